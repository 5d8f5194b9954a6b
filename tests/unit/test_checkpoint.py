from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from most_ray.data.plan import Plan
from most_ray.errors import CheckpointError
from most_ray.train import checkpoint
from tests.support.builders import tiny_model
from tests.support.training import full_weights, loss_of, make, save_to, steps


@pytest.mark.parametrize("options", [{}, {"fp16": True}])
def test_what_follows_a_restore_is_what_would_have_followed(model_dir: str, plan: Plan, tmp_path: Path, options: dict[str, bool]) -> None:
    """Bit for bit, twice in a row, over an epoch's boundary (promises 1, 37)."""
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
        content = checkpoint.load(tmp_path / f"step-{state.step}", again)
        assert content["cursor"]["step"] == again.step == state.step
        state = again
        results += steps(state, plan, stop - state.step, dtype=dtype)
    assert [loss_of(r) for r in results] == [loss_of(r) for r in expected]
    assert [r.learning_rate for r in results] == [r.learning_rate for r in expected]
    for name, weight in full_weights(straight).items():
        assert torch.equal(weight, full_weights(state)[name]), name


def test_random_state_comes_back(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    state = make(model_dir)
    save_to(tmp_path / "c", state, plan)
    expected = torch.rand(3)
    torch.manual_seed(1)
    checkpoint.load(tmp_path / "c", make(model_dir))
    assert torch.equal(torch.rand(3), expected)


def test_weights_alone(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    """ignore_optimizer_state: a new run from the weights."""
    state = make(model_dir)
    steps(state, plan, 3)
    save_to(tmp_path / "c", state, plan)
    fresh = make(model_dir)
    checkpoint.load(tmp_path / "c", fresh, with_optimizer=False)
    assert fresh.step == 0 and fresh.scheduler.get_last_lr()[0] == 0.0
    assert all(float(v["exp_avg"].abs().sum()) == 0.0 for v in fresh.optimizer.state.values())
    assert all(torch.equal(w, full_weights(state)[n]) for n, w in full_weights(fresh).items())


def test_a_folder_without_its_marker_is_no_checkpoint(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    state = make(model_dir)
    for step in (1, 2, 3):
        steps(state, plan, 1)
        save_to(checkpoint.step_dir(tmp_path, step), state, plan)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-000000001", "step-000000002", "step-000000003"]
    (checkpoint.step_dir(tmp_path, 3) / checkpoint.COMMIT).unlink()
    assert checkpoint.committed(tmp_path)[-1].name == "step-000000002"
    with pytest.raises(CheckpointError, match="never completed"):
        checkpoint.load(checkpoint.step_dir(tmp_path, 3), state)
    checkpoint.keep_last(tmp_path, 1)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-000000002"]
    save_to(checkpoint.step_dir(tmp_path, 3), state, plan)  # a dead attempt's folder is written anew
    assert checkpoint.committed(tmp_path)[-1].name == "step-000000003"


def test_an_attempt_that_was_replaced_cannot_commit(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    state = make(model_dir)
    with pytest.raises(CheckpointError, match="replaced by a newer one"):
        checkpoint.save(tmp_path / "c", state, plan.cursor(0), {}, lambda: False, lambda _: None)
    assert not (tmp_path / "c" / checkpoint.COMMIT).exists()


def test_a_replaced_attempt_leaves_the_newer_ones_checkpoint_alone(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    state = make(model_dir)
    save_to(tmp_path / "c", state, plan)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    for may_commit in (lambda: False, lambda: True):
        with pytest.raises(CheckpointError, match="replaced by a newer one"):
            checkpoint.save(tmp_path / "c", state, plan.cursor(0), {}, may_commit, lambda _: None)
        assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_float16_after_float32_begins_with_a_fresh_scale(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    state = make(model_dir, fp16=True)
    checkpoint.load(tmp_path / "c", state)
    assert state.loss_scale.enabled and state.loss_scale.scale == 2.0**16


def test_a_damaged_file_is_named(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    shard = next((tmp_path / "c").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "c", make(model_dir))


def test_nothing_is_pickled(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert all(name.endswith((".safetensors", ".json")) for name in names), names


def test_a_checkpoint_of_another_model_or_format_is_refused(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    save_to(tmp_path / "c", make(model_dir), plan)
    for changes, message in (
        ({"n_routed_experts": 4}, "in shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"num_hidden_layers": 2}, "unknown"),
    ):
        other = tmp_path / message.split()[-1]
        tiny_model(**changes, **({"text_expert_indices": None} if "n_routed_experts" in changes else {})).save_pretrained(other)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / "c", make(str(other)))
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    (tmp_path / "c" / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read_state(tmp_path / "c")
