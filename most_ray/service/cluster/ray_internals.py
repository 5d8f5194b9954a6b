"""What the cluster modules use of Ray 2.60 that is not public, in one place for whoever upgrades Ray.

Private names of a single subject stay with it: requests for nodes (capacity.py), joining (address.py), the process group
(process_group.py), jobs (job_package.py, submit.py), Ray Data's executor (tasks/batch_stream.py), the trainer and its
errors (training/attempts.py), and Tune's schedulers and search (tune/schedulers.py, tune/search.py).
"""

from __future__ import annotations

import logging
from typing import Any

import ray
import ray._private.worker
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, _enable_token_auth
from ray._private.state import available_resources_per_node, state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental import internal_kv

from most_ray.io.json_values import parse_json

_MOST_OF_A_KIND = 100_000  # nodes of a kind without limit, or of a resource on a node: more than any cluster has


def local_ray_has_ended() -> bool:
    """Whether the Ray that this process has started has lost one of the processes that it cannot do without."""
    node = _global_node()
    needed = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
    return node is not None and any(kind in needed for kind, _ in node.dead_processes())


def _global_node() -> Any:
    return ray._private.worker._global_node


def log_raylet_messages() -> None:
    """Let what Ray's processes report to this one go to Ray's logger: by itself Ray prints it, a thousand characters a message."""

    def log(data: dict[str, Any], ignore_prefix: bool) -> None:
        del ignore_prefix
        for line in data["lines"]:
            logger.error("%s: %s", data["pid"], line)

    logger = logging.getLogger("ray.raylet")
    ray._private.worker.print_to_stdstream = log


def kv_put(key: bytes, value: bytes) -> None:
    """Set a key of the key-value store that all processes of a cluster share."""
    internal_kv._internal_kv_put(key, value, overwrite=True)


def kv_get(key: bytes) -> bytes | None:
    """Read a key of the cluster's key-value store; None where it is not set."""
    return internal_kv._internal_kv_get(key)


def kv_delete(key: bytes) -> None:
    """Remove a key of the cluster's key-value store, if it is set."""
    internal_kv._internal_kv_del(key)


def draining_nodes() -> dict[str, int]:
    """Ids of the nodes that will be taken away, with their deadlines (UNIX time in ms, 0: none). Ray Train looks at the same table."""
    return state.get_draining_nodes()


def free_resources() -> dict[str, dict[str, float]]:
    """Resources that are unused now, by node id."""
    return available_resources_per_node()


def largest_resources() -> tuple[dict[str, float], bool]:
    """The resources that the cluster has, or that its autoscaler may bring it to; and whether the autoscaler's limits are known."""
    found = {str(name): float(amount) for name, amount in ray.cluster_resources().items()}
    largest = state.get_max_resources_from_cluster_config()
    for name, amount in (largest or {}).items():
        found[name] = max(found.get(name, 0.0), float(amount))
    return found, largest is not None


def nodes_to_come() -> list[dict[str, float]]:
    """The resources of the nodes that the autoscaler may add at most, where its limits are known; of a kind without limit, 100,000."""
    config = state.get_cluster_config()
    found: list[dict[str, float]] = []
    for group in config.node_group_configs if config else ():
        resources = {name: _MOST_OF_A_KIND if amount < 0 else float(amount) for name, amount in group.resources.items()}
        found += [resources] * (group.max_count if group.max_count >= 0 else _MOST_OF_A_KIND)
    return found


def has_autoscaler() -> bool:
    """Whether the cluster has an autoscaler. Version 2 is registered as such; version 1 is recognised by its node types, for an autoscaler
    that only monitors the cluster names each node's type after the node."""
    if is_autoscaler_v2(fetch_from_server=True):
        return True
    report = parse_json(kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = (report.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return any(not kind.startswith("node_") for kind in types.values())


def keep_loopback() -> None:
    """Let this process use a loopback address as it is: by default Ray replaces it by the machine's outward address."""
    ray_constants.ENABLE_RAY_CLUSTER = False


def require_token() -> None:
    """Let this process, and the Ray that it starts, require a token, which is read again: Ray remembers what it has found before."""
    _enable_token_auth()
    AuthenticationTokenLoader.instance().reset_cache()
