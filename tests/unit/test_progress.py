from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from most_ray.console.progress import Pace, ProgressText, ProgressWatcher, duration, evaluated


def train(step: int, step_time: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 1.5, "tokens_per_second": 1234.5, "step_time": step_time, **more}


def evaluation(step: int, rate: float = 0.02) -> dict[str, Any]:
    words = {"asr/takes": {"words": {"rate": rate, "interval": [0.005, 0.04]}}, "asr/none": {"words": {"rate": None}}}
    return {"kind": "evaluation", "step": step, "wer": {"takes": rate, "speaker": 0.098, "none": None}, "sets": words}


def told(text_of: ProgressText, lines: list[dict[str, Any]], now: float = 0.0) -> list[str]:
    return [text for line in lines if (text := text_of.update(line, now))]


def test_plain_lines_come_every_twentieth_of_the_steps_and_every_minute() -> None:
    progress = ProgressText(total_steps=1000, first_step=100, live=False, now=0.0)
    assert [text.split()[1] for text in told(progress, [train(step) for step in range(101, 260)])] == ["150/1000", "200/1000", "250/1000"]
    assert told(progress, [train(260)], now=59.9) == []
    assert told(progress, [train(261)], now=60.0) == ["step 261/1000  loss 1.5000  1,234 tokens/s  25 min left"]
    assert told(progress, [train(262)], now=119.0) == []
    assert len(told(progress, [train(1000)], now=119.0)) == 1, "the last step is always told"


def test_lines_of_other_kinds_are_no_steps_and_old_ones_are() -> None:
    progress = ProgressText(10, 0, live=False, now=0.0)
    others = [{"kind": "start", "step": 0}, {"kind": "experts", "step": 9, "load": {}}, {"kind": "something new", "step": 9}]
    assert told(progress, others) == [] and progress.step == 0
    assert told(progress, [{"step": 3, "loss": None, "tokens_per_second": 5.0}]) == ["step 3/10  loss skipped  5 tokens/s"]


def test_an_evaluation_is_told_when_it_comes_and_the_newest_stays_in_sight() -> None:
    progress = ProgressText(1000, 0, live=True, now=0.0)
    assert told(progress, [evaluation(200)]) == ["evaluation of step 200: WER takes 2.00% [0.5, 4.0], speaker 9.80%"]
    assert told(progress, [evaluation(100, rate=0.5), train(210)]) != []
    assert progress.figures.endswith("WER takes 2.0%, speaker 9.8% at step 200")
    losses = {"kind": "evaluation", "step": 5, "wer": {}, "validation_loss": {"text/books": 2.5, "tts/empty": None}}
    assert evaluated(losses) == "evaluation of step 5: loss text/books 2.5000"
    assert evaluated({"kind": "evaluation", "step": 5}) == "evaluation of step 5: no figures"


def test_a_failed_evaluation_is_told() -> None:
    failure = {"kind": "failure", "step": 200, "what": "evaluation", "reason": "the records are gone"}
    assert told(ProgressText(1000, 0, live=False, now=0.0), [failure]) == ["evaluation of step 200 failed: the records are gone"]


def test_the_time_left_follows_recent_steps() -> None:
    pace = Pace()
    assert pace.left(10) == ""
    pace.add(1, 60.0)
    assert pace.left(10) == "10 min left"
    pace.add(2, 1.0)
    assert pace.step_time == 1.0, "a slow first step is forgotten"
    for step in range(3, 23):
        pace.add(step, 3.0)
    assert pace.step_time == pytest.approx(2.0), "after a half-life, half way to the new speed"
    pace.start()
    pace.add(15, 500.0)
    assert pace.step_time == pytest.approx(2.0), "nor does the first step behind a restart count"
    pace.add(16, 2.0)
    assert pace.step_time == pytest.approx(2.0)
    assert [duration(s) for s in (40, 720, 11100)] == ["40 s", "12 min", "3 h 05 min"]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_watcher_shows_all_lines_written_while_it_watches(tmp_path: Path, terminal: bool) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(train(99)) + "\n")
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=terminal)
    with ProgressWatcher(metrics, total_steps=4, first_step=0, console=console), metrics.open("a") as stream:
        for line in (train(3), evaluation(3), train(4)):
            stream.write(json.dumps(line) + "\n")
            stream.flush()
        stream.write('{"kind": "train", "step": 5')  # a line that is being written
        stream.flush()
    shown = screen.getvalue()
    assert "evaluation of step 3: WER takes 2.00%" in shown and "4/4" in shown and "step 99" not in shown
    assert ("step 3/4  loss" in shown) != terminal


def test_the_watcher_goes_on_behind_a_file_that_was_cut_back(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(train(step)) + "\n" for step in range(1, 9)))
    screen = io.StringIO()
    watcher = ProgressWatcher(metrics, 10, 8, Console(file=screen, width=200))
    metrics.write_text(json.dumps(train(1)) + "\n")
    assert list(watcher._lines.new_lines()) == []
    with metrics.open("a") as stream:
        stream.write(json.dumps(train(2)) + "\n")
    assert [line["step"] for line in watcher._lines.new_lines()] == [2]
