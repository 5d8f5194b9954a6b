from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from most_ray.config import config_from
from most_ray.data.batch import open_plan
from most_ray.data.plan import Plan
from most_ray.errors import ConfigError
from most_ray.optim.train_state import TrainState
from most_ray.train.recompute import apply_recompute, compile_layers
from most_ray.train.step import run_step
from tests.support.gloo import run_ranks
from tests.support.training import batch_of, differences, full_weights, loss_of, make, spy_gradients, step_settings, steps

Kind = Literal["none", "selective", "full"]
KINDS: tuple[Kind, ...] = ("none", "selective", "full")


def made(model_dir: str, kind: Kind = "none", topology: tuple[int, int, int] = (1, 1, 1)) -> TrainState:
    state = make(model_dir, topology)
    apply_recompute(state.model, kind)
    return state


def followed(state: TrainState, plan: Plan, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Losses and norms of three steps, and the first one's gradients."""
    step, gradients = state.optimizer.step, spy_gradients(state)
    results = steps(state, plan, 1, dtype=dtype)
    state.optimizer.step = step  # type: ignore[method-assign]
    results += steps(state, plan, 2, dtype=dtype)
    return {"losses": [loss_of(r) for r in results], "norms": [r.grad_norm for r in results], "gradients": gradients}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_computed_again_is_the_same_to_the_bit(model_dir: str, plan: Plan, dtype: torch.dtype | None) -> None:
    """Losses, norms and every gradient."""
    runs = [followed(made(model_dir, kind), plan, dtype) for kind in KINDS]
    for run in runs[1:]:
        assert run["losses"] == runs[0]["losses"] and run["norms"] == runs[0]["norms"]
        assert all(torch.equal(gradient, run["gradients"][name]) for name, gradient in runs[0]["gradients"].items())


def kept(state: TrainState, plan: Plan) -> int:
    """Bytes that a forward pass leaves behind for the backward pass."""
    state.model.register_forward_hook(_stop)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, pytest.raises(_ForwardDoneError) as done:
        run_step(state, batch_of(plan, 1), step_settings())
    assert done.value.output is not None
    return sum(event.self_cpu_memory_usage for event in profiler.events())


class _ForwardDoneError(Exception):
    def __init__(self, output: object) -> None:
        self.output = output  # what is kept lives as long


def _stop(module: object, arguments: object, output: object) -> None:
    raise _ForwardDoneError(output)


def test_selective_keeps_less_than_none_and_more_than_full(model_dir: str, plan: Plan) -> None:
    """Of the bytes that computing everything again would save, a third at least."""
    none, selective, full = (kept(made(model_dir, kind), plan) for kind in KINDS)
    assert full < selective < none - (none - full) / 3


def test_nothing_is_kept_or_computed_again_where_no_gradient_is_asked_for(model_dir: str) -> None:
    """Evaluation during training, with the cache of decoding."""
    state = made(model_dir, "selective")
    calls = []
    state.model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,index]
    with torch.no_grad():
        state.model.eval().generate(torch.arange(5)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert len(calls) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_a_cache_is_training_without(model_dir: str, kind: Kind) -> None:
    """What is computed again would write to it once more. (Callers of the model may leave `use_cache` on, its default.)"""
    state = made(model_dir, kind)
    ids = torch.arange(3, 17)[None]
    gradients = []
    for use_cache in (False, True):
        state.optimizer.zero_grad()
        state.model.train()(input_ids=ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([p.grad.clone() for p in state.model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20 and all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def compile_traced(state: TrainState) -> list[str]:
    """Compile without generating code, which takes minutes; the classes of the modules that were asked for."""
    asked: list[str] = []
    original = nn.Module.compile

    def traced(module: nn.Module, **keywords: Any) -> None:
        asked.append(type(module).__name__)
        original(module, backend="aot_eager", **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", traced)
        compile_layers(state.model)
    return asked


def on_ranks(model_dir: str, spec: Any, topology: tuple[int, int, int]) -> list[dict[str, Any]]:
    plan = open_plan(spec)
    found = [followed(made(model_dir, kind, topology), plan) for kind in KINDS]
    state = made(model_dir, "none", topology)
    compile_traced(state)
    names = list(state.model.state_dict())
    return [*found, {**followed(state, plan), "names": names}]


@pytest.mark.slow
def test_over_expert_parallel_ranks(model_dir: str, plan: Plan) -> None:
    """(1, 2, 2): computing again changes nothing to the bit and leaves no rank waiting; compiled parts, with FSDP's hooks around
    them, give the same to rounding, and every tensor keeps its name."""
    none, selective, full, compiled = run_ranks(2, on_ranks, model_dir, plan.spec, (1, 2, 2))[0]
    for other in (selective, full):
        assert other["losses"] == none["losses"] and other["norms"] == none["norms"]
        assert all(torch.equal(gradient, other["gradients"][name]) for name, gradient in none["gradients"].items())
    assert compiled["losses"] == pytest.approx(none["losses"], abs=1e-6)
    assert max(differences(none, compiled).values()) < 1e-4
    assert compiled["names"] == list(make(model_dir).model.state_dict())


def test_compiled_parts_train_the_same(model_dir: str, plan: Plan) -> None:
    """Losses to 1e-6, weights to 1e-5, with recomputation around them."""
    plain, compiled = made(model_dir), made(model_dir, "full")
    asked = compile_traced(compiled)
    assert asked == ["MostNorm", "MostNorm", "MostMlp"] + ["MostNorm", "MostUncastNorm", "MostMlp"] * 2
    expected, found = ([loss_of(r) for r in steps(state, plan, 3)] for state in (plain, compiled))
    assert found == pytest.approx(expected, abs=1e-6)
    for name, weight in full_weights(plain).items():
        torch.testing.assert_close(full_weights(compiled)[name], weight, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_the_two_ways_to_ask_for_it() -> None:
    assert config_from({}).recomputed == "none"
    assert config_from({"gradient_checkpointing": True}).recomputed == config_from({"recompute": "full"}).recomputed == "full"
    assert config_from({"recompute": "selective"}).recomputed == "selective"
    with pytest.raises(ConfigError, match=r"recompute = 'selective': and gradient_checkpointing .* exclude each other. Choose one."):
        config_from({"recompute": "selective", "gradient_checkpointing": True})
