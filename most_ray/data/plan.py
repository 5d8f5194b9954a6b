"""The plan: which records each optimizer step holds and how they are packed. A pure function of lengths, weights and seed.

A step is `global_batch_size` consecutive records of the mixture, packed among themselves. So every step is known without the ones
before it, the mix is exact after every step, and nothing depends on the number of workers.
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
from most_ray.errors import CheckpointError, ConfigError, DataError, nearest
from most_ray.io import storage
from most_ray.records.record import TASKS, units_hash


@dataclass(frozen=True)
class PlanSpec:
    """All that a plan is made from; small, picklable, and JSON when written down."""

    stores: tuple[str, ...]
    weights: tuple[int, ...]
    seed: int
    global_batch_size: int
    max_seq_length: int
    weight_unit: WeightUnit
    noise: UnitNoise = NO_NOISE


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step.

    sources, rows: where its records lie, int64 (records,), in mixture order.
    packs: indices into them, one list per packed row.
    n_supervised: supervised tokens of the whole step by task, in the order of records.TASKS; n_tokens: all its tokens (before noise).
    """

    step: int
    sources: np.ndarray
    rows: np.ndarray
    packs: list[list[int]]
    n_supervised: list[int]
    n_tokens: int


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data: everything before `step` has been trained on, nothing after. `step` alone decides."""

    fingerprint: str
    epoch: float
    step: int


class Plan:
    """`step(k)` for any k, in any order, in constant time."""

    def __init__(self, spec: PlanSpec, stores: Sequence[TokenStore] | None = None) -> None:
        """`stores`: in place of those that the spec names."""
        self.spec = spec
        self.stores: list[TokenStore] = [open_store(path) for path in spec.stores] if stores is None else list(stores)
        self.mixture = Mixture(spec.weights, [store.lengths for store in self.stores], spec.seed, spec.weight_unit)
        self._tasks = np.array([TASKS.index(store.task) for store in self.stores])
        self.neighbours = [unit_neighbours(store) for store in self.stores]

    @cached_property
    def ingredients(self) -> dict[str, Any]:
        """What the order of records follows from, by name: two runs with equal ingredients train on equal batches."""
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
        return _digest(self.ingredients)

    def step(self, k: int) -> StepPlan:
        """The k-th optimizer step, counted from 1."""
        size = self.spec.global_batch_size
        sources, rows = self.mixture.locate((k - 1) * size, k * size)
        lengths = np.empty(size, np.int64)
        prompts = np.empty(size, np.int64)
        for source, store in enumerate(self.stores):
            chosen = sources == source
            lengths[chosen] = store.lengths[rows[chosen]]
            prompts[chosen] = store.prompt_lengths[rows[chosen]]
        packs = best_fit(lengths.tolist(), self.spec.max_seq_length)
        supervised = np.zeros(len(TASKS), np.int64)
        np.add.at(supervised, self._tasks[sources], lengths - prompts)
        return StepPlan(k, sources, rows, packs, supervised.tolist(), int(lengths.sum()))

    def record_ids(self, plan: StepPlan) -> list[str]:
        """Ids of the step's records, sorted: one line of a trace."""
        return sorted(self.stores[s].record_id(int(r)) for s, r in zip(plan.sources, plan.rows, strict=True))

    def steps_for_epochs(self, epochs: float, of: str = "all") -> int:
        """Steps after which every source, or the one called `of`, has been seen at least `epochs` times.

        Raises:
            ConfigError: no source, or more than one, is called so.
        """
        source = None
        if of != "all":
            found = [i for i, name in enumerate(self.names) if of in (name, name.split("/", 1)[1])]
            if len(found) != 1:
                rule = "is no training source." if not found else "is the name of more than one source."
                raise ConfigError("epochs_of", of, rule, nearest(of, ["all", *self.names]))
            source = found[0]
        return -(-self.mixture.records_for_epochs(epochs, source) // self.spec.global_batch_size)

    def cursor(self, step: int) -> Cursor:
        """Epoch: passes over the least seen source."""
        counts = self.mixture.counts(step * self.spec.global_batch_size)
        epoch = min(int(count) / size for count, size in zip(counts, self.mixture.sizes, strict=True))
        return Cursor(self.fingerprint, epoch, step)

    def consumed(self, step: int) -> dict[str, int]:
        """Records trained on per source after `step` steps."""
        counts = self.mixture.counts(step * self.spec.global_batch_size)
        return {name: int(count) for name, count in zip(self.names, counts, strict=True)}

    def mix(self, step: int) -> dict[str, dict[str, float]]:
        """What `step` steps have trained on: per source its records, their tokens (before noise), and its share of the unit that weights
        count, beside the share that was asked for."""
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
        """What each source is called: task and folder."""
        tasks = [store.task for store in self.stores]
        folders = distinct_names([store.manifest["source"] for store in self.stores], tasks)
        return [f"{task}/{folder}" for task, folder in zip(tasks, folders, strict=True)]


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def distinct_names(directories: Sequence[str | Path], groups: Sequence[str]) -> list[str]:
    """Each directory's (or URI's) last name, with as many of those above it as tell it apart from the others of its group."""
    full = [storage.absolute(directory) for directory in directories]
    parts = [[name for name in place.split("?")[0].split("/") if name] or ["root"] for place in full]
    names = []
    for index, own in enumerate(parts):
        others = [other for i, other in enumerate(parts) if i != index and groups[i] == groups[index]]
        depth = next((d for d in range(1, len(own)) if all(other[-d:] != own[-d:] for other in others)), len(own))
        names.append("/".join(own[-depth:]))
    return names


def check_cursor(plan: Plan, cursor: Cursor, ingredients: dict[str, Any], accept_change: bool = False) -> list[str]:
    """A run may go on only over the data it began with. Returns what changed: nothing, or, with `accept_change`, the names.

    Raises:
        CheckpointError: names what changed.
    """
    if cursor.fingerprint == plan.fingerprint:
        return []
    changed = _changes(ingredients, json.loads(json.dumps(plan.ingredients))) or ["plan"]
    if accept_change:
        return changed
    raise CheckpointError(
        "data",
        ", ".join(changed),
        "changed since the checkpoint was written, so the run cannot go on exactly.",
        "Restore it, go on all the same with --accept_data_change true (at the same step of the new plan), or give the run another name "
        "(with resume_from_checkpoint and ignore_optimizer_state to keep the weights).",
    )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the ingredients that differ; of sources and vocabulary, which one and which part."""
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
    """Integer weights of the sources: the kinds share by asr_tts_mix_ratio and text_mix_ratio, sources of a kind by their weights.

    Raises:
        ConfigError: a ratio gives a share to a kind without data, or none to a kind that has data.
    """
    ratio, text = Fraction(str(config.asr_tts_mix_ratio)), Fraction(str(config.text_mix_ratio))
    present = {store.task for store in stores}
    shares = {"asr": (1 - text) * ratio, "tts": (1 - text) * (1 - ratio), "text": text}
    if "tts" not in present or "asr" not in present:
        # One speech task alone takes the whole speech share: the ratio is between two.
        shares["asr"], shares["tts"] = ((1 - text), Fraction(0)) if "asr" in present else (Fraction(0), (1 - text))
        if not present & {"asr", "tts"}:
            shares = {"asr": Fraction(0), "tts": Fraction(0), "text": Fraction(1)}
    for task, name in (("asr", "asr_tts_mix_ratio"), ("tts", "asr_tts_mix_ratio"), ("text", "text_mix_ratio")):
        if task in present and shares[task] <= 0:
            raise ConfigError(name, getattr(config, name), f"gives no share to train_{task}_dirs.", "Leave them out or change it.")
        if task not in present and shares[task] > 0:
            raise ConfigError(name, getattr(config, name), f"asks for {task} records, but train_{task}_dirs is empty.")
    weights: list[Fraction] = []
    for task in ("asr", "tts", "text"):
        of_kind = [store for store in stores if store.task == task]
        sizes = [len(store) if config.weight_unit == "records" else store.manifest["n_tokens"] for store in of_kind]
        given = getattr(config, f"train_{task}_weights") or sizes
        parts = [Fraction(str(weight)) for weight in given]
        weights += [shares[task] * part / sum(parts, Fraction(0)) for part in parts]
    return integer_weights(weights)


def make_spec(config: RunConfig, stores: Sequence[TokenStore], global_batch_size: int) -> PlanSpec:
    """The plan of a run. `stores` in the order asr, tts, text.

    Raises:
        ConfigError, DataError: there is nothing to train on, or the units of the sources were made differently.
    """
    if not stores:
        raise ConfigError("train_asr_dirs", (), "no training data is named.", "Name train_asr_dirs, train_tts_dirs or train_text_dirs.")
    check_units(stores)
    return PlanSpec(
        stores=tuple(store.uri for store in stores),
        weights=source_weights(config, stores),
        seed=config.seed,
        global_batch_size=global_batch_size,
        max_seq_length=config.max_seq_length,
        weight_unit=config.weight_unit,
        noise=_noise(config, stores),
    )


def _noise(config: RunConfig, stores: Sequence[TokenStore]) -> UnitNoise:
    noise = UnitNoise(config.unit_swap_prob, config.unit_replace_prob, config.unit_drop_prob)
    if noise.swap > 0 and any(store.task == "asr" and unit_neighbours(store) is None for store in stores):
        raise ConfigError(
            "unit_swap_prob",
            noise.swap,
            "needs units.json beside the ASR records, which says which units are near each other.",
            "Set it to 0.",
        )
    return noise


def unit_neighbours(store: TokenStore) -> np.ndarray | None:
    """Near units of each unit, int64 (n_units, k), where the store's records came with them."""
    table = (store.manifest.get("units") or {}).get("neighbours")
    return None if table is None else np.array(table, dtype=np.int64)


def check_units(stores: Sequence[TokenStore]) -> str | None:
    """The one identity of all units that are trained on, or None where no source tells.

    Raises:
        DataError: two sources were made with different features, k-means or repeat removal.
    """
    known = [(store, units_hash(store.manifest["units"])) for store in stores if store.manifest.get("units")]
    for store, identity in known[1:]:
        if identity != known[0][1]:
            raise DataError(
                "units",
                store.manifest["source"],
                f"were made differently from those of {known[0][0].manifest['source']} (features, k-means, rate or repeats differ).",
                "Prepare both with the same k-means file and options.",
            )
    return known[0][1] if known else None
