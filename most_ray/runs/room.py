"""Whether what a command requests fits on this machine, decided before Ray or torch is imported: workers, threads, GPUs, evaluations.

Of a cluster that is named, its nodes decide (service/cluster/connection.py).
"""

from __future__ import annotations

import glob
import math
import os
import sys

from most_ray.config import RunConfig
from most_ray.errors import ConfigError, count_of
from most_ray.io import storage

# Device files without which torch finds no GPU: of NVIDIA's cards and boards, of AMD's, and of those that Windows lends to Linux.
_GPU_FILES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
_ELSEWHERE = "or name a cluster with ray_address."


def machine_cores() -> int:
    """CPU cores that this process may use: a container can have fewer than its host."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_gpus() -> int:
    """GPUs of this machine that torch can use. Where it has none, that is known without torch, whose import takes seconds."""
    if "torch" not in sys.modules and not any(map(glob.glob, _GPU_FILES)):
        return 0
    import torch

    return torch.cuda.device_count()


def cluster_address(config: RunConfig) -> str | None:
    """The address of the cluster that the configuration or RAY_ADDRESS names; None for a run on this machine."""
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def uses_gpus(config: RunConfig, gpus: int) -> bool:
    """Whether a run uses GPUs, where there are `gpus` of them."""
    return config.use_gpu if config.use_gpu is not None else gpus > 0


def workers_of(config: RunConfig, use_gpu: bool, gpus: int) -> tuple[int, int]:
    """The fewest and the most workers that a configuration requests: without a number, one for each of `gpus` GPUs, or one."""
    given = config.num_workers or ((max(1, gpus) if use_gpu else 1),)
    return given[0], given[-1]


def workers_that_fit(config: RunConfig, use_gpu: bool) -> int:
    """How many workers this machine has room for: by their share of its GPUs where they use them, else of its cores."""
    has, share = (machine_gpus(), config.gpus_per_worker) if use_gpu else (machine_cores(), config.cpus_per_worker)
    return math.floor(has / share + 1e-6)


def check_room(config: RunConfig) -> None:
    """Raise ConfigError where a run on this machine requests more workers, threads or GPUs than it has: its processes would take turns, or
    wait without end. Nothing is refused where a cluster is named, or the run is complete."""
    if cluster_address(config):
        return
    try:
        _check_workers(config)
        if not config.eval_inline:
            use_gpu = uses_gpus(config, machine_gpus())
            training = workers_of(config, use_gpu, machine_gpus())[0] * config.gpus_per_worker if use_gpu else 0.0
            check_evaluation_room(config, "eval_workers", "eval_gpus", training)
    except ConfigError:
        if not storage.exists(storage.join(config.run_uri, "summary.json")):
            raise


def _check_workers(config: RunConfig) -> None:
    """The part of `check_room` that is about training."""
    cores, gpus = machine_cores(), machine_gpus()
    use_gpu = uses_gpus(config, gpus)
    if use_gpu and gpus == 0:
        raise no_gpu()
    fewest, fit = workers_of(config, use_gpu, gpus)[0], workers_that_fit(config, use_gpu)
    if fit < 1:
        rule = f"is more than this machine has: {count_of(cores, 'core')}."
        raise ConfigError("cpus_per_worker", config.cpus_per_worker, rule, f"Use at most {cores}, {_ELSEWHERE}")
    if fewest > fit:
        share = f"{config.gpus_per_worker:g} GPU" if use_gpu else f"{config.cpus_per_worker:g} CPU"
        has = count_of(gpus, "GPU") if use_gpu else count_of(cores, "core")
        shared = "" if use_gpu else " lower cpus_per_worker to let workers share cores,"
        rule = f"is more than this machine has room for: {has}, and each worker takes {share}."
        raise ConfigError("num_workers", fewest, rule, f"Use at most {fit},{shared} {_ELSEWHERE}")
    threads, most = config.threads_per_worker, max(1, cores // fewest)
    if threads and threads > most:
        rule = f"is more than this machine has room for: {count_of(cores, 'core')} for {count_of(fewest, 'worker')}."
        raise ConfigError("threads_per_worker", threads, rule, f"Use at most {most}, or leave it out: then the cores are shared out.")


def no_gpu() -> ConfigError:
    """The error of a run that is to use GPUs where there are none."""
    return ConfigError("use_gpu", True, "but this machine has no GPU.", "Leave it out, or name a cluster with ray_address.")


def check_evaluation_room(config: RunConfig, workers: str, gpus: str, training: float = 0.0) -> None:
    """Raise ConfigError where evaluations on this machine request more processes or GPUs than it has; nothing where a cluster is named.

    Args:
        workers, gpus: the key or flag to name for `eval_workers` and for `eval_gpus`.
        training: GPUs that training workers take, which are not free for evaluations.
    """
    if cluster_address(config):
        return
    cores, needed = machine_cores(), config.eval_workers * config.eval_gpus
    if needed and (has := machine_gpus()) < training + needed:
        beside = f" beside {training:g} of the training workers" if training else ""
        rule = f"needs {count_of(needed, 'GPU')} for evaluations{beside}, this machine has {has}."
        raise ConfigError(gpus, config.eval_gpus, rule, f"Lower it, {_ELSEWHERE}")
    if not needed and config.eval_workers > cores:
        rule = f"is more than this machine has room for: {count_of(cores, 'core')}."
        raise ConfigError(workers, config.eval_workers, rule, f"Use at most {cores}, {_ELSEWHERE}")


def check_actors(actors: int | None, gpus_each: float | None, may_use_gpus: bool, address: str | None) -> None:
    """Raise ConfigError where a pool of actors on this machine requests more than it has; nothing where a cluster is named.

    Args:
        actors: how many (None: as many as fit).
        gpus_each: GPUs of each (None: one where `may_use_gpus` and there are any).
        address: of a cluster.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        return
    cores, gpus = machine_cores(), machine_gpus() if gpus_each or may_use_gpus else 0
    if gpus_each and gpus_each > gpus:
        rule = f"is more than the {count_of(gpus, 'GPU')} of this machine."
        raise ConfigError("gpus_per_actor", gpus_each, rule, f"Lower it, {_ELSEWHERE}")
    on_gpus = gpus_each if gpus_each is not None else may_use_gpus and gpus > 0
    if not on_gpus and actors and actors > cores:
        rule = f"is more than this machine has room for: {count_of(cores, 'core')}."
        raise ConfigError("num_actors", actors, rule, f"Use at most {cores}, {_ELSEWHERE}")


def ranks_note(ranks: int, threads: int) -> str | None:
    """What to say of `ranks` processes on this machine, which torchrun has started with `threads` CPU threads each: None where each has a
    core of its own."""
    cores = machine_cores()
    if ranks <= cores:
        return None
    shared = f"{count_of(ranks, 'rank')} of {count_of(threads, 'thread')} each share this machine's {count_of(cores, 'core')}"
    return f"{shared}: steps take longer than with {count_of(cores, 'rank')}"
