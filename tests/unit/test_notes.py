"""What a run's figures should make its user look at, and what says from where a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from most_ray.evaluation.hypotheses import evaluation_result, result_lines
from most_ray.metrics.notes import collapse_notes, imbalance, is_overloaded, short_speech_notes
from most_ray.records.units_manifest import seconds_per_unit
from most_ray.runs.interrupts import resuming_text


@pytest.mark.parametrize(
    ("ratio", "experts", "selected", "alert", "found"),
    [
        (1.9, 4, 2, 4.0, True),  # of 2.0 that can be
        (1.7, 4, 2, 4.0, False),
        (1.9, 4, 2, 0.0, False),  # never, as it has always meant
        (4.1, 64, 6, 4.0, True),
        (3.9, 64, 6, 4.0, False),
        (9.0, 64, 6, 100.0, True),
        (1.0, 2, 2, 4.0, False),  # all are selected: no imbalance can be
        (1.9, 4, None, 4.0, False),  # of an earlier version, which does not say how many are selected
    ],
)
def test_load_is_judged_by_what_can_be(ratio: float, experts: int, selected: int | None, alert: float, found: bool) -> None:
    assert is_overloaded(ratio, experts, selected, alert) is found


def test_imbalance_goes_from_even_to_the_greatest_that_can_be() -> None:
    assert (imbalance(1.0, 4, 2), imbalance(1.5, 4, 2), imbalance(2.0, 4, 2)) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("value", [None, "x", [], {"text": None}, {"text": "x"}, {"text": [0, 1, 2, 3]}])
def test_notes_of_damaged_lines_are_none(value: Any) -> None:
    assert collapse_notes({"experts": value, "experts_per_token": value}, {"step": 3, "expert_max_over_mean": value}, 4.0) == []


def spoken(row: int, generated: int, recorded: int, name: str = "tts/a") -> dict[str, Any]:
    units = {"reference": " ".join(["1"] * recorded), "hypothesis": " ".join(["1"] * generated)}
    texts = dict.fromkeys(("text", "recognised", "normalised_text", "normalised_recognised"), "seven")
    flags = {"ended": True, "hit_cap": False, "looping": False, "foreign": 0}
    common = {"kind": "hypothesis", "set": name, "task": "tts", "row": row, "id": f"u{row}", "loss": 1.0, "supervised_tokens": 1}
    return {**common, **units, **texts, **flags}


def result(seconds: float | None) -> dict[str, Any]:
    about = {"task": "tts", "records": 3, "rejected": 0, "rejected_file": "", "seconds_per_unit": seconds}
    rows = [spoken(0, 9, 30), spoken(1, 20, 30), spoken(2, 15, 30)]
    return evaluation_result({"sets": {"tts/a": about}, "routing": {"leaked": 0}, "settings": {}}, rows)


def test_speech_has_lengths_in_seconds_and_what_is_far_too_short_is_said() -> None:
    found = result(0.02)
    figures = found["sets"]["tts/a"]
    assert figures["cycle"]["rate"] == 0.0, "which alone flatters"
    assert (figures["generated_seconds"], figures["generated_seconds_median"]) == pytest.approx((44 / 3 * 0.02, 0.3))
    assert (figures["recorded_seconds"], figures["recorded_seconds_median"]) == pytest.approx((0.6, 0.6))
    assert figures["short_records"] == 1, "half as long is not below the bound"
    assert found["overall"]["tts"]["generated_seconds"] == figures["generated_seconds"]
    (note,) = short_speech_notes(found["sets"])
    assert (
        note.startswith("tts/a: 1 of 3 synthesised records last less than 0.5 times as long as their recordings") and "recogniser" in note
    )
    lines = result_lines(found)
    assert note in lines and "speech 0.29 s on average (median 0.30 s), recordings 0.60 s on average (median 0.60 s)" in lines[0]


def test_without_the_length_of_a_unit_the_ratio_is_still_judged() -> None:
    figures = result(None)["sets"]["tts/a"]
    assert figures["generated_seconds"] is None and figures["short_records"] == 1


@pytest.mark.parametrize(
    ("identity", "seconds"),
    [
        ({"rate_hz": 50.0, "repeats_removed": False}, 0.02),
        ({"rate_hz": 50.0, "repeats_removed": True}, None),  # a unit stands for any time
        ({"rate_hz": 50.0}, None),
        ({"repeats_removed": False}, None),
        ({"rate_hz": True, "repeats_removed": False}, None),
        (None, None),
    ],
)
def test_seconds_per_unit(identity: dict[str, Any] | None, seconds: float | None) -> None:
    assert seconds_per_unit({"identity": identity}) == seconds and seconds_per_unit(None) is None


def test_a_run_resumes_from_a_checkpoint_only_where_there_is_one(tmp_path: Path) -> None:
    assert resuming_text(str(tmp_path)) == "starting again from step 0: there is no checkpoint yet"
    assert resuming_text(str(tmp_path), "elsewhere") == "starting again from resume_from_checkpoint"
    unfinished = tmp_path / "checkpoints" / "step-000000004"
    unfinished.mkdir(parents=True)
    assert "from step 0" in resuming_text(str(tmp_path)), "it is not committed"
    (unfinished / "commit.json").write_text("{}")
    assert resuming_text(str(tmp_path)) == "resuming from the checkpoint of step 4"
