from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from most_ray.checkpoint import catalog, reader
from most_ray.checkpoint.export import export_checkpoint
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.data.plan import Plan
from most_ray.errors import CheckpointError
from most_ray.io import storage
from tests.support.builders import tiny_model
from tests.support.checkpoints import copy_tokenizer, save, small, weight_in
from tests.support.training import full_weights, loss_of, make, save_to, steps


@pytest.mark.parametrize("options", [{}, {"fp16": True}])
def test_what_follows_a_restore_is_what_would_have_followed(model_dir: str, plan: Plan, tmp_path: Path, options: dict[str, bool]) -> None:
    """Bit for bit, twice in a row, over an epoch's boundary (promises 1, 37 of docs/promises.md)."""
    dtype = torch.float16 if options else None
    straight = make(model_dir, **options)
    expected = steps(straight, plan, 9, dtype=dtype)
    assert plan.cursor(9).epoch > 1.0 > plan.cursor(4).epoch
    state = make(model_dir, **options)
    results = steps(state, plan, 4, dtype=dtype)
    for stop in (7, 9):
        save_to(tmp_path / f"step-{state.step}", state, plan)
        torch.manual_seed(99)
        again = make(model_dir, **options)
        content = reader.load(tmp_path / f"step-{state.step}", again)
        assert content["cursor"]["step"] == again.step == state.step
        state = again
        results += steps(state, plan, stop - state.step, dtype=dtype)
    assert [loss_of(r) for r in results] == [loss_of(r) for r in expected]
    assert [r.learning_rate for r in results] == [r.learning_rate for r in expected]
    for name, weight in full_weights(straight).items():
        assert torch.equal(weight, full_weights(state)[name]), name


def test_random_state_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "c", small())
    expected = torch.rand(3)
    torch.manual_seed(1)
    reader.load(tmp_path / "c", small())
    assert torch.equal(torch.rand(3), expected)


def test_buffers_come_back_where_they_are_stored(tmp_path: Path) -> None:
    state = small()
    state.buffers["load"] = torch.arange(6).view(2, 3)
    state.skipped_in_row = 2
    save(tmp_path / "c", state)
    again = small()
    again.buffers.update(load=torch.zeros(2, 3, dtype=torch.int64), newer=torch.full((2,), 7))
    reader.load(tmp_path / "c", again)
    assert torch.equal(again.buffers["load"], torch.arange(6).view(2, 3)) and again.buffers["newer"].tolist() == [7, 7]
    assert again.skipped_in_row == 2
    again.buffers["load"] = torch.zeros(3, 3, dtype=torch.int64)
    with pytest.raises(CheckpointError, match=r"holds state.load in shape \(2, 3\)"):
        reader.load(tmp_path / "c", again)


def test_weights_alone(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    """ignore_optimizer_state: a new run from the weights."""
    state = make(model_dir)
    steps(state, plan, 3)
    save_to(tmp_path / "c", state, plan)
    fresh = make(model_dir)
    reader.load(tmp_path / "c", fresh, with_optimizer=False)
    assert fresh.step == 0 and fresh.scheduler.get_last_lr()[0] == 0.0
    assert all(float(v["exp_avg"].abs().sum()) == 0.0 for v in fresh.optimizer.state.values())
    assert all(torch.equal(w, full_weights(state)[n]) for n, w in full_weights(fresh).items())


def test_state_says_what_wrote_it(tmp_path: Path) -> None:
    state = small()
    made = CheckpointWriter(background=False)
    made.save(str(tmp_path / "c"), state, {"template": "abc"}, lambda _: None, lambda: True)
    content = reader.read_state(tmp_path / "c")
    assert content["template"] == "abc" and content["n_tensors"] == 2
    assert content["tensor_bytes"] == 4 * (3 * (40 * 60 + 60) + 2)
    assert content["versions"].keys() == {"most_ray", "torch", "transformers", "python"}
    assert content["versions"]["torch"] == torch.__version__
    assert content["ranks"] == {"world_size": 1, "meshes": []}


def test_float16_after_float32_begins_with_a_fresh_scale(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    state = make(model_dir, fp16=True)
    reader.load(tmp_path / "c", state)
    assert state.loss_scale.enabled and state.loss_scale.scale == 2.0**16


def test_nothing_is_pickled(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["commit.json", "rank-00000.safetensors", "state.json"]
    assert all(json.loads((tmp_path / "c" / name).read_text()) for name in names if name.endswith(".json"))


def test_a_checkpoint_of_another_model_or_format_is_refused(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    uri = tmp_path / "step-000000000"
    save_to(uri, make(model_dir), plan)
    for changes, message in (
        ({"n_routed_experts": 4}, "in shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unknown"),
    ):
        other = tmp_path / message.split()[-1]
        tiny_model(**changes, **({"text_expert_indices": None} if "n_routed_experts" in changes else {})).save_pretrained(other)
        with pytest.raises(CheckpointError, match=message):
            reader.load(uri, make(str(other)))
    marker = json.loads((uri / catalog.COMMIT).read_text())
    for number, content in ((99, {**marker, "format": 99}), (1, {"step": 0})):  # as the version before wrote it
        (uri / catalog.COMMIT).write_text(json.dumps(content))
        for read in (lambda: reader.read_state(uri), lambda: catalog.latest_valid(str(tmp_path))):
            with pytest.raises(CheckpointError, match=f"format {number}, not 2"):
                read()


@pytest.fixture
def bucket(s3: str) -> str:
    return f"{s3}/run/checkpoints"


def test_checkpoints_behind_a_uri(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploaded, listed, checked, read, pruned; scratch is left empty."""
    assert catalog.committed(bucket) == [] and catalog.latest_valid(bucket) == (None, [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = CheckpointWriter()
    for step in (1, 2, 3):
        state = small(float(step))
        state.step = step
        files = lambda folder: (folder / "tokenizer.json").write_text("{}") and None  # noqa: E731
        made.save(catalog.step_uri(bucket, step), state, {}, files, lambda: True)
    made.wait()
    assert [(saved.step, saved.uri) for saved in made.poll()] == [(step, catalog.step_uri(bucket, step)) for step in (1, 2, 3)]
    made.close()
    uris = catalog.committed(bucket)
    assert [catalog.step_of(uri) for uri in uris] == [1, 2, 3] and all(uri.startswith("s3://") for uri in uris)
    state = small(-1.0)
    assert reader.load(uris[1], state)["step"] == state.step == 2
    assert weight_in(uris[1]) == 2.0
    storage.write_bytes(storage.join(uris[2], "tokenizer.json"), b"[]")
    assert catalog.latest_valid(bucket) == (
        uris[1],
        [(uris[2], "tokenizer.json has other content than was written (its hash differs)")],
    )
    storage.write_bytes(storage.join(uris[2], "tokenizer.json"), b"[1]")
    assert "tokenizer.json has 3 bytes, not 2" in str(catalog.find_corruption(uris[2]))
    catalog.invalidate(uris[0])
    assert catalog.prune(bucket, 1) == [2]
    assert catalog.committed(bucket) == uris[2:]
    assert {entry.name.split("/")[0] for entry in storage.list_files(bucket, ("",))} == {"step-000000003"}
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_behind_a_uri_is_exported(bucket: str, model_dir: str, plan: Plan, tmp_path: Path) -> None:
    state = make(model_dir)
    steps(state, plan, 1)

    def files(folder: Path) -> None:
        copy_tokenizer(folder)
        shutil.copy(Path(model_dir) / "config.json", folder)

    for number, uri in enumerate((bucket + "/step-000000001", str(tmp_path / "step-000000001"))):
        save(uri, state, files)
        export_checkpoint(uri, tmp_path / f"export-{number}")
    one, two = (load_file(path / "model.safetensors") for path in sorted(tmp_path.glob("export-*")))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(".experts.7.down_proj.weight" in name for name in one)
