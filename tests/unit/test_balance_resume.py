"""Balance biases over a restart: turned on in the middle of a run they begin at zero, and what was learnt comes back."""

from __future__ import annotations

from pathlib import Path

import torch

from most_ray.checkpoint import reader
from most_ray.data.plan import Plan
from most_ray.model.routing import BALANCE_BIAS
from most_ray.optim.train_state import TrainState
from tests.support.training import full_weights, make, save_to, steps


def biases(state: TrainState) -> list[torch.Tensor]:
    return [value.clone() for name, value in state.model.named_buffers() if name.endswith(BALANCE_BIAS)]


def test_biases_begin_at_zero_and_come_back(model_dir: str, plan: Plan, tmp_path: Path) -> None:
    plain = make(model_dir)
    steps(plain, plan, 1)
    save_to(tmp_path / "plain", plain, plan)
    state = make(model_dir, balance_bias_rate=0.01)
    reader.load(tmp_path / "plain", state)
    assert all(float(bias.abs().sum()) == 0.0 for bias in biases(state)) and len(biases(state)) > 0
    steps(state, plan, 2)
    assert any(float(bias.abs().sum()) > 0.0 for bias in biases(state))
    save_to(tmp_path / "biased", state, plan)
    again = make(model_dir, balance_bias_rate=0.01)
    reader.load(tmp_path / "biased", again)
    assert all(torch.equal(a, b) for a, b in zip(biases(state), biases(again), strict=True))
    weights_only = make(model_dir, balance_bias_rate=0.01)
    reader.load(tmp_path / "plain", weights_only, with_optimizer=False)
    assert all(torch.equal(weight, full_weights(plain)[name]) for name, weight in full_weights(weights_only).items())
