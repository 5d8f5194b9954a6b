"""The progress of a run on the screen, or in a job's log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from most_ray.console.terminal import LOG_WIDTH, print_line, shown_text
from most_ray.io.journal import Follower, journal_lines
from most_ray.metrics.texts import duration, percent, rate_text, rough_duration
from most_ray.metrics.totals import RunClock
from most_ray.records.record import TASKS

_EVERY_S = 60.0  # seconds after which the next plain line is due
_POLL_S = 0.5  # seconds between two looks at metrics.jsonl
_GAP = 2  # characters between the line and the bar
_BAR = (12, 40)  # characters: a bar is drawn where there is room for the fewest


class ProgressText:
    """The text of a run's progress, from its lines of metrics.jsonl.

    Args:
        live: the screen has a progress bar with `line`, so that only evaluations and failures are printed.
    """

    def __init__(self, total_steps: int, first_step: int, live: bool) -> None:
        self.step = first_step  # the newest
        self._total, self._first, self._live = total_steps, first_step, live
        self._clock, self._newest = RunClock(), (-1, "")
        self._trained: Mapping[str, Any] = {}  # the newest line of this start
        self._shown_at: float | None = None

    def recall(self, line: Mapping[str, Any]) -> None:
        """Add a line of an earlier start: it counts for the run's time, speed and newest error rates, and is not shown."""
        if line["step"] <= self._first:
            self._clock.add(line)
            self._judge(line)

    def update(self, line: Mapping[str, Any], now: float) -> str | None:
        """Add a line, at `now` in seconds of any steady clock. Returns the text to print for it, None if there is none."""
        self._clock.add(line)
        match line.get("kind", "train"):
            case "start":
                self._shown_at = None  # the first line after it is shown
            case "evaluation":
                self._judge(line)
                return evaluated(line)
            case "failure":
                return f"{line['what']} {'of' if line['what'] == 'evaluation' else 'at'} step {line['step']} failed: {line['reason']}"
            case "train":
                self.step, self._trained = line["step"], line
                return self._due(now)
        return None

    def _due(self, now: float) -> str | None:
        """The line for a log: of the first step of a start, of the last one, and one a minute."""
        first = self._shown_at is None
        if self._live or not (first or self.step >= self._total or now - (self._shown_at or 0.0) >= _EVERY_S):
            return None
        self._shown_at = now
        return self.line(LOG_WIDTH)

    def _judge(self, line: Mapping[str, Any]) -> None:
        if line.get("kind") != "evaluation" or line["step"] < self._newest[0]:
            return
        if rates := ", ".join(f"{name} {percent(rate)}" for name, rate, _ in error_rates(line)):
            self._newest = (line["step"], f"WER {rates}")

    def line(self, width: int) -> str:
        """The newest figures in one line of at most `width` characters. Whole figures are left out where there is no room, the least
        important first: error rates, the time so far, the loss of all tasks together, digits of losses."""
        head = f"step {self.step}/{self._total}"
        if not self._trained:
            return _longest([(head, "starting workers"), (head,)], width)
        totals, left = self._clock.totals, self._clock.seconds_left(self._total)
        speed = f"{totals.tokens_per_second:,.0f} tokens/s" if totals.tokens_per_second else ""
        remaining = "" if left is None else f"{rough_duration(left)} left"
        pace, past = (speed, remaining), f"{duration(totals.seconds)} so far" if totals.seconds else ""
        rates, at = self._newest[1], f"{self._newest[1]} at step {self._newest[0]}" if self._newest[1] else ""
        tasks = [_losses(self._trained, digits) for digits in (4, 3, 2)]
        every = _losses(self._trained, 4, with_sum=True)
        choices = [(head, every, *pace, past, at), (head, every, *pace, at), (head, tasks[0], *pace, at), (head, tasks[0], *pace, rates)]
        choices += [(head, every, *pace, past), (head, every, *pace), *((head, each, *pace) for each in tasks)]
        choices += [
            (head, tasks[2], _short_speed(totals.tokens_per_second), remaining),
            (head, tasks[2], remaining),
            (head, tasks[2]),
            (head,),
        ]
        return _longest(choices, width)


def _longest(choices: Iterable[tuple[str, ...]], width: int) -> str:
    """The first choice, its parts joined, that has at most `width` characters; empty if none has."""
    texts = ("  ".join(filter(None, choice)) for choice in choices)
    return next((text for text in texts if len(text) <= width), "")


def _short_speed(speed: float | None) -> str:
    """A speed in three digits: `1.09M tok/s`."""
    if not speed:
        return ""
    size = next((size for size in (1e9, 1e6, 1e3) if speed >= size), 1.0)
    return f"{speed / size:.3g}{ {1e9: 'G', 1e6: 'M', 1e3: 'k'}.get(size, '') } tok/s"


def _losses(line: Mapping[str, Any], digits: int, with_sum: bool = False) -> str:
    """The losses of a line's tasks, as `asr 0.1234  tts 2.9876`; of all tasks together where there are no others, or `with_sum`."""
    if line.get("loss") is None:
        return "loss skipped"
    tasks = [f"{task} {line[f'{task}_loss']:.{digits}f}" for task in TASKS if line.get(f"{task}_loss") is not None]
    return "  ".join([*([f"loss {line['loss']:.{digits}f}"] if with_sum or len(tasks) < 2 else []), *(tasks if len(tasks) > 1 else [])])


def error_rates(line: Mapping[str, Any]) -> list[tuple[str, float, tuple[float, float] | None]]:
    """(set, word error rate, its 95 % interval) of an evaluation's line, without sets that have no reference words."""
    rates = []
    for name, rate in (line.get("wer") or {}).items():
        words = (line.get("sets") or {}).get(f"asr/{name}", {}).get("words") or {}
        interval = words.get("interval")
        if rate is not None:
            rates.append((name, float(rate), (float(interval[0]), float(interval[1])) if interval else None))
    return rates


def evaluated(line: Mapping[str, Any]) -> str:
    """An evaluation as text: `evaluation of step 200: WER test_takes 2.00% [0.50%, 4.00%]`; with losses if no set has reference words."""
    shown = [f"{name} {rate_text({'rate': rate, 'interval': interval})}" for name, rate, interval in error_rates(line)]
    losses = [f"{name} {loss:.4f}" for name, loss in (line.get("validation_loss") or {}).items() if loss is not None]
    what = "WER " + ", ".join(shown) if shown else "loss " + ", ".join(losses) if losses else "no figures"
    return f"evaluation of step {line['step']}: {what}"


class _Line(ProgressColumn):
    """The progress in one line, which the task's field `line` makes for a width."""

    def render(self, task: Any) -> Text:
        return Text(shown_text(task.fields["line"]), no_wrap=True, overflow="crop")


class _Bar(ProgressColumn):
    """A bar in the room that the line leaves, if that is enough."""

    def __init__(self, console: Console) -> None:
        super().__init__(Column(no_wrap=True))
        self._console = console

    def render(self, task: Any) -> ProgressBar | Text:
        fewest, most = _BAR
        room = self._console.width - len(task.fields["line"]) - _GAP
        return ProgressBar(task.total, task.completed, min(most, room)) if room >= fewest else Text("")


class ProgressWatcher:
    """Follows metrics.jsonl on a thread of its own and shows the run's progress: a bar on a terminal, elsewhere lines at intervals."""

    def __init__(self, metrics: Path, total_steps: int, first_step: int, console: Console) -> None:
        self._total, self._console = total_steps, console
        self._metrics, self._known = metrics, metrics.stat().st_size if metrics.exists() else 0
        self._lines = Follower(str(metrics), only_new=True)  # what is there was shown by an earlier start
        self._text = ProgressText(total_steps, first_step, console.is_terminal)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        for line in journal_lines(self._metrics, size=self._known) if self._known else ():
            self._text.recall(line)
        with Progress(_Line(), _Bar(self._console), console=self._console, disable=not self._console.is_terminal) as progress:
            bar = progress.add_task("train", total=self._total, completed=self._text.step, line=self._text.line(self._console.width - _GAP))
            stopping = False
            while not stopping:
                stopping = self._stop.wait(_POLL_S)
                for line in self._lines.new_lines():
                    if text := self._text.update(line, time.monotonic()):
                        print_line(self._console, text)
                progress.update(bar, completed=self._text.step, line=self._text.line(self._console.width - _GAP))
