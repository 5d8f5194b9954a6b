"""Recordings to units on a cluster: the same parts as in one process, made by a pool of Ray Data actors, one per GPU or CPU core."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import ray.data
from ray.data import ActorPoolStrategy, DataContext

from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.service.cluster.connection import start_ray
from most_ray.speech.units.corpus_parts import Part, PartTask, PartWorker, Runner, run_in_process, worth_a_cluster
from most_ray.speech.units.features import FeatureSettings, MfccSettings
from most_ray.speech.units.prepare import ChooseRunner


def runner_of(features: FeatureSettings, num_actors: int | None, gpus_per_actor: float | None, address: str | None) -> ChooseRunner:
    """Makes parts in this process where `num_actors` is 0, or None and there is little to do; else by so many actors, by default one
    per GPU of the cluster, or per CPU core where there is none (or `gpus_per_actor` is 0)."""

    def choose(size: int) -> Runner:
        if num_actors == 0 or (num_actors is None and not worth_a_cluster(features, size)):
            return run_in_process

        def run(work: PartTask, parts: Sequence[Part]) -> Iterator[dict[str, float]]:
            start_ray(config_from({"ray_address": address}), 1, num_actors or os.cpu_count() or 1, False)
            found = ray.cluster_resources()
            default = 0.0 if isinstance(features, MfccSettings) else float(found.get("GPU", 0.0) > 0)
            gpus = default if gpus_per_actor is None else gpus_per_actor
            if gpus > found.get("GPU", 0.0):
                raise ConfigError("gpus_per_actor", gpus, f"is more than the {found.get('GPU', 0.0):g} GPUs of the cluster.")
            if gpus > 1 and gpus != int(gpus):
                raise ConfigError("gpus_per_actor", gpus, "must be a whole number where it is above 1.")
            # A Ray of this command's own has more logical CPUs than the machine has cores.
            cores = found.get("CPU", 1.0) if address or os.environ.get("RAY_ADDRESS") else os.cpu_count() or 1
            most = int(found.get("GPU", 0.0) / gpus if gpus else cores)
            return spread(work, parts, min(num_actors or most, most) if gpus else num_actors or most, gpus)

        return run

    return choose


def spread(work: PartTask, parts: Sequence[Part], actors: int, gpus: float) -> Iterator[dict[str, float]]:
    """Make the parts in a pool of actors, in any order. A part whose actor dies is made again; parts that were finished stay.

    Raises:
        UserError: what a user can mend, as in one process.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its own progress, which would stand among ours
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
    # What an actor is made with goes along in its class: constructor arguments would lie in the object store, where they can be lost.
    maker = type("Maker", (PartWorker,), {"work": work, "device": "cuda" if gpus else "cpu"})
    made = rows.map(
        maker,
        compute=ActorPoolStrategy(size=min(actors, len(parts))),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for row in made.iter_rows():
        if error := row.pop("error"):
            raise error
        yield row
