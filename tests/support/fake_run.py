"""Stands in for `most-ray train` in tests of sweeps: reads a configuration from standard input and leaves what a run leaves, in no time.

Its word error rate is a function of the settings and the step, the lower the nearer learning_rate is to 0.01; two learning rates do more:
at 0.666 it fails, at 0.999 it kills itself. It goes on behind its newest checkpoint, counts its starts in `starts`, and leaves the times of
its beginnings and ends in `spans`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def wer_of(learning_rate: float, step: int) -> float:
    return round(abs(learning_rate - 0.01) * 10 + 1 / step, 9)


def main() -> int:
    config = yaml.safe_load(sys.stdin)
    folder = Path(config["output_dir"]) / config["name"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    rate, total, every = config["learning_rate"], config["max_steps"], config["eval_steps"]
    if rate == 0.666:
        print("some output\nmost-ray: data error: train_asr_dirs: holds nothing.", file=sys.stderr)
        return 2
    if rate == 0.999:
        os.kill(os.getpid(), signal.SIGKILL)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    done = newest(folder, config)
    with (folder / "metrics.jsonl").open("a") as metrics, (folder / "spans").open("a") as spans:
        began = time.time()

        def write(**line: Any) -> None:
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()

        write(kind="start", step=done)
        for step in range(done + 1, total + 1):
            time.sleep(float(os.environ.get("FAKE_STEP_S", "0.05")))  # training: so that trials overlap, and can be stopped
            write(kind="train", step=step, loss=rate)
            if step % every == 0 or stopped:
                uri = folder / "checkpoints" / f"step-{step:09d}"
                uri.mkdir(parents=True, exist_ok=True)
                (uri / "state.json").write_text(json.dumps({"step": step}))
                (uri / "commit.json").write_text("{}")
            if step % every == 0:
                rates = {"rate": wer_of(rate, step), "interval": [0.0, 1.0]}
                write(kind="evaluation", step=step, sets={"asr/test_takes": {"words": rates, "loss": rate}})
            if stopped:
                break
        spans.write(f"{began} {time.time()}\n")
    return 75 if stopped else 0


def newest(folder: Path, config: dict[str, Any]) -> int:
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    if not steps and config.get("resume_from_checkpoint"):
        steps = [json.loads((Path(config["resume_from_checkpoint"]) / "state.json").read_text())["step"]]
    return max(steps, default=0)


if __name__ == "__main__":
    sys.exit(main())
