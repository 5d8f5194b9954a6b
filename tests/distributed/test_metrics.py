"""Lines of metrics on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from most_ray.config import config_from
from most_ray.data.batch import open_plan
from most_ray.data.plan import Plan, PlanSpec
from most_ray.distributed.devices import peak_flops
from most_ray.distributed.ranks import world_size
from most_ray.train.loop import train
from tests.support.builders import make_plan, tiny_model
from tests.support.gloo import run_ranks
from tests.support.runs import MEASURED, numbers_in
from tests.support.training import CPU, batch_of, make

STEPS, LOGGING = 4, 2


class Kept:
    """The lines, without what is measured, and with the operations that `mfu` is made from."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def trained(self, batch: object) -> None: ...

    def log(self, line: dict[str, Any]) -> None:
        kept = {key: value for key, value in line.items() if key not in MEASURED}
        if line["kind"] == "train":
            kept["flops"] = round(line["mfu"] * line["step_time"] * LOGGING * peak_flops(CPU, None) * world_size())
        self.lines.append(kept)


def lines(model_dir: str, spec: PlanSpec, topology: tuple[int, int, int]) -> list[dict[str, Any]]:
    plan, kept = open_plan(spec), Kept()
    state = make(model_dir, topology)
    config = config_from({"logging_steps": LOGGING, "check_replicas_steps": 0, "load_alert": 0})
    batches = (batch_of(plan, step) for step in range(1, STEPS + 1))
    assert train(state, batches, config, STEPS, CPU, kept, lambda *_: 0.0)
    return kept.lines


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("topology", [(1, 2, 1), (1, 2, 2)], ids=["sharded", "experts shared out"])
def test_two_ranks_write_the_lines_of_one(plan: Plan, tmp_path: Path, topology: tuple[int, int, int]) -> None:
    """All that is not a time or memory, on either rank, to 1e-5."""
    tiny_model().save_pretrained(tmp_path)
    (alone,) = run_ranks(1, lines, str(tmp_path), plan.spec, (1, 1, 1))
    both = run_ranks(2, lines, str(tmp_path), plan.spec, topology)
    for rank in both:
        for line in rank:
            line.pop("rank_load_max_over_mean", None)  # is there with expert parallelism only
    assert both[0] == both[1] and [line["kind"] for line in alone] == ["train", "train", "experts"]
    for one, two in zip(alone, both[0], strict=True):
        assert two.pop("kind") == one.pop("kind")
        assert numbers_in(two) == pytest.approx(numbers_in(one), rel=1e-5)
