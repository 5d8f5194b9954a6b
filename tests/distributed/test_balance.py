"""Batch-wise balance loss and balance biases: the same whatever the ranks, packs and forward passes, and after a restart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from most_ray.checkpoint import reader
from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.optim.train_state import BALANCE_LOAD, TrainState
from tests.support.builders import make_plan, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import loss_of, make, save_to, spy_gradients, steps

VARIANTS: dict[str, dict[str, Any]] = {
    "batch-wise": {"seq_aux": False, "aux_loss_alpha": 0.5},
    "recomputed": {"seq_aux": False, "aux_loss_alpha": 0.5, "gradient_checkpointing": True},
    "bias": {"balance_bias_rate": 0.02, "aux_loss_alpha": 0.0},
}


@dataclass(frozen=True)
class Setting:
    model_dir: str
    spec: PlanSpec
    folder: str


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("balance")
    tiny_model().save_pretrained(root / "model")
    return Setting(str(root / "model"), make_plan(root / "data", batch=11).spec, str(root))


def balance_of(state: TrainState) -> dict[str, torch.Tensor]:
    """What balances the next step."""
    biases = {name: tensor.clone() for name, tensor in state.model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {**biases, **{name: tensor.clone() for name, tensor in state.buffers.items()}}


def balanced(setting: Setting, topology: tuple[int, int, int], max_rows: int) -> dict[str, Any]:
    """Losses of four steps, gradients of the last, and what balances the fifth."""
    found = {}
    for variant, options in VARIANTS.items():
        state = make(setting.model_dir, topology, **options)
        gradients = spy_gradients(state)
        results = steps(state, open_plan(setting.spec), 4, max_rows=max_rows)
        found[variant] = {
            "losses": [loss_of(r) for r in results],
            "aux": [r.aux_loss for r in results],
            "gradients": dict(gradients),
            "balance": balance_of(state),
            "loads": [r.load for r in results],
        }
    return found


@pytest.fixture(scope="module")
def single(setting: Setting) -> dict[str, Any]:
    return balanced(setting, (1, 1, 1), 16)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for variant in VARIANTS:
        one, two = expected[variant], found[variant]
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5), variant
        assert two["aux"] == pytest.approx(one["aux"], abs=1e-6), variant
        assert all(torch.equal(two["balance"][name], tensor) for name, tensor in one["balance"].items()), variant
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(two["gradients"][name], gradient, rtol=0, atol=1e-5)


def test_passes_do_not_matter(setting: Setting, single: dict[str, Any]) -> None:
    assert_same(balanced(setting, (1, 1, 1), 1), single)


def test_ranks_do_not_matter(setting: Setting, single: dict[str, Any]) -> None:
    for found in run_ranks(2, balanced, setting, (1, 2, 2), 2):  # biases on every rank
        assert_same(found, single)


def test_something_was_balanced(single: dict[str, Any]) -> None:
    """The batch-wise loss begins with the second step, whose frequencies are the first one's; biases are what the loads say."""
    batch, bias = single["batch-wise"], single["bias"]
    assert batch["aux"][0] == 0.0 and min(batch["aux"][1:]) > 0.1
    assert torch.equal(batch["balance"][BALANCE_LOAD], batch["loads"][-1].sum(1))
    groups = [(0, slice(0, 4)), (1, slice(4, 8))]
    for index, name in enumerate(sorted(bias["balance"])):
        expected = torch.zeros(8)
        for load in bias["loads"]:
            for modality, group in groups:
                used = load[index, modality, group].double()
                expected[group] += 0.02 * (used.mean() - used).sign().float()
        torch.testing.assert_close(bias["balance"][name], expected)
        assert expected.any()


@pytest.mark.parametrize("variant", ["batch-wise", "bias"])
def test_a_restart_changes_nothing(setting: Setting, variant: str, tmp_path: Path) -> None:
    plan, options = open_plan(setting.spec), VARIANTS[variant]
    through = make(setting.model_dir, **options)
    expected = [loss_of(r) for r in steps(through, plan, 5)][3:]
    state = make(setting.model_dir, **options)
    steps(state, plan, 3)
    save_to(tmp_path / "step-000000003", state, plan)
    resumed = make(setting.model_dir, **options)
    reader.load(tmp_path / "step-000000003", resumed)
    assert balance_of(resumed) and all(torch.equal(balance_of(resumed)[name], tensor) for name, tensor in balance_of(state).items())
    assert [loss_of(r) for r in steps(resumed, plan, 2)] == expected
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), through.model.parameters(), strict=True))


@pytest.mark.parametrize("variant", ["batch-wise", "bias"])
def test_a_skipped_step_balances_nothing(setting: Setting, variant: str) -> None:
    plan = open_plan(setting.spec)
    state = make(setting.model_dir, **VARIANTS[variant])
    steps(state, plan, 2)
    before = balance_of(state)
    with torch.no_grad():
        state.model.lm_head.weight[0, 0] = torch.inf  # type: ignore[union-attr, index]
    assert steps(state, plan, 1)[0].skipped
    assert before and all(torch.equal(tensor, before[name]) for name, tensor in balance_of(state).items())
