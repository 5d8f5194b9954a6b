"""Packing: which share of the packed rows holds tokens, by the size of a step, against what trainers commonly do.

Lengths are a model of LibriHeavy's large set: 11,156,939 utterances in 50,794 hours, so 16.4 s each on average, cut to 2..30 s (Kang et
al. 2023, arXiv 2309.08105). The published table has no distribution: a normal one is assumed, with three widths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from most_ray.data.packing import best_fit
from most_ray.data.plan import Plan, PlanSpec
from most_ray.data.store import TokenStore
from tests.benchmarks import common

ROW = 2048
BATCHES = (64, 128, 256, 512, 1024, 2048)
MICRO_BATCH = 16  # records that are padded to the longest of them
MEAN_S, SHORTEST_S, LONGEST_S = 16.4, 2.0, 30.0
TEXT_PER_SECOND = 3.46 * 1.3  # words a second, tokens a word
TEMPLATE = 22
WITHOUT_REPEATS = 0.61  # of the units are left, in shared/data/librispeech_units
WEIGHTS = (1, 1)


@dataclass(frozen=True)
class Lengths:
    """A store for all that a plan asks of one: no tokens."""

    name: str
    task: str
    lengths: np.ndarray
    prompt_lengths: np.ndarray

    @property
    def manifest(self) -> dict[str, Any]:
        return {"content": self.name, "source": self.name, "units": None, "vocabulary": "none", "n_tokens": int(self.lengths.sum())}

    def __len__(self) -> int:
        return len(self.lengths)


def make_stores(n: int, sd: float, units_kept: float) -> list[Lengths]:
    """`n` records, half of them ASR, half TTS."""
    stores = []
    for number, task in enumerate(("asr", "tts")):
        rng = np.random.default_rng(number)
        seconds = rng.normal(MEAN_S, sd, 3 * n)
        seconds = seconds[(seconds >= SHORTEST_S) & (seconds <= LONGEST_S)][: n // 2]
        units, text = (np.round(seconds * per_second).astype(np.int32) for per_second in (50 * units_kept, TEXT_PER_SECOND))
        output = text if task == "asr" else units
        stores.append(Lengths(task, task, units + text + TEMPLATE, units + text + TEMPLATE - output - 1))
    return stores


@dataclass
class Measured:
    """A pass over all records in steps of one size."""

    fill: float
    ms_per_step: float
    ms_packing: float
    mix_deviation: float  # from the share asked for, over its bound's unit: records, or longest records
    bound: float
    in_order: np.ndarray  # lengths as the steps come


def measure(stores: Sequence[Lengths], batch: int, unit: Literal["records", "tokens"], n: int) -> Measured:
    plan = Plan(PlanSpec((), WEIGHTS, 0, batch, ROW, unit), cast("list[TokenStore]", list(stores)))
    check = MixCheck(len(stores), unit, max(int(store.lengths.max()) for store in stores))
    plan.step(1)
    tokens = rows = 0
    seconds, packing, in_order = [], [], []
    for step in range(1, n // batch + 1):
        start = time.perf_counter()
        made = plan.step(step)
        seconds.append(time.perf_counter() - start)
        lengths = np.array([stores[s].lengths[r] for s, r in zip(made.sources, made.rows, strict=True)])
        start = time.perf_counter()
        best_fit(lengths.tolist(), ROW)
        packing.append(time.perf_counter() - start)
        assert sorted(index for pack in made.packs for index in pack) == list(range(batch)), "a record is missing or there twice"
        assert all(lengths[pack].sum() <= ROW for pack in made.packs), "a pack is too long"
        check.add(made.sources, lengths)
        tokens, rows = tokens + int(lengths.sum()), rows + len(made.packs)
        in_order.append(lengths)
    deviation = check.largest
    assert deviation <= plan.mixture.bound, (deviation, plan.mixture.bound)
    return Measured(
        tokens / (rows * ROW),
        1000 * float(np.median(seconds)),
        1000 * float(np.median(packing)),
        deviation,
        plan.mixture.bound,
        np.concatenate(in_order),
    )


class MixCheck:
    """How far each source is from its share, counted after every record and by nobody's word but the steps' own."""

    def __init__(self, n_sources: int, unit: str, longest: int) -> None:
        self._held = np.zeros(n_sources)
        self._unit, self._longest, self.largest = unit, longest, 0.0

    def add(self, sources: np.ndarray, lengths: np.ndarray) -> None:
        amounts = np.ones(len(lengths)) if self._unit == "records" else lengths / self._longest
        running = self._held + np.cumsum(amounts[:, None] * (sources[:, None] == np.arange(len(self._held))), axis=0)
        shares = np.array(WEIGHTS) / sum(WEIGHTS)
        self.largest = max(self.largest, float(np.abs(running - running.sum(axis=1, keepdims=True) * shares).max()))
        self._held = running[-1]


def padding(lengths: np.ndarray) -> float:
    """Fill with one record a row, each row as long as the longest of its micro-batch."""
    whole = lengths[: len(lengths) // MICRO_BATCH * MICRO_BATCH].reshape(-1, MICRO_BATCH)
    return float(whole.sum() / (whole.max(axis=1).sum() * MICRO_BATCH))


def greedy(lengths: np.ndarray) -> float:
    """Fill with records in order, a new row where the next one does not fit."""
    rows, free = 0, 0
    for length in lengths.tolist():
        if length > free:
            rows, free = rows + 1, ROW
        free -= length
    return float(lengths.sum() / (rows * ROW))


def opponents(lengths: np.ndarray) -> dict[str, float]:
    packs = best_fit(lengths.tolist(), ROW)
    return {
        "greedy": greedy(lengths),
        "padding": padding(lengths),
        "padding_to_max": float(lengths.mean() / ROW),
        "best_fit_all": float(lengths.sum() / (len(packs) * ROW)),
    }


CASES = {  # name: width of the durations in seconds, share of the units that is left
    "": (7.0, 1.0),
    "sd_5": (5.0, 1.0),
    "sd_9": (9.0, 1.0),
    "without_repeats": (7.0, WITHOUT_REPEATS),
}


def run_case(name: str, n: int) -> tuple[dict[str, float], list[object], Measured]:
    """Figures of one distribution of lengths, and a row of the table."""
    stores = make_stores(n, *CASES[name])
    measured = {batch: measure(stores, batch, "records", n) for batch in BATCHES}
    other = opponents(measured[512].in_order)
    tail = f"_{name}" if name else ""
    figures = {f"fill_{batch}{tail}": m.fill for batch, m in measured.items()}
    figures |= {f"fill_{way}{tail}": fill for way, fill in other.items()}
    figures |= {f"ratio_{way}{tail}": measured[512].fill / fill for way, fill in other.items()}
    if not name:
        figures |= {f"ms_per_step_{batch}": m.ms_per_step for batch, m in measured.items()}
        figures |= {f"ms_packing_{batch}": m.ms_packing for batch, m in measured.items()}
        figures["mean_tokens"] = float(measured[512].in_order.mean())
    figures[f"mix_deviation_max{tail}"] = max(m.mix_deviation for m in measured.values())
    row = [name.replace("_", " ") or "sd 7", *(f"{m.fill:.4f}" for m in measured.values()), *(f"{fill:.4f}" for fill in other.values())]
    return figures, list(row), measured[512]


def time_rows(n: int, figures: dict[str, float]) -> list[list[object]]:
    """Milliseconds of a step, with shares of rows and of tokens."""
    stores, rows = make_stores(n, *CASES[""]), []
    for batch in BATCHES:
        tokens = measure(stores, batch, "tokens", n)
        figures |= {f"ms_per_step_{batch}_tokens": tokens.ms_per_step, f"fill_{batch}_tokens": tokens.fill}
        figures["mix_deviation_max_tokens"] = max(figures.get("mix_deviation_max_tokens", 0.0), tokens.mix_deviation)
        both = [figures[f"ms_packing_{batch}"], figures[f"ms_per_step_{batch}"], tokens.ms_per_step, f"{tokens.fill:.4f}"]
        rows.append([str(batch), *both])
    figures["mix_bound_tokens"] = tokens.bound
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    n = parser.parse_args().records
    figures: dict[str, float] = {}
    rows = []
    for name in CASES:
        of_case, row, at_512 = run_case(name, n)
        figures |= of_case
        rows.append(row)
    figures["mix_bound"] = at_512.bound
    common.show(
        f"Fill of rows of {ROW} tokens, {n:,} records, best fit in steps of so many records",
        ["durations", *map(str, BATCHES), "greedy", "padding", "to max", "all at once"],
        rows,
        [
            f"Mean of sd 7: {figures['mean_tokens']:.0f} tokens. Greedy and padding are the same in all steps; all at once: best fit.",
            f"Durations are a model: normal, mean {MEAN_S} s, cut to {SHORTEST_S:g}..{LONGEST_S:g} s.",
        ],
    )
    times = time_rows(n, figures)
    common.show("Milliseconds of a step (median)", ["records", "best fit alone", "rows", "tokens", "fill with tokens"], times)
    common.console.print(
        f"After every record, sources are within {figures['mix_deviation_max']:.3f} records (rows; bound {figures['mix_bound']:g}) and "
        f"{figures['mix_deviation_max_tokens']:.3f} longest records (tokens; bound {figures['mix_bound_tokens']:g}) of their shares."
    )
    common.write("packing", {**figures, "records": n})


if __name__ == "__main__":
    main()
