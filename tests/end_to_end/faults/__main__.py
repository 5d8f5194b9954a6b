"""The long form, with a table: `python -m tests.end_to_end.faults --kills 20 --saves 20`."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Table

from most_ray.service.cluster.connection import start_local_ray
from tests.end_to_end.faults.harness import Report, kills_inside_saves, random_kills


def show(title: str, report: Report, console: Console) -> None:
    table = Table(title=title)
    for heading in ("", "killed", "behind step", "written of the save", "newest commit then"):
        table.add_column(heading)
    for number, row in enumerate(report.rows, start=1):
        table.add_row(str(number), *map(str, row))
    console.print(table)
    console.print(
        f"trace equal: {report.trace_equal}; metrics without gap or repeat: {report.metrics_whole}; "
        f"largest difference of a loss: {report.loss_difference:.2g}",
        highlight=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="random kills of workers and drivers (default: 20)")
    parser.add_argument("--saves", type=int, default=20, help="kills inside a save (default: 20)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the runs that are killed inside a save (default: 2)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 30), help="of the moments")
    args = parser.parse_args()
    console = Console(width=160)
    console.print(f"seed {args.seed}", highlight=False)
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        for name in ("random", "saves"):
            (Path(folder) / name).mkdir()
        if args.saves:
            report = kills_inside_saves(Path(folder) / "saves", args.saves, 3, args.seed, args.ranks)
            show(f"{args.saves} kills inside a save, {args.ranks} ranks", report, console)
            passed &= report.passed
        if args.kills:
            address = start_local_ray(4).address_info["gcs_address"]
            report = random_kills(Path(folder) / "random", address, args.kills, 6 * args.kills, 5, args.seed)
            ray.shutdown()
            show(f"{args.kills} random kills, 2 workers under Ray", report, console)
            passed &= report.passed
    console.print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
