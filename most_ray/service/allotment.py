"""How trials share a cluster out."""

from __future__ import annotations

import math
import os
from typing import Any

import ray
import torch

from most_ray.config import RunConfig
from most_ray.errors import ConfigError
from most_ray.service.cluster import connect, named_cluster
from most_ray.service.control import WorkerShare, room, usable_nodes
from most_ray.service.stream import TASK_CPUS
from most_ray.sweep.options import Sweep
from most_ray.train.prepare import Prepared

_TASKS_OF_A_RUN = 3 * TASK_CPUS  # two that fetch data, an evaluation
ACTOR_CPUS = 0.01  # of a trial's actor, which waits
_TRIAL_BYTES = 3 << 30  # of memory that a trial's processes take beside a small model, measured: 2.3 GB


class Allotment:
    """The Ray that a sweep uses, and each trial's share of it.

    Attributes:
        concurrent: trials at a time.
        shared: keys of a trial's configuration that follow from its share: those of the sweep's first start, given as `before`, else new.
        threads: CPU threads of each worker.

    Raises:
        ConfigError: the cluster has no room for a trial, or does not answer.
    """

    def __init__(self, sweep: Sweep, prepared: Prepared, left: int, before: dict[str, Any] | None) -> None:
        run = sweep.run
        self.use_gpu, self.workers = prepared.use_gpu, prepared.topologies[-1].world_size
        self._share = WorkerShare.of(run, self.use_gpu)
        self._cpus = self.workers * self._share.cpus + _TASKS_OF_A_RUN + TASK_CPUS * (run.eval_workers - 1) + ACTOR_CPUS
        cores = os.cpu_count() or 1
        here = (
            None if named_cluster(run) or ray.is_initialized() else self._here(run, min(left, sweep.options.max_concurrent_trials or left))
        )
        connect(run, math.ceil((here or 1) * self._cpus) + 1)
        fits = self._room()
        if fits < 1:
            raise ConfigError(
                "num_workers",
                self.workers,
                f"is more than the cluster has room for: a trial takes {self.workers} workers of {self._share} each, and "
                f"{self._cpus - self.workers * self._share.cpus:g} CPUs for their data and evaluations.",
                "Use fewer workers, or lower cpus_per_worker.",
            )
        self.room = fits if here is None else min(fits, here)
        self.concurrent = min(left, self.room, sweep.options.max_concurrent_trials or self.room)
        self.threads = run.threads_per_worker or (1 if self.use_gpu else max(1, cores // (self.concurrent * self.workers)))
        self.shared = before or {
            "use_gpu": self.use_gpu,
            "num_workers": [self.workers],
            "threads_per_worker": self.threads,
            "max_steps": prepared.job.total_steps,  # of epochs, a trial's mix would make another number
        }
        self.threads = int(self.shared["threads_per_worker"])

    def _here(self, run: RunConfig, wanted: int) -> int:
        """Trials at once on this machine: a core or a GPU for each worker, and memory for their processes."""
        cores = os.cpu_count() or 1
        slots = torch.cuda.device_count() / self._share.gpus if self._share.gpus else cores / (run.threads_per_worker or 1)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _TRIAL_BYTES
        return max(1, min(wanted, int(slots) // self.workers, memory))

    def _room(self) -> int:
        """Trials that the whole cluster could hold."""
        nodes = usable_nodes()
        by_cpus = int(ray.cluster_resources().get("CPU", 0.0) / self._cpus + 1e-6)
        return min(by_cpus, room(nodes, self._share, by_cpus * _TASKS_OF_A_RUN) // self.workers)

    @property
    def where(self) -> str:
        workers = f"{self.workers} worker{'' if self.workers == 1 else 's'}"
        each = " each" if self.workers > 1 else ""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return f"{self.concurrent} at a time (room for {self.room}); {workers} of {self._share}{each}, {threads}"
