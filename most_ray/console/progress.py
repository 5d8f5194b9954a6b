"""The progress of a run on the screen, or in a job's log."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TimeElapsedColumn

from most_ray.console.terminal import print_line, progress_bar
from most_ray.io.journal import Follower

_HALF_LIFE = 20.0  # steps after which a step's time counts half
_EVERY_SHARE, _EVERY_S = 0.05, 60.0  # share of the steps, and seconds, after which the next plain line is due
_POLL_S = 0.5  # seconds between two looks at metrics.jsonl


class Pace:
    """The time of a step: a moving average in which newer steps count more. The first line after each start is slow (kernels, caches) and
    counts only until there is another one."""

    def __init__(self) -> None:
        self.step_time: float | None = None  # seconds; None before the first line
        self._warm, self._lines, self._at = False, 0, 0

    def start(self) -> None:
        """The run starts or resumes."""
        self._lines = 0

    def add(self, step: int, step_time: float) -> None:
        """Add a line of training: its step, and its seconds per step."""
        self._lines += 1
        steps, self._at = max(1, step - self._at), step
        if self._lines == 1 and self._warm:
            return
        if self._warm and self.step_time is not None:
            weight = 0.5 ** (steps / _HALF_LIFE)
            self.step_time = weight * self.step_time + (1 - weight) * step_time
        else:
            self.step_time, self._warm = step_time, self._lines > 1

    def left(self, steps: int) -> str:
        """The time for so many steps, as `12 min left`; empty if it is not known yet."""
        return "" if self.step_time is None else f"{duration(self.step_time * steps)} left"


def duration(seconds: float) -> str:
    """A time as text: `40 s`, `12 min` or `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressText:
    """The text of a run's progress, from its lines of metrics.jsonl.

    Args:
        live: the screen has a progress bar with `figures`, so that only evaluations and failures are printed.
        now: seconds of any steady clock.
    """

    def __init__(self, total_steps: int, first_step: int, live: bool, now: float) -> None:
        self.step = first_step  # the newest
        self.figures = "starting workers"  # then loss, speed, time left and newest error rates
        self._total, self._live = total_steps, live
        self._pace, self._newest = Pace(), (-1, "")
        self._shown_step, self._shown_at = first_step, now

    def update(self, line: Mapping[str, Any], now: float) -> str | None:
        """Add a line. Returns the text to print for it, None if there is none."""
        match line.get("kind", "train"):
            case "start":
                self._pace.start()
            case "evaluation":
                if line["step"] >= self._newest[0] and (rates := ", ".join(f"{n} {r:.1%}" for n, r, _ in error_rates(line))):
                    self._newest = (line["step"], f"WER {rates} at step {line['step']}")
                return evaluated(line)
            case "failure":
                return f"{line['what']} {'of' if line['what'] == 'evaluation' else 'at'} step {line['step']} failed: {line['reason']}"
            case "train":
                return self._trained(line, now)
        return None

    def _trained(self, line: Mapping[str, Any], now: float) -> str | None:
        self.step = line["step"]
        if line.get("step_time") is not None:
            self._pace.add(self.step, line["step_time"])
        loss = "skipped" if line.get("loss") is None else f"{line['loss']:.4f}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s" if line.get("tokens_per_second") is not None else ""
        left = self._pace.left(max(0, self._total - self.step))
        self.figures = "  ".join(part for part in (f"loss {loss}", speed, left, self._newest[1]) if part)
        due = abs(self.step - self._shown_step) >= _EVERY_SHARE * self._total or now - self._shown_at >= _EVERY_S
        if self._live or not (due or self.step >= self._total):
            return None
        self._shown_step, self._shown_at = self.step, now
        return f"step {self.step}/{self._total}  {self.figures}"


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
    """An evaluation as text: `evaluation of step 200: WER test_takes 2.00% [0.5, 4.0]`; with losses if no set has reference words."""
    shown = [f"{name} {rate:.2%}" + (f" [{100 * i[0]:.1f}, {100 * i[1]:.1f}]" if i else "") for name, rate, i in error_rates(line)]
    losses = [f"{name} {loss:.4f}" for name, loss in (line.get("validation_loss") or {}).items() if loss is not None]
    what = "WER " + ", ".join(shown) if shown else "loss " + ", ".join(losses) if losses else "no figures"
    return f"evaluation of step {line['step']}: {what}"


class ProgressWatcher:
    """Follows metrics.jsonl on a thread of its own and shows the run's progress: a bar on a terminal, elsewhere lines at intervals."""

    def __init__(self, metrics: Path, total_steps: int, first_step: int, console: Console) -> None:
        self._total, self._console = total_steps, console
        self._lines = Follower(str(metrics), only_new=True)  # what is there was shown by an earlier start
        self._text = ProgressText(total_steps, first_step, console.is_terminal, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        steps = "step {task.completed:.0f}/{task.total:.0f}"
        with progress_bar(self._console, steps, "{task.fields[figures]}", TimeElapsedColumn()) as progress:
            bar = progress.add_task("train", total=self._total, completed=self._text.step, figures=self._text.figures)
            stopping = False
            while not stopping:
                stopping = self._stop.wait(_POLL_S)
                for line in self._lines.new_lines():
                    if text := self._text.update(line, time.monotonic()):
                        print_line(self._console, text)
                progress.update(bar, completed=self._text.step, figures=self._text.figures)
