from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from most_ray.checkpoint import catalog, reader
from most_ray.errors import CheckpointError
from tests.support.checkpoints import save, saved_at, small, weight_in


def test_a_folder_without_its_marker_is_no_checkpoint(tmp_path: Path) -> None:
    uris = saved_at(tmp_path, 1, 2, 3)
    assert catalog.committed(str(tmp_path)) == uris
    assert [catalog.step_of(uri) for uri in uris] == [1, 2, 3]
    (Path(uris[2]) / catalog.COMMIT).unlink()
    assert catalog.committed(str(tmp_path)) == uris[:2]
    with pytest.raises(CheckpointError, match="never completed"):
        reader.load(uris[2], small())
    assert catalog.latest_valid(str(tmp_path)) == (uris[1], [])
    assert catalog.prune(str(tmp_path), 1) == [1]
    assert catalog.committed(str(tmp_path)) == uris[1:2]
    assert Path(uris[2]).exists(), "a checkpoint under way is newer than all complete ones"
    saved_at(tmp_path, 3)  # a dead attempt's folder is written again
    assert weight_in(catalog.committed(str(tmp_path))[-1]) == 3.0
    with pytest.raises(CheckpointError, match="is not named step-NNNNNNNNN"):
        catalog.step_of(str(tmp_path))


def test_what_a_dead_attempt_left_is_no_part_of_the_next_one(tmp_path: Path) -> None:
    uri = Path(catalog.step_uri(str(tmp_path), 1))
    uri.mkdir()
    (uri / "rank-00007.safetensors").write_bytes(b"of a larger group")
    saved_at(tmp_path, 1)
    assert sorted(catalog.read_marker(str(uri))["files"]) == ["rank-00000.safetensors", "state.json"]
    assert weight_in(uri) == 1.0


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = saved_at(tmp_path, 1, 2)

    def cut_off(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        catalog.prune(str(tmp_path), 1)
    assert catalog.committed(str(tmp_path)) == uris[1:]


def test_the_best_and_the_evaluated_are_kept(tmp_path: Path) -> None:
    saved_at(tmp_path, 1, 2, 3, 4, 5, 6)
    (tmp_path / "step-000000002" / catalog.COMMIT).unlink()  # what a dead attempt left
    (tmp_path / "step-other").mkdir()
    assert catalog.prune(str(tmp_path), 1, 1, {1: 0.5, 3: 0.1, 4: 0.2}, {4}) == [1, 5]
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4", "6", "r"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def garbage(path: Path) -> None:
    path.write_bytes(b'{"step": 3, "fi')


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (cut, "rank-00000.safetensors", "rank-00000.safetensors has [0-9,]+ bytes, not"),
        (flip, "rank-00000.safetensors", "rank-00000.safetensors has other content than was written"),
        (flip, "state.json", "state.json has other content"),
        (Path.unlink, "rank-00000.safetensors", "rank-00000.safetensors is missing"),
        (Path.unlink, "state.json", "state.json is missing"),
        (cut, "commit.json", "commit.json is cut off or garbage"),
        (garbage, "commit.json", "commit.json is cut off or garbage"),
        (lambda path: path.write_bytes(b""), "commit.json", "commit.json is cut off or garbage"),
        (lambda path: path.write_text("[]"), "commit.json", "commit.json is cut off or garbage"),
        (lambda path: path.write_text('{"format": 2, "step": 3, "files": {"a": 1}}'), "commit.json", "commit.json is cut off or garbage"),
    ],
)
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, damage: Callable[[Path], None], file: str, message: str
) -> None:
    """It is skipped, and its step may be saved again once it is invalidated."""
    uris = saved_at(tmp_path, 1, 2)
    assert [catalog.find_corruption(uri, deep=True) for uri in uris] == [None, None]
    damage(Path(uris[1]) / file)
    uri, ((corrupt, reason),) = catalog.latest_valid(str(tmp_path))
    assert uri == uris[0] and corrupt == uris[1] and pytest.approx(weight_in(uri)) == 1.0
    assert re.match(message, reason), reason
    catalog.invalidate(uris[1])
    assert catalog.committed(str(tmp_path)) == uris[:1]
    saved_at(tmp_path, 2)
    assert catalog.latest_valid(str(tmp_path)) == (uris[1], [])


def test_only_the_asked_share_is_hashed(tmp_path: Path) -> None:
    (uri,) = saved_at(tmp_path, 1)
    flip(Path(uri) / "rank-00000.safetensors")  # the first of two files
    assert catalog.find_corruption(uri) is None
    assert catalog.find_corruption(uri, 0, 2, deep=True) and catalog.find_corruption(uri, 1, 2, deep=True) is None
    assert catalog.latest_valid(str(tmp_path), deep_bytes=1000) == (uri, [])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for damage in (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), garbage, Path.unlink):
        (uri,) = saved_at(tmp_path, 1)
        damage(Path(uri) / "rank-00000.safetensors")
        with pytest.raises(CheckpointError, match=r"damaged file \(.*rank-00000.safetensors.*Delete it to resume from an older one"):
            reader.load(uri, small())
        shutil.rmtree(uri)
    (uri,) = saved_at(tmp_path, 1)
    garbage(Path(uri) / "commit.json")
    with pytest.raises(CheckpointError, match=r"commit\.json is cut off"):
        reader.read_state(uri)


def test_tensors_that_are_missing_since_the_save_are_told(tmp_path: Path) -> None:
    save(tmp_path / "c", small())
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps({**state, "n_tensors": 3}))
    with pytest.raises(CheckpointError, match="2 of 3 model tensors"):
        reader.load(tmp_path / "c", small())


def test_a_run_without_an_intact_checkpoint_does_not_begin_anew(tmp_path: Path) -> None:
    uris = saved_at(tmp_path, 1, 2)
    for uri in uris:
        (Path(uri) / catalog.COMMIT).write_text("{")
    intact, corrupt = catalog.latest_valid(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"step-000000002.*is damaged \(commit.json.*so are all 2 of the run"):
        catalog.require_valid(intact, corrupt)
    catalog.require_valid(None, [])
    catalog.require_valid(uris[0], [(uris[1], "x")])


# Files that are the ones that were written, and hold something else than they must


def rewrite(uri: str, name: str, data: bytes) -> None:
    """Put another content into a file, and its size and hash into commit.json."""
    (Path(uri) / name).write_bytes(data)
    marker = json.loads((Path(uri) / "commit.json").read_text())
    marker["files"][name] = [len(data), catalog.hash_file(Path(uri) / name)]
    (Path(uri) / "commit.json").write_text(json.dumps(marker))


def with_state(**changes: Any) -> Callable[[str], None]:
    return lambda uri: rewrite(uri, "state.json", json.dumps({**json.loads((Path(uri) / "state.json").read_text()), **changes}).encode())


def with_marker(**changes: Any) -> Callable[[str], None]:
    def change(uri: str) -> None:
        path = Path(uri) / "commit.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_header(**changes: Any) -> Callable[[str], None]:
    """Changes in the first tensor's entry of the rank's file."""

    def change(uri: str) -> None:
        data = (Path(uri) / "rank-00000.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header[next(key for key in header if key != "__metadata__")].update(changes)
        text = json.dumps(header).encode()
        rewrite(uri, "rank-00000.safetensors", len(text).to_bytes(8, "little") + text + data[8 + size :])

    return change


DEEP = b"[" * 100_000 + b"]" * 100_000
STRANGE: dict[str, Callable[[str], None]] = {
    "a deep commit.json": lambda uri: (Path(uri) / "commit.json").write_bytes(DEEP) and None,
    "a format of text": with_marker(format="2"),
    "a format of truth": with_marker(format=True),
    "a step of text": with_marker(step="2"),
    "no files": with_marker(files={}),
    "files of a list": with_marker(files=["state.json"]),
    "a negative size": with_marker(files={"state.json": [-1, "x"]}),
    "files elsewhere": with_marker(files={"../../x": [1, "x"]}),
    "a deep state.json": lambda uri: rewrite(uri, "state.json", DEEP),
    "a state.json of digits": lambda uri: rewrite(uri, "state.json", b'{"format": ' + b"2" * 5000 + b"}"),
    "a state.json of a list": lambda uri: rewrite(uri, "state.json", b"[]"),
    "the state of another step": with_state(step=1),
    "a number of steps that is text": with_state(step="two"),
    "a schedule of text": with_state(scheduler={"last_epoch": "x"}),
    "a scale of more": with_state(loss_scale={"scale": float("nan")}),
    "tensors of text": with_state(n_tensors="2"),
    "a cursor of nothing": with_state(cursor={}),
    "ingredients of a list": with_state(ingredients=[]),
    "a meter of texts": with_state(meter={"sums": {"aux": "x"}}),
    "a type nobody knows": with_header(dtype="F7"),
    "a shape of text": with_header(shape="40"),
    "a negative shape": with_header(shape=[-1, 40]),
    "a shape of more numbers": with_header(shape=[1, 1, 1]),
    "a part beyond the tensor": with_header(shape=[1 << 40, 40]),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_checkpoint_of_strange_content_is_skipped(tmp_path: Path, case: str) -> None:
    """It ended the run, by whatever error its first reader had for it."""
    uris = saved_at(tmp_path, 1, 2)
    STRANGE[case](uris[1])
    uri, ((corrupt, reason),) = catalog.latest_valid(str(tmp_path))
    assert (uri, corrupt) == (uris[0], uris[1]) and "\n" not in reason and len(reason) < 300
    with pytest.raises(CheckpointError, match="has a damaged file"):
        reader.load(uris[1], small())
    assert weight_in(uris[0]) == 1.0


def test_another_format_is_no_damage(tmp_path: Path) -> None:
    """A newer version's checkpoint must not be skipped, and its run so continued from an older one."""
    uris = saved_at(tmp_path, 1, 2)
    with_marker(format=3)(uris[1])
    with pytest.raises(CheckpointError, match="has format 3, not 2"):
        catalog.latest_valid(str(tmp_path))
