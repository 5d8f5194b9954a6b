from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.evaluation.inline import write_evaluation
from most_ray.metrics import schema
from most_ray.metrics.keys import Curve, Gauge, Key, nested
from most_ray.metrics.rows import row_of
from most_ray.records.template import AUDIO, TEXT
from most_ray.report.figures import _declared
from most_ray.train.meter import Meter, perplexity
from most_ray.train.step import StepResult
from tests.conftest import ROOT
from tests.support.builders import tiny_config
from tests.support.evaluation import evaluate, make_scene
from tests.support.runs import MEASURED, go, lines_of, prepare_small

EVEN, CROWDED = [50, 50, 50, 50], [0, 10, 190, 0]


def result(text: list[int], audio: list[int], step: int = 1) -> StepResult:
    """A step whose first layer is even and whose second is as given."""
    load = torch.zeros(2, 2, 8, dtype=torch.long)
    load[0, TEXT, :4] = sum(text) // 4
    load[0, AUDIO, 4:] = sum(audio) // 4
    load[1, TEXT, :4], load[1, AUDIO, 4:] = torch.tensor(text), torch.tensor(audio)
    return StepResult(step, [1.0, 0.0, 0.0], [2, 0, 0], 0.5, 1.0, 1e-3, load, False)


def lines(meter: Meter, *results: StepResult) -> list[dict[str, Any]]:
    found = []
    for made in results:
        meter.add(made, 10, 20, 0.0)
        found.append(meter.line())
    return found


def test_the_load_of_ranks_is_over_a_lines_steps() -> None:
    ranks = ((0, 1, 2, 3), (4, 5, 6, 7))
    meter = Meter(tiny_config(), ranks)
    meter.add(result(EVEN, [150] * 4), 10, 20, 0.0)
    meter.add(result([250] * 4, [150] * 4), 10, 20, 0.0)
    assert meter.line()["rank_load_max_over_mean"] == 1.0
    assert lines(meter, result(EVEN, [150] * 4))[0]["rank_load_max_over_mean"] == 1.5
    assert "rank_load_max_over_mean" not in lines(Meter(tiny_config()), result(EVEN, EVEN))[0]


def test_a_crowded_expert_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Promise 22 of docs/promises.md: the alert on an expert whose load is far above the mean."""
    meter = Meter(tiny_config(), load_alert=3.0)
    with caplog.at_level(logging.WARNING):
        lines(meter, result(EVEN, EVEN), result(EVEN, CROWDED, 7))
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("step 7: in layer 2 expert 6 has 3.80 times the mean load of the audio experts")
    assert "aux_loss_alpha or balance_bias_rate" in message


def test_alerts_come_once_in_a_hundred_lines_of_each_modality(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(tiny_config(), load_alert=3.0)
    with caplog.at_level(logging.WARNING):
        lines(meter, *(result(CROWDED if step > 3 else EVEN, CROWDED, step) for step in range(1, 120)))
    assert [(record.args[0], record.args[4]) for record in caplog.records] == [  # type: ignore[index]
        (1, "audio"),
        (4, "text"),
        (101, "audio"),
        (104, "text"),
    ]


@pytest.mark.parametrize(
    ("alert", "audio"),
    [(0.0, CROWDED), (3.9, [60, 50, 50, 40]), (3.0, [0, 0, 40, 0])],
    ids=["off", "below", "too few to tell"],
)
def test_no_alert(caplog: pytest.LogCaptureFixture, alert: float, audio: list[int]) -> None:
    with caplog.at_level(logging.WARNING):
        lines(Meter(tiny_config(), load_alert=alert), result(EVEN, audio))
    assert not caplog.records


def test_an_expert_with_nearly_all_it_can_have_is_named_however_high_load_alert_is(caplog: pytest.LogCaptureFixture) -> None:
    """With 2 of 4 experts selected, no load is above twice the mean."""
    with caplog.at_level(logging.WARNING):
        lines(Meter(tiny_config(), load_alert=4.0), result(EVEN, [95, 85, 15, 5], 7))
    (record,) = caplog.records
    assert "expert 4 has 1.90 times the mean load of the audio experts, of at most 2.00 (load_alert is 4). Raise" in record.getMessage()


@pytest.mark.parametrize(("name", "value"), [("load_alert", 1.0), ("load_alert", -1.0), ("balance_bias_rate", -0.1)])
def test_options_of_balancing_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        config_from({name: value})
    assert config_from({"load_alert": 0, "balance_bias_rate": 0.001}).balance_bias_rate == 0.001


def test_a_line_goes_on_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between two lines of either kind, twice within one: its lines are those of a run that was not stopped."""
    monkeypatch.setattr("most_ray.train.loop.EXPERTS_STEPS", 5)
    options = {"max_steps": 11, "logging_steps": 4, "save_steps": 100}
    straight, broken = prepare_small(tmp_path, "straight", **options), prepare_small(tmp_path, "broken", **options)
    assert go(straight)
    assert [go(broken, stop_at=6), go(broken, stop_at=7), go(broken)] == [False, False, True]
    assert [(line["kind"], line["step"]) for line in lines_of(broken)] == [
        ("start", 0),
        ("train", 4),
        ("experts", 5),
        ("start", 6),
        ("start", 7),
        ("train", 8),
        ("experts", 10),
        ("train", 11),
        ("experts", 11),
    ]
    for kind in ("train", "experts"):
        told = [[{k: v for k, v in line.items() if k not in MEASURED} for line in lines_of(run, kind)] for run in (straight, broken)]
        assert told[0] == told[1]


def test_a_meters_state_is_json_and_all_of_it() -> None:
    meters = [Meter(tiny_config(), load_alert=3.0) for _ in range(2)]
    meters[0].add(result(EVEN, CROWDED), 10, 20, 0.5, 3)
    meters[0].stalled(0.25)
    meters[1].restore(json.loads(json.dumps({**meters[0].state(), "seconds": 100.0})))
    for meter in meters:
        meter.add(result(CROWDED, EVEN, 2), 7, 20, 0.5, 4)
    made = [meter.line() for meter in meters]
    assert made[0]["step_time"] < 50 < made[1]["step_time"]  # the seconds before the restart count
    clocks = MEASURED - {"data_wait", "save_stall"}
    for key in made[0].keys() - clocks:
        assert made[0][key] == made[1][key], key
    assert meters[0].experts_line() == meters[1].experts_line()


def test_times_leave_evaluations_out() -> None:
    meter = Meter(tiny_config())
    meter.restore({**meter.state(), "seconds": 50.0})
    meter.add(result(EVEN, EVEN), 10, 20, 0.0)
    meter.paused(20.0)
    assert 30 <= meter.line()["step_time"] < 40


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (2.0, math.exp(2.0)), (1e4, None), (None, None)])
def test_perplexities_are_numbers_or_null(loss: float | None, expected: float | None) -> None:
    assert perplexity(loss) == expected


def test_metrics_md_is_made_of_the_schema(generator: ModuleType) -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == generator.docs_metrics.metrics_markdown(), (
        ".venv/bin/python .ci/docs.py"
    )


def test_lines_of_evaluations_are_as_documented(tmp_path: Path) -> None:
    line = write_evaluation(evaluate(make_scene(tmp_path, n_asr=2, n_tts=1, n_text=1)), str(tmp_path / "run"), 5, 1.0)
    assert schema.check_line({**line, "time": 1.0}) == []


def test_a_new_metric_needs_its_declaration_alone(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides a value where it is computed: trackers, Prometheus, sweeps, the report and the page read the declaration."""
    gauge, curve = Gauge("most_ray_novel", "A new metric"), Curve("Speed", "fig-novel", "Novelty", "novelty")
    key = Key(float, "share", "of what is new", over="mean", tracker="train/novel", gauge=gauge, curve=curve)
    monkeypatch.setitem(schema.TRAIN, "novel", key)  # type: ignore[arg-type]
    line = {"kind": "train", "step": 1, "novel": 0.5}
    assert row_of(line, {}) == {"train/novel": 0.5} and not schema.undeclared_keys(line)
    assert (
        "| `novel` | number | share | mean | of what is new | `train/novel` | `most_ray_novel` |"
        in generator.docs_metrics.metrics_markdown()
    )
    assert gauge in [each.gauge for each in nested(schema.TRAIN)]
    lines = SimpleNamespace(values=lambda name: np.array([line.get(name, np.nan)], dtype=float))
    run: Any = SimpleNamespace(name="r", steps=np.array([1.0]), train=lines)
    assert [figure.title for make in _declared("Speed") if (figure := make([run]))] == ["Novelty"]


def test_lines_that_are_not_as_documented_are_found() -> None:
    line = {"kind": "experts", "step": 3, "time": 1.5, "steps": 3, "load": {"text": [[1, 2], [3, 4]]}}
    assert schema.check_line(line) == []
    assert schema.check_line({"kind": "other"}) == ["kind: 'other' is unknown"]
    wrong = {**line, "step": 3.5, "time": True, "load": {"text": [[1, "2"]]}, "more": 1}
    del wrong["steps"]
    assert sorted(schema.check_line(wrong)) == [
        "load.text[0][1]: '2' is not of type integer",
        "more: unknown key",
        "step: 3.5 is not of type integer",
        "steps: missing key",
        "time: True is not of type number",
    ]
