"""What validation beside training costs the loop: steps per second with evaluations running all the time and without any, by turns.

    python -m tests.benchmarks.validation [--steps 240] [--every 20] [--rounds 3]

One training worker of one thread on the digits records, a core to spare for the evaluations (both test sets, greedy). The first steps of a
run (warm-up, the stream's first block) are left out; the time between the first and last of the others, saves included: all save alike.
`busy` tells what a core is worth: instead of evaluations a process of lowest priority multiplies matrices on one thread. The traces and
losses are compared too: no step is repeated or lost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import ray

from most_ray.io.journal import read_journal
from most_ray.service.cluster.connection import start_local_ray
from tests.benchmarks.common import show, write
from tests.end_to_end.faults.harness import finish, under_ray

SKIPPED = 20
BUSY = "import torch; torch.set_num_threads(1); a = torch.rand(512, 512)\nwhile True: a = torch.tanh(a @ a)"
SETS = ["jobs/data/digits/test_takes", "jobs/data/digits/test_speaker"]


def run(folder: Path, name: str, address: str, steps: int, every: int, evaluated: bool) -> dict[str, float]:
    flags: dict[str, object] = {"max_steps": steps, "save_steps": every, "threads_per_worker": 1, "keep_last": 2}
    flags |= {"val_asr_dirs": SETS, "eval_steps": every} if evaluated else {}
    finish(under_ray(folder, name, address, **flags), folder, name)
    lines = read_journal(folder / name / "metrics.jsonl", "train")
    scored = read_journal(folder / name / "metrics.jsonl", "evaluation")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert sorted(line["step"] for line in scored) == (sorted({*range(every, steps + 1, every), steps}) if evaluated else [])
    end = lines[-1]["time"]
    return {"steps_per_s": (steps - SKIPPED) / (end - lines[SKIPPED - 1]["time"]), "evaluations": len(scored)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.validation", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations, and saves (20: there is always one under way)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": [], "busy": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        address = start_local_ray(3).address_info["gcs_address"]
        for number in range(args.rounds):
            for how in reversed(found) if number % 2 else found:
                other = subprocess.Popen([sys.executable, "-c", BUSY], preexec_fn=lambda: os.nice(19)) if how == "busy" else None
                try:
                    found[how].append(run(folder, f"{how}-{number}", address, args.steps, args.every, how == "with"))
                finally:
                    if other:
                        other.kill()
                        other.wait()
            traces = [(folder / f"{how}-{number}.trace").read_bytes() for how in found]
            lines = [read_journal(folder / f"{how}-{number}" / "metrics.jsonl", "train") for how in found]
            assert traces[0] == traces[1] and [a["loss"] for a in lines[0]] == [b["loss"] for b in lines[1]]
        ray.shutdown()
    speeds = {how: statistics.median(one["steps_per_s"] for one in runs) for how, runs in found.items()}
    rows = [[how, f"{speed:.3f}", f"{speed / speeds['without']:.3f}"] for how, speed in speeds.items()]
    show("Steps per second beside evaluations", ["evaluations", "steps/s", "ratio"], rows)
    write("validation", {"every": args.every, "runs": found, "ratio": speeds["with"] / speeds["without"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
