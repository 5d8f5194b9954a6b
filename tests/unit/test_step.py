from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from most_ray.config import config_from
from most_ray.data.plan import Plan
from most_ray.optim.train_state import LossScale
from most_ray.train.meter import Meter
from most_ray.train.step import TrainingDivergedError, run_step
from tests.support.batches import padded
from tests.support.training import CPU, batch_of, full_weights, loss_of, make, step_settings, steps


def test_accumulation_is_one_large_batch(model_dir: str, plan: Plan) -> None:
    """Promise 5 of docs/promises.md, its other half: the loss is a mean over the step's tokens, not over forward passes."""
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
    with pytest.raises(TrainingDivergedError, match="loss = nan: is not finite; step 20 is the last of 20 skipped in a row") as error:
        steps(state, plan, 30)
    assert all(record in str(error.value) for record in batch_of(plan, 20).record_ids)


def test_the_error_shows_twenty_records(model_dir: str, plan: Plan) -> None:
    state = make(model_dir)
    poison(state)
    batch = dataclasses.replace(batch_of(plan, 1), record_ids=[f"r{i:02}" for i in range(23)])
    with pytest.raises(TrainingDivergedError, match="r18, r19 and 3 more"):
        run_step(state, batch, step_settings(max_skipped_steps=1))


def test_an_infinite_loss_with_finite_gradients_is_skipped(model_dir: str, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    state = make(model_dir)

    def infinite(_module: object, _args: object, output: Any) -> Any:
        output.token_losses = output.token_losses + math.inf
        return output

    handle = state.model.register_forward_hook(infinite)
    before = full_weights(state)
    result = steps(state, plan, 1)[0]
    handle.remove()
    assert result.skipped and math.isfinite(result.grad_norm) and state.skipped_in_row == 1
    assert all(torch.equal(weight, before[name]) for name, weight in full_weights(state).items())
    assert "step 1 skipped: loss = inf. Its records: " in caplog.text and batch_of(plan, 1).record_ids[0] in caplog.text
    assert not steps(state, plan, 1)[0].skipped and state.skipped_in_row == 0


def test_an_overflow_in_float16_is_skipped_without_naming_records(model_dir: str, plan: Plan, caplog: pytest.LogCaptureFixture) -> None:
    state = make(model_dir, fp16=True)
    state.loss_scale.scale = 2.0**40
    assert steps(state, plan, 1, dtype=torch.float16)[0].skipped
    assert state.loss_scale.scale == 2.0**39 and "step 1 skipped" in caplog.text and "records" not in caplog.text


def test_lines_of_metrics_leave_skipped_steps_out(model_dir: str, plan: Plan) -> None:
    state = make(model_dir)
    good = steps(state, plan, 2)
    poison(state)
    bad = steps(state, plan, 1)[0]
    meter = Meter(state.model_config)
    lines = []
    for results in ((*good, bad), good, (bad,)):
        for result in results:
            meter.add(result, 100, 200, 0.0)
        lines.append(json.loads(json.dumps(meter.line(), allow_nan=False)))
    assert lines[0]["skipped_steps"] == 1 and lines[1]["skipped_steps"] == 0
    assert all(lines[0][key] == lines[1][key] for key in ("loss", "aux_loss", "grad_norm", "supervised_tokens"))
    assert lines[2]["loss"] is None and lines[2]["skipped_steps"] == 1


@pytest.mark.parametrize("routing", [True, False])
def test_padding_changes_nothing(model_dir: str, plan: Plan, routing: bool) -> None:
    """Promise 21 of docs/promises.md: longer rows and more empty rows change neither the loss, nor the balance loss, nor expert counts."""
    runs = []
    for change in (lambda batch: batch, padded):
        state = make(model_dir, use_modality_aware_routing=routing, warmup_steps=0)
        runs.append((steps(state, plan, 3, change=change), full_weights(state)))
    for plain, more in zip(runs[0][0], runs[1][0], strict=True):
        assert loss_of(more) == pytest.approx(loss_of(plain), rel=1e-6)
        assert more.aux_loss == pytest.approx(plain.aux_loss, rel=1e-6)
        assert more.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
        assert torch.equal(more.load, plain.load) and more.token_counts == plain.token_counts


def test_gradient_checkpointing(model_dir: str, plan: Plan) -> None:
    plain = [loss_of(r) for r in steps(make(model_dir), plan, 3)]
    recomputed = [loss_of(r) for r in steps(make(model_dir, gradient_checkpointing=True), plan, 3)]
    assert recomputed == pytest.approx(plain, abs=1e-6)


def test_the_loop_refuses_a_stream_that_is_out_of_step(model_dir: str, plan: Plan) -> None:
    from most_ray.train.loop import train

    class Silent:
        def trained(self, batch: object) -> None: ...
        def log(self, line: object) -> None: ...

    state = make(model_dir)
    config = config_from({"check_replicas_steps": 0, "load_alert": 0})
    wrong = [batch_of(plan, 1), batch_of(plan, 3)]
    with pytest.raises(RuntimeError, match="step 3 where step 2 was due"):
        train(state, wrong, config, 3, CPU, Silent(), lambda *_: 0.0)  # type: ignore[arg-type]


def test_a_step_without_supervised_tokens_of_a_task_still_counts(model_dir: str, plan: Plan) -> None:
    batch = batch_of(plan, 1)
    state = make(model_dir)
    result = run_step(state, dataclasses.replace(batch, task=batch.task * 0), step_settings())
    assert result.token_counts[1] == 0 and result.token_counts[0] == sum(batch.n_supervised)
