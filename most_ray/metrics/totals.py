"""A run's totals from its lines of metrics.jsonl: the one clock and the one speed of screens, summary.json, report and trackers.

The training time is the sum of the times of all lines of kind `train`, as `step_time` has them: of all starts, with waiting for data and
stalls of checkpoints, without starting up, evaluations in between steps, and steps that a resume has cut off (they are made again). The
speed is the tokens of these lines over this time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

COUNTED = ("step", "tokens", "samples", "tokens_per_second", "step_time", "time")  # keys of lines of kind `train`
_HALF_LIFE = 20.0  # steps after which a step's time counts half in the time left


@dataclass(frozen=True)
class Totals:
    """What a run's lines add up to, up to a step."""

    step: int = 0  # of the newest line
    seconds: float = 0.0  # training time
    tokens: int = 0  # trained on
    records: int = 0  # trained on; 0 where lines of an earlier version do not say
    timed_tokens: int = 0  # tokens of the lines whose time is known

    @property
    def tokens_per_second(self) -> float | None:
        """The run's speed; None without a line that has a time and tokens."""
        return self.timed_tokens / self.seconds if self.seconds > 0 and self.timed_tokens else None

    def keys(self) -> dict[str, Any]:
        """The totals as keys of a line of kind `train`."""
        return {
            "training_seconds": self.seconds,
            "run_tokens": self.tokens,
            "run_records": self.records,
            "run_tokens_per_second": self.tokens_per_second or 0.0,
        }


class RunClock:
    """Adds up the lines of a run, in the order of the file. A start cuts off the lines beyond its step, as in the file."""

    def __init__(self) -> None:
        self._ends = [Totals()]  # up to each line
        self._starts: list[int] = []  # steps
        self._time: float | None = None  # of the newest line, of either kind
        self._lines = 0  # since the newest start
        self._step_time: float | None = None  # seconds, of recent steps, without the first line after each start

    @property
    def totals(self) -> Totals:
        """Those up to the newest line."""
        return self._ends[-1]

    @property
    def seconds(self) -> list[float]:
        """The training time up to each line of kind `train`."""
        return [end.seconds for end in self._ends[1:]]

    @property
    def starts(self) -> int:
        """The number of starts."""
        return len(self._starts)

    def since(self, step: int) -> float:
        """The training time of the lines beyond a step."""
        return self.totals.seconds - next((end.seconds for end in reversed(self._ends) if end.step <= step), 0.0)

    def add(self, line: Mapping[str, Any]) -> Totals:
        """Add a line; those of other kinds than `start` and `train` do not count. Returns the totals up to it."""
        kind, step = line.get("kind", "train"), _number(line.get("step"))
        if step is None or kind not in ("start", "train"):
            return self.totals
        self._cut(int(step) if kind == "start" else int(step) - 1)
        if kind == "start":
            self._starts = [*(at for at in self._starts if at <= step), int(step)]
            self._lines = 0
        else:
            self._ends.append(self._with(line, int(step)))
        self._time = _number(line.get("time"))
        return self.totals

    def _cut(self, step: int) -> None:
        while len(self._ends) > 1 and self._ends[-1].step > step:
            self._ends.pop()

    def _with(self, line: Mapping[str, Any], step: int) -> Totals:
        before = self.totals
        steps = step - max(before.step, 0 if len(self._ends) > 1 or not self._starts else self._starts[-1])
        tokens, seconds = int(_number(line.get("tokens")) or 0), _seconds(line, steps, self._time)
        self._pace(steps, seconds)
        return Totals(
            step,
            before.seconds + (seconds or 0.0),
            before.tokens + tokens,
            before.records + int(_number(line.get("samples")) or 0),
            before.timed_tokens + (tokens if seconds else 0),
        )

    def _pace(self, steps: int, seconds: float | None) -> None:
        """Follow the time of a step, in which newer steps count more. The first line after each start is slow (kernels, caches)."""
        self._lines += 1
        if self._lines == 1 or seconds is None:
            return
        step_time, weight = seconds / max(1, steps), 0.5 ** (max(1, steps) / _HALF_LIFE)
        self._step_time = step_time if self._step_time is None else weight * self._step_time + (1 - weight) * step_time

    def seconds_left(self, total_steps: int) -> float | None:
        """The time to the last step, by recent steps, of earlier starts too. None until a start has had a second line."""
        return None if self._step_time is None else self._step_time * max(0, total_steps - self.totals.step)


def clock_of(lines: Iterable[Mapping[str, Any]]) -> RunClock:
    """The clock after some lines."""
    clock = RunClock()
    for line in lines:
        clock.add(line)
    return clock


def _seconds(line: Mapping[str, Any], steps: int, before: float | None) -> float | None:
    """The time of a line's steps; None where it does not say it. `before`: the time at which they began, for lines that say no more."""
    tokens, speed, step_time, time = (_number(line.get(key)) for key in ("tokens", "tokens_per_second", "step_time", "time"))
    if tokens and speed and tokens > 0 and speed > 0:
        return tokens / speed
    if step_time and step_time > 0:
        return step_time * max(1, steps)
    return time - before if speed is None and step_time is None and time is not None and before is not None and time > before else None


def _number(value: Any) -> float | None:
    """A value of a file where it is a number whose sums stay finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e200 else None  # false for NaN
