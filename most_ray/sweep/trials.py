"""From a trial's values to its run: settings over the sweep's own, what makes them invalid, and what all trials will cost. Pure."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from most_ray.config import RunConfig, config_from
from most_ray.distributed.topology import plan_topologies
from most_ray.errors import ConfigError, UserError
from most_ray.io import storage
from most_ray.io.run_folder import local_copy
from most_ray.model.build import PRESETS, read_config
from most_ray.model.compat import check_workers
from most_ray.model.configuration import MostConfig, check_experts
from most_ray.options import to_plain
from most_ray.sweep.ledger import TRIALS, Trial, kept_uri
from most_ray.sweep.options import Sweep
from most_ray.sweep.space import Values
from most_ray.sweep.splits import split_experts

_MOST_STARTS = 64
_TRIED = 2_000  # proposals that are looked at for a valid one, where results will decide on them


@dataclass(frozen=True)
class Start:
    """A starting model's configuration, and its experts by the text that they carry (None where no trial asks for that)."""

    model: MostConfig
    most_text_first: Sequence[int] | None = None


def start_key(sweep: Sweep, values: Values) -> str:
    """What of a trial's values makes its starting model, JSON of an object: its folder or preset; of a preset, also its weights' seed."""
    named = values.get("model_name_or_path", sweep.run.model_name_or_path)
    names = ("model_name_or_path", "seed") if named in PRESETS else ("model_name_or_path",)
    return json.dumps({name: values[name] for name in names if name in values})


def start_keys(sweep: Sweep) -> list[str]:
    """Those of all trials that there can be.

    Raises:
        ConfigError: the space makes more starting models than affinity could be measured on.
    """
    by_affinity = any(d.name == "expert_split" and "affinity" in d.values for d in sweep.space.dimensions)
    moved = sorted(name for name in sweep.space.names if name.startswith("train_") and name.split("[")[0].endswith("_dirs"))
    if by_affinity and moved and sweep.run.model_name_or_path in PRESETS:
        rule = "makes a preset's tokenizer another for each trial, so that affinity would be measured on none of their models."
        raise ConfigError(f"space.{moved[0]}", None, rule, "Make a starting model by `most-ray init-model`, and name that.")
    dimensions = [d for d in sweep.space.dimensions if d.name in ("model_name_or_path", "seed")]
    if (many := math.prod(len(d.listed or ()) for d in dimensions)) > _MOST_STARTS and sweep.run.model_name_or_path in PRESETS:
        rule = f"makes {many} starting models, each of which is prepared before the first trial; at most {_MOST_STARTS} are."
        raise ConfigError(f"space.{dimensions[-1].name}", None, rule, "Name fewer values, or a model's folder: model_name_or_path.")
    points = itertools.product(*(d.listed or () for d in dimensions))
    return list(dict.fromkeys(start_key(sweep, dict(zip((d.name for d in dimensions), point, strict=True))) for point in points))


@dataclass(frozen=True)
class Setting:
    """What all trials of a sweep stand on.

    starts: starting models by `start_key`; shared: what of the run was settled for all trials (devices, workers, threads), so that none
    depends on where it is started.
    """

    sweep: Sweep
    starts: Mapping[str, Start]
    shared: Mapping[str, Any]

    def settings_of(self, values: Values) -> dict[str, Any]:
        """What a trial's run changes in the sweep's: keys of the configuration.

        Raises:
            UserError: the trial cannot be; names what of it.
        """
        settings = self.sweep.space.settings(values)
        start = self.starts[start_key(self.sweep, values)]
        split, n_audio = settings.pop("expert_split", None), settings.pop("audio_experts", None)
        if split is not None or n_audio is not None:
            n_audio = self._audio_experts(start.model) if n_audio is None else n_audio
            text, audio = split_experts(split or "contiguous", start.model.n_routed_experts, n_audio, start.most_text_first)
            settings |= {"use_modality_aware_routing": True, "text_expert_indices": text, "audio_expert_indices": audio}
        settings |= self.shared
        _check(self.config(settings, "check"), start.model)
        return settings

    def _audio_experts(self, model: MostConfig) -> int:
        """How many there are where no trial says it: as in the model that is started from, else half of them."""
        given = self.sweep.run.audio_expert_indices or model.audio_expert_indices
        return len(given) if given else model.n_routed_experts // 2

    def config(self, settings: Mapping[str, Any], run: str) -> RunConfig:
        """The configuration of a trial's run, which lies in the sweep's folder beside the others; all of them share token stores."""
        base = self.sweep.run
        uri = {
            "name": run,
            "output_dir": storage.join(base.run_uri, TRIALS),
            "store_dir": base.store_uri,
            "wandb_group": base.wandb_group or base.name,
        }
        return config_from({**self.sweep.values, **settings, **uri})

    def best_yaml(self, trial: Trial, why: str) -> str:
        """The winner as a configuration of its own: a run of the same steps that makes the same numbers."""
        base = self.sweep.run.redacted()
        kept = {name: value for name, value in vars(base).items() if name in self.sweep.values and name not in ("name", "output_dir")}
        whole = {"name": f"{base.name}-best-{trial.runs[-1]}", "output_dir": base.output_dir, **kept, **trial.settings}
        parent = trial.parents[-1] if trial.parents else None
        if parent:
            redacted_place = storage.redact(self.sweep.run.run_uri)
            whole |= {"resume_from_checkpoint": kept_uri(redacted_place, parent["run"], parent["step"]), "accept_data_change": True}
        return f"# {why}\n{yaml.safe_dump(to_plain(whole), sort_keys=False, allow_unicode=True)}"


def _check(config: RunConfig, model: MostConfig) -> None:
    """Whether a run of `config` can start from a model. Raises UserError."""
    aware = model.use_modality_aware_routing if config.use_modality_aware_routing is None else config.use_modality_aware_routing
    every = set(range(model.n_routed_experts))
    text, audio = config.text_expert_indices, config.audio_expert_indices
    if text is None and audio is not None:  # one group named: the other is what is left, as for any run
        text = tuple(sorted(every - set(audio)))
    elif audio is None and text is not None:
        audio = tuple(sorted(every - set(text)))
    check_experts(
        n_routed_experts=model.n_routed_experts,
        top_k=config.num_experts_per_tok or model.num_experts_per_tok,
        modality_aware=aware,
        text=model.text_expert_indices if text is None else text,
        audio=model.audio_expert_indices if audio is None else audio,
        n_group=model.n_group if model.topk_method == "group_limited_greedy" else None,
        topk_group=model.topk_group,
    )
    workers = (config.num_workers or (1,))[-1]
    check_workers(workers)
    plan_topologies(workers, workers, config.ep_size, config.dp_replicate_size, model.n_routed_experts)


def starting_config(sweep: Sweep, key: str) -> MostConfig:
    """The configuration of a starting model, before its tokenizer is made.

    Raises:
        CheckpointError: there is none.
    """
    name = json.loads(key).get("model_name_or_path", sweep.run.model_name_or_path)
    if name in PRESETS:
        return MostConfig(**{setting: value for setting, value in PRESETS[name].items() if setting != "text_vocab_size"})
    return read_config(local_copy(storage.absolute(name) if storage.is_remote(name) else name))


def proposals(sweep: Sweep) -> Iterator[Values]:
    """Values that trials get by random and grid; of tpe random ones out of the same space."""
    for k in range(_TRIED if sweep.options.search == "tpe" else sweep.max_trials):
        values = sweep.space.proposal(sweep.options.search, sweep.options.search_seed, k)
        if values is None:
            return
        yield values


def first_valid(setting: Setting) -> dict[str, Any]:
    """Settings of the first proposal that can be trained.

    Raises:
        ConfigError: none can; says why, by the commonest reason.
    """
    reasons: dict[str, int] = {}
    for values in proposals(setting.sweep):
        try:
            return setting.settings_of(values)
        except UserError as error:
            reasons[str(error)] = reasons.get(str(error), 0) + 1
    commonest = max(reasons, key=lambda reason: reasons[reason])
    rule = f"holds no trial that can be trained: {sum(reasons.values())} were looked at, most of them fail so: {commonest}"
    raise ConfigError("space", setting.sweep.space.names, rule)


@dataclass(frozen=True)
class Estimate:
    """What a sweep will cost: steps of all trials where the scheduler stops as many as it may (fewest) and none (most), and the hours of
    both, where a step's time is known."""

    fewest_steps: int
    most_steps: int
    fewest_hours: float | None
    most_hours: float | None


START_S = 30.0  # of a trial, besides its steps: processes, the model, the last evaluation, export and report; measured on two cores


def estimate(sweep: Sweep, total_steps: int, left: int, concurrent: int, step_s: float | None) -> Estimate:
    """Of `left` trials with `concurrent` at a time."""
    most = fewest = left * total_steps
    if sweep.options.scheduler == "asha":
        fewest = sum(_fewest_at_rungs(left, sweep.grace_steps, total_steps, sweep.options.reduction_factor))
    if step_s is None:
        return Estimate(fewest, most, None, None)
    low, high = ((steps * step_s + left * START_S) / concurrent / 3600 for steps in (fewest, most))
    return Estimate(fewest, most, low, high)


def _fewest_at_rungs(trials: int, grace: int, total: int, factor: float) -> list[int]:
    """Steps made up to each rung where at each but one of `factor` trials is stopped, the best never: each trial makes the first rung's."""
    made, rung, before, going = [], float(min(grace, total)), 0.0, float(trials)
    while trials and before < total:
        made.append(round(going * (min(rung, total) - before)))
        before, rung, going = rung, rung * factor, max(1.0, going / factor)
    return made


def run_name(trial: int, generation: int = 0) -> str:
    return f"{trial:03d}" + (f"-{generation}" if generation else "")
