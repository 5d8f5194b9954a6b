"""How the trials of a sweep share a cluster: how many run at once, and what each one takes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import ray
import torch

from most_ray.errors import ConfigError, count_of
from most_ray.runs.resolve import Prepared
from most_ray.runs.room import cluster_address, machine_cores
from most_ray.service.cluster.capacity import TASK_CPUS, WorkerShare, usable_nodes, worker_capacity
from most_ray.service.cluster.connection import connect
from most_ray.sweep.options import Sweep

ACTOR_CPUS = 0.01  # CPUs of a trial's actor, which only waits
_RUN_TASK_CPUS = 3 * TASK_CPUS  # CPUs of a run's tasks: two that fetch data, and an evaluation
_TRIAL_BYTES = 3 << 30  # memory of a trial's processes with a small model; 2.3 GB were measured


class TrialResources:
    """Connects to Ray and divides it among the trials. Raises ConfigError where a trial does not fit, or the cluster cannot be joined.

    Args:
        prepared: the run of the sweep's first starting model.
        left: trials that are still to run.
        known: `shared` of the sweep's first start, whose values are kept; None in the first start.
    """

    def __init__(self, sweep: Sweep, prepared: Prepared, left: int, known: dict[str, Any] | None) -> None:
        run, before = sweep.run, known or {}
        self.use_gpu = bool(before.get("use_gpu", prepared.use_gpu))
        self.workers = int(before.get("num_workers", [prepared.topologies[-1].world_size])[0])  # of each trial
        self._share = WorkerShare.of(run, self.use_gpu)
        evaluations = 0 if run.eval_inline else run.eval_workers
        self._needs = self._share.resources(self.workers)
        self._needs["CPU"] += _RUN_TASK_CPUS + TASK_CPUS * max(0, evaluations - 1) + ACTOR_CPUS
        if evaluation_gpus := evaluations * run.eval_gpus:  # a run keeps its workers' GPUs until its last evaluation has finished
            self._needs["GPU"] = self._needs.get("GPU", 0.0) + evaluation_gpus
        threads = int(before.get("threads_per_worker", run.threads_per_worker or 0))
        local = None if cluster_address(run) or ray.is_initialized() else self._local_capacity(threads or 1)
        self._requested = sweep.options.max_concurrent_trials or 0
        wanted = min(left, self._requested or left)
        connect(run, math.ceil(min(local or 1, wanted) * self._needs["CPU"]) + 1)
        fits = self._cluster_capacity()
        if fits < 1:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
            several = f"with {count_of(self.workers, 'worker')} of {self._share} each"
            rule = f"is more than the cluster has room for: {several} a trial takes {needs}."
            raise ConfigError("num_workers", self.workers, rule, "Use fewer workers, or lower cpus_per_worker.")
        self.capacity = local or fits  # trials that fit at once
        self.concurrent = min(wanted, fits, self.capacity)  # trials that will run at once
        self.threads = threads or (1 if self.use_gpu else max(1, machine_cores() // (self.concurrent * self.workers)))
        self.shared = known or {  # keys of every trial's configuration that depend on what the cluster has
            "use_gpu": self.use_gpu,
            "num_workers": [self.workers],
            "threads_per_worker": self.threads,
            "max_steps": prepared.job.total_steps,  # computed from epochs it would depend on each trial's mix
        }

    def _local_capacity(self, threads: int) -> int:
        """Trials that fit on this machine at once: a core for each of a worker's `threads`, or GPUs, and memory for their processes."""
        gpus = self._needs.get("GPU", 0.0)
        by_devices = torch.cuda.device_count() / gpus if gpus else machine_cores() / (threads * self.workers)
        return max(1, min(int(by_devices), _memory() // _TRIAL_BYTES))

    def _cluster_capacity(self) -> int:
        """Trials that the cluster could hold if it were empty."""
        resources = ray.cluster_resources()
        by_sum = min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in self._needs.items() if amount)
        return min(by_sum, worker_capacity(usable_nodes(), self._share, by_sum * _RUN_TASK_CPUS) // self.workers)

    @property
    def description(self) -> str:
        """The division in one line, for the screen."""
        share = f"{count_of(self.workers, 'worker')} of {self._share}{' each' * (self.workers > 1)}"
        fewer = f", not for max_concurrent_trials = {self._requested}" if self._requested > self.capacity else ""
        return f"{self.concurrent} at a time (room for {self.capacity}{fewer}); {share}, {count_of(self.threads, 'thread')}"


def _memory() -> int:
    """Bytes of memory of this machine, or of this container (cgroup v2) where it is limited to fewer."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return whole
