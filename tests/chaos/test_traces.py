"""Promises 1, 3, 5, 36 and 37 of docs/promises.md on whole runs: the same records in the same steps, whatever the number of workers,
forward passes and kills.

Every run is the command that a user types, on spoken digits: recognition, synthesis and text, mixed in tokens, packed. Takes some
minutes: `make chaos`.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from most_ray.config import load_config
from most_ray.data.batch import forward_shape
from most_ray.io.journal import read_journal
from most_ray.runs.resolve import prepare_run
from tests.conftest import ROOT

STEPS = 28
EPOCH = 7  # steps after which the recognition records have been seen once, and a checkpoint lies on the boundary
ROWS = {
    (1, 1): 12,
    (1, 2): 6,
    (1, 4): 3,
    (3, 1): 4,
    (3, 2): 2,
    (3, 4): 1,
}  # train_batch_size by passes and workers: a step has 9 to 12 rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records and configuration: three sources of unequal sizes, so that their epochs end at different steps."""
    folder = tmp_path_factory.mktemp("chaos")
    for name, count in (("train_asr", 40), ("train_tts", 30)):
        with gzip.open(ROOT / "jobs/data/digits" / name / "records.jsonl.gz", "rt", encoding="utf-8") as stream:
            lines = [next(stream) for _ in range(count)]
        (folder / name).mkdir()
        (folder / name / "records.jsonl").write_text("".join(lines))
    (folder / "text").mkdir()
    texts = [{"id": f"text_{i}", "instruction": "Say it again.", "input": f"{i} {i}", "output": f"{i} " * (1 + i % 9)} for i in range(11)]
    (folder / "text" / "records.json").write_text(json.dumps(texts))
    settings = {
        "train_asr_dirs": [str(folder / "train_asr")],
        "train_tts_dirs": [str(folder / "train_tts")],
        "train_text_dirs": [str(folder / "text")],
        "text_mix_ratio": 0.2,
        "weight_unit": "tokens",
        "max_seq_length": 64,
        "global_batch_size": 14,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "output_dir": str(folder / "runs"),
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder / "config.yaml"


def command(config: Path, name: str, workers: int, passes: int = 1, **flags: Any) -> list[str]:
    flags |= {"num_workers": workers, "ep_size": min(workers, 2), "train_batch_size": ROWS[passes, workers], "name": name}
    flags |= {"gradient_accumulation_steps": passes, "trace_records": config.parent / f"{name}.trace"}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, "-m", "most_ray.cli", "train", "--config", str(config), *words]


def finish(config: Path, name: str, address: str, workers: int, passes: int = 1, **flags: Any) -> bytes:
    """Run to the end; the trace."""
    done = subprocess.run(
        command(config, name, workers, passes, **flags),
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (config.parent / f"{name}.trace").read_bytes()


def kill_behind(config: Path, name: str, address: str, step: int, workers: int, passes: int = 1, **flags: Any) -> None:
    """SIGKILL to the driver once the trace holds `step`."""
    trace = config.parent / f"{name}.trace"
    with subprocess.Popen(
        command(config, name, workers, passes, **flags),
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 200
        while not (trace.exists() and trace.read_bytes().count(b"\n") >= step):
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < end, f"step {step} did not come"
            time.sleep(0.01)  # between two looks at a file of another process: nothing depends on how long
        process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def reference(config: Path, ray_cluster: str) -> bytes:
    """The trace of the uninterrupted run of one worker in one forward pass."""
    trace = finish(config, "reference", ray_cluster, 1)
    assert [json.loads(line)["step"] for line in trace.splitlines()] == list(range(1, STEPS + 1))
    return trace


def test_the_plan_command_agrees(config: Path, reference: bytes, tmp_path: Path) -> None:
    words = ["plan", "--config", str(config), "--steps", f"0:{STEPS}", "--trace", str(tmp_path / "t"), "--name", "reference"]
    subprocess.run([sys.executable, "-m", "most_ray.cli", *words], cwd=ROOT, check=True, timeout=100)
    assert (tmp_path / "t").read_bytes() == reference


@pytest.mark.parametrize(("workers", "passes"), [(1, 3), (2, 1), (2, 3), (4, 1), (4, 3)])
def test_workers_and_accumulation(config: Path, reference: bytes, ray_cluster: str, workers: int, passes: int) -> None:
    plan = prepare_run(load_config(config, {"name": "reference"})).plan
    made = {forward_shape(len(plan.step(k).packs), workers, ROWS[passes, workers])[0] for k in range(1, STEPS + 1)}
    assert max(made) == passes
    assert finish(config, f"w{workers}p{passes}", ray_cluster, workers, passes) == reference


@pytest.mark.parametrize(("workers", "passes"), [(1, 1), (2, 3)])
@pytest.mark.parametrize(("where", "save_steps", "kills"), [("mid-epoch", 5, [12]), ("boundary", EPOCH, [9]), ("twice", 4, [6, 18])])
def test_kills(
    config: Path, reference: bytes, ray_cluster: str, workers: int, passes: int, where: str, save_steps: int, kills: list[int]
) -> None:
    name = f"{where}-w{workers}"
    for step in kills:
        kill_behind(config, name, ray_cluster, step, workers, passes, save_steps=save_steps)
    assert finish(config, name, ray_cluster, workers, passes, save_steps=save_steps) == reference
    lines = read_journal(config.parent / "runs" / name / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_four_workers_then_two_then_four(config: Path, reference: bytes, ray_cluster: str) -> None:
    kill_behind(config, "resized", ray_cluster, 6, 4, save_steps=3)
    kill_behind(config, "resized", ray_cluster, 16, 2, save_steps=3)
    assert finish(config, "resized", ray_cluster, 4, save_steps=3) == reference


def test_an_epoch_ends_where_a_checkpoint_lies(config: Path, reference: bytes) -> None:
    """So that "boundary" above is one: the checkpoint of step 7 lies where a source starts over, or right beside."""
    plan = prepare_run(load_config(config, {"name": "reference"})).plan
    ends = {plan.steps_for_epochs(e, name) for name in ("train_asr", "train_tts", "text") for e in (1.0, 2.0)}
    assert EPOCH in ends, sorted(ends)


def test_changed_data_stops_a_run_and_may_be_accepted(config: Path, ray_cluster: str) -> None:
    """A record more in one source: refused by its name; with --accept_data_change the run goes on at its step, over the new data."""
    extra = config.parent / "text" / "more.jsonl"
    finish(config, "changed", ray_cluster, 1, max_steps=10, save_steps=10)
    extra.write_text(json.dumps({"id": "late", "instruction": "Say it again.", "input": "so", "output": "so"}) + "\n")
    try:
        words = command(config, "changed", 1, max_steps=16)
        refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
        assert refused.returncode == 2 and "data = 'sources (text/text)': changed since" in refused.stderr, refused.stderr
        trace = finish(config, "changed", ray_cluster, 1, max_steps=16, accept_data_change=True)
    finally:
        extra.unlink()
    assert [json.loads(line)["step"] for line in trace.splitlines()] == list(range(1, 17))
