"""Ray for a run: joins the cluster that the configuration names, or starts Ray on this machine."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
import ray.exceptions

from most_ray.config import RunConfig
from most_ray.console.library_log import divert_native
from most_ray.distributed.stop_signals import hangup_blocked
from most_ray.errors import ConfigError, count_of, one_line
from most_ray.io import storage
from most_ray.io.waits import waiting_for
from most_ray.runs.room import check_room, cluster_address
from most_ray.service.cluster.address import check_address
from most_ray.service.cluster.capacity import TASK_CPUS, WorkerShare, fitting, nodes_now
from most_ray.service.cluster.private_files import check_ray_folder, check_token, open_token, ray_folder, require_private_token
from most_ray.service.cluster.ray_internals import has_autoscaler, keep_loopback, largest_resources, log_raylet_messages, nodes_to_come


def start_ray(config: RunConfig, fewest: int, most: int, use_gpu: bool) -> None:
    """Join the named cluster, or start Ray on this machine with room for `most` workers and their data tasks. Raises as `connect` and
    `check_resources`."""
    connect(config, most + 2)
    check_resources(config, fewest, most, use_gpu)


def start_beside(config: RunConfig, workers: int) -> Callable[[], None]:
    """Begin to start Ray on this machine, with room for `workers` workers, while this process loads the libraries of a run: its processes
    are up by then. Returns what waits for it, and raises the error of `connect`."""
    started: Future[None] = Future()

    def start() -> None:
        try:
            connect(config, workers + 2)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            started.set_exception(error)
        else:
            started.set_result(None)
            threading.Event().wait()  # Linux ends Ray's processes together with the thread that has started them

    threading.Thread(target=start, name="ray-start", daemon=True).start()
    return started.result


def check_resources(config: RunConfig, fewest: int, most: int, use_gpu: bool) -> None:
    """Raise ConfigError where the cluster that was joined neither has nor can grow to what a run of `fewest` to `most` workers needs: room
    for the fewest, each of them on one node, and GPUs left for evaluations."""
    resources, limit_known = largest_resources()
    if has_autoscaler() and not limit_known:  # it may become large enough: the run waits for that
        return
    share = WorkerShare.of(config, use_gpu)
    if evaluation := 0.0 if config.eval_inline else config.eval_workers * config.eval_gpus:
        # The workers keep theirs until the last evaluation has finished.
        check_evaluation_gpus("eval_gpus", config.eval_gpus, evaluation, most * share.gpus)
    needed = share.resources(fewest)
    needed["CPU"] += TASK_CPUS
    if short := sorted((name for name, amount in needed.items() if resources.get(name, 0.0) < amount), reverse=True):
        wanted = " and ".join(f"{needed[name]:g} {name}" for name in short)
        available = " and ".join(f"{resources.get(name, 0.0):g}" for name in short)
        raise ConfigError("num_workers", fewest, f"needs {wanted}, the cluster has {available}.", "Use fewer workers, or add nodes.")
    nodes = [*nodes_now().values(), *nodes_to_come()]
    if (fit := fitting(nodes, share, TASK_CPUS)) < fewest:
        rule = f"needs room for as many workers of {share}, each on one node: the cluster's nodes have room for {fit}."
        raise ConfigError("num_workers", fewest, rule, "Use fewer workers, let each take less, or add larger nodes.")


def check_evaluation_gpus(field: str, each: float, needed: float, training: float = 0.0) -> None:
    """Raise ConfigError for evaluations that would wait for GPUs without end: all their workers take `needed`, beside those of `training`
    workers, which are not free for evaluations. `field`: the key or flag to name, `each`: its value, the GPUs of one evaluation worker."""
    gpus = largest_resources()[0].get("GPU", 0.0)
    if gpus < training + needed:
        rule = f"needs {count_of(needed, 'GPU')} for evaluations beside {training:g} of the training workers, the cluster has {gpus:g}."
        raise ConfigError(field, each, rule, "Lower it, or use fewer workers.")


def cluster_gpus(config: RunConfig) -> int | None:
    """Join the named cluster, see `connect`, and return the GPUs that it has now; None for a run on this machine, for which
    `check_local_room` and `check_local` are called."""
    if not cluster_address(config):
        check_local_room(config)
        check_local(config)
        return None
    connect(config, 0)
    return int(ray.cluster_resources().get("GPU", 0.0))


def check_local_room(config: RunConfig) -> None:
    """`check_room`, but where Ray runs in this process already: then that decides, see `check_resources`."""
    if not ray.is_initialized():
        check_room(config)


def check_local(config: RunConfig) -> None:
    """Check what Ray on this machine needs, before any work is done for a run; nothing where a cluster is named. Raises ConfigError."""
    if cluster_address(config):
        return
    if open_token() is None:  # which `require_private_token` closes
        check_token()
    check_ray_folder()


def connect(config: RunConfig, local_cpus: int) -> None:
    """Join the named cluster, or start Ray on this machine with `local_cpus` logical CPUs. Does nothing where Ray is connected already.
    Raises ConfigError where the cluster cannot be joined."""
    if ray.is_initialized():
        return
    keep_libraries_quiet()
    # Little output, and nothing sent anywhere. No variable of Ray Train's is set: see `attempts._Trainer`.
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "1"}.items():
        os.environ.setdefault(name, value)
    address = cluster_address(config)
    if not address:
        # Several runs at once have more processes than Ray expects of so few cores: it would warn of each further one.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(os.cpu_count() or 1, 2 * local_cpus)))
        start_local_ray(local_cpus)
        return
    with waiting_for(f"Ray at {address}"):
        check_address(address)
        try:
            joined = ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            reason = f"cannot be joined ({one_line(error)[:200]})."
            raise ConfigError("ray_address", address, reason, "Check it, and that Ray runs there.") from error
    if storage.redact(config.run_uri) != config.run_uri:
        os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "0"  # the dashboard would show the URI's credentials
    elif joined.dashboard_url:  # without a dashboard Ray Train would complain of it every second
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")


def keep_libraries_quiet() -> None:
    """Let Ray's log lines, and what its native code writes in this process, go where those of all libraries go. By its own handler, made
    when it is imported, they would be on the screen."""
    if divert_native():
        own = logging.getLogger("ray")
        for handler in list(own.handlers):
            own.removeHandler(handler)
        own.setLevel(logging.WARNING)
        own.propagate = True
        log_raylet_messages()


def start_local_ray(num_cpus: int, **changes: Any) -> Any:
    """Start Ray on this machine, on loopback alone, with a token and a folder that no other user can read. A hangup of the terminal does
    not end it: that is left to this process. Raises ConfigError where the token or folder that the environment names cannot be used, or
    Ray does not come up.

    Args:
        num_cpus: logical CPUs, one for each worker, and two for their data tasks and an evaluation.
        changes: in the arguments of `ray.init`, whose context is returned.
    """
    require_private_token()
    # Else Ray replaces 127.0.0.1 by the machine's outward address and listens on every one. Its processes read the variable; this one has
    # read it already.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    keep_loopback()
    where = {"_node_ip_address": "127.0.0.1", "_temp_dir": changes.pop("_temp_dir", None) or ray_folder()}
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    keep_libraries_quiet()
    with hangup_blocked():
        try:
            return ray.init(**{"num_cpus": num_cpus, "object_store_memory": 512 << 20, **where, **quiet, **changes})
        except Exception as error:  # the class of Ray's own, where one of its processes was not up in time; its subclasses are raised again
            if type(error) is not Exception:
                raise
            rule = f"names no cluster, and Ray did not start on this machine ({one_line(error)[:200]})."
            raise ConfigError("ray_address", None, rule, "Start it again when the machine is less busy, or name a cluster.") from error
