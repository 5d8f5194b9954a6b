"""Who may write to a run: its newest driver, and of that the newest attempt."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import torch.distributed as dist

from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.ranks import this_rank
from most_ray.errors import CheckpointError, ConfigError
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder
from most_ray.runs.job import Job


def claim_run(folder: RunFolder) -> str:
    """Make the run this driver's, whose id is returned: workers of an older driver can then neither commit a checkpoint nor start again."""
    driver = uuid.uuid4().hex
    folder.claim(f"{driver}.0")
    return driver


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run, on one rank."""

    job: Job
    folder: RunFolder
    rank: int
    id: str

    def owns_run(self) -> bool:
        """Return whether no newer attempt has started."""
        return self.folder.owner() == self.id

    @classmethod
    def claim(cls, job: Job) -> Attempt:
        """Start an attempt, if the run still belongs to its driver: an older attempt that is still running can then not commit. Collective.
        Raises CheckpointError if a newer driver owns the run, ConfigError if the run's folder is not shared by all ranks."""
        folder, rank, new = RunFolder(job.run_uri), this_rank(), [""]
        if rank == 0 and folder.owner().startswith(f"{job.driver}."):
            new = [f"{job.driver}.{uuid.uuid4().hex}"]
            folder.claim(new[0])
        if dist.is_initialized():
            dist.broadcast_object_list(new, src=0)
        if not new[0]:
            raise CheckpointError("attempt", None, "has been replaced by a newer start of the same run.", "One driver at a time.")
        owners = all_gather_or_raise(folder.owner)
        if apart := [other for other, owner in enumerate(owners) if owner != owners[0]]:
            rule = f"is not shared by all nodes: ranks {apart} do not see there what rank 0 has written."
            raise ConfigError("output_dir", storage.redact(folder.uri), rule, "Mount the same storage on every node, or name a URI.")
        return cls(job, folder, rank, new[0])
