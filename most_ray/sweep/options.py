"""A sweep's configuration: a run's configuration, the settings that are tried, and how they are searched."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from most_ray.config import OPTIONS, RunConfig, config_from
from most_ray.config_files import is_shipped, portable_yaml, read_yaml
from most_ray.data.plan import distinct_names
from most_ray.errors import ConfigError, count_of, nearest
from most_ray.io import storage
from most_ray.metrics.figures import FIGURES, OBJECTIVES, RATES
from most_ray.metrics.schema import TRAIN
from most_ray.options import (
    ABOVE_0,
    ABOVE_1,
    AT_LEAST_1,
    CONFIGURATION,
    NOT_NEGATIVE,
    check_names,
    option,
    options_of,
    parse_values,
)
from most_ray.options import add_flags as add_options
from most_ray.options import flag_values as given_flags
from most_ray.records.record import TASKS
from most_ray.sweep.ledger import Objective
from most_ray.sweep.space import ROUTING, Space, parse_space

_MOST_TRIALS = 100_000  # of a sweep: the ledger holds all of them


@dataclass(frozen=True)
class SweepOptions:
    """How settings are searched."""

    base: str | None = option(
        None, "a run's YAML file, whose keys hold for every trial where this file's own do not", location=CONFIGURATION, inert=True
    )
    search: Literal["random", "grid", "tpe"] = option("random", "how settings are proposed; tpe: Optuna's, which learns from results")
    search_seed: int = option(0, "seed of the proposals", range=NOT_NEGATIVE, most=(1 << 31) - 1)
    scheduler: Literal["none", "asha", "pbt"] = option(
        "none", "asha stops the worse trials early; pbt replaces them by changed copies of the better ones (population based training)"
    )
    objectives: tuple[str, ...] = option((), "figures to minimise, as wer/test_takes, or max:NAME (default: WER of the first ASR set)")
    max_trials: int | None = option(
        None, "trials in all (default: 10; of a grid all its points)", range=AT_LEAST_1, most=_MOST_TRIALS, inert=True
    )
    max_hours: float | None = option(
        None, "hours that the sweep may take, all its starts together (default: no limit)", range=ABOVE_0, inert=True
    )
    max_concurrent_trials: int | None = option(
        None, "trials at once (default: as many as the cluster has room for)", range=AT_LEAST_1, inert=True
    )
    grace_steps: int | None = option(None, "asha: steps that every trial may make (default: eval_steps)", range=AT_LEAST_1)
    reduction_factor: float = option(3.0, "asha: of so many trials at a rung one continues, to so many times the steps", range=ABOVE_1)
    perturb_steps: int | None = option(
        None, "pbt: steps between replacements, a multiple of eval_steps (default: eval_steps)", range=AT_LEAST_1
    )


SWEEP_OPTIONS = options_of(SweepOptions)  # by name


@dataclass(frozen=True)
class Sweep:
    """A checked sweep."""

    options: SweepOptions
    space: Space
    run: RunConfig  # what all trials share; its `name` and `output_dir` are the sweep's
    values: Mapping[str, Any]  # those keys of `run` that the file, its base or a flag states
    raw_space: Mapping[str, Any]  # the space as the file has it
    objectives: tuple[Objective, ...]
    overruled: Mapping[str, Any]  # the length of the base's own run, where the sweep's trials have another length

    @property
    def max_trials(self) -> int:
        """Trials in all; of a grid at most its points."""
        points = self.space.grid_size("grid") if self.options.search == "grid" else None
        wanted = self.options.max_trials or points or 10
        return min(wanted, points) if points else wanted

    @property
    def grace_steps(self) -> int:
        """Steps that every trial may make before asha stops it."""
        return self.options.grace_steps or self.run.eval_steps or 1

    @property
    def perturb_steps(self) -> int:
        """Steps between replacements by population based training."""
        return self.options.perturb_steps or self.run.eval_steps or 1

    def to_yaml(self, moves: bool = False) -> str:
        """A file that describes the same sweep, without credentials and with the content of `base`. `moves`: it is in the sweep's folder,
        and names what is there or beside it relative to itself."""
        redacted = vars(self.run.redacted())
        run = {name: getattr(self.run, name) if OPTIONS[name].location else redacted[name] for name in self.values}
        changed = {name: value for name, value in vars(self.options).items() if value != SWEEP_OPTIONS[name].default and name != "base"}
        content = {"name": self.run.name, "output_dir": self.run.output_dir, **run, **changed, "space": _unquoted(self.raw_space)}
        uri = self.run.run_uri
        return portable_yaml(content, OPTIONS, uri, storage.parent(uri) if moves else None)


def _unquoted(value: Any) -> Any:
    """A value of a YAML file with numbers for their texts where these are read as the same text again: PyYAML puts texts in quotes."""
    if isinstance(value, Mapping):
        return {key: _unquoted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(_unquoted, value))
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", value):
        number = float(value) if "." in value else int(value)
        return number if str(number) == value else value
    return value


def load_sweep(path: str | Path | None, flags: Mapping[str, Any]) -> Sweep:
    """The sweep of a YAML file (None: no file), overruled by flags. Raises ConfigError for an unknown key, a value of the wrong type or
    outside of its range, or a space or a combination that is impossible."""
    given = {**(read_yaml(path, {**OPTIONS, **SWEEP_OPTIONS}) if path is not None else {}), **flags}
    raw_space = given.pop("space", None)
    check_names(given, [*SWEEP_OPTIONS, *OPTIONS, "space"])
    options = SweepOptions(**parse_values(SWEEP_OPTIONS, {name: value for name, value in given.items() if name in SWEEP_OPTIONS}))
    own = {name: value for name, value in given.items() if name in OPTIONS}
    base = read_yaml(options.base, OPTIONS, path is not None and is_shipped(path)) if options.base else {}
    values = {"name": "sweep", **{name: value for name, value in base.items() if name != "name"}, **own}
    run = config_from(values)
    space = parse_space(raw_space)
    length = [option.name for option in OPTIONS.values() if option.length]
    full = config_from({name: base[name] for name in length if name in base})
    overruled = {name: getattr(full, name) for name in length if base and getattr(full, name) != getattr(run, name)}
    sweep = Sweep(options, space, run, {name: getattr(run, name) for name in values}, raw_space, _objectives(options, run), overruled)
    _check(sweep)
    return sweep


def _objectives(options: SweepOptions, run: RunConfig) -> tuple[Objective, ...]:
    """The metrics that are optimised. Raises ConfigError for one that is not measured."""
    known = known_metrics(run)
    if not options.objectives:
        return (Objective(next((name for name in known if name.startswith("wer/")), "loss")),)
    objectives = tuple(Objective.parse(text) for text in options.objectives)
    for objective in objectives:
        if objective.metric not in known:
            raise ConfigError("objectives", objective.metric, "is not measured for trials.", nearest(objective.metric, known))
    if len({objective.metric for objective in objectives}) < len(objectives):
        raise ConfigError("objectives", options.objectives, "names a metric twice.")
    return objectives


def known_metrics(run: RunConfig) -> list[str]:
    """Names of the metrics that `ledger.metrics_of` finds in a run's evaluations, in the order of its validation sets."""
    named = [(task, directory) for task in TASKS for directory in run.directories("val", task)]
    of_sets = [task for task, _ in named]
    sets = list(zip(of_sets, distinct_names([directory for _, directory in named], of_sets), strict=True))
    tasks = {key: FIGURES.keys[key].tasks or TASKS for key in (*RATES, *OBJECTIVES)}
    rates = {key: called for key, called in RATES.items() if run.recogniser or key != "outside"}
    found = [f"{called}/{name}" for task, name in sets for key, called in rates.items() if task in tasks[key]]
    found += [f"{called}/{task}/{name}" for task, name in sets for key, called in OBJECTIVES.items() if task in tasks[key]]
    numbers = [name for name, key in TRAIN.items() if key.type in (int, float, float | None) and name not in ("step", "time")]
    return [*found, "loss", *(["wer"] if run.val_asr_dirs else []), *(f"train/{name}" for name in numbers)]


def _check(sweep: Sweep) -> None:
    """Raises ConfigError where options exclude each other, or one lacks what it needs."""
    options, run = sweep.options, sweep.run
    if not (run.val_asr_dirs or run.val_tts_dirs or run.val_text_dirs):
        raise ConfigError("val_asr_dirs", (), "names no validation set, and trials are compared by one.", "Name some.")
    if run.num_workers and len(set(run.num_workers)) > 1:
        raise ConfigError("num_workers", run.num_workers, "must be one number: trials share the cluster out evenly.", "Give one.")
    if run.resume_from_checkpoint and options.scheduler == "pbt":
        rule = "excludes population based training, in which trials continue from each other's checkpoints."
        raise ConfigError("resume_from_checkpoint", run.resume_from_checkpoint, rule, "Export it and name that folder: model_name_or_path.")
    if options.scheduler != "none" and run.eval_steps is None:
        raise ConfigError("eval_steps", None, f"is needed: {options.scheduler} compares trials at their evaluations.", "Give it.")
    if run.trace_records:
        rule = "is one file, which all trials would write at once."
        raise ConfigError("trace_records", run.trace_records, rule, "Trace the winner: give it to the command that trains it.")
    trained = [objective.metric for objective in sweep.objectives if objective.metric.startswith("train/")]
    if trained and run.eval_steps and run.eval_steps % run.logging_steps:
        rule = f"is compared every {count_of(run.eval_steps, 'step')}, and logged every {run.logging_steps}."
        raise ConfigError("objectives", trained[0], rule, "Let eval_steps be a multiple of logging_steps.")
    _check_ends(sweep)
    if options.search == "grid" and (endless := [d.name for d in sweep.space.dimensions if d.listed is None]):
        rule = "has infinitely many values, so it makes no grid."
        raise ConfigError(f"space.{endless[0]}", None, rule, "Use `grid: [...]`, or search: random.")
    if sweep.max_trials > _MOST_TRIALS:  # of a grid: its points
        rule = f"is a grid of {count_of(sweep.max_trials, 'point')}; at most {_MOST_TRIALS:,} trials are made."
        raise ConfigError("space", sweep.space.names, rule, "Give max_trials, fewer values, or search: random.")
    if options.search == "tpe" and (gridded := [d.name for d in sweep.space.dimensions if d.kind == "grid"]):
        raise ConfigError(f"space.{gridded[0]}", None, "is a grid, and tpe searches none.", "Use `choice`.")
    if options.scheduler == "pbt":
        _check_pbt(sweep)


def _check_ends(sweep: Sweep) -> None:
    """Raises ConfigError where an end of a range is not a valid value of its key: many trials of such a range would fail."""
    ranges = (d for d in sweep.space.dimensions if not d.values and d.name not in ROUTING and "[" not in d.name)
    for name, value in ((d.name, int(end) if d.kind == "randint" else end) for d in ranges for end in (d.low, d.high)):
        try:
            config_from({**sweep.values, name: value})
        except ConfigError as error:
            if error.field == name:
                raise ConfigError(f"space.{name}", value, error.rule, error.remedy) from error


def _check_pbt(sweep: Sweep) -> None:
    """Raises ConfigError where population based training cannot be done with the other options."""
    options, run = sweep.options, sweep.run
    if options.search == "tpe":
        raise ConfigError("search", "tpe", "excludes population based training, which changes settings itself.", "Use random.")
    if not mutable(sweep.space):
        rule = "holds nothing that can change during training: learning rate, mix, weights of losses and sources, in a range."
        raise ConfigError("space", None, rule, "Add `learning_rate: {loguniform: [...]}`, or use scheduler: asha.")
    if sweep.perturb_steps % (run.eval_steps or 1):
        raise ConfigError("perturb_steps", sweep.perturb_steps, f"is no multiple of eval_steps ({run.eval_steps}).")
    if len(sweep.objectives) > 1:
        raise ConfigError("objectives", options.objectives, "are several, and population based training optimises one.", "Give one.")


def mutable(space: Space) -> list[str]:
    """The dimensions that population based training changes: ranges of options that may change during training."""
    adapting = [option.name for option in OPTIONS.values() if option.sweep == "adapts"]
    return [d.name for d in space.dimensions if d.continuous and d.name.split("[")[0] in adapting]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per key of a sweep's own; those of a run are added by `config.add_flags`."""
    add_options(parser, (SweepOptions,), "everyday")


def flag_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """The keys of a sweep and of a run that were given as flags."""
    return given_flags(namespace, {*SWEEP_OPTIONS, *OPTIONS})
