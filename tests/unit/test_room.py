"""Shares of a cluster: what a worker takes, and how many have room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.service.cluster import capacity
from most_ray.service.cluster.capacity import WorkerShare, worker_capacity
from most_ray.service.tune import trial_resources as module
from most_ray.service.tune.trial_resources import TrialResources
from most_ray.sweep.options import load_sweep

NODES = {"a": {"CPU": 4.0, "GPU": 2.0}, "b": {"CPU": 1.5, "GPU": 1.0}, "c": {"CPU": 8.0}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray as if it had these nodes."""
    nodes = [{"NodeID": name, "Resources": resources, "Alive": True} for name, resources in NODES.items()]
    total = {kind: sum(each.get(kind, 0.0) for each in NODES.values()) for kind in ("CPU", "GPU")}
    fake = SimpleNamespace(nodes=lambda: nodes, is_initialized=lambda: True, cluster_resources=lambda: total)
    monkeypatch.setattr(capacity, "ray", fake)
    monkeypatch.setattr(module, "ray", fake)
    monkeypatch.setattr(module, "connect", lambda *_: None)
    monkeypatch.setattr(module, "usable_nodes", lambda: set(NODES))


@pytest.mark.parametrize(
    ("cpus", "gpus", "tasks", "workers"),
    [
        (1.0, 0.0, 0.0, 13),  # whole CPUs, node by node: 4 + 1 + 8
        (1.0, 0.0, 1.0, 12),  # data tasks take what is left over first, but there is only half a CPU of that
        (0.5, 0.0, 0.0, 27),
        (0.1, 0.0, 0.0, 135),  # and no rounding error makes it fewer
        (2.5, 0.0, 0.0, 4),
        (1.0, 1.0, 0.0, 3),
        (1.0, 0.5, 0.0, 5),  # node b has room for two halves, but one CPU
        (9.0, 0.0, 0.0, 0),
    ],
)
def test_room_for_workers_of_any_share(cluster: None, cpus: float, gpus: float, tasks: float, workers: int) -> None:
    assert worker_capacity(set(NODES), WorkerShare(cpus, gpus), tasks) == workers


def test_a_share_is_what_the_configuration_says() -> None:
    config = config_from({"cpus_per_worker": 0.5, "gpus_per_worker": 0.25, "num_workers": 1})
    assert WorkerShare.of(config, use_gpu=True).resources(2) == {"CPU": 1.0, "GPU": 0.5}
    assert WorkerShare.of(config, use_gpu=False).resources() == {"CPU": 0.5}
    assert str(WorkerShare(1.0, 0.25)) == "1 CPU and 0.25 GPU"


@pytest.mark.parametrize(
    "values", [{"gpus_per_worker": 0.5}, {"gpus_per_worker": 0.5, "num_workers": 2}, {"gpus_per_worker": 2.0, "num_workers": 1}]
)
def test_parts_of_a_gpu_are_for_runs_of_one_worker(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="gpus_per_worker"):
        config_from(values)


def allotted(
    tmp_path: Path, left: int, use_gpu: bool = False, workers: int = 1, before: dict[str, Any] | None = None, **values: Any
) -> TrialResources:
    content = {"val_asr_dirs": ["v"], "num_workers": workers, **values}
    (tmp_path / "sweep.yaml").write_text("space: {learning_rate: [0.1, 0.2]}\n")
    sweep = load_sweep(tmp_path / "sweep.yaml", content)
    job = SimpleNamespace(total_steps=7)
    prepared: Any = SimpleNamespace(use_gpu=use_gpu, topologies=[SimpleNamespace(world_size=workers)], job=job)
    return TrialResources(sweep, prepared, left, before)


def test_trials_share_a_cluster_out(cluster: None, tmp_path: Path) -> None:
    """13.5 CPUs: a trial takes a worker's, three quarters of one for data and evaluations, and a little for its actor."""
    assert allotted(tmp_path, left=99).capacity == 7
    assert allotted(tmp_path, left=99, cpus_per_worker=0.25).capacity == 13
    assert allotted(tmp_path, left=99, workers=2).capacity == 4
    assert allotted(tmp_path, left=99, use_gpu=True).capacity == 3
    assert allotted(tmp_path, left=99, use_gpu=True, gpus_per_worker=0.5).capacity == 5
    assert allotted(tmp_path, left=2).concurrent == 2
    assert allotted(tmp_path, left=99, max_concurrent_trials=3).concurrent == 3
    assert allotted(tmp_path, left=99, max_concurrent_trials=30).concurrent == 7


def test_a_trial_without_room_is_refused(cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_workers = 14: .*14 workers of 1 CPU each"):
        allotted(tmp_path, left=1, workers=14)


def test_what_trials_get_stays_over_the_starts_of_a_sweep(cluster: None, tmp_path: Path) -> None:
    first = allotted(tmp_path, left=99, threads_per_worker=3)
    assert first.shared == {"use_gpu": False, "num_workers": [1], "threads_per_worker": 3, "max_steps": 7}
    again = allotted(tmp_path, left=99, before=first.shared)
    assert again.shared == first.shared and again.threads == 3
