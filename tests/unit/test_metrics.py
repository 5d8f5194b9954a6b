from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from most_ray.config import config_from
from most_ray.data.batch import AUDIO, TEXT
from most_ray.errors import ConfigError
from most_ray.train.metrics import Meter
from most_ray.train.step import StepResult
from tests.support.builders import tiny_config

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
    meter = Meter(tiny_config(), load_alert=3.0)
    with caplog.at_level(logging.WARNING):
        lines(meter, result(EVEN, EVEN), result(EVEN, CROWDED, 7))
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("step 7: in layer 2 expert 6 has 3.8 times the mean load of the audio experts")
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
    [(0.0, CROWDED), (3.9, CROWDED), (3.0, [0, 0, 40, 0])],
    ids=["off", "below", "too few to tell"],
)
def test_no_alert(caplog: pytest.LogCaptureFixture, alert: float, audio: list[int]) -> None:
    with caplog.at_level(logging.WARNING):
        lines(Meter(tiny_config(), load_alert=alert), result(EVEN, audio))
    assert not caplog.records


@pytest.mark.parametrize(("name", "value"), [("load_alert", 1.0), ("load_alert", -1.0), ("balance_bias_rate", -0.1)])
def test_options_of_balancing_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        config_from({name: value})
    assert config_from({"load_alert": 0, "balance_bias_rate": 0.001}).balance_bias_rate == 0.001
