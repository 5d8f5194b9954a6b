"""Processes of a run killed at random moments, and at moments inside a save; what is left is compared with an uninterrupted run's.

Every run is the command that a user types. Kills are SIGKILL: no handler, no last words.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from most_ray.io.journal import read_journal
from tests.conftest import ROOT

CONFIG = ROOT / "jobs" / "configs" / "digits.yaml"
_started: list[subprocess.Popen[bytes]] = []
DEADLINE_S = 240.0  # for whatever is waited for; only a hang reaches it


@dataclass
class Report:
    """What happened to one run. `rows`: (what was killed, behind which step, what a save had written by then, step it went on from)."""

    rows: list[tuple[str, int, str, int]] = field(default_factory=list)
    trace_equal: bool = False
    metrics_whole: bool = False
    loss_difference: float = float("nan")

    @property
    def passed(self) -> bool:
        return self.trace_equal and self.metrics_whole and self.loss_difference < 1e-4


def flags_of(folder: Path, name: str, **changes: Any) -> list[str]:
    values = {
        "output_dir": str(folder),
        "name": name,
        "trace_records": str(folder / f"{name}.trace"),
        "val_asr_dirs": "",
        "val_tts_dirs": "",
        "warmup_steps": 5,
        "max_failures": 1000,
        "bf16": "false",  # losses are compared
        **changes,
    }
    words = {flag: value if isinstance(value, list) else [str(value)] for flag, value in values.items()}
    return ["--config", str(CONFIG), *(word for flag, given in words.items() for word in (f"--{flag}", *given))]


def under_ray(folder: Path, name: str, address: str, **changes: Any) -> subprocess.Popen[bytes]:
    """`most-ray train` on a cluster that is there."""
    return _start([sys.executable, "-m", "most_ray.cli", "train", *flags_of(folder, name, **changes)], folder, name, RAY_ADDRESS=address)


def by_itself(folder: Path, name: str, ranks: int, **changes: Any) -> subprocess.Popen[bytes]:
    """The engine without Ray, under torchrun where there are several ranks."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    module = ["-m", "most_ray.train.run"]
    return _start([sys.executable, *launcher, *module, *flags_of(folder, name, **changes)], folder, name, OMP_NUM_THREADS="1")


def _start(words: list[str], folder: Path, name: str, **environment: str) -> subprocess.Popen[bytes]:
    log = (folder / f"{name}.log").open("ab")
    # A session of its own: what is killed is this run and nothing beside it.
    process = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    _started.append(process)
    return process


def end_all() -> None:
    """Kill what a failed test has left running."""
    while _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(_started.pop().pid, signal.SIGKILL)


def finish(process: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    code = process.wait(timeout=2 * DEADLINE_S)
    assert code == 0, (code, (folder / f"{name}.log").read_text()[-3000:])


def steps_done(folder: Path, name: str) -> int:
    trace = folder / f"{name}.trace"
    return trace.read_bytes().count(b"\n") if trace.exists() else 0


def newest_commit(folder: Path, name: str) -> int:
    found = (folder / name / "checkpoints").glob("step-*/commit.json")
    return max((int(path.parent.name[5:]) for path in found), default=0)


def ray_workers(address: str) -> list[psutil.Process]:
    """The training workers of one Ray of this machine, which is told from others by what its raylet was started with."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if re.match(r"ray::\S*(RayTrainWorker|TrainWorker)", line):
            with contextlib.suppress(psutil.Error):
                raylet = process.parent()
                if raylet and any(address in word for word in raylet.cmdline()):
                    found.append(process)
    return found


def random_kills(folder: Path, address: str, kills: int, steps: int, save_steps: int, seed: int, workers: int = 2, **more: Any) -> Report:
    """One run under Ray; at random steps a worker or the driver is killed, in turn. `more`: flags of the run that is killed."""
    draw = random.Random(seed)
    changes = {"max_steps": steps, "save_steps": save_steps, "num_workers": workers, "ep_size": workers}
    finish(by_itself(folder, "straight", workers, **changes), folder, "straight")
    report, process = Report(), under_ray(folder, "killed", address, **(changes := {**changes, **more}))
    moments = sorted(draw.sample(range(1, steps - 1), kills))
    for number, moment in enumerate(moments):
        whom = ("worker", "driver")[number % 2]
        end = time.monotonic() + DEADLINE_S
        while not (steps_done(folder, "killed") >= moment and (whom == "driver" or ray_workers(address))):
            assert process.poll() is None, (folder / "killed.log").read_text()[-3000:]
            assert time.monotonic() < end, f"step {moment} did not come"
            time.sleep(0.01)  # between two looks at files of another process: nothing depends on how long
        done = steps_done(folder, "killed")
        if whom == "driver":
            process.kill()
            process.wait()
            process = under_ray(folder, "killed", address, **changes)
        else:
            victim = draw.choice(ray_workers(address))
            victim.kill()
            # The trace is cut back when the next attempt begins: until then nobody else is killed.
            psutil.wait_procs([victim], timeout=DEADLINE_S)
        report.rows.append((whom, done, "", newest_commit(folder, "killed")))
    finish(process, folder, "killed")
    return compare(report, folder, "straight", "killed")


def kills_inside_saves(folder: Path, kills: int, save_steps: int, seed: int, ranks: int = 1) -> Report:
    """The engine by itself; each time a checkpoint has been begun and not committed one of its ranks is killed."""
    draw = random.Random(seed)
    steps = save_steps * (kills + 2)
    changes = {"max_steps": steps, "save_steps": save_steps, "ep_size": ranks}
    finish(by_itself(folder, "whole", ranks, **changes), folder, "whole")
    report, before = Report(), 0
    while len(report.rows) < kills:
        process = by_itself(folder, "torn", ranks, **changes)
        uri = _begun(folder / "torn" / "checkpoints", process, before)
        assert uri is not None, (folder / "torn.log").read_text()[-3000:]
        time.sleep(draw.uniform(0.0, 0.03))  # at any phase of the save: which one it was is looked at afterwards
        victims = psutil.Process(process.pid).children(recursive=True) if ranks > 1 else []
        for victim in [draw.choice([v for v in victims if "most_ray" in " ".join(v.cmdline())] or [psutil.Process(process.pid)])]:
            victim.kill()
        process.wait(timeout=DEADLINE_S)
        step = int(uri.name[5:])
        if not (uri / "commit.json").exists():
            written = sorted(path.name for path in uri.iterdir())
            report.rows.append(("rank", step, ", ".join(written) or "nothing", newest_commit(folder, "torn")))
        before = max(before, newest_commit(folder, "torn"))
        assert step < steps, "the run was over before all kills were made"
    finish(by_itself(folder, "torn", ranks, **changes), folder, "torn")
    return compare(report, folder, "whole", "torn")


def _begun(checkpoints: Path, process: subprocess.Popen[bytes], after: int) -> Path | None:
    """The folder of a save that begins in this attempt. What an attempt before has left is older, or is written anew."""
    old = {path: path.stat().st_ino for path in checkpoints.glob("step-*")}
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        for path in checkpoints.glob("step-*"):
            try:
                new = old.get(path) != path.stat().st_ino
            except FileNotFoundError:
                continue
            if new and int(path.name[5:]) > after and not (path / "commit.json").exists():
                return path
        time.sleep(0.001)  # as above
    return None


def compare(report: Report, folder: Path, straight: str, killed: str) -> Report:
    report.trace_equal = (folder / f"{straight}.trace").read_bytes() == (folder / f"{killed}.trace").read_bytes()
    lines = [read_journal(folder / name / "metrics.jsonl", "train") for name in (straight, killed)]
    report.metrics_whole = [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    if report.metrics_whole:
        report.loss_difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(*lines, strict=True))
    return report
