"""The plan: the records of each optimizer step and their packing, a pure function of lengths, weights and seed.

A step is `global_batch_size` consecutive records of the mixture, packed among themselves. So every step is computed without those before
it, the mix is exact after every step, and nothing depends on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.config import RunConfig, WeightUnit
from most_ray.data.mixture import MIXTURE_VERSION, Mixture, integer_weights
from most_ray.data.noise import NO_NOISE, UnitNoise
from most_ray.data.packing import PACKER_VERSION, best_fit
from most_ray.data.store import TokenStore, open_store
from most_ray.errors import CheckpointError, ConfigError, DataError, nearest, one_line
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.records.record import TASKS, units_hash
from most_ray.records.units_manifest import neighbours_of

_LEAST_SHARE = Fraction(1, 10**15)  # of a source: the mixture counts records in 64 bits


@dataclass(frozen=True)
class PlanSpec:
    """Everything that a plan is computed from; small, picklable, and stored as JSON."""

    stores: tuple[str, ...]  # URIs of the token stores, one per source
    weights: tuple[int, ...]  # of the sources
    seed: int  # of the shuffles and the noise
    global_batch_size: int  # records of a step, over all ranks
    max_seq_length: int  # tokens of a row
    weight_unit: WeightUnit
    noise: UnitNoise = NO_NOISE


@dataclass(frozen=True)
class StepPlan:
    """The records of one optimizer step, in the order of the mixture."""

    step: int  # counted from 1
    sources: np.ndarray  # source of each record, int64 (records,)
    rows: np.ndarray  # row of each record in its source's store, int64 (records,)
    packs: list[list[int]]  # for each packed row, the indices of its records in `sources` and `rows`
    n_supervised: list[int]  # supervised tokens of each task, in the order of TASKS
    n_tokens: int  # before noise


@dataclass(frozen=True)
class Cursor:
    """The position of a run in its data, as checkpoints store it. The records of the first `step` steps have been trained on, no others."""

    fingerprint: str  # of the plan
    epoch: float  # of the least seen source; informative only
    step: int


class Plan:
    """The plan of a run. Any step is computed in constant time, in any order. `stores` are used in place of those that `spec` names."""

    def __init__(self, spec: PlanSpec, stores: Sequence[TokenStore] | None = None) -> None:
        self.spec = spec
        self.stores: list[TokenStore] = [open_store(path) for path in spec.stores] if stores is None else list(stores)
        self.mixture = Mixture(spec.weights, [store.lengths for store in self.stores], spec.seed, spec.weight_unit)
        self._tasks = np.array([TASKS.index(store.task) for store in self.stores])
        self.neighbours = [unit_neighbours(store) for store in self.stores]

    @cached_property
    def ingredients(self) -> dict[str, Any]:
        """Everything that determines the batches, by name: two runs with equal ingredients train on equal batches."""
        return {
            "sources": [[store.name, store.task, store.manifest["content"]] for store in self.stores],
            "vocabulary": self.stores[0].manifest["vocabulary"],
            "weights": list(self.spec.weights),
            "weight_unit": "rows" if self.spec.weight_unit == "records" else "tokens",  # as in checkpoints of earlier versions
            "mixture": MIXTURE_VERSION,
            "seed": self.spec.seed,
            "global_batch_size": self.spec.global_batch_size,
            "max_seq_length": self.spec.max_seq_length,
            "packer": PACKER_VERSION,
            "noise": asdict(self.spec.noise),
            "neighbours": _digest([None if n is None else n.tolist() for n in self.neighbours]) if self.spec.noise.swap else None,
        }

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the ingredients."""
        return _digest(self.ingredients)

    def step(self, k: int) -> StepPlan:
        """The k-th optimizer step, counted from 1."""
        size = self.spec.global_batch_size
        sources, rows = self.mixture.locate((k - 1) * size, k * size)
        lengths, prompts = np.empty(size, np.int64), np.empty(size, np.int64)
        for source, store in enumerate(self.stores):
            chosen = sources == source
            lengths[chosen] = store.lengths[rows[chosen]]
            prompts[chosen] = store.prompt_lengths[rows[chosen]]
        packs = best_fit(lengths.tolist(), self.spec.max_seq_length)
        supervised = np.zeros(len(TASKS), np.int64)
        np.add.at(supervised, self._tasks[sources], lengths - prompts)
        return StepPlan(k, sources, rows, packs, supervised.tolist(), int(lengths.sum()))

    def record_ids(self, plan: StepPlan) -> list[str]:
        """Ids of the step's records, sorted, as a line of a trace has them."""
        return sorted(self.stores[s].record_id(int(r)) for s, r in zip(plan.sources, plan.rows, strict=True))

    def steps_for_epochs(self, epochs: float, of: str = "all") -> int:
        """The number of steps after which every source, or the one named `of`, has been seen at least `epochs` times.

        Raises:
            ConfigError: no source, or more than one, has the name `of`.
        """
        return -(-self.mixture.records_for_epochs(epochs, self.source_named(of)) // self.spec.global_batch_size)

    def source_named(self, of: str) -> int | None:
        """The index of the source of a name, None for "all". Raises ConfigError as `steps_for_epochs`."""
        found = [i for i, name in enumerate(self.names) if of in (name, name.split("/", 1)[1])] if of != "all" else [None]
        if len(found) != 1:
            rule = "is no training source." if not found else "is the name of more than one source."
            raise ConfigError("epochs_of", of, rule, nearest(of, ["all", *self.names]))
        return found[0]

    def cursor(self, step: int) -> Cursor:
        """The cursor after `step` steps."""
        counts = self.mixture.counts(step * self.spec.global_batch_size)
        epoch = min(int(count) / size for count, size in zip(counts, self.mixture.sizes, strict=True))
        return Cursor(self.fingerprint, epoch, step)

    def consumed(self, step: int) -> dict[str, int]:
        """The number of records of each source, by its name, in the first `step` steps."""
        counts = self.mixture.counts(step * self.spec.global_batch_size)
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}

    def mix(self, step: int) -> dict[str, dict[str, float]]:
        """The mix of the first `step` steps, by source: number of records, their tokens (before noise), the source's share in the unit
        that weights count, and the share that the weights request."""
        n = step * self.spec.global_batch_size
        counts, tokens = self.mixture.counts(n), self.mixture.tokens(n)
        amounts = counts if self.spec.weight_unit == "records" else tokens
        total, weights = max(1, int(amounts.sum())), sum(self.spec.weights)
        return {
            name: {"records": int(c), "tokens": int(t), "share": round(int(a) / total, 9), "target": round(w / weights, 9)}
            for name, c, t, a, w in zip(self.names, counts, tokens, amounts, self.spec.weights, strict=True)
        }

    @cached_property
    def names(self) -> list[str]:
        """The name of each source: task and folder."""
        tasks = [store.task for store in self.stores]
        folders = distinct_names([store.manifest["source"] for store in self.stores], tasks)
        return [f"{task}/{folder}" for task, folder in zip(tasks, folders, strict=True)]


def _digest(value: Any) -> str:
    """A digest of a JSON value, 16 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def distinct_names(directories: Sequence[str | Path], groups: Sequence[str]) -> list[str]:
    """Names for directories (or URIs): the last part of each, with as many parts above it as distinguish it from others of its group."""
    full = [storage.absolute(directory) for directory in directories]
    parts = [[name for name in uri.split("?")[0].split("/") if name] or ["root"] for uri in full]
    names = []
    for index, own in enumerate(parts):
        others = [other for i, other in enumerate(parts) if i != index and groups[i] == groups[index]]
        depth = next((d for d in range(1, len(own)) if all(other[-d:] != own[-d:] for other in others)), len(own))
        names.append("/".join(own[-depth:]))
    return names


def check_cursor(plan: Plan, cursor: Cursor, ingredients: dict[str, Any], accept_change: bool = False) -> list[str]:
    """Check that a run resumes with the data that it began with. `cursor` and `ingredients` are those of the checkpoint.

    Returns:
        The names of changed ingredients.

    Raises:
        CheckpointError: names the changed ingredients, unless `accept_change`.
    """
    if cursor.fingerprint == plan.fingerprint:
        return []
    changed = _changes(ingredients, parse_json(json.dumps(plan.ingredients))) or ["plan"]
    if accept_change:
        return changed
    rule = "changed since the checkpoint was written, so the run cannot continue exactly."
    remedy = "Restore it, continue anyway with --accept_data_change true (at the same step of the new plan), or give the run another name "
    keeping = "(with resume_from_checkpoint and ignore_optimizer_state to keep the weights)."
    raise CheckpointError("data", ", ".join(changed), rule, remedy + keeping)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the ingredients that differ; for sources which ones, for the vocabulary which parts."""
    changed = []
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "vocabulary" and isinstance(old, dict) and isinstance(new, dict):
            changed += [{"ids": "token ids"}.get(part, part) for part in sorted(new) if new[part] != old.get(part)]
        elif key == "sources" and isinstance(old, list) and isinstance(new, list):
            names = [f"{task}/{name}" for name, task, *_ in [*(s for s in new if s not in old), *(s for s in old if s not in new)]]
            changed.append(f"sources ({', '.join(dict.fromkeys(names)) or 'their order'})")
        else:
            changed.append(key)
    return changed


def source_weights(config: RunConfig, stores: Sequence[TokenStore]) -> tuple[int, ...]:
    """Integer weights of the sources. asr_tts_mix_ratio and text_mix_ratio share out between the tasks, train_{task}_weights between the
    sources of a task (by default their sizes).

    Raises:
        ConfigError: a ratio gives a share to a task without data, or none to a task that has data.
    """
    ratio, text = Fraction(str(config.asr_tts_mix_ratio)), Fraction(str(config.text_mix_ratio))
    present = {store.task for store in stores}
    if not {"asr", "tts"} <= present:  # a single speech task has the whole share of speech: the ratio is between two
        ratio = Fraction("asr" in present)
    if not {"asr", "tts"} & present:
        text = Fraction(1)
    shares = {"asr": (1 - text) * ratio, "tts": (1 - text) * (1 - ratio), "text": text}
    for task, name in (("asr", "asr_tts_mix_ratio"), ("tts", "asr_tts_mix_ratio"), ("text", "text_mix_ratio")):
        if task in present and shares[task] < _LEAST_SHARE:
            raise ConfigError(name, getattr(config, name), f"gives no share to train_{task}_dirs.", "Leave them out or change it.")
        if task not in present and shares[task] > 0:
            raise ConfigError(name, getattr(config, name), f"requests {task} records, but train_{task}_dirs is empty.")
    weights: list[Fraction] = []
    for task in TASKS:
        of_task = [store for store in stores if store.task == task]
        sizes = [len(store) if config.weight_unit == "records" else store.manifest["n_tokens"] for store in of_task]
        parts = [Fraction(str(weight)) for weight in getattr(config, f"train_{task}_weights") or sizes]
        weights += [shares[task] * part / sum(parts, Fraction(0)) for part in parts]
        if of_task and min(weights[-len(of_task) :]) < _LEAST_SHARE:
            rule = "gives a directory so small a share that a run would never reach its first record."
            raise ConfigError(f"train_{task}_weights", getattr(config, f"train_{task}_weights"), rule, "Leave the directory out.")
    return integer_weights(weights)


def make_spec(config: RunConfig, stores: Sequence[TokenStore], global_batch_size: int) -> PlanSpec:
    """The specification of a run's plan, whose sources are the stores, ordered by task: asr, tts, text.

    Raises:
        ConfigError: there is nothing to train on, or the configuration does not fit the data.
        DataError: the units of the sources were made differently.
    """
    if not stores:
        raise ConfigError("train_asr_dirs", (), "no training data is named.", "Name train_asr_dirs, train_tts_dirs or train_text_dirs.")
    check_units(stores)
    uris, weights, noise = tuple(store.uri for store in stores), source_weights(config, stores), _noise(config, stores)
    return PlanSpec(uris, weights, config.seed, global_batch_size, config.max_seq_length, config.weight_unit, noise)


def _noise(config: RunConfig, stores: Sequence[TokenStore]) -> UnitNoise:
    """The configured noise. Raises ConfigError where swapping units is configured and neighbours are not known."""
    noise = UnitNoise(config.unit_swap_prob, config.unit_replace_prob, config.unit_drop_prob)
    if noise.swap > 0 and any(store.task == "asr" and unit_neighbours(store) is None for store in stores):
        rule = "needs units.json beside the ASR records, which says which units are near each other."
        raise ConfigError("unit_swap_prob", noise.swap, rule, "Set it to 0.")
    return noise


def unit_neighbours(store: TokenStore) -> np.ndarray | None:
    """Near units of each unit, int64 (n_units, k), from the units manifest of the store's records; None where there is none. Raises
    DataError for a wrong one, which stores of earlier versions may hold."""
    try:
        return neighbours_of(store.manifest.get("units"))
    except ValueError as error:
        rule = f"of {store.manifest['source']} are described by a wrong units.json ({one_line(error)})."
        raise DataError("units", store.name, rule, "Put the right one beside the records (`most-ray prepare units`).") from error


def check_units(stores: Sequence[TokenStore]) -> str | None:
    """Check that the units of all sources were made equally. Returns their hash, or None where no source has a units manifest.

    Raises:
        DataError: two sources were made with different features, k-means or repeat removal.
    """
    known = [(store, units_hash(store.manifest["units"])) for store in stores if store.manifest.get("units")]
    for store, identity in known[1:]:
        if identity != known[0][1]:
            rule = f"were made differently from those of {known[0][0].manifest['source']} (features, k-means, rate or repeats differ)."
            raise DataError("units", store.manifest["source"], rule, "Prepare both with the same k-means file and options.")
    return known[0][1] if known else None
