"""cluster/slurm/train.sbatch under a real Slurm of two nodes: to the end, and over a stop and a requeue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.io.journal import read_journal
from tests.support.slurm import Slurm, require, slurm, wait_until

SCRIPT = "cluster/slurm/train.sbatch"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require()
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def submit(made: Slurm, folder: Path, name: str, steps: int, *options: str, nodes: int = 2) -> int:
    """A shortened digits run, a worker for each node."""
    flags = {
        "config": "jobs/configs/digits.yaml",
        "output_dir": folder,
        "store_dir": made.folder / "store",
        "name": name,
        "num_workers": nodes,
    }
    flags |= {"max_steps": steps, "save_steps": 1000, "logging_steps": 1, "val_asr_dirs": "", "val_tts_dirs": ""}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return made.submit(f"--nodes={nodes}", "--cpus-per-task=3", *options, SCRIPT, *words)


def steps_done(folder: Path, name: str) -> list[int]:
    uri = folder / name / "metrics.jsonl"
    return [int(line["step"]) for line in read_journal(uri, "train")] if uri.exists() else []


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_trains_to_the_end_and_leaves_nothing(two_nodes: Slurm, tmp_path: Path, nodes: int) -> None:
    job = submit(two_nodes, tmp_path, "run", 20, nodes=nodes)
    assert two_nodes.wait(job) == ("COMPLETED", "0:0", 0), two_nodes.output(job)
    assert f"Ray is up on {nodes} node(s)" in two_nodes.output(job)
    assert steps_done(tmp_path, "run") == list(range(1, 21)) and (tmp_path / "run" / "summary.json").exists()
    assert two_nodes.leftovers(job) == []


def test_a_signal_stops_the_run_behind_a_checkpoint_and_the_requeued_job_goes_on(two_nodes: Slurm, tmp_path: Path) -> None:
    job = submit(two_nodes, tmp_path, "run", 60)
    wait_until(lambda: len(steps_done(tmp_path, "run")) >= 5, 180, lambda: two_nodes.output(job))
    two_nodes.call("scancel", "--batch", "--signal=TERM", str(job))
    assert two_nodes.wait(job) == ("COMPLETED", "0:0", 1), two_nodes.output(job)
    said = two_nodes.output(job)
    assert "a checkpoint was written" in said and "Back into the queue" in said and said.count("Ray is up") == 2
    first = min(int(path.parent.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoints/*/commit.json"))
    assert 5 <= first < 60 and f"Resuming after step {first}" in said
    assert steps_done(tmp_path, "run") == list(range(1, 61))
    assert two_nodes.leftovers(job) == []


def test_the_time_limit_is_such_a_signal(two_nodes: Slurm, tmp_path: Path) -> None:
    """Far more steps than fit: the job comes back by itself and continues."""
    job = submit(two_nodes, tmp_path, "run", 100_000, "--time=5", "--signal=B:TERM@150", nodes=1)
    wait_until(lambda: two_nodes.state(job)[2] == 1, 300, lambda: two_nodes.output(job))
    (committed,) = (tmp_path / "run").glob("checkpoints/*/commit.json")
    before = int(committed.parent.name.rpartition("-")[2])
    wait_until(lambda: max(steps_done(tmp_path, "run"), default=0) > before, 200, lambda: two_nodes.output(job))
    two_nodes.call("scancel", str(job))
    two_nodes.wait(job)
    done = steps_done(tmp_path, "run")
    assert done == list(range(1, len(done) + 1)) and f"Resuming after step {before}" in two_nodes.output(job)


def test_a_mistake_in_the_configuration_is_the_jobs_end(two_nodes: Slurm, tmp_path: Path) -> None:
    """Exit code 2, one line, no requeue."""
    job = two_nodes.submit("--nodes=1", "--cpus-per-task=3", SCRIPT, "--config", "jobs/configs/digits.yaml", "--ep_size", "7")
    assert two_nodes.wait(job) == ("FAILED", "2:0", 0)
    assert "ep_size" in two_nodes.output(job) and two_nodes.leftovers(job) == []
