from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from most_ray.data.plan import Plan
from most_ray.train.state import LossScale
from most_ray.train.step import Precision, TrainingDivergedError, run_step
from tests.support.training import CPU, batch_of, full_weights, loss_of, make, steps


def test_accumulation_is_one_large_batch(model_dir: str, plan: Plan) -> None:
    """Promise 5's other half: the loss is a mean over the step's tokens, not over forward passes."""
    runs = []
    for rows in (1, 2, 8):
        state = make(model_dir)
        results = steps(state, plan, 4, max_rows=rows)
        runs.append((results, full_weights(state)))
    for results, weights in runs[1:]:
        assert [loss_of(r) for r in results] == pytest.approx([loss_of(r) for r in runs[0][0]], abs=1e-5)
        assert [r.grad_norm for r in results] == pytest.approx([r.grad_norm for r in runs[0][0]], abs=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=0, atol=2e-5)


def test_the_loss_is_the_models_own(model_dir: str, plan: Plan) -> None:
    """Against the library's call: mean cross-entropy over all supervised tokens of the step."""
    from tests.unit.test_model import forward_batch

    state = make(model_dir)
    expected = forward_batch(state.model.train(), plan, 1, rows=4)  # type: ignore[arg-type]
    result = steps(state, plan, 1)[0]
    assert loss_of(result) == pytest.approx(float(expected["loss"]) / expected["count"], abs=1e-6)
    assert sum(result.token_counts) == sum(plan.step(1).n_supervised)
    assert result.aux_loss == pytest.approx(0.01 * float(expected["aux"]) / plan.spec.global_batch_size, rel=1e-5)
    assert torch.equal(result.load, expected["load"])


def test_the_weight_of_asr_tokens(model_dir: str, plan: Plan) -> None:
    """Gradients are those of (w * ASR sum + TTS sum) / (w * ASR tokens + TTS tokens), put together by hand from two runs."""
    from tests.support.training import spy_gradients

    gradients = []
    for weight in (1.0, 1e-9, 7.0):
        state = make(model_dir, aux_loss_alpha=0.0)
        state.model_config.aux_loss_alpha = 0.0
        seen = spy_gradients(state)
        result = steps(state, plan, 1, clip=0.0, asr_weight=weight)[0]
        gradients.append(dict(seen))
    asr_tokens, tts_tokens = result.token_counts[:2]
    for name, both in gradients[0].items():
        tts = gradients[1][name] * tts_tokens
        asr = both * (asr_tokens + tts_tokens) - tts
        expected = (7.0 * asr + tts) / (7.0 * asr_tokens + tts_tokens)
        torch.testing.assert_close(gradients[2][name], expected, rtol=1e-4, atol=1e-6)


def test_losses_are_told_apart_by_task(model_dir: str, plan: Plan) -> None:
    result = steps(make(model_dir), plan, 1)[0]
    step = plan.step(1)
    counts = [0, 0, 0]
    for source, row in zip(step.sources, step.rows, strict=True):
        store = plan.stores[source]
        counts[{"asr": 0, "tts": 1}[store.task]] += int(store.lengths[row] - store.prompt_lengths[row])
    assert result.token_counts == counts and min(counts[:2]) > 0
    assert all(sum_ > 0 for sum_ in result.loss_sums[:2]) and result.loss_sums[2] == 0


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_clipping(model_dir: str, plan: Plan, clip: float) -> None:
    from tests.support.training import spy_gradients

    state = make(model_dir)
    seen = spy_gradients(state)
    result = steps(state, plan, 1, clip=clip)[0]
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in seen.values()))
    assert norm == pytest.approx(min(clip, result.grad_norm) if clip else result.grad_norm, rel=1e-4)


@pytest.mark.parametrize(("name", "last"), [("linear", 0.0), ("cosine", 0.0), ("constant", 3e-3)])
def test_warm_up_and_schedules(model_dir: str, plan: Plan, name: str, last: float) -> None:
    state = make(model_dir, total=6, lr_scheduler=name)
    rates = [r.learning_rate for r in steps(state, plan, 6)]
    assert rates[0] == 0.0 and rates[1] == pytest.approx(1.5e-3) and rates[2] == pytest.approx(3e-3)
    assert state.scheduler.get_last_lr()[0] == pytest.approx(last, abs=1e-9)


def test_norms_are_not_decayed(model_dir: str) -> None:
    state = make(model_dir)
    decays = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    for name, parameter in state.model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_near_float32(model_dir: str, plan: Plan, dtype: torch.dtype) -> None:
    """Bound: three times the type's spacing at the loss's size, over the first steps."""
    exact = [loss_of(r) for r in steps(make(model_dir), plan, 5)]
    state = make(model_dir, fp16=dtype is torch.float16)
    results = steps(state, plan, 5, dtype=dtype)
    bound = 3 * torch.finfo(dtype).eps * max(exact)
    assert [loss_of(r) for r in results] == pytest.approx(exact, abs=bound)
    assert all(p.dtype == torch.float32 for p in state.model.parameters())


def test_loss_scale() -> None:
    scale = LossScale(scale=8.0, growth_interval=2, enabled=True)
    for finite, expected in ((True, 8.0), (True, 16.0), (False, 8.0), (True, 8.0), (True, 16.0)):
        scale.update(finite)
        assert scale.scale == expected
    off = LossScale()
    off.update(False)
    assert off.scale == 1.0


def poison(state: Any) -> None:
    with torch.no_grad():
        state.model.lm_head.weight[0, 0] = float("nan")


def test_a_non_finite_gradient_changes_nothing(model_dir: str, plan: Plan) -> None:
    state = make(model_dir)
    steps(state, plan, 2)
    poison(state)
    before = full_weights(state)
    moments = {k: v["exp_avg"].clone() for k, v in state.optimizer.state.items()}
    result = steps(state, plan, 1)[0]
    assert result.skipped and state.step == 3
    for name, weight in full_weights(state).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(v["exp_avg"], moments[k]) for k, v in state.optimizer.state.items())


def test_gradients_that_stay_non_finite_end_the_run(model_dir: str, plan: Plan) -> None:
    state = make(model_dir)
    poison(state)
    with pytest.raises(TrainingDivergedError, match="not been finite for 20 steps"):
        steps(state, plan, 30)


def test_gradient_checkpointing(model_dir: str, plan: Plan) -> None:
    plain = [loss_of(r) for r in steps(make(model_dir), plan, 3)]
    recomputed = [loss_of(r) for r in steps(make(model_dir, gradient_checkpointing=True), plan, 3)]
    assert recomputed == pytest.approx(plain, abs=1e-6)


def test_the_loop_refuses_a_stream_that_is_out_of_step(model_dir: str, plan: Plan) -> None:
    from most_ray.train.loop import LoopSettings, train

    class Silent:
        def trained(self, batch: object) -> None: ...
        def log(self, line: object) -> None: ...

    state = make(model_dir)
    settings = LoopSettings(3, 1, 1.0, Precision(None), CPU)
    wrong = [batch_of(plan, 1), batch_of(plan, 3)]
    with pytest.raises(RuntimeError, match="step 3 where step 2 was due"):
        train(state, wrong, settings, Silent(), lambda _: None)  # type: ignore[arg-type]


def test_a_step_without_supervised_tokens_of_a_task_still_counts(model_dir: str, plan: Plan) -> None:
    batch = batch_of(plan, 1)
    state = make(model_dir)
    result = run_step(state, dataclasses.replace(batch, task=batch.task * 0), Precision(None), 1.0, CPU)
    assert result.token_counts[1] == 0 and result.token_counts[0] == sum(batch.n_supervised)
