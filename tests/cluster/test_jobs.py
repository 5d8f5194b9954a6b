"""Jobs on a real cluster with a token, as `ray job submit` and `most-ray submit` make them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import LocalCluster
from tests.conftest import ROOT

CONFIG = "jobs/configs/digits.yaml"
SHORT = ["--val_asr_dirs", "", "--val_tts_dirs", "", "--save_steps", "4", "--global_batch_size", "16"]
LIMIT_S = 400.0


@pytest.fixture
def submit(local_cluster: LocalCluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "most_ray.cli", "submit", *words]
        return subprocess.run(command, cwd=ROOT, env=local_cluster.env, text=True, capture_output=True, timeout=LIMIT_S, check=False)

    return run


def jobs_of(cluster: LocalCluster) -> dict[str, str]:
    return {job["submission_id"]: job["status"] for job in cluster.get("/api/jobs/") if job["submission_id"]}


def until(condition: Callable[[], Any], what: str) -> Any:
    limit = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert time.monotonic() < limit, what
        time.sleep(0.2)
    return found


def trained_steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [line["step"] for line in map(json.loads, lines) if line["kind"] == "train"]


def test_a_job_by_ray_goes_on_by_most_ray_and_ends_at_once_when_it_is_complete(
    local_cluster: LocalCluster, submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Promise 36 of docs/promises.md: the same name continues, whoever submits it."""
    ray = str(Path(sys.executable).with_name("ray"))
    flags = ["--config", CONFIG, "--output_dir", str(tmp_path), "--name", "short", *SHORT]
    by_hand = [ray, "job", "submit", "--runtime-env", "jobs/runtime_env.yaml", "--working-dir", ".", "--"]
    words = [*by_hand, "python", "jobs/train.py", *flags, "--max_steps", "4"]
    first = subprocess.run(words, cwd=ROOT, env=local_cluster.env, text=True, capture_output=True, timeout=LIMIT_S, check=False)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "succeeded" in first.stdout + first.stderr
    assert trained_steps(tmp_path / "short") == [1, 2, 3, 4]

    second = submit("train", *flags, "--max_steps", "8")
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "Resuming after step 4" in second.stdout
    assert trained_steps(tmp_path / "short") == list(range(1, 9))
    assert "- source: asr/train_asr | records: 9,000" in second.stdout and "│" not in second.stdout, "tables survive Ray's log viewer"

    third = submit("train", *flags, "--max_steps", "8")
    assert third.returncode == 0
    assert "is complete (8 steps); nothing to do" in third.stdout
    assert trained_steps(tmp_path / "short") == list(range(1, 9))
    made = [name for name in jobs_of(local_cluster) if name.startswith("short-")]
    assert len(made) == 2
    assert {jobs_of(local_cluster)[name] for name in made} == {"SUCCEEDED"}


def test_a_job_that_is_stopped_leaves_a_checkpoint_and_detaching_does_not_stop_it(
    local_cluster: LocalCluster, submit: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    flags = ["--config", CONFIG, "--output_dir", str(tmp_path), "--name", "long", *SHORT, "--save_steps", "100000", "--max_steps", "100000"]
    command = [sys.executable, "-m", "most_ray.cli", "submit", "train", *flags]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=ROOT, env=local_cluster.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    with start() as follower:
        until(lambda: trained_steps(tmp_path / "long"), "the job trains")
        follower.send_signal(signal.SIGINT)
        said = follower.communicate(timeout=60)[0]
    assert follower.returncode == 0, said[-3000:]
    assert "Detached, the job continues" in said
    (name,) = (name for name in jobs_of(local_cluster) if name.startswith("long-"))
    assert jobs_of(local_cluster)[name] == "RUNNING"
    assert f"most-ray submit --stop {name}" in said

    def jobs(*words: str) -> subprocess.CompletedProcess[str]:
        listing = [sys.executable, "-m", "most_ray.cli", "jobs", *words]
        return subprocess.run(listing, cwd=ROOT, env=local_cluster.env, text=True, capture_output=True, timeout=LIMIT_S, check=False)

    (listed,) = (each for each in json.loads(jobs("--json").stdout) if each["submission"] == name)
    assert (listed["name"], listed["state"], listed["under_way"]) == ("long", "RUNNING", True) and listed["started"] <= time.time()
    assert re.search(rf"- name: long \| state: RUNNING \| age: .* \| job: {name}", jobs().stdout)
    unknown = jobs("--stop", "lonk")
    assert unknown.returncode == 2 and "stop = 'lonk': is no job of this cluster. Did you mean 'long'?" in unknown.stderr
    with start() as again:
        assert again.stdout is not None
        assert "under way already" in next(line for line in again.stdout if not line.startswith("waiting for "))
        stopped = jobs("--stop", "long")
        assert stopped.returncode == 0, stopped.stderr
        assert f"{name} says: " in stopped.stdout and "checkpoint" in stopped.stdout
        rest = again.communicate(timeout=120)[0]
    assert again.returncode == 75, rest[-3000:]
    assert re.search(r"the checkpoint of step \d+ was written", rest)
    assert jobs_of(local_cluster)[name] == "STOPPED"
    (commit,) = (tmp_path / "long" / "checkpoints").glob("step-*/commit.json")
    assert int(commit.parent.name.removeprefix("step-")) in trained_steps(tmp_path / "long")
