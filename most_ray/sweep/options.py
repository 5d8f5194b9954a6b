"""A sweep's configuration: a run's, with what is tried and how around it."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from most_ray import config as configuration
from most_ray.config import RunConfig, coerce, config_from, option, read_yaml
from most_ray.data.plan import distinct_names
from most_ray.errors import ConfigError, nearest
from most_ray.metrics.schema import TRAIN
from most_ray.records.record import TASKS
from most_ray.sweep.ledger import Objective
from most_ray.sweep.space import ROUTING, Space, parse_space


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is made."""

    base: str | None = option(None, "a run's YAML file, whose keys hold for every trial where this file's own do not")
    search: Literal["random", "grid", "tpe"] = option("random", "how settings are proposed; tpe: Optuna's, which learns from results")
    search_seed: int = option(0, "seed of the proposals")
    scheduler: Literal["none", "asha", "pbt"] = option(
        "none", "asha stops the worse trials early; pbt replaces them by changed copies of the better ones (population based training)"
    )
    objectives: tuple[str, ...] = option((), "figures to make small, as wer/test_takes, or max:NAME (default: WER of the first ASR set)")
    max_trials: int | None = option(None, "trials in all (default: 10; of a grid all its points)")
    max_hours: float | None = option(None, "hours that the sweep may take, all its starts together (default: no limit)")
    max_concurrent_trials: int | None = option(None, "trials at once (default: as many as the cluster has room for)")
    grace_steps: int | None = option(None, "asha: steps that every trial may make (default: eval_steps)")
    reduction_factor: float = option(3.0, "asha: of so many trials at a rung one goes on, to so many times the steps")
    perturb_steps: int | None = option(None, "pbt: steps between replacements, a multiple of eval_steps (default: eval_steps)")


_FIELDS = {f.name: f for f in dataclasses.fields(SweepOptions)}
_HINTS = typing.get_type_hints(SweepOptions)
_LENGTH = ("max_steps", "epochs", "eval_steps", "save_steps")
_RUN_FIELDS = {f.name for f in dataclasses.fields(RunConfig)}


@dataclass(frozen=True)
class Sweep:
    """run: what all trials share; `name` and `output_dir` are the sweep's. values: those of its keys that were given; raw_space: as it
    stood; overruled: how long the base's own run is, where the sweep's trials are of another length."""

    options: SweepOptions
    space: Space
    run: RunConfig
    values: Mapping[str, Any]
    raw_space: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    overruled: Mapping[str, Any]

    @property
    def max_trials(self) -> int:
        points = self.space.grid_size("grid") if self.options.search == "grid" else None
        wanted = self.options.max_trials or points or 10
        return min(wanted, points) if points else wanted

    @property
    def grace_steps(self) -> int:
        return self.options.grace_steps or self.run.eval_steps or 1

    @property
    def perturb_steps(self) -> int:
        return self.options.perturb_steps or self.run.eval_steps or 1

    def to_yaml(self) -> str:
        """What makes the same sweep again, without credentials; `base` is part of it."""
        redacted = vars(self.run.redacted())
        run = {name: redacted[name] for name in self.values}
        sweep = {name: value for name, value in vars(self.options).items() if name != "base" and value != _FIELDS[name].default}
        content = {"name": self.run.name, "output_dir": redacted["output_dir"], **run, **sweep, "space": dict(self.raw_space)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in content.items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def load_sweep(path: str | Path | None, flags: Mapping[str, Any]) -> Sweep:
    """A sweep's file, overruled by flags.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, a space or a combination that cannot be.
    """
    given = {**(read_yaml(path) if path else {}), **flags}
    raw_space = given.pop("space", None)
    for name in given:
        if name not in _FIELDS and name not in _RUN_FIELDS:
            raise ConfigError(name, None, "is no known flag or configuration key.", nearest(name, [*_FIELDS, *_RUN_FIELDS, "space"]))
    options = SweepOptions(**{name: coerce(name, value, _HINTS) for name, value in given.items() if name in _FIELDS})
    own = {name: value for name, value in given.items() if name in _RUN_FIELDS}
    base = read_yaml(options.base) if options.base else {}
    values = {"name": "sweep", **{name: value for name, value in base.items() if name != "name"}, **own}
    run = config_from(values)
    space = parse_space(raw_space)
    before = config_from({name: base[name] for name in _LENGTH if name in base})
    overruled = {name: getattr(before, name) for name in _LENGTH if base and getattr(before, name) != getattr(run, name)}
    sweep = Sweep(options, space, run, {name: getattr(run, name) for name in values}, raw_space, _objectives(options, run), overruled)
    _check(sweep)
    return sweep


def _objectives(options: SweepOptions, run: RunConfig) -> tuple[Objective, ...]:
    known = known_metrics(run)
    if not options.objectives:
        return (Objective(next((name for name in known if name.startswith("wer/")), "loss")),)
    objectives = tuple(Objective.parse(text) for text in options.objectives)
    for objective in objectives:
        if objective.metric not in known:
            raise ConfigError("objectives", objective.metric, "is measured of no trial.", nearest(objective.metric, known))
    if len({objective.metric for objective in objectives}) < len(objectives):
        raise ConfigError("objectives", options.objectives, "names a figure twice.")
    return objectives


def known_metrics(run: RunConfig) -> list[str]:
    """What `ledger.metrics_of` gives of a run's evaluations, in the order of its validation sets."""
    named = [(task, directory) for task in TASKS for directory in getattr(run, f"val_{task}_dirs")]
    names = distinct_names([directory for _, directory in named], [task for task, _ in named])
    kinds = {"asr": ("wer", "cer"), "tts": ("cycle_wer", "unit_error_rate", "outside_wer"), "text": ()}
    found = [f"{kind}/{name}" for (task, _), name in zip(named, names, strict=True) for kind in kinds[task]]
    found = [name for name in found if run.recogniser or not name.startswith("outside_wer/")]
    found += [f"{kind}/{task}/{name}" for (task, _), name in zip(named, names, strict=True) for kind in ("loss", "perplexity")]
    found += [f"duration_ratio/{task}/{name}" for (task, _), name in zip(named, names, strict=True) if task == "tts"]
    numbers = [name for name, key in TRAIN.items() if key.type in (int, float, float | None) and name not in ("step", "time")]
    return [*found, "loss", *(["wer"] if run.val_asr_dirs else []), *(f"train/{name}" for name in numbers)]


def _check(sweep: Sweep) -> None:
    options, run = sweep.options, sweep.run
    for name in ("max_trials", "max_concurrent_trials", "grace_steps", "perturb_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(name, value, "must be at least 1.")
    if options.max_hours is not None and options.max_hours <= 0:
        raise ConfigError("max_hours", options.max_hours, "must be above 0.")
    if options.search_seed < 0:
        raise ConfigError("search_seed", options.search_seed, "must not be negative.")
    if not options.reduction_factor > 1:
        raise ConfigError("reduction_factor", options.reduction_factor, "must be above 1.")
    if not (run.val_asr_dirs or run.val_tts_dirs or run.val_text_dirs):
        raise ConfigError("val_asr_dirs", (), "names no validation set, and trials are compared by one.", "Name some.")
    if run.num_workers and len(set(run.num_workers)) > 1:
        raise ConfigError("num_workers", run.num_workers, "must be one number: trials share the cluster out evenly.", "Give one.")
    if run.resume_from_checkpoint and options.scheduler == "pbt":
        rule = "goes with no population based training: there, trials go on from each other's checkpoints."
        raise ConfigError("resume_from_checkpoint", run.resume_from_checkpoint, rule, "Export it and name that folder: model_name_or_path.")
    if options.scheduler != "none" and run.eval_steps is None:
        raise ConfigError("eval_steps", None, f"is needed: {options.scheduler} compares trials at their evaluations.", "Give it.")
    if run.trace_records:
        rule = "is one file, which all trials would write at once."
        raise ConfigError("trace_records", run.trace_records, rule, "Trace the winner: give it to the command that trains it.")
    trained = [objective.metric for objective in sweep.objectives if objective.metric.startswith("train/")]
    if trained and run.eval_steps and run.eval_steps % run.logging_steps:
        rule = f"is compared every {run.eval_steps} steps, and written down every {run.logging_steps}."
        raise ConfigError("objectives", trained[0], rule, "Let eval_steps be a multiple of logging_steps.")
    _check_ends(sweep)
    endless = [d.name for d in sweep.space.dimensions if d.listed is None]
    if options.search == "grid" and endless:
        raise ConfigError(
            f"space.{endless[0]}", None, "has no end of values, so it makes no grid.", "Use `grid: [...]`, or search: random."
        )
    if options.search == "tpe" and (gridded := [d.name for d in sweep.space.dimensions if d.kind == "grid"]):
        raise ConfigError(f"space.{gridded[0]}", None, "is a grid, which tpe does not go through.", "Use `choice`.")
    _check_scheduler(sweep)


def _check_ends(sweep: Sweep) -> None:
    """Raises ConfigError where an end of a range is no value that a run takes: of such a range many trials would fail."""
    for dimension in sweep.space.dimensions:
        if dimension.values or dimension.name in ROUTING or "[" in dimension.name:
            continue
        for end in (dimension.low, dimension.high):
            value = int(end) if dimension.kind == "randint" else end
            try:
                config_from({**sweep.values, dimension.name: value})
            except ConfigError as error:
                if error.field == dimension.name:
                    raise ConfigError(f"space.{dimension.name}", value, error.rule, error.remedy) from error


def _check_scheduler(sweep: Sweep) -> None:
    options, run = sweep.options, sweep.run
    if options.scheduler == "pbt":
        if options.search == "tpe":
            raise ConfigError("search", "tpe", "goes with no population based training, which makes settings anew itself.", "Use random.")
        if not mutable(sweep.space):
            rule = "holds nothing that can change during training: learning rate, mix, weights of losses and sources, in a range."
            raise ConfigError("space", None, rule, "Add `learning_rate: {loguniform: [...]}`, or use scheduler: asha.")
        if sweep.perturb_steps % (run.eval_steps or 1):
            raise ConfigError("perturb_steps", sweep.perturb_steps, f"is no multiple of eval_steps ({run.eval_steps}).")
        if len(sweep.objectives) > 1:
            raise ConfigError("objectives", options.objectives, "are several, and population based training follows one.", "Give one.")


# What a run may change between two of its checkpoints: read at every start, and no part of the model or its optimizer's state.
_MUTABLE = (
    "learning_rate asr_tts_mix_ratio text_mix_ratio train_asr_weights train_tts_weights train_text_weights asr_loss_weight aux_loss_alpha "
    "weight_decay unit_swap_prob unit_replace_prob unit_drop_prob max_grad_norm balance_bias_rate"
)


def mutable(space: Space) -> list[str]:
    """The dimensions that population based training changes: those in a range that a run can take up in the middle."""
    return [d.name for d in space.dimensions if d.continuous and d.name.split("[")[0] in _MUTABLE.split()]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A sweep's own flags; a run's are `config.add_flags`."""
    configuration.add_flags(parser, (SweepOptions,))


def flag_values(namespace: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, the sweep's and the run's."""
    return {name: value for name, value in vars(namespace).items() if name in _FIELDS or name in _RUN_FIELDS}
