"""A sweep's folder as a sweep leaves it, made up: trials whose error depends on how their experts are split and on their mix."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from most_ray.sweep.ledger import Objective, ranked, replay
from tests.support.report_data import write_run

EXPERTS = 8
DIMENSIONS: list[dict[str, Any]] = [
    {"name": "expert_split", "kind": "choice", "values": ["contiguous", "interleaved", "affinity"]},
    {"name": "audio_experts", "kind": "randint", "low": 2, "high": 6},
    {"name": "asr_tts_mix_ratio", "kind": "uniform", "low": 0.2, "high": 0.8},
    {"name": "learning_rate", "kind": "loguniform", "low": 1e-4, "high": 1e-2},
]
OBJECTIVES = ("wer/dev_clean", "cycle_wer/dev_tts")
REASON = "DataError: shards/00003.arrow: is damaged.\nRestore it."
_STEPS = (50, 100, 150, 200)
_BETTER = {"affinity": 0.0, "interleaved": 0.03, "contiguous": 0.07}
_BEGAN = 1.0e9


def write_sweep(
    folder: Path,
    trials: int = 12,
    objectives: Sequence[str] = OBJECTIVES[:1],
    live: bool = False,
    runs: Sequence[int] | None = None,
    failed: Sequence[int] = (4,),
    dimensions: Sequence[dict[str, Any]] = tuple(DIMENSIONS),
) -> Path:
    """A sweep of `trials`: the numbers in `failed` have failed, every third of the others was stopped early; with live=True the last three
    are still going, and no trial has won. `runs`: trials whose folders are there (None: all that have results)."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    lines = [_start(folder.name, trials, objectives, dimensions)]
    for number in range(1, trials + 1):
        values = {entry["name"]: _value(entry, draw) for entry in dimensions}
        going = live and number > trials - 3
        lines += _trial(number, values, objectives, draw, number in failed, going)
        if number not in failed and (runs is None or number in runs):
            write_run(folder / "trials" / f"{number:03d}", steps=40, seed=number, restart=None, done=not going)
    write_ledger(folder, lines)
    (folder / "sweep.yaml").write_text("name: sweep\nmax_trials: 12\n")
    share = [0.21, 0.05, 0.16, 0.08, 0.2, 0.03, 0.17, 0.1]
    order = sorted(range(EXPERTS), key=lambda expert: -share[expert])
    (folder / "affinity.json").write_text(json.dumps({"order": order, "share": share, "tokens": 4096}))
    if not live:
        best = ranked(replay(lines).trials.values(), Objective.parse(objectives[0]))[0]
        settings = "".join(f"{name}: {value}\n" for name, value in best.settings.items())
        (folder / "best.yaml").write_text(f"# Trial {best.number} of the sweep {folder.name}\nname: {folder.name}-best\n{settings}")
        (folder / "summary.json").write_text(json.dumps({"name": folder.name}))
    return folder


def write_population(folder: Path) -> Path:
    """A sweep of population based training: the second trial went on from the first one's checkpoint."""
    folder.mkdir(parents=True)
    dimension = DIMENSIONS[3]
    lines = [_start(folder.name, 2, OBJECTIVES[:1], [dimension]) | {"scheduler": "pbt"}]
    lines += [_begin(number, {"learning_rate": 0.001 * number}) for number in (1, 2)]
    lines += [_result(number, f"{number:03d}", 50, {OBJECTIVES[0]: 0.2 * number}) for number in (1, 2)]
    lines.append(_begin(2, {"learning_rate": 0.0012}, "002-1", {"trial": 1, "run": "001", "step": 50}))
    lines += [_result(number, run, 100, {OBJECTIVES[0]: 0.1 * number}) for number, run in ((1, "001"), (2, "002-1"))]
    lines += [_end(number, 100, "finished") for number in (1, 2)]
    write_ledger(folder, lines)
    return folder


def write_ledger(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Lines a minute apart."""
    (folder / "trials.jsonl").write_text("".join(json.dumps({"time": _BEGAN + 60 * i, **line}) + "\n" for i, line in enumerate(lines)))


def _start(name: str, trials: int, objectives: Sequence[str], dimensions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    how = {"search": "random", "scheduler": "asha", "max_trials": trials, "max_steps": _STEPS[-1], "concurrent": 2}
    return {"kind": "sweep", "name": name, "objectives": list(objectives), "dimensions": list(dimensions), **how}


def _value(entry: dict[str, Any], draw: random.Random) -> Any:
    if "values" in entry:
        return draw.choice(entry["values"])
    if entry["kind"] == "randint":
        return draw.randint(entry["low"], entry["high"])
    if entry["kind"] == "loguniform":
        return math.exp(draw.uniform(math.log(entry["low"]), math.log(entry["high"])))
    return draw.uniform(entry["low"], entry["high"])


def _trial(
    number: int, values: dict[str, Any], objectives: Sequence[str], draw: random.Random, failed: bool, going: bool
) -> list[dict[str, Any]]:
    lines = [_begin(number, values)]
    if failed:
        return [*lines, _end(number, 0, "failed", REASON)]
    stopped = number % 3 == 0 and not going
    steps = _STEPS[:2] if stopped or going else _STEPS
    lines += [_result(number, f"{number:03d}", step, _metrics(values, objectives, step, draw)) for step in steps]
    if going:
        return lines
    return [*lines, _end(number, steps[-1], "stopped" if stopped else "finished", "worse than two thirds at step 100" if stopped else None)]


def _metrics(values: dict[str, Any], objectives: Sequence[str], step: int, draw: random.Random) -> dict[str, float]:
    mix, rate = values.get("asr_tts_mix_ratio", 0.5), values.get("learning_rate", 1e-3)
    split = _BETTER.get(values.get("expert_split", ""), 0.0)
    base = 0.12 + 0.6 * math.exp(-step / 60) + split + 0.06 * abs(math.log10(rate / 2e-3))
    asr, tts = base + 0.1 * (0.7 - mix) ** 2, base + 0.25 * mix
    noise = draw.gauss(0, 0.006)
    names = [Objective.parse(text).metric for text in objectives]
    return dict(zip(names, (max(0.01, asr + noise), max(0.01, tts - noise)), strict=False))


def _begin(number: int, values: dict[str, Any], run: str = "", parent: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"kind": "trial", "trial": number, "run": run or f"{number:03d}", "values": values, "settings": values, "parent": parent}


def _result(number: int, run: str, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    intervals = {name: [0.88 * value, 1.13 * value] for name, value in metrics.items()}
    return {"kind": "result", "trial": number, "run": run, "step": step, "metrics": metrics, "intervals": intervals}


def _end(number: int, step: int, state: str, reason: str | None = None) -> dict[str, Any]:
    return {"kind": "end", "trial": number, "step": step, "state": state, "reason": reason}
