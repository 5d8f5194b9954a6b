"""How trials share a cluster out."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import ray
import torch

from most_ray.errors import ConfigError
from most_ray.runs.resolve import Prepared
from most_ray.service.cluster.capacity import TASK_CPUS, WorkerShare, usable_nodes, worker_capacity
from most_ray.service.cluster.connection import cluster_address, connect
from most_ray.sweep.options import Sweep

_TASKS_OF_A_RUN = 3 * TASK_CPUS  # two that fetch data, an evaluation
ACTOR_CPUS = 0.01  # of a trial's actor, which waits
_TRIAL_BYTES = 3 << 30  # of memory that a trial's processes take beside a small model, measured: 2.3 GB


class TrialResources:
    """The Ray that a sweep uses, and each trial's share of it.

    Attributes:
        concurrent: trials at a time.
        shared: keys of a trial's configuration that follow from its share: those of the sweep's first start, given as `before`, else new.
        threads: CPU threads of each worker.

    Raises:
        ConfigError: the cluster has no room for a trial, or does not answer.
    """

    def __init__(self, sweep: Sweep, prepared: Prepared, left: int, before: dict[str, Any] | None) -> None:
        run, known = sweep.run, before or {}
        self.use_gpu = bool(known.get("use_gpu", prepared.use_gpu))
        self.workers = int(known.get("num_workers", [prepared.topologies[-1].world_size])[0])
        self._share = WorkerShare.of(run, self.use_gpu)
        evaluations = 0 if run.eval_inline else run.eval_workers
        self._needs = self._share.resources(self.workers)
        self._needs["CPU"] += _TASKS_OF_A_RUN + TASK_CPUS * max(0, evaluations - 1) + ACTOR_CPUS
        if beside := evaluations * run.eval_gpus:  # a run holds its workers' until its last evaluation is in
            self._needs["GPU"] = self._needs.get("GPU", 0.0) + beside
        threads = int(known.get("threads_per_worker", run.threads_per_worker or 0))
        here = None if cluster_address(run) or ray.is_initialized() else self._here(threads or 1)
        wanted = min(left, sweep.options.max_concurrent_trials or left)
        connect(run, math.ceil(min(here or 1, wanted) * self._needs["CPU"]) + 1)
        fits = self._room()
        if fits < 1:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
            rule = f"is more than the cluster has room for: with {self.workers} workers of {self._share} each a trial takes {needs}."
            raise ConfigError("num_workers", self.workers, rule, "Use fewer workers, or lower cpus_per_worker.")
        self.room = here or fits
        self.concurrent = min(wanted, fits, self.room)
        self.threads = threads or (1 if self.use_gpu else max(1, _cores() // (self.concurrent * self.workers)))
        self.shared = before or {
            "use_gpu": self.use_gpu,
            "num_workers": [self.workers],
            "threads_per_worker": self.threads,
            "max_steps": prepared.job.total_steps,  # of epochs, a trial's mix would make another number
        }

    def _here(self, threads: int) -> int:
        """Trials at once on this machine: a core for each thread, or GPUs; and memory for their processes."""
        gpus = self._needs.get("GPU", 0.0)
        by_devices = torch.cuda.device_count() / gpus if gpus else _cores() / (threads * self.workers)
        return max(1, min(int(by_devices), _memory() // _TRIAL_BYTES))

    def _room(self) -> int:
        """Trials that the whole cluster could hold."""
        resources = ray.cluster_resources()
        by_sum = min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in self._needs.items() if amount)
        return min(by_sum, worker_capacity(usable_nodes(), self._share, by_sum * _TASKS_OF_A_RUN) // self.workers)

    @property
    def where(self) -> str:
        workers = f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        each = " each" if self.workers > 1 else ""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.concurrent} at a time (room for {self.room}); {workers} of {self._share}{each}, {threads}"


def _cores() -> int:
    """That this process may use: a container can have fewer than its host."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of this machine, or of this container (cgroup v2) where that has fewer."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return whole
