"""What is measured against is the same training: peers have our loss on the same records, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from most_ray.config import OptimizerOptions
from most_ray.data.batch import Batch
from most_ray.data.plan import Plan
from most_ray.optim.train_state import make_state
from most_ray.train.step import run_step
from tests.benchmarks.peers import OriginalPeer, TransformersPeer, records_of, train_with_trainer
from tests.support.builders import tiny_model
from tests.support.training import batch_of, loss_of, step_settings

OPTIONS = OptimizerOptions(learning_rate=1e-3)
PLAIN: dict[str, Any] = {"use_modality_aware_routing": False, "aux_loss_alpha": 0.0}


@pytest.fixture(scope="module")
def batch(plan: Plan) -> Batch:
    """Six records of both tasks in one forward pass."""
    made = batch_of(plan, 1, max_rows=8)
    assert len(made.input_ids) == 1
    return made


def ours(batch: Batch, **changes: Any) -> tuple[float, float]:
    """Loss and gradient norm of our own step."""
    result = run_step(make_state(tiny_model(**changes), OPTIONS, 1), batch, step_settings(max_grad_norm=0))
    return loss_of(result), result.grad_norm


def test_records_are_those_of_the_plan(plan: Plan, batch: Batch) -> None:
    step = plan.step(1)
    expected = sorted(plan.stores[s].record(int(r))[1].tolist() for s, r in zip(step.sources, step.rows, strict=True))
    records = records_of(batch)
    assert sorted(record["input_ids"] for record in records) == expected
    assert sum(label >= 0 for record in records for label in record["labels"]) == sum(batch.n_supervised)


def test_transformers_in_a_plain_loop_makes_our_step(batch: Batch) -> None:
    peer = TransformersPeer(tiny_model(**PLAIN), OPTIONS, 1)
    assert peer.step(batch) == pytest.approx(ours(batch, **PLAIN), rel=1e-5)


def test_the_trainer_has_our_loss_though_its_rows_are_padded(batch: Batch, tmp_path: Path) -> None:
    told: list[float] = []
    loss = train_with_trainer(tiny_model(**PLAIN), [records_of(batch)], tmp_path, told.append)
    assert loss == pytest.approx(ours(batch, **PLAIN)[0], abs=1e-5)
    assert len(told) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("routing", [False, True])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_originals_loops_make_our_step(batch: Batch, routing: bool, norm_topk_prob: bool) -> None:
    """Without its balance loss, which takes padding for text, all of it is the same, the routing by modality too."""
    changes = {**PLAIN, "use_modality_aware_routing": routing, "norm_topk_prob": norm_topk_prob}
    peer = OriginalPeer(tiny_model(**changes), OPTIONS, 1)
    assert peer.step(records_of(batch)) == pytest.approx(ours(batch, **changes), rel=1e-5)


def test_the_originals_balance_loss_is_ours_where_nothing_is_padded(batch: Batch) -> None:
    """One record alone: what the gradient norm gains by the balance loss is the same."""
    alone = max(records_of(batch), key=lambda record: len(record["input_ids"]))
    length = len(alone["input_ids"])
    model = tiny_model(aux_loss_alpha=1.0)
    _, norm = OriginalPeer(model, OPTIONS, 1).step([alone])
    ids, labels = (torch.tensor([alone[key]]) for key in ("input_ids", "labels"))
    model.train()(input_ids=ids, labels=labels, position_ids=torch.arange(length)[None], use_cache=False).loss.backward()
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])), rel=1e-5)
