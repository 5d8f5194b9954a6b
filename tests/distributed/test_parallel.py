"""Expert and data parallelism against a single process, on gloo, without Ray (promises 12-16).

Each group of ranks is started once for all its layouts: starting processes costs more than the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.train import checkpoint
from tests.support.builders import asr, make_plan, make_store, text, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import full_weights, kind_of, loss_of, make, save_to, steps, trajectory

LAYOUTS = {2: [(1, 2, 1), (2, 1, 1), (1, 2, 2)], 4: [(2, 2, 1), (1, 4, 2), (2, 2, 2), (1, 4, 4)]}
STEPS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip": 0.1},
    "accumulated": {"max_rows": 1},
    "weighted": {"asr_weight": 7.0},
}


@dataclass(frozen=True)
class Setting:
    model_dir: str
    spec: PlanSpec
    apart: PlanSpec
    only_text: PlanSpec
    folder: str


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("parallel")
    tiny_model().save_pretrained(root / "model")
    plan = make_plan(root / "data", batch=11)
    one = make_store(root / "apart", "speech", [asr(i, 90, "x") for i in range(8)])
    two = make_store(root / "apart", "text", [{**text(i), "input": "y" * 127, "output": "x"} for i in range(8)], "text")
    # A pack is one record, all are equally long and kinds alternate: one rank of two holds only text, the other only speech.
    apart = PlanSpec((one.place, two.place), (1, 1), 0, 4, 200)
    only_text = PlanSpec((two.place,), (1,), 0, 4, 200)
    return Setting(str(root / "model"), plan.spec, apart, only_text, str(root))


def every_layout(setting: Setting, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for topology in LAYOUTS.get(world, [(1, 1, 1)]):
        for variant, keywords in VARIANTS.items():
            found[topology, variant] = trajectory(setting.model_dir, setting.spec, topology, STEPS, dict(keywords))
        found[topology, "apart"] = trajectory(setting.model_dir, setting.apart, topology, STEPS, {"max_rows": 1})
        found[topology, "only_text"] = trajectory(setting.model_dir, setting.only_text, topology, STEPS, {})
        options = {"options": {"gradient_checkpointing": True}}
        found[topology, "recomputed"] = trajectory(setting.model_dir, setting.spec, topology, 2, options)
    return found


@pytest.fixture(scope="module")
def single(setting: Setting) -> dict[str, Any]:
    return {variant: value for (_, variant), value in every_layout(setting, 1).items()}


@pytest.fixture(scope="module")
def parallel(setting: Setting) -> dict[Any, Any]:
    return {key: value for world in LAYOUTS for key, value in run_ranks(world, every_layout, setting, world)[0].items()}


CASES = [
    (topology, variant)
    for layouts in LAYOUTS.values()
    for topology in layouts
    for variant in (*VARIANTS, "apart", "only_text", "recomputed")
]


@pytest.mark.parametrize(("topology", "variant"), CASES)
def test_gradients_and_losses_are_those_of_one_process(
    single: dict[str, Any], parallel: dict[Any, Any], topology: tuple[int, int, int], variant: str
) -> None:
    expected, found = single[variant], parallel[topology, variant]
    worst = {"dense": 0.0, "router": 0.0, "expert": 0.0}
    for name, gradient in expected["gradients"].items():
        worst[kind_of(name)] = max(worst[kind_of(name)], float((found["gradients"][name] - gradient).abs().max()))
    assert max(worst.values()) < 1e-5, worst
    assert float(sum(g.abs().sum() for n, g in expected["gradients"].items() if kind_of(n) == "router")) > 0
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["aux"] == pytest.approx(expected["aux"], abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found["loads"], expected["loads"], strict=True))


def test_the_ranks_were_really_apart(setting: Setting, single: dict[str, Any]) -> None:
    """In `apart` one rank of two sees only text; in `only_text` the experts of speech, half of the ranks', get no token."""
    from most_ray.data.batch import rank_batch
    from tests.unit.test_plan import LAYOUT

    plan = open_plan(setting.apart)
    kinds = [{int(task) for task in rank_batch(plan, 1, rank, 2, 1, LAYOUT).task.flatten() if task >= 0} for rank in (0, 1)]
    assert sorted(map(list, kinds)) == [[0], [2]]
    assert all(int(load[:, :, 4:].sum()) == 0 and int(load[:, :, :4].sum()) > 0 for load in single["only_text"]["loads"])


def train_and_save(setting: Setting, topology: tuple[int, int, int]) -> dict[str, Any]:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, topology)
    steps(state, plan, 3)
    save_to(Path(setting.folder) / "checkpoint", state, plan)
    weights = full_weights(state)
    return {"weights": weights, "losses": [loss_of(r) for r in steps(state, plan, 3)]}


def restore_and_train(setting: Setting, topologies: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    plan = open_plan(setting.spec)
    found = []
    for topology in topologies:
        state = make(setting.model_dir, topology)
        checkpoint.load(Path(setting.folder) / "checkpoint", state)
        weights = full_weights(state)
        found.append({"weights": weights, "losses": [loss_of(r) for r in steps(state, plan, 3)]})
    return found


def test_a_checkpoint_moves_to_any_layout(setting: Setting) -> None:
    """Promise 16: saved at 4 ranks with experts split both ways, read at 1, 2 and 4 ranks; weights equal to the bit, optimizer too,
    so that the next losses are the same."""
    saved = run_ranks(4, train_and_save, setting, (1, 4, 2))[0]
    found = restore_and_train(setting, [(1, 1, 1)])
    found += run_ranks(2, restore_and_train, setting, [(1, 2, 1), (1, 2, 2)])[0]
    found += run_ranks(4, restore_and_train, setting, [(1, 4, 4), (2, 2, 2)])[0]
    assert len(found) == 5
    for other in found:
        assert all(torch.equal(other["weights"][name], weight) for name, weight in saved["weights"].items())
        assert other["losses"] == pytest.approx(saved["losses"], abs=1e-5)


def hang(rank_that_hangs: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() != rank_that_hangs:
        dist.barrier()
    else:
        import threading

        threading.Event().wait()


def fail() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_the_harness_shows_failures_and_hangs() -> None:
    with pytest.raises(AssertionError, match="rank 1 has had enough"):
        run_ranks(2, fail)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not end within 12 s"):
        run_ranks(2, hang, 1, deadline=12.0)
