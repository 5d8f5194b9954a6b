"""What every benchmark needs: repetitions side by side, a table on the screen, flat figures in a file."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "runs" / "bench"

console = Console(width=120, highlight=False)


class Took(NamedTuple):
    """Seconds on the clock, and of processor time: the second is what matters where others use the same cores."""

    wall: float
    cpu: float


def repeat(ways: Mapping[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, list[Took]]:
    """What each way took, the ways taking turns, so that a busy moment of the machine hits all of them. One more round goes before.

    Args:
        ways: each prepares, which is not timed, and returns the work.
    """
    took: dict[str, list[Took]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, prepare in ways.items():
            work = prepare()
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if number:
                took[name].append(Took(time.perf_counter() - wall, time.process_time() - cpu))
    return took


def spread(values: Sequence[float]) -> float:
    """How noisy: (median - best) / best."""
    return statistics.median(values) / min(values) - 1


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()) -> None:
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else _number(cell) for cell in row))
    console.print(table)
    for note in notes:
        console.print(note)


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write(name: str, figures: Mapping[str, Any]) -> Path:
    """runs/bench/NAME.json: the figures, which commit they are of, and what they were measured on."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in figures.items()}
    path.write_text(json.dumps({**rounded, **_machine()}, indent=1) + "\n", encoding="utf-8")
    console.print(f"{path.relative_to(ROOT)}\n")
    return path


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "commit": _git("rev-parse", "--short", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--", "most_ray").splitlines()),
        "cpus": os.cpu_count(),
        "cpu": model,
        "load_1_minute": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
