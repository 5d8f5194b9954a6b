from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from most_ray.console.progress import ProgressText, ProgressWatcher, evaluated
from most_ray.console.terminal import Terminal


def train(step: int, step_time: float = 2.0, **more: Any) -> dict[str, Any]:
    speed = {"tokens": 2000, "tokens_per_second": 2000 / step_time}
    return {"kind": "train", "step": step, "loss": 1.5, **speed, "step_time": step_time, **more}


def evaluation(step: int, rate: float = 0.02) -> dict[str, Any]:
    words = {"asr/takes": {"words": {"rate": rate, "interval": [0.005, 0.04]}}, "asr/none": {"words": {"rate": None}}}
    return {"kind": "evaluation", "step": step, "wer": {"takes": rate, "speaker": 0.098, "none": None}, "sets": words}


START = {"kind": "start", "step": 0}


def told(text_of: ProgressText, lines: list[dict[str, Any]], now: float = 0.0) -> list[str]:
    return [text for line in lines if (text := text_of.update(line, now))]


def test_logs_get_the_first_line_of_a_start_then_one_a_minute_and_the_last() -> None:
    progress = ProgressText(total_steps=1000, first_step=100, live=False)
    assert told(progress, [train(101)], now=3.0) == ["step 101/1000  loss 1.5000  1,000 tokens/s  2.0 s so far"]
    assert told(progress, [train(step) for step in range(102, 900)], now=62.9) == [], "however many steps that are"
    assert [text.split()[1] for text in told(progress, [train(900), train(901)], now=63.0)] == ["900/1000"]
    assert told(progress, [train(902)], now=122.0) == []
    assert len(told(progress, [train(1000)], now=122.5)) == 1, "the last step is always told"
    assert len(told(progress, [{"kind": "start", "step": 950}, train(951), train(952)], now=123.0)) == 1, "as is a new attempt"


def test_lines_of_other_kinds_are_no_steps_and_old_ones_are() -> None:
    progress = ProgressText(10, 0, live=False)
    others = [START, {"kind": "experts", "step": 9, "load": {}}, {"kind": "something new", "step": 9}]
    assert told(progress, others) == [] and progress.step == 0
    assert told(progress, [{"step": 3, "loss": None, "tokens_per_second": 5.0}]) == ["step 3/10  loss skipped"]


def test_an_evaluation_is_told_when_it_comes_and_the_newest_stays_in_sight() -> None:
    progress = ProgressText(1000, 0, live=True)
    assert told(progress, [evaluation(200)]) == ["evaluation of step 200: WER takes 2.00% [0.50%, 4.00%], speaker 9.80%"]
    assert told(progress, [evaluation(100, rate=0.5), train(210)]) != []
    assert progress.line(160).endswith("WER takes 2.00%, speaker 9.80% at step 200")
    losses = {"kind": "evaluation", "step": 5, "wer": {}, "validation_loss": {"text/books": 2.5, "tts/empty": None}}
    assert evaluated(losses) == "evaluation of step 5: loss text/books 2.5000"
    assert evaluated({"kind": "evaluation", "step": 5}) == "evaluation of step 5: no figures"


def test_a_failed_evaluation_is_told() -> None:
    failure = {"kind": "failure", "step": 200, "what": "evaluation", "reason": "the records are gone"}
    assert told(ProgressText(1000, 0, live=False), [failure]) == ["evaluation of step 200 failed: the records are gone"]


BUSY = train(99_999, asr_loss=0.0123, tts_loss=3.1274, text_loss=2.2) | {"tokens": 9_000_000, "tokens_per_second": 1_234_567.0}


def busy() -> ProgressText:
    """The progress of a long run on three tasks."""
    progress = ProgressText(100_000_000, 0, live=True)
    told(progress, [START, train(99_997), {**BUSY, "step": 99_998}, BUSY, evaluation(99_000)])
    return progress


def test_the_line_holds_loss_by_task_speed_and_time_left_at_80_columns_and_error_rates_where_there_is_room() -> None:
    progress = ProgressText(1700, 0, live=True)
    lines = [train(step, 0.1, asr_loss=0.0123, tts_loss=3.1274) for step in (498, 499, 500)]
    told(progress, [START, *lines, evaluation(400)])
    full = "step 500/1700  loss 1.5000  asr 0.0123  tts 3.1274  20,000 tokens/s  2 min left"
    assert progress.line(80) == full and progress.line(78) == full.replace("loss 1.5000  ", "")
    wide = "step 500/1700  asr 0.0123  tts 3.1274  20,000 tokens/s  2 min left  WER takes 2.00%, speaker 9.80% at step 400"
    assert progress.line(120) == wide


def test_no_line_is_longer_than_its_room_and_no_figure_is_cut() -> None:
    progress = busy()
    whole = set(progress.line(1000).split("  "))
    figures = whole | {part for width in range(200) for part in progress.line(width).split("  ")}
    for width in range(200):
        assert len(progress.line(width)) <= width
    wer = r"WER takes 2.00%, speaker 9.80%( at step 99000)?"
    known = rf"step 99999/100000000|(loss|asr|tts|text) \d+\.\d{{2,4}}|[\d,]+ tokens/s|[\d.]+M tok/s|.* left|.* so far|{wer}"
    assert not [part for part in figures - {""} if not re.fullmatch(known, part)]
    assert all(each in progress.line(82) for each in ("step 99999/100000000", "asr 0.01", "tts 3.13", "text 2.20", "1.09M tok/s", "left"))


def test_the_time_of_earlier_starts_counts_and_their_lines_are_not_shown() -> None:
    progress = ProgressText(100, 20, live=False)
    for line in (START, train(10), train(20), evaluation(20), train(30)):
        progress.recall(line)  # step 30 is beyond the checkpoint: it will be made again
    text = progress.line(120)
    assert text == "step 20/100  starting workers"
    (first,) = told(progress, [{"kind": "start", "step": 20}, train(21, 9.0)])
    assert "32.0 s so far" not in first and first.endswith("13.0 s so far  WER takes 2.00%, speaker 9.80% at step 20")
    assert "16 s left" in first, "by the steps of earlier starts"


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminal_shows_one_line_that_fits(tmp_path: Path, width: int) -> None:
    metrics, screen = tmp_path / "metrics.jsonl", io.StringIO()
    metrics.write_text("")
    console = Terminal(file=screen, width=width, force_terminal=True)
    with ProgressWatcher(metrics, total_steps=100_000_000, first_step=0, console=console), metrics.open("a") as stream:
        for line in (START, train(99_997), {**BUSY, "step": 99_998}, BUSY, evaluation(99_000)):
            stream.write(json.dumps(line) + "\n")
            stream.flush()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line for part in shown.split("\n") for line in part.split("\r")]
    assert all(len(line.rstrip()) <= width for line in lines) and "…" not in shown
    assert any(busy().line(width - 2) in line for line in lines)


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
