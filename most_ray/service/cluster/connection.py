"""Ray for a run: the cluster that is named, or one on this machine."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
import ray.exceptions
from ray._private import ray_constants

from most_ray.config import RunConfig
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.service.cluster.address import check_address
from most_ray.service.cluster.control import TASK_CPUS, WorkerShare, grows


def start_ray(config: RunConfig, fewest: int, most: int, use_gpu: bool) -> None:
    """Join the cluster that is named, or start one on this machine with room for the most workers and their data tasks.

    Raises:
        ConfigError: the cluster is, and will be, smaller than the fewest workers need, or has no GPUs left for evaluations.
    """
    connect(config, most + 2)
    check_needs(config, fewest, most, use_gpu)


def check_needs(config: RunConfig, fewest: int, most: int, use_gpu: bool) -> None:
    """Whether the cluster that was joined has, or will have, what a run needs.

    Raises:
        ConfigError: it has not.
    """
    resources, most_known = most_resources()
    if grows() and not most_known:  # it may become large enough: that is waited for
        return
    beside = 0.0 if config.eval_inline else config.eval_workers * config.eval_gpus
    if beside:  # the workers hold theirs until the last evaluation is in
        training = most * config.gpus_per_worker if use_gpu else 0.0
        check_evaluation_gpus("eval_gpus", config.eval_gpus, beside, training)
    needed = WorkerShare.of(config, use_gpu).resources(fewest)
    needed["CPU"] += TASK_CPUS
    short = {name: amount for name, amount in needed.items() if resources.get(name, 0.0) < amount}
    if short:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in sorted(short.items(), reverse=True))
        there = " and ".join(f"{resources.get(name, 0.0):g}" for name in sorted(short, reverse=True))
        raise ConfigError("num_workers", fewest, f"needs {wanted}, the cluster has {there}.", "Use fewer workers, or add nodes.")


def most_resources() -> tuple[dict[str, float], bool]:
    """What the cluster has, or what its autoscaler could make of it where that is known; by Ray's names, and whether it was known."""
    from ray._private.state import state  # no public way in Ray 2.60

    found = {str(name): float(amount) for name, amount in ray.cluster_resources().items()}
    largest = state.get_max_resources_from_cluster_config()
    for name, amount in (largest or {}).items():
        found[name] = max(found.get(name, 0.0), float(amount))
    return found, largest is not None


def cluster_gpus(config: RunConfig) -> int | None:
    """GPUs that the cluster that is named has now; it is joined. None where a run stays on this machine.

    Raises:
        ConfigError: the cluster does not answer.
    """
    if not named_cluster(config):
        return None
    connect(config, 0)
    return int(ray.cluster_resources().get("GPU", 0.0))


def connect(config: RunConfig, local_cpus: int) -> None:
    """Join the cluster that is named, or start a Ray on this machine with so many logical CPUs; where neither has been done yet.

    Raises:
        ConfigError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    _set_ray_environment()
    address = named_cluster(config)
    if not address:
        # Several runs at once have more processes than Ray expects of so few cores: it would warn of each further one.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(os.cpu_count() or 1, 2 * local_cpus)))
        start_local_ray(local_cpus)
        return
    check_address(address)
    try:
        joined = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = f"cannot be joined ({' '.join(str(error).split())[:200]})."
        raise ConfigError("ray_address", address, reason, "Check it, and that Ray runs there.") from error
    if storage.redact(config.run_uri) != config.run_uri:
        os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "0"  # the dashboard would show the credentials in it
    elif joined.dashboard_url:  # without one, Ray Train would complain of it every second
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")


def named_cluster(config: RunConfig) -> str | None:
    """The address of the cluster that is asked for; None: one on this machine."""
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def check_evaluation_gpus(field: str, each: float, needed: float, training: float = 0.0) -> None:
    """Refuse evaluations that would wait for GPUs for ever; `training`: GPUs that are not theirs.

    Raises:
        ConfigError: the cluster has too few.
    """
    gpus = most_resources()[0].get("GPU", 0.0)
    if gpus < training + needed:
        rule = f"needs {needed:g} GPUs for evaluations beside {training:g} of the training workers, the cluster has {gpus:g}."
        raise ConfigError(field, each, rule, "Lower it, or use fewer workers.")


def start_local_ray(num_cpus: int, **changes: Any) -> Any:
    """A Ray on this machine, on loopback alone. Its logical CPUs: one for each worker, and two for their data tasks and an evaluation.
    `changes`: other arguments of `ray.init`, whose context it returns."""
    # Else Ray takes the machine's outward address for 127.0.0.1 and listens on every one; read by its processes, and here already.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    options = {
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "object_store_memory": 512 << 20,
        "_node_ip_address": "127.0.0.1",
    }
    return ray.init(**{**options, **changes})


def _set_ray_environment() -> None:
    """Quiet, and nothing sent anywhere."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_DEDUP_LOGS": "1",
    }.items():
        os.environ.setdefault(name, value)
