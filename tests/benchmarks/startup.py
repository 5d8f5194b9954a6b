"""How long the commands take to answer, from the start of the process, on the digits records:

    python -m tests.benchmarks.startup [--rounds 3] [--root CHECKOUT]

The first line and the first step of a run, under Ray and under torchrun; a run that is complete; mistakes that no model is needed for;
imports. Each in a process of its own, its output in a file. `--root`: another checkout, to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.common import ROOT, show, write

LIMIT_S = 240.0  # seconds for one process
LIBRARIES = "import torch, transformers, transformers.modeling_utils"
TRAIN = ["--config", "jobs/configs/digits.yaml", "--logging_steps", "1"]
MISTAKES = {
    "no data named": ["train", "--model_name_or_path", "tiny", "--name", "x", "--max_steps", "2"],
    "ep_size 3": ["train", *TRAIN, "--ep_size", "3", "--name", "x"],
    "missing key": ["train", "--config", "{folder}/typo.yaml", "--name", "x"],
    "missing file to transcribe": ["transcribe", "--model", "{folder}/model", "{folder}/missing.wav"],
    "missing folder of records": ["train", *TRAIN, "--train_asr_dirs", "missing", "--name", "x"],
    "train --help": ["train", "--help"],
}
IMPORTS = ["most_ray.cli", "most_ray.model.modeling", "most_ray.train.run", "most_ray.service.training.worker"]


class Started:
    """A process whose output goes to a file, and what it has done so far."""

    def __init__(self, root: Path, folder: Path, words: Sequence[str]) -> None:
        self.log = folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(root)}
        with self.log.open("wb") as sink:
            self.began = time.time()
            self.process = subprocess.Popen(words, cwd=root, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)

    def until(self, happened: Callable[[], float | None]) -> float:
        """Seconds until `happened` gives a time of the clock, or has one when the process ends."""
        while time.time() < self.began + LIMIT_S:
            ended = self.process.poll() is not None
            if (at := happened()) is not None:
                return at - self.began
            if ended:
                raise RuntimeError(self.log.read_text(encoding="utf-8")[-2000:])
            time.sleep(0.01)
        raise RuntimeError(f"nothing within {LIMIT_S:.0f} s: {self.log.read_text(encoding='utf-8')[-2000:]}")

    def end(self) -> float:
        """Seconds until the process has ended by itself."""
        self.process.wait(LIMIT_S)
        return time.time() - self.began

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(LIMIT_S)


def first_step(metrics: Path) -> float | None:
    """The time at which the first step was logged."""
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        if line.endswith("}") and json.loads(line)["kind"] == "train":
            return float(json.loads(line)["time"])
    return None


def measure(root: Path, folder: Path) -> dict[str, float]:
    """One round: seconds of each thing."""
    python, took = sys.executable, {}
    model = ["init-model", "--preset", "tiny", "--records", "jobs/data/digits/train_asr", "--output", str(folder / "model")]
    Started(root, folder, [python, "-m", "most_ray.cli", *model]).end()
    for name, module in (("torch and transformers", LIBRARIES), *((each, f"import {each}") for each in IMPORTS)):
        took[f"import {name}"] = Started(root, folder, [python, "-c", module]).end()
    (folder / "typo.yaml").write_text("max_stepz: 3\n", encoding="utf-8")
    for name, words in MISTAKES.items():
        took[name] = Started(root, folder, [python, "-m", "most_ray.cli", *(word.format(folder=folder) for word in words)]).end()
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "most_ray.train.run"]
    for how, words in (("train", [python, "-m", "most_ray.cli", "train"]), ("torchrun, 2 ranks", torchrun)):
        run = folder / how
        started = Started(
            root, folder, [*words, *TRAIN, "--output_dir", str(folder), "--name", run.name.replace(",", "").replace(" ", "-")]
        )
        metrics = folder / run.name.replace(",", "").replace(" ", "-") / "metrics.jsonl"
        took[f"{how}: first line"] = started.until(lambda s=started: time.time() if s.log.stat().st_size else None)  # type: ignore[misc]
        took[f"{how}: first step"] = started.until(lambda path=metrics: first_step(path))  # type: ignore[misc]
        started.stop()
    short = [*TRAIN, "--output_dir", str(folder), "--name", "short", "--max_steps", "2", "--val_asr_dirs", "", "--val_tts_dirs", ""]
    Started(root, folder, [python, "-m", "most_ray.cli", "train", *short]).end()
    took["train: a complete run says so"] = Started(root, folder, [python, "-m", "most_ray.cli", "train", *short]).end()
    return took


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.startup", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        folder = Path(tempfile.mkdtemp())
        rounds.append(measure(args.root.resolve(), folder))
        shutil.rmtree(folder)
    found = {name: [each[name] for each in rounds] for name in rounds[0]}
    rows = [[name, *(f"{each:.2f}" for each in (*took, statistics.median(took)))] for name, took in found.items()]
    show("Seconds from the start of the process", ["what", *(f"run {n + 1}" for n in range(args.rounds)), "median"], rows)
    write("startup", {"seconds": {name: [round(each, 2) for each in took] for name, took in found.items()}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
