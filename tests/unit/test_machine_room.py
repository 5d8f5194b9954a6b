"""What this machine has no room for is refused before Ray or torch starts, with the number that fits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from most_ray.cli import main
from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.runs import resolve, room
from most_ray.runs.room import check_actors, check_evaluation_room, check_room, ranks_note
from most_ray.service.training import attempts
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine of 4 cores without GPUs, which a test may change, and no cluster."""
    has = {"cores": 4, "gpus": 0}
    for module in (room, resolve):
        monkeypatch.setattr(module, "machine_gpus", lambda: has["gpus"])
    monkeypatch.setattr(room, "machine_cores", lambda: has["cores"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return has


@pytest.mark.parametrize(
    ("values", "gpus", "says"),
    [
        ({"num_workers": 64}, 0, r"num_workers = 64: is more .*: 4 cores, and each worker takes 1 CPU\. Use at most 4, .*cpus_per_worker"),
        ({"num_workers": (5, 8)}, 0, r"num_workers = 5: .* Use at most 4,"),
        ({"num_workers": 3, "cpus_per_worker": 2}, 0, r"num_workers = 3: .*each worker takes 2 CPU\. Use at most 2,"),
        ({"cpus_per_worker": 5}, 0, r"cpus_per_worker = 5\.0: is more than this machine has: 4 cores\."),
        ({"num_workers": 3}, 2, r"num_workers = 3: .*: 2 GPUs, and each worker takes 1 GPU\. Use at most 2, or name a cluster"),
        ({"use_gpu": True}, 0, r"use_gpu = True: but this machine has no GPU"),
        ({"threads_per_worker": 64}, 0, r"threads_per_worker = 64: .*4 cores for 1 worker\. Use at most 4,"),
        ({"num_workers": 2, "threads_per_worker": 3}, 0, r"threads_per_worker = 3: .*for 2 workers\. Use at most 2,"),
        ({"eval_workers": 64}, 0, r"eval_workers = 64: .*4 cores\. Use at most 4,"),
        ({"eval_gpus": 1}, 0, r"eval_gpus = 1\.0: needs 1 GPU for evaluations, this machine has 0\."),
        ({"eval_gpus": 1, "num_workers": 2}, 2, r"eval_gpus = 1\.0: needs 1 GPU for evaluations beside 2 of the training workers"),
    ],
)
def test_a_run_that_asks_for_more_than_there_is_is_refused(machine: dict[str, int], values: dict[str, Any], gpus: int, says: str) -> None:
    machine["gpus"] = gpus
    with pytest.raises(ConfigError, match=says):
        check_room(config_from(values))


@pytest.mark.parametrize(
    ("values", "gpus"),
    [
        ({}, 0),
        ({"num_workers": 4}, 0),
        ({"num_workers": (1, 64)}, 0),  # as many as there is room for
        ({"num_workers": 8, "cpus_per_worker": 0.5, "threads_per_worker": 1}, 0),  # which share cores, as they are told to
        ({"num_workers": 2, "threads_per_worker": 2, "eval_workers": 4}, 0),
        ({"eval_workers": 64, "eval_gpus": 1, "eval_inline": True}, 0),  # which are not used
        ({"num_workers": 8}, 8),  # GPUs decide, not cores
        ({"eval_gpus": 1, "num_workers": 1}, 2),
        ({"num_workers": 64, "ray_address": "10.0.0.1:6379"}, 0),
    ],
)
def test_a_run_that_fits_is_not(machine: dict[str, int], values: dict[str, Any], gpus: int) -> None:
    machine["gpus"] = gpus
    check_room(config_from(values))


def test_a_complete_run_needs_no_room(tmp_path: Path) -> None:
    config = config_from({"num_workers": 64, "output_dir": str(tmp_path)})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    check_room(config)


def test_of_a_range_there_are_as_many_workers_as_fit(machine: dict[str, int], tmp_path: Path, digits: Path) -> None:
    """Whose layout is that of the range; a step holds what it holds wherever it runs."""
    values = {"train_asr_dirs": [str(digits / "test_takes")], "output_dir": str(tmp_path), "max_steps": 2, "max_seq_length": 256}
    config = config_from({**values, "num_workers": (2, 8), "ep_size": 8, "use_gpu": False, "train_batch_size": 3})
    prepared = resolve.prepare_run(config)
    assert [each.world_size for each in prepared.topologies] == [2, 3, 4] and prepared.job.threads == 1
    assert prepared.job.plan.global_batch_size == 3 * 16 * 8
    elsewhere = resolve.prepare_run(replace(config, ray_address="10.0.0.1:6379"))
    assert [each.world_size for each in elsewhere.topologies][-1] == 8


def test_evaluations_and_pools_are_measured_too(machine: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"num_workers = 64: .*Use at most 4"):
        check_evaluation_room(config_from({"eval_workers": 64}), "num_workers", "gpus")
    with pytest.raises(ConfigError, match=r"gpus = 1\.0: needs 2 GPUs"):
        check_evaluation_room(config_from({"eval_workers": 2, "eval_gpus": 1}), "num_workers", "gpus")
    with pytest.raises(ConfigError, match=r"num_actors = 64: .*4 cores\. Use at most 4"):
        check_actors(64, None, True, None)
    with pytest.raises(ConfigError, match=r"gpus_per_actor = 1: is more than the 0 GPUs"):
        check_actors(1, 1, True, None)
    check_actors(64, None, True, "10.0.0.1:6379")
    check_actors(None, None, True, None)
    machine["gpus"] = 1
    check_actors(64, 0.25, True, None)  # of these there are as many as the GPUs hold


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--num_workers", "64"], "num_workers = 64"),
        (["train", "--threads_per_worker", "64"], "threads_per_worker = 64"),
        (["sweep", "--config", "s.yaml", "--num_workers", "64"], "num_workers = 64"),
        (["evaluate", "--model", "m", "--asr_dirs", "d", "--output", "o.json", "--num_workers", "64"], "num_workers = 64"),
        (["prepare", "units", "--input", "i", "--output", "o", "--fit_kmeans", "auto", "--num_actors", "64"], "num_actors = 64"),
        (["prepare", "kmeans", "--input", "i", "--output", "k.npy", "--num_actors", "64"], "num_actors = 64"),
    ],
)
def test_every_command_refuses_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    digits = ROOT / "jobs" / "data" / "digits"
    (tmp_path / "s.yaml").write_text(
        f"space: {{learning_rate: [0.1, 0.2]}}\neval_steps: 2\ntrain_asr_dirs: [{digits}/train_asr]\nval_asr_dirs: [{digits}/test_takes]\n"
    )
    monkeypatch.chdir(tmp_path)
    given = ["--train_asr_dirs", str(digits / "train_asr")] if words[0] == "train" else []
    assert main([*words, *given]) == 2
    assert says in (said := capfd.readouterr().err) and "Use at most 4" in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_ranks_that_share_cores_are_told() -> None:
    assert ranks_note(4, 1) is None
    assert ranks_note(8, 1) == "8 ranks of 1 thread each share this machine's 4 cores: steps take longer than with 4 ranks"


def test_torch_and_ray_are_not_imported_for_it() -> None:
    script = "import sys\nfrom most_ray.config import config_from\nfrom most_ray.runs.room import check_room\n"
    script += "check_room(config_from({}))\nprint({'torch', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" or room.machine_gpus() > 0


def test_a_wait_for_room_says_at_once_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first start at once, then at intervals; the last words are the error's."""
    clock, lines = [0.0], []
    monkeypatch.setattr(attempts.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(attempts, "print_line", lambda _, text: lines.append((clock[0], text)))
    nodes = {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}}
    monkeypatch.setattr(attempts.capacity, "usable_nodes", lambda: {"a", "b"})
    monkeypatch.setattr(attempts.capacity, "nodes_now", lambda: nodes)
    monkeypatch.setattr(attempts.capacity, "free_resources", lambda: {"a": {"CPU": 1.5}, "b": {}})
    monkeypatch.setattr(attempts.AutoscalerRequest, "renew", lambda _: None)

    def wait(seconds: float) -> None:
        clock[0] += seconds

    shutdown: Any = SimpleNamespace(is_set=lambda: False, wait=wait, name="")
    topologies = (SimpleNamespace(world_size=2),)
    prepared: Any = SimpleNamespace(topologies=topologies, use_gpu=False, job=SimpleNamespace(config=config_from({"room_timeout_s": 20.0})))
    request = attempts.AutoscalerRequest(attempts.WorkerShare(1.0), 2, 0.25)
    console: Any = None
    with pytest.raises(attempts.RunIncompleteError, match="found no room for 20 s: 2 workers of 1 CPU each are needed"):
        attempts._wait_for_resources(prepared, False, shutdown, console, request)
    said = "2 workers of 1 CPU each are needed, the cluster has room for 1; free are 1.5 of 6 CPU on 2 nodes."
    assert lines == [(0.0, f"Waiting for room, 0 of at most 20 s: {said}"), (15.0, f"Waiting for room, 15 of at most 20 s: {said}")]
