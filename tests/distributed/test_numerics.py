"""float16, skipped steps, replica checks and repeatability over several ranks, on gloo, without Ray (promise 15 of docs/promises.md)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from most_ray.config import config_from
from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.distributed.determinism import set_deterministic
from most_ray.optim.train_state import TrainState
from most_ray.train.loop import train
from most_ray.train.replicas import ReplicaError, check_replicas
from most_ray.train.step import TrainingDivergedError
from tests.support.builders import make_plan, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import CPU, batch_of, full_weights, loss_of, make, steps

Topology = tuple[int, int, int]


@dataclass(frozen=True)
class Setting:
    model_dir: str
    spec: PlanSpec


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("numerics")
    tiny_model().save_pretrained(root / "model")
    return Setting(str(root / "model"), make_plan(root / "data", batch=11).spec)


def world_of(topology: Topology) -> int:
    return topology[0] * topology[1]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def everything(state: TrainState) -> list[torch.Tensor]:
    """Copies of this rank's weights and moments."""
    tensors = [local(p).clone() for p in state.model.parameters()]
    return tensors + [local(value).clone() for p in state.model.parameters() for _, value in sorted(state.optimizer.state[p].items())]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def spoilt(state: TrainState, rank: int, by: float, with_gradient: bool) -> Iterator[None]:
    """One rank's losses are not finite; its gradients are, or are not either."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        if dist.get_rank() == rank:
            output.token_losses = output.token_losses * by if with_gradient else output.token_losses + by
        return output

    handle = state.model.register_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def warnings_logged() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    target = logging.getLogger("most_ray.train.step")
    target.addHandler(handler)
    yield lines
    target.removeHandler(handler)


def half_precision(setting: Setting, topology: Topology, dtype: torch.dtype) -> dict[str, Any]:
    plan, scaled = open_plan(setting.spec), dtype is torch.float16
    exact = [loss_of(r) for r in steps(make(setting.model_dir, topology), plan, 3)]
    state = make(setting.model_dir, topology, fp16=scaled)
    results = steps(state, plan, 3, dtype=dtype)
    found = {"exact": exact, "losses": [loss_of(r) for r in results], "skipped": [r.skipped for r in results]}
    if scaled:
        state.loss_scale.scale = 2.0**40
        before = everything(state)
        overflow = steps(state, plan, 1, dtype=dtype)[0]
        found |= {"overflow": overflow.skipped, "kept": same(before, everything(state)), "scale": state.loss_scale.scale}
        check_replicas(state)
        state.loss_scale.scale = 2.0**16
        found["after"] = steps(state, plan, 1, dtype=dtype)[0].skipped
    found["changed"] = not same(everything(state), everything(make(setting.model_dir, topology)))
    return found


@pytest.mark.parametrize("topology", [(1, 2, 2), (2, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_over_ranks(setting: Setting, topology: Topology, dtype: torch.dtype) -> None:
    """Near float32: within three times the type's spacing at the loss's size, as in one process. An overflow is skipped by all."""
    ranks = run_ranks(world_of(topology), half_precision, setting, topology, dtype)
    for found in ranks:
        assert found["losses"] == pytest.approx(found["exact"], abs=3 * torch.finfo(dtype).eps * max(found["exact"]))
        assert found["losses"] == ranks[0]["losses"] and found["losses"] != found["exact"]
        assert not any(found["skipped"]) and found["changed"]
        if dtype is torch.float16:
            assert found["overflow"] and found["kept"] and found["scale"] == 2.0**39 and not found["after"]


def skip_a_step(setting: Setting, topology: Topology, by: float, with_gradient: bool) -> dict[str, Any]:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, topology)
    steps(state, plan, 2)
    before, rates = everything(state), state.scheduler.get_last_lr()
    with spoilt(state, world_of(topology) - 1, by, with_gradient), warnings_logged() as lines:
        result = steps(state, plan, 1)[0]
    kept = same(before, everything(state))
    after = steps(state, plan, 1)[0]
    return {
        "skipped": result.skipped,
        "norm": result.grad_norm,
        "kept": kept,
        "moved_on": state.step == 4 and state.scheduler.get_last_lr() != rates and state.skipped_in_row == 0,
        "after": (after.skipped, loss_of(after)),
        "lines": lines,
    }


@pytest.mark.parametrize(("by", "with_gradient"), [(math.inf, False), (math.nan, True)])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(setting: Setting, by: float, with_gradient: bool) -> None:
    """Also where only the loss is infinite and every gradient finite. The warning names the step and all ranks' records."""
    ranks = run_ranks(2, skip_a_step, setting, (1, 2, 2), by, with_gradient)
    ids = open_plan(setting.spec).record_ids(open_plan(setting.spec).step(3))
    for found in ranks:
        assert found["skipped"] and found["kept"] and found["moved_on"]
        assert math.isfinite(found["norm"]) != with_gradient
        assert found["after"] == ranks[0]["after"] and not found["after"][0] and math.isfinite(found["after"][1])
    assert [len(found["lines"]) for found in ranks] == [1, 0]
    assert "step 3 skipped: loss = " in ranks[0]["lines"][0] and all(record in ranks[0]["lines"][0] for record in ids)


class Silent:
    def trained(self, batch: object) -> None: ...
    def log(self, line: object) -> None: ...


def diverge(setting: Setting, topology: Topology) -> str:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, topology)
    config = config_from({"max_skipped_steps": 3, "check_replicas_steps": 0, "load_alert": 0})
    with spoilt(state, 1, math.nan, True), pytest.raises(TrainingDivergedError) as error:
        train(state, (batch_of(plan, step) for step in range(1, 10)), config, 9, CPU, Silent(), lambda *_: 0.0)  # type: ignore[arg-type]
    return str(error.value)


def test_a_run_that_stays_non_finite_ends_on_every_rank(setting: Setting) -> None:
    messages = run_ranks(2, diverge, setting, (1, 2, 1))
    plan = open_plan(setting.spec)
    assert messages[0] == messages[1] and "step 3 is the last of 3 skipped in a row" in messages[0]
    assert all(record in messages[0] for record in plan.record_ids(plan.step(3)))


def flip_a_bit(tensor: torch.Tensor, uri: int = 0) -> None:
    words = tensor.view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int64)
    words[uri] = words[uri] ^ 1


def drift(setting: Setting, topology: Topology) -> dict[str, str | None]:
    """What the check says after one bit was changed on the last rank, and was changed back."""
    state = make(setting.model_dir, topology)
    state.buffers["extra"] = torch.arange(5)
    steps(state, open_plan(setting.spec), 2)
    tensors = {name: local(p) for name, p in state.model.named_parameters()} | dict(state.model.named_buffers()) | state.buffers
    wanted = ("layers.1.mlp.gate.weight", "layers.2.mlp.experts.down_proj", "lm_head.weight", "inv_freq", "extra")
    found: dict[str, str | None] = {"": said_by_the_check(state)}
    for name, tensor in tensors.items():
        if name.endswith(wanted):
            last = dist.get_rank() == dist.get_world_size() - 1
            if last:
                flip_a_bit(tensor, tensor.numel() - 1)
            found[name] = said_by_the_check(state)
            if last:
                flip_a_bit(tensor, tensor.numel() - 1)
    return found


def said_by_the_check(state: TrainState) -> str | None:
    try:
        check_replicas(state)
    except ReplicaError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("topology", "holders"), [((2, 1, 1), "ranks [0] and ranks [1]"), ((2, 2, 2), "ranks [1] and ranks [3]")])
def test_one_changed_bit_is_found(setting: Setting, topology: Topology, holders: str) -> None:
    """Promise 15 of docs/promises.md. Equal replicas pass; the message names the tensor and the ranks, alike on every rank."""
    ranks = run_ranks(world_of(topology), drift, setting, topology)
    assert all(found == ranks[0] for found in ranks)
    assert len(ranks[0]) == 7
    for name, message in ranks[0].items():
        if not name:
            assert message is None
        elif world_of(topology) == 4 and name.endswith(("inv_freq", "extra")):
            assert message is not None and message.startswith(f"{name}: ") and "ranks [0, 1, 2] and ranks [3]" in message
        else:
            assert message is not None and message.startswith(f"{name}: ") and holders in message and "after step 2" in message


def drift_in_the_loop(setting: Setting) -> tuple[str, int]:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, (2, 1, 1))

    def at_step(state: TrainState, last: bool) -> float:
        if state.step == 3 and dist.get_rank() == 1:
            flip_a_bit(local(state.model.get_parameter("model.layers.1.mlp.gate.weight")))
        return 0.0

    config = config_from({"check_replicas_steps": 2, "load_alert": 0})
    with pytest.raises(ReplicaError) as error:
        train(state, (batch_of(plan, step) for step in range(1, 10)), config, 9, CPU, Silent(), at_step)  # type: ignore[arg-type]
    return str(error.value), state.step


def test_the_loop_checks_at_its_interval(setting: Setting) -> None:
    """The bit is changed behind step 3; steps 2 and 4 are checked. What drifted once spreads: the first tensor is named."""
    for message, step in run_ranks(2, drift_in_the_loop, setting):
        assert step == 4 and "differs after step 4" in message


def train_twice(setting: Setting, topology: Topology, dtype: torch.dtype | None, recompute: bool) -> list[Any]:
    plan, found = open_plan(setting.spec), []
    for _ in range(2):
        set_deterministic(7, dist.get_rank())
        state = make(setting.model_dir, topology, gradient_checkpointing=recompute)
        results = steps(state, plan, 3, dtype=dtype)
        found.append(([r.loss_sums for r in results], [r.grad_norm for r in results], torch.rand(2), full_weights(state)))
    return found


@pytest.mark.parametrize(("dtype", "recompute"), [(None, False), (torch.bfloat16, True)])
def test_deterministic_runs_are_equal_to_the_bit(setting: Setting, dtype: torch.dtype | None, recompute: bool) -> None:
    """And nothing in the model lacks a deterministic implementation on a CPU."""
    once = run_ranks(2, train_twice, setting, (1, 2, 2), dtype, recompute)[0]
    runs = once if dtype else once + run_ranks(2, train_twice, setting, (1, 2, 2), dtype, recompute)[0]
    for losses, norms, drawn, weights in runs[1:]:
        assert losses == runs[0][0] and norms == runs[0][1] and torch.equal(drawn, runs[0][2])
        assert all(torch.equal(weight, runs[0][3][name]) for name, weight in weights.items())
