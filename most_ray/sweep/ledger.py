"""A sweep's ledger, trials.jsonl: all trials and their results. It is the only record of a sweep's state, which a restart reads.

Lines are JSON, each with `kind` and `time`; a later line about a trial adds to the earlier ones:

- `sweep`: a start of the sweep. name, objectives, dimensions (name, kind, values or low and high), search, scheduler, max_trials,
  max_steps, concurrent; full: the length of the base's run, if it differs from that of the trials.
- `trial`: a trial and its run. trial (from 1), run (its folder in trials/), values (by dimension), settings (keys of the configuration that
  the run changes); parent: {trial, run, step} of the checkpoint that it continues from, or null; invalid: why it cannot be trained. A
  further line with another run: population based training has replaced the trial by a changed copy of its parent.
- `result`: trial, run, step, metrics (see `metrics_of`), intervals (95%, of those metrics that have one).
- `end`: trial, step, state (`finished`: all its steps; `stopped`: by the scheduler; `failed`), reason.
"""

from __future__ import annotations

import logging
import shlex
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from most_ray.config import OPTIONS
from most_ray.errors import ConfigError, shown
from most_ray.io import storage
from most_ray.io.json_values import json_text, parse_lines, read_lines
from most_ray.io.run_folder import LEDGER, TRIALS, RunFolder, step_uri
from most_ray.metrics.figures import OBJECTIVES, RATES
from most_ray.options import current_words
from most_ray.runs.run_lock import RunLock

logger = logging.getLogger(__name__)
KEPT, BEST = "kept", "best.yaml"  # in the sweep's folder: checkpoints for other trials, the best configuration
_MOST = 1 << 53  # of steps and trials
State = Literal["open", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Result:
    """A trial's metrics at one step of its run."""

    run: str
    step: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # 95%, of the metrics that have one


@dataclass
class Trial:
    """One trial."""

    number: int  # from 1
    runs: list[str] = field(default_factory=list)  # folders in trials/; the last is the current one
    values: dict[str, Any] = field(default_factory=dict)  # of the current run, by dimension
    settings: dict[str, Any] = field(default_factory=dict)  # of the current run, by configuration key
    parents: list[dict[str, Any] | None] = field(default_factory=list)  # of each run: the checkpoint that it continues from
    results: list[Result] = field(default_factory=list)
    state: State = "open"
    reason: str | None = None  # of a failure
    began: float = 0.0  # UNIX time in seconds
    ended: float | None = None

    @property
    def step(self) -> int:
        """The step of its last result, 0 without one."""
        return self.results[-1].step if self.results else 0

    def metric(self, name: str) -> float | None:
        """Return a metric's value in the last result; None if it has none there, as if it is not finite, whatever earlier results have."""
        return self.results[-1].metrics.get(name) if self.results else None


@dataclass
class Ledger:
    """The state of a sweep."""

    sweep: dict[str, Any]  # the newest line of kind `sweep`
    trials: dict[int, Trial]  # by number, ascending
    spent_s: float = 0.0  # from each start to its last line, summed over starts

    def in_state(self, *states: State) -> list[Trial]:
        """Return the trials in any of these states."""
        return [trial for trial in self.trials.values() if trial.state in states]


def replay(lines: Iterable[Mapping[str, Any]]) -> Ledger:
    """Return the state that the lines of a ledger lead to. Incomplete lines are skipped."""
    ledger = Ledger({}, {})
    began = last = 0.0
    for line in lines:
        try:
            now = float(line.get("time", 0.0))
            if line["kind"] == "sweep":
                ledger.spent_s += last - began
                began, last, ledger.sweep = now, now, dict(line)
            else:
                _apply(ledger, line, now)
                last = max(last, now)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            logger.warning("an incomplete line of %s is skipped (%s): %s", LEDGER, shown(error), shown(dict(line)))
    ledger.spent_s += last - began
    ledger.trials = dict(sorted(ledger.trials.items()))
    return ledger


def _apply(ledger: Ledger, line: Mapping[str, Any], now: float) -> None:
    """Add a line about a trial to a ledger."""
    number = _count(line["trial"])
    if line["kind"] == "trial":
        run, values, settings = str(line["run"]), dict(line["values"]), dict(line["settings"])
        trial = ledger.trials.setdefault(number, Trial(number, began=now))
        if not trial.runs or trial.runs[-1] != run:
            trial.runs.append(run)
            trial.parents.append(line.get("parent"))
        trial.values, trial.settings = current_words(OPTIONS, values), current_words(OPTIONS, settings)
        if line.get("invalid"):
            trial.state, trial.reason, trial.ended = "failed", str(line["invalid"]), now
        return
    trial = ledger.trials[number]
    if line["kind"] == "result":
        bounds = {name: (float(low), float(high)) for name, (low, high) in dict(line.get("intervals", {})).items()}
        result = Result(str(line["run"]), _count(line["step"]), dict(line["metrics"]), bounds)
        if all((known.run, known.step) != (result.run, result.step) for known in trial.results):
            trial.results.append(result)
    elif line["kind"] == "end" and line["state"] in ("finished", "stopped", "failed"):
        trial.state, trial.reason, trial.ended = line["state"], line.get("reason"), now


def _count(value: Any) -> int:
    """A trial's number or a step. Raises ValueError for numbers that none has."""
    if not 0 <= (number := int(value)) <= _MOST:
        raise ValueError(f"{number} is neither a step nor a trial")
    return number


class LedgerFile:
    """The ledger's file, for the only process that writes it, with its current state as `ledger`. An incomplete last line, left by a kill,
    is cut off. Raises ConfigError if another process writes it."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lock = RunLock(folder.uri, "swept")
        self._driver = uuid.uuid4().hex
        if folder.remote:
            folder.claim(self._driver)
        folder.pull(LEDGER)
        self._path = folder.local / LEDGER
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.ledger = replay(parse_lines(whole))
        self._stream = self._path.open("ab")
        self._stream.truncate(len(whole))

    def write(self, kind: str, **content: Any) -> None:
        """Append a line; of a sweep at a URI, upload the file. Raises ConfigError if another machine owns the sweep now."""
        if self._folder.remote and self._folder.owner() != self._driver:
            rule = "has been taken over by a newer start of the same sweep."
            raise ConfigError("name", storage.redact(self._folder.uri), rule, "One driver at a time.")
        line = {"kind": kind, "time": round(time.time(), 3), **content}
        self._stream.write(json_text(line).encode() + b"\n")
        self._stream.flush()
        self._folder.push(LEDGER)
        if kind == "sweep":
            self.ledger.sweep = line
        else:
            _apply(self.ledger, line, line["time"])

    def reread(self) -> Ledger:
        """Return the file's state, with the time spent up to now."""
        return replay(read_lines(self._path))

    def close(self) -> None:
        """Close the file, and remove an empty one: a sweep that was refused leaves no ledger, so that its folder can still be a run's."""
        self._stream.close()
        if not self._path.stat().st_size:
            self._path.unlink()
        self._lock.close()


def read_ledger(uri: str) -> Ledger | None:
    """Return the state of the sweep in a folder; None if it has no ledger."""
    try:
        return replay(parse_lines(storage.read_bytes(storage.join(uri, LEDGER))))
    except FileNotFoundError:
        return None


def metrics_of(evaluation: Mapping[str, Any], train: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the metrics by name of a line of kind `evaluation` and of the line of kind `train` of the same step: wer/SET, cer/SET,
    cycle_wer/SET, outside_wer/SET, unit_error_rate/SET; loss/TASK/SET, perplexity/TASK/SET, duration_ratio/TASK/SET; wer and loss, the
    means over the sets; train/KEY."""
    found: dict[str, Any] = {}
    for name, figures in evaluation.get("sets", {}).items():
        # Sets of two tasks may share a name: one without a part leaves the other's value.
        found |= {metric: errors.get("rate") for metric, errors in _error_rates(name, figures)}
        found |= {f"{called}/{name}": figures.get(key) for key, called in OBJECTIVES.items()}
    for mean in ("wer", "loss"):
        of_sets = [value for name, value in found.items() if name.startswith(f"{mean}/") and value is not None]
        found[mean] = sum(of_sets) / len(of_sets) if of_sets else None
    found |= {f"train/{key}": value for key, value in (train or {}).items() if key not in ("step", "time")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def intervals_of(evaluation: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the 95% intervals of those metrics of an evaluation that have one."""
    rates = (rate for name, figures in evaluation.get("sets", {}).items() for rate in _error_rates(name, figures))
    return {metric: (bounds[0], bounds[1]) for metric, errors in rates if (bounds := errors.get("interval"))}


def _error_rates(name: str, figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the error rates of a set, named without its task, by metric."""
    return [(f"{called}/{name.split('/', 1)[-1]}", errors) for part, called in RATES.items() if (errors := figures.get(part))]


@dataclass(frozen=True)
class Objective:
    """A metric of `metrics_of` to minimise, written NAME, or to maximise, written max:NAME."""

    metric: str
    largest: bool = False  # maximise it

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read an objective as it is written in a configuration."""
        direction, colon, name = text.partition(":")
        # Any other word before a colon is part of a set's name, or a typing error that must not reverse the search.
        return cls(name.strip(), direction.strip() == "max") if colon and direction.strip() in ("min", "max") else cls(text.strip())

    def __str__(self) -> str:
        return f"max:{self.metric}" if self.largest else self.metric

    def key(self, value: float) -> float:
        """Return a value to sort by: smaller is better."""
        return -value if self.largest else value


def ranked(trials: Iterable[Trial], objective: Objective) -> list[Trial]:
    """Return the trials that have a value of the objective, best first by the last one; finished trials come before others."""
    valued = [trial for trial in trials if trial.state != "failed" and trial.metric(objective.metric) is not None]
    return sorted(valued, key=lambda trial: (trial.state != "finished", objective.key(trial.metric(objective.metric) or 0.0), trial.number))


def pareto(trials: Iterable[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Return the Pareto front of the finished trials, sorted by the first objective: those that no other one dominates, being better in one
    objective and at least as good in all others."""
    points = []
    for trial in trials:
        keys = [objective.key(value) for objective in objectives if (value := trial.metric(objective.metric)) is not None]
        if trial.state == "finished" and len(keys) == len(objectives):
            points.append((keys, trial.number, trial))

    def dominated(own: list[float]) -> bool:
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other, _, _ in points)

    return [trial for own, _, trial in sorted(points, key=lambda point: point[:2]) if not dominated(own)]


def metric_at(trial: Trial, metric: str, step: int) -> float | None:
    """Return a trial's metric at a step, in any of its runs."""
    return next((result.metrics.get(metric) for result in reversed(trial.results) if result.step == step), None)


def trial_uri(sweep_uri: str, run: str) -> str:
    """Return the folder of a trial's run."""
    return storage.join(sweep_uri, TRIALS, run)


def commands_of(ledger: Ledger, sweep_uri: str, name: str, run: str) -> dict[str, str]:
    """Return the commands that train the best trial of the sweep `name`, whose run is `run`. `again`: a run with the same results as the
    trial; `in full`: one as long as the base's, if that differs from the trials."""
    again = ["most-ray", "train", "--config", storage.redact(storage.join(sweep_uri, BEST))]
    commands = {"again": shlex.join(again)}
    if isinstance(full := ledger.sweep.get("full"), dict) and full:
        flags = [word for name, value in full.items() for word in (f"--{name}", "none" if value is None else str(value))]
        commands["in full"] = shlex.join([*again, "--name", f"{name}-full-{run}", *flags])
    return commands


def kept_uri(sweep_uri: str, run: str, step: int) -> str:
    """Return where a checkpoint that other trials continue from is kept, after the run itself has deleted it."""
    return step_uri(storage.join(sweep_uri, KEPT, run), step)
