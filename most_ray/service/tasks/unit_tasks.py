"""Encodes recordings as units on a cluster: a pool of Ray Data actors, one per GPU or CPU core, makes the parts that one process would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ray.data
from ray.data import ActorPoolStrategy

from most_ray.config import config_from
from most_ray.errors import ConfigError, count_of
from most_ray.runs.room import cluster_address, machine_cores
from most_ray.service.cluster.connection import start_ray
from most_ray.service.cluster.ray_internals import has_autoscaler
from most_ray.service.tasks.ingest_tasks import dataset_of
from most_ray.speech.units.corpus_parts import Part, PartTask, PartWorker, Runner
from most_ray.speech.units.features import FeatureSettings


def pool_runner(features: FeatureSettings, num_actors: int | None, gpus_per_actor: float | None, address: str | None) -> Runner:
    """A runner that makes parts by a pool of actors.

    Args:
        num_actors: size of the pool (None: one actor per GPU, or per CPU core where actors use no GPU).
        gpus_per_actor: GPUs of each actor (None: one for encoders where the cluster has GPUs, else none).
        address: of the cluster (None: the one of RAY_ADDRESS, else Ray is started on this machine).
    """

    def run(work: PartTask, parts: Sequence[Part]) -> Iterator[dict[str, float]]:
        config = config_from({"ray_address": address})
        start_ray(config, 1, num_actors or machine_cores(), False)
        found = ray.cluster_resources()
        available = found.get("GPU", 0.0)
        gpus = float(features.uses_gpu and available > 0) if gpus_per_actor is None else gpus_per_actor
        if gpus > available:
            raise ConfigError("gpus_per_actor", gpus, f"is more than the {count_of(available, 'GPU')} of the cluster.")
        if gpus > 1 and gpus != int(gpus):
            raise ConfigError("gpus_per_actor", gpus, "must be a whole number where it is above 1.")
        # A Ray that this command has started has more logical CPUs than the machine has cores.
        cores = found.get("CPU", 1.0) if cluster_address(config) else machine_cores()
        most = int(available / gpus if gpus else cores)
        if not gpus and num_actors and num_actors > most and not has_autoscaler():
            rule = f"is more than the {count_of(cores, 'CPU')} of the cluster."
            raise ConfigError("num_actors", num_actors, rule, f"Use at most {most}.")
        return run_in_actors(work, parts, min(num_actors or most, most) if gpus else num_actors or most, gpus)

    return run


def run_in_actors(work: PartTask, parts: Sequence[Part], actors: int, gpus: float) -> Iterator[dict[str, float]]:
    """Make the parts in a pool of `actors` actors with `gpus` GPUs each, in any order. A part whose actor dies is made again; parts that
    are finished stay. A UserError of an actor is raised as in one process."""
    # An actor's arguments are attributes of its class: constructor arguments would be in the object store, where they can be lost.
    worker = type("Worker", (PartWorker,), {"task": work, "device": "cuda" if gpus else "cpu"})
    pool = ActorPoolStrategy(size=min(actors, len(parts)))
    for row in dataset_of(parts).map(worker, compute=pool, num_cpus=1, num_gpus=gpus or None).iter_rows():
        if error := row.pop("error"):
            raise error
        yield row
