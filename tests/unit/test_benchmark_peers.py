"""What is measured against is the same training: peers have our loss on the same records, to float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from most_ray.config import OptimizerOptions
from most_ray.data.plan import Plan
from most_ray.train.state import make_state
from most_ray.train.step import Precision, run_step
from tests.benchmarks.peers import OriginalPeer, PaddingCollator, TransformersPeer, records_of, train_with_trainer
from tests.support.builders import IDS, tiny_model
from tests.support.training import CPU, batch_of, loss_of

OPTIONS = OptimizerOptions(learning_rate=1e-3)


@pytest.fixture(scope="module")
def batches(plan: Plan) -> list[object]:
    return [batch_of(plan, step, max_rows=8) for step in (1, 2)]
