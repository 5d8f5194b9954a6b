"""Whoever may read one file of an output may read all of them: a run that is shared in a group is shared as a whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.cli import main
from most_ray.config import config_from
from most_ray.io.outputs import open_to_readers, replacing, replacing_folder
from most_ray.train.run import train
from tests.support.audio import tones


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong(folder: Path, umask: int) -> dict[str, str]:
    """What is below a folder with other rights than the umask leaves to it, with them."""
    found = {}
    for path in folder.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        if (mode := stat.S_IMODE(path.lstat().st_mode)) != wanted:
            found[path.relative_to(folder).as_posix()] = oct(mode)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct, indirect=True)
def test_every_file_that_commands_write_has_the_rights_of_its_neighbours(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tones(tmp_path / "recordings", count=12)
    for path in (tmp_path / "recordings").iterdir():
        path.chmod(0o600)
    units = ["prepare", "units", "--corpus", "folder", "--input", "recordings", "--features", "mfcc"]
    assert main([*units, "--output", "out/asr", "--fit_kmeans", "12"]) == 0
    assert main(["prepare", "vocoder", "--corpus", "folder", "--input", "recordings", "--records", "out/asr"]) == 0
    assert main(["prepare", "tts", "--input_dir", "out/asr", "--output_dir", "out/tts", "--dataset_name", "tones"]) == 0
    data = {"train_asr_dirs": ["out/asr"], "train_tts_dirs": ["out/tts"], "val_asr_dirs": ["out/asr"], "max_new_tokens": 4}
    sizes = {"max_steps": 2, "save_steps": 1, "global_batch_size": 4, "max_seq_length": 256, "use_gpu": False, "threads_per_worker": 1}
    assert train(config_from({"output_dir": "out", "name": "r", "trace_records": "out/t", "tensorboard": True, **data, **sizes}))
    last = "out/r/checkpoints/step-000000002"
    assert main(["export", "--checkpoint", last, "--output", "out/export"]) == 0
    assert main(["init-model", "--preset", "tiny", "--records", "out/asr", "--output", "out/init"]) == 0
    assert main(["report", "out/r", "out/r", "--output", "out/report.html"]) == 0
    assert main(["evaluate", "--model", last, "--asr_dirs", "out/asr", "--max_new_tokens", "4", "--output", "out/e.json"]) == 0
    assert main(["transcribe", "--model", last, *map(str, sorted(Path("recordings").glob("*.flac"))), "--output", "out/said.jsonl"]) == 0
    assert (tmp_path / "out" / "r" / "export" / "speech" / "vocoder.safetensors").exists()
    assert wrong(tmp_path / "out", umask) == {}


def test_what_a_library_makes_for_this_user_alone_is_made_an_output(tmp_path: Path, umask: int) -> None:
    with replacing("output", tmp_path / "a.wav") as temporary:
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    with replacing_folder("output", tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(mode=0o700, parents=True)
        os.close(os.open(temporary / "inner" / "b", os.O_CREAT | os.O_WRONLY, 0o600))
        (temporary / "link").symlink_to("inner/b")
    (tmp_path / "folder" / "link").unlink()
    assert wrong(tmp_path, umask) == {}


def test_rights_that_somebody_has_given_stay(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script").touch()
    (tmp_path / "folder" / "script").chmod(0o750)
    open_to_readers(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "folder" / "script").stat().st_mode) == 0o750
