"""From the values of a trial to its run's configuration, whether it can be trained, and the cost of all trials. Pure functions."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from most_ray.config import OPTIONS, RunConfig, config_from
from most_ray.config_files import portable_yaml
from most_ray.distributed.topology import plan_topologies
from most_ray.errors import ConfigError, UserError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import TRIALS, local_copy, model_source
from most_ray.model.build import read_config
from most_ray.model.compat import check_workers
from most_ray.model.configuration import MostConfig
from most_ray.presets import PRESETS
from most_ray.runs.job import overrides_of
from most_ray.sweep.ledger import Trial, kept_uri
from most_ray.sweep.options import Sweep
from most_ray.sweep.space import Values
from most_ray.sweep.splits import split_experts

_MAX_STARTS = 64  # starting models of a sweep
_TPE_PROPOSALS = 2_000  # random ones that are checked in place of TPE's, which depend on results
TRIAL_OVERHEAD_S = 30.0  # of a trial apart from its steps: processes, model, last evaluation, export, report; measured on two cores


@dataclass(frozen=True)
class StartModel:
    """A model that trials start from."""

    config: MostConfig
    most_text_first: Sequence[int] | None = None  # experts by the text routed to them; None if no trial uses affinity


def start_key(sweep: Sweep, values: Values) -> str:
    """Return those of a trial's values that determine its starting model, as JSON: its folder or preset, and for a preset the seed."""
    named = values.get("model_name_or_path", sweep.run.model_name_or_path)
    names = ("model_name_or_path", "seed") if named in PRESETS else ("model_name_or_path",)
    return json.dumps({name: values[name] for name in names if name in values})


def start_keys(sweep: Sweep) -> list[str]:
    """Return the keys of all starting models that trials can have. Raises ConfigError if there are too many, or if affinity cannot be
    measured on them."""
    by_affinity = any(d.name == "expert_split" and "affinity" in d.values for d in sweep.space.dimensions)
    moved = sorted(name for name in sweep.space.names if name.startswith("train_") and name.split("[")[0].endswith("_dirs"))
    if by_affinity and moved and sweep.run.model_name_or_path in PRESETS:
        rule = "gives a preset another tokenizer for each trial, so that affinity would be measured on none of their models."
        raise ConfigError(f"space.{moved[0]}", None, rule, "Make a starting model by `most-ray init-model`, and name that.")
    dimensions = [d for d in sweep.space.dimensions if d.name in ("model_name_or_path", "seed")]
    if (many := math.prod(len(d.listed or ()) for d in dimensions)) > _MAX_STARTS and sweep.run.model_name_or_path in PRESETS:
        rule = f"makes {many} starting models, each of which is prepared before the first trial; at most {_MAX_STARTS} are."
        raise ConfigError(f"space.{dimensions[-1].name}", None, rule, "Name fewer values, or a model's folder: model_name_or_path.")
    points = itertools.product(*([(d.name, value) for value in d.listed or ()] for d in dimensions))
    return list(dict.fromkeys(start_key(sweep, dict(point)) for point in points))


@dataclass(frozen=True)
class TrialBase:
    """What the trials of a sweep have in common."""

    sweep: Sweep
    starts: Mapping[str, StartModel]  # by `start_key`
    shared: Mapping[str, Any]  # settings chosen for all trials (devices, workers, threads), so that none depends on where it is started

    def settings_of(self, values: Values) -> dict[str, Any]:
        """Return the configuration keys that a trial's run changes in the sweep's. Raises UserError, which names the value at fault, if the
        trial cannot be trained."""
        settings = self.sweep.space.settings(values)
        start = self.starts[start_key(self.sweep, values)]
        split, n_audio = settings.pop("expert_split", None), settings.pop("audio_experts", None)
        if split is not None or n_audio is not None:
            if n_audio is None:  # as many as the starting model has, or half of the experts
                given = self.sweep.run.audio_expert_indices or start.config.audio_expert_indices
                n_audio = len(given) if given else start.config.n_routed_experts // 2
            text, audio = split_experts(split or "contiguous", start.config.n_routed_experts, n_audio, start.most_text_first)
            settings |= {"use_modality_aware_routing": True, "text_expert_indices": text, "audio_expert_indices": audio}
        settings |= self.shared
        _check_trainable(self.config(settings, "check"), start.config)
        return settings

    def config(self, settings: Mapping[str, Any], run: str) -> RunConfig:
        """Return the configuration of a trial's run, whose folder is in the sweep's; all runs share token stores."""
        base = self.sweep.run
        folders = {"name": run, "output_dir": storage.join(base.run_uri, TRIALS), "store_dir": base.store_uri}
        return config_from({**self.sweep.values, **settings, **folders, "wandb_group": base.wandb_group or base.name})

    def best_yaml(self, trial: Trial, why: str, moves: bool = False) -> str:
        """Return the best trial's configuration as YAML, with the comment `why`: a run of the same steps with the same results. `moves`: it
        is for the sweep's folder, and names what is there or beside it relative to itself."""
        base = self.sweep.run
        redacted = base.redacted()
        values = {name: getattr(base if OPTIONS[name].location else redacted, name) for name in OPTIONS}
        kept = {name: value for name, value in values.items() if name in self.sweep.values and name not in ("name", "output_dir")}
        whole = {"name": f"{base.name}-best-{trial.runs[-1]}", "output_dir": base.output_dir, **kept, **trial.settings}
        if parent := trial.parents[-1] if trial.parents else None:
            kept_checkpoint = kept_uri(base.run_uri, parent["run"], parent["step"])
            whole |= {"resume_from_checkpoint": kept_checkpoint, "accept_data_change": True}
        return portable_yaml(whole, OPTIONS, base.run_uri, storage.parent(base.run_uri) if moves else None, f"# {why}\n")


def _check_trainable(config: RunConfig, model: MostConfig) -> None:
    """Raise UserError unless a run can start from a model."""
    MostConfig(**overrides_of(config).apply(model.to_dict()))  # which checks the groups of experts
    workers = (config.num_workers or (1,))[-1]
    check_workers(workers)
    plan_topologies(workers, workers, config.ep_size, config.dp_replicate_size, model.n_routed_experts)


def start_config(sweep: Sweep, key: str) -> MostConfig:
    """Return a starting model's configuration, before its tokenizer is made. Raises CheckpointError if there is no such model."""
    name = parse_json(key).get("model_name_or_path", sweep.run.model_name_or_path)
    if name in PRESETS:
        return MostConfig(**{setting: value for setting, value in PRESETS[name].items() if setting != "text_vocab_size"})
    return read_config(local_copy(model_source(name, known=PRESETS)))


def proposals(sweep: Sweep) -> Iterator[Values]:
    """Yield the values of the trials of a random or grid search; for TPE, random values of the same space."""
    search, count = sweep.options.search, _TPE_PROPOSALS if sweep.options.search == "tpe" else sweep.max_trials
    proposed = (sweep.space.proposal(search, sweep.options.search_seed, k) for k in range(count))
    yield from (values for values in proposed if values is not None)


def first_valid(base: TrialBase) -> dict[str, Any]:
    """Return the settings of the first proposal that can be trained. Raises ConfigError, with the most frequent reason, if none can."""
    reasons = Counter[str]()
    for values in proposals(base.sweep):
        try:
            return base.settings_of(values)
        except UserError as error:
            reasons[str(error)] += 1
    ((most_frequent, _),) = reasons.most_common(1)
    rule = f"holds no trial that can be trained: {reasons.total()} were checked, and most of them fail with: {most_frequent}"
    raise ConfigError("space", base.sweep.space.names, rule)


@dataclass(frozen=True)
class Estimate:
    """The cost of a sweep."""

    fewest_steps: int  # of all trials, if the scheduler stops as many as it can
    most_steps: int  # if it stops none
    fewest_hours: float | None  # None if a step's time is unknown
    most_hours: float | None


def estimate(sweep: Sweep, total_steps: int, left: int, concurrent: int, step_s: float | None) -> Estimate:
    """Estimate the cost of the `left` remaining trials, of which `concurrent` run at a time, from a step's seconds (None: unknown)."""
    most, asha = left * total_steps, sweep.options.scheduler == "asha"
    fewest = _fewest_steps(left, sweep.grace_steps, total_steps, sweep.options.reduction_factor) if asha else most
    if step_s is None:
        return Estimate(fewest, most, None, None)
    low, high = ((steps * step_s + left * TRIAL_OVERHEAD_S) / concurrent / 3600 for steps in (fewest, most))
    return Estimate(fewest, most, low, high)


def _fewest_steps(trials: int, grace: int, total: int, factor: float) -> int:
    """Return the steps of all trials if at each of ASHA's rungs, the first of which all reach, one in `factor` continues, at least one."""
    made, rung, previous, running = 0, float(min(grace, total)), 0.0, float(trials)
    while trials and previous < total:
        made += round(running * (min(rung, total) - previous))
        previous, rung, running = rung, rung * factor, max(1.0, running / factor)
    return made


def run_name(trial: int, generation: int = 0) -> str:
    """Return the name of a trial's run; population based training replaces it by one of the next generation."""
    return f"{trial:03d}" + (f"-{generation}" if generation else "")
