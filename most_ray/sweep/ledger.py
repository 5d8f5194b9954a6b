"""A sweep's ledger, trials.jsonl: what was proposed, what came of it. It alone says where a sweep stands; whoever goes on reads it.

Lines are JSON, each with `kind` and `time`; a later line about a trial adds to the earlier ones:

- `sweep`: a start. name, objectives, dimensions (name, kind, values or low and high), search, scheduler, max_trials, max_steps,
  concurrent; full: how long the base's run is, where it is not as long as the trials.
- `trial`: a trial and the run that carries it out. trial (from 1), run (its folder in trials/), values (by dimension), settings (what of
  the base configuration its run changes); parent: {trial, run, step} of the checkpoint that it goes on from, or null. A further line with
  another run: population based training has replaced the trial by a changed copy of its parent. invalid: why it cannot be trained at all.
- `result`: trial, run, step, metrics (see `metrics_of`), intervals (95%, of those that have one).
- `end`: trial, step, state (`finished`: all its steps; `stopped`: by the scheduler; `failed`), reason.
"""

from __future__ import annotations

import fcntl
import json
import shlex
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from most_ray.config import OPTIONS
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.json_lines import parse_lines, read_lines
from most_ray.io.run_folder import LEDGER, RunFolder, step_uri
from most_ray.metrics.figures import OBJECTIVES, RATES
from most_ray.options import current_words

TRIALS, KEPT, BEST = "trials", "kept", "best.yaml"
State = Literal["open", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Result:
    """A trial's figures at one step of its run."""

    run: str
    step: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass
class Trial:
    """What the ledger says of one trial. `runs`: folders in trials/, the last is the one that counts; `settings` and `values` are its."""

    number: int
    runs: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    parents: list[dict[str, Any] | None] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    state: State = "open"
    reason: str | None = None
    began: float = 0.0
    ended: float | None = None

    @property
    def step(self) -> int:
        """That of its last result, 0 without one."""
        return self.results[-1].step if self.results else 0

    def metric(self, name: str) -> float | None:
        """Its value at the last result; None where it has none there, as of a loss that is not finite: an earlier one would flatter."""
        return self.results[-1].metrics.get(name) if self.results else None


@dataclass
class Ledger:
    """A ledger's lines, put together. `sweep`: the newest line of that kind; trials by number, ascending."""

    sweep: dict[str, Any]
    trials: dict[int, Trial]
    spent_s: float = 0.0  # from each start to its last line, all starts together

    def in_state(self, *states: State) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.state in states]


def fold(lines: Iterable[Mapping[str, Any]]) -> Ledger:
    """The ledger that lines make; what is incomplete is passed over."""
    ledger = Ledger({}, {})
    began = last = 0.0
    for line in lines:
        try:
            now = float(line.get("time", 0.0))
            if line["kind"] == "sweep":
                ledger.spent_s += last - began
                began = last = now
                ledger.sweep = dict(line)
            else:
                _fold_trial(ledger, line, now)
                last = max(last, now)
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    ledger.spent_s += last - began
    ledger.trials = dict(sorted(ledger.trials.items()))
    return ledger


def _fold_trial(ledger: Ledger, line: Mapping[str, Any], now: float) -> None:
    number = int(line["trial"])
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
        result = Result(str(line["run"]), int(line["step"]), dict(line["metrics"]), bounds)
        if all((known.run, known.step) != (result.run, result.step) for known in trial.results):
            trial.results.append(result)
    elif line["kind"] == "end" and line["state"] in ("finished", "stopped", "failed"):
        trial.state, trial.reason, trial.ended = line["state"], line.get("reason"), now


class LedgerFile:
    """The file, for the one process that writes it. A last line that a kill has torn is cut off; behind a URI every line goes there, as
    long as no other machine has taken the sweep over.

    Raises:
        ConfigError: another process has it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._lock = (folder.local / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            uri = storage.redact(folder.uri)
            raise ConfigError("name", uri, "is being swept by another process.", "Wait for it, or choose another name.") from None
        self._mark = uuid.uuid4().hex
        if folder.remote:
            folder.claim(self._mark)
        folder.pull(LEDGER)
        path = folder.local / LEDGER
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.ledger = fold(parse_lines(whole))
        self._stream = path.open("ab")
        self._stream.truncate(len(whole))

    def write(self, kind: str, **content: Any) -> None:
        if self._folder.remote and self._folder.owner() != self._mark:
            rule = "has been taken over by a newer start of the same sweep."
            raise ConfigError("name", storage.redact(self._folder.uri), rule, "One driver at a time.")
        line = {"kind": kind, "time": round(time.time(), 3), **content}
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
        self._folder.push(LEDGER)
        if kind == "sweep":
            self.ledger.sweep = line
        else:
            _fold_trial(self.ledger, line, line["time"])

    def reread(self) -> Ledger:
        """The ledger as the file has it, with the time that has been spent."""
        return fold(read_lines(self._folder.local / LEDGER))

    def close(self) -> None:
        """A sweep that was refused leaves no ledger: its folder may yet be a run's."""
        self._stream.close()
        path = self._folder.local / LEDGER
        if not path.stat().st_size:
            path.unlink()
        self._lock.close()


def read_ledger(uri: str) -> Ledger | None:
    """The ledger of the sweep at a place (path or URI); None where there is none."""
    try:
        return fold(parse_lines(storage.read_bytes(storage.join(uri, LEDGER))))
    except FileNotFoundError:
        return None


def metrics_of(evaluation: Mapping[str, Any], train: Mapping[str, Any] | None = None) -> dict[str, float]:
    """A line of kind `evaluation`, and the `train` line of its step, as figures by name: wer/SET, cer/SET, cycle_wer/SET, outside_wer/SET,
    unit_error_rate/SET; loss/TASK/SET, perplexity/TASK/SET, duration_ratio/TASK/SET; wer and loss, the mean over the sets; train/KEY."""
    found: dict[str, Any] = {}
    for name, figures in evaluation.get("sets", {}).items():
        for part, called in RATES.items():
            if errors := figures.get(part):  # sets of two tasks may be called alike: one has no say about the other's figures
                found[f"{called}/{_bare(name)}"] = errors.get("rate")
        found |= {f"{called}/{name}": figures.get(key) for key, called in OBJECTIVES.items()}
    for mean in ("wer", "loss"):
        of_sets = [value for name, value in found.items() if name.startswith(f"{mean}/") and value is not None]
        found[mean] = sum(of_sets) / len(of_sets) if of_sets else None
    found |= {f"train/{key}": value for key, value in (train or {}).items() if key not in ("step", "time")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def intervals_of(evaluation: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The 95% intervals of those figures that have one."""
    found = {}
    for name, figures in evaluation.get("sets", {}).items():
        for part, called in RATES.items():
            if bounds := (figures.get(part) or {}).get("interval"):
                found[f"{called}/{_bare(name)}"] = (bounds[0], bounds[1])
    return found


def _bare(name: str) -> str:
    return name.split("/", 1)[-1]


@dataclass(frozen=True)
class Objective:
    """A figure of `metrics_of` to be made small, or large: written NAME or max:NAME."""

    metric: str
    largest: bool = False

    @classmethod
    def parse(cls, text: str) -> Objective:
        direction, colon, name = text.partition(":")
        # Any other word before a colon is part of a set's name, or a slip that must not turn the search round.
        return cls(name.strip(), direction.strip() == "max") if colon and direction.strip() in ("min", "max") else cls(text.strip())

    def __str__(self) -> str:
        return f"max:{self.metric}" if self.largest else self.metric

    def key(self, value: float) -> float:
        """The smaller the better."""
        return -value if self.largest else value


def ranked(trials: Iterable[Trial], objective: Objective) -> list[Trial]:
    """Those that have a value, the best first: those that made all their steps before those that were stopped, each by the last value."""
    valued = [trial for trial in trials if trial.state != "failed" and trial.metric(objective.metric) is not None]
    return sorted(valued, key=lambda trial: (trial.state != "finished", objective.key(trial.metric(objective.metric) or 0.0), trial.number))


def pareto(trials: Iterable[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Finished trials to which no other is better in one objective and at least as good in all the others, by the first objective."""
    points = {}
    for trial in trials:
        values = [trial.metric(objective.metric) for objective in objectives]
        if trial.state == "finished" and None not in values:
            points[trial.number] = (trial, [o.key(v) for o, v in zip(objectives, values, strict=True) if v is not None])

    def beaten(own: list[float]) -> bool:
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for _, other in points.values())

    return [trial for trial, own in sorted(points.values(), key=lambda point: (point[1], point[0].number)) if not beaten(own)]


def at_step(trial: Trial, metric: str, step: int) -> float | None:
    """A metric at a step of the trial, in whichever run."""
    return next((result.metrics.get(metric) for result in reversed(trial.results) if result.step == step), None)


def folder_of(sweep_uri: str, run: str) -> str:
    """A trial's run."""
    return storage.join(sweep_uri, TRIALS, run)


def commands_of(ledger: Ledger, sweep_uri: str, run: str) -> dict[str, str]:
    """What trains the winner, whose run is `run`: `again`, to the trial's own numbers; `in full`, where the base's run is of another length
    than the trials."""
    again = ["most-ray", "train", "--config", storage.redact(storage.join(sweep_uri, BEST))]
    full = ledger.sweep.get("full") or {}
    if not isinstance(full, dict) or not full:
        return {"again": shlex.join(again)}
    flags = [word for name, value in full.items() for word in (f"--{name}", "none" if value is None else str(value))]
    name = f"{ledger.sweep.get('name', 'sweep')}-full-{run}"
    return {"again": shlex.join(again), "in full": shlex.join([*again, "--name", name, *flags])}


def kept_uri(sweep_uri: str, run: str, step: int) -> str:
    """A checkpoint that other trials go on from, when the run itself has long forgotten it."""
    return step_uri(storage.join(sweep_uri, KEPT, run), step)
