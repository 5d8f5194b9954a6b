"""How many workers a cluster has room for: its usable nodes, each worker's share of them, and requests for more nodes."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from most_ray.config import RunConfig
from most_ray.errors import count_of
from most_ray.service.cluster.ray_internals import draining_nodes, free_resources, has_autoscaler

if TYPE_CHECKING:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator

logger = logging.getLogger(__name__)
TASK_CPUS = 0.25  # CPUs of a task that fetches batches; small, so that it fits beside the training workers
_REQUEST_S = 180.0  # seconds after which a request to the autoscaler expires


@dataclass(frozen=True)
class WorkerShare:
    """The resources that one training worker takes of the cluster."""

    cpus: float
    gpus: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, use_gpu: bool) -> WorkerShare:
        return cls(config.cpus_per_worker, config.gpus_per_worker if use_gpu else 0.0)

    def resources(self, workers: int = 1) -> dict[str, float]:
        """What `workers` workers take, by Ray's names of resources."""
        return {"CPU": workers * self.cpus, **({"GPU": workers * self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def usable_nodes() -> set[str]:
    """Ids of the nodes that Ray considers alive and that are not draining."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - set(draining_nodes())


def start_on_nodes(function: Callable[..., Any], nodes: Iterable[str], *args: Any) -> dict[ray.ObjectRef, str]:
    """Start `function(*args)` as a task without CPUs on each of `nodes`, and on no other. Returns the node's id by the task's reference."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    return {task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*args): node for node in nodes}


def answering_nodes(nodes: set[str], timeout_s: float) -> set[str]:
    """Those of `nodes` that finish an empty task within `timeout_s` seconds: Ray considers a node alive until several heartbeats are
    missing, and waits a minute for workers on a node that is gone."""
    tasks = start_on_nodes(lambda: None, nodes)
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout_s) if tasks else ([], [])
    for reference in late:
        ray.cancel(reference, force=True)
    found = set()
    for reference in done:
        with contextlib.suppress(ray.exceptions.RayError):  # the node was lost while it answered
            ray.get(reference)
            found.add(tasks[reference])
    return found


def worker_capacity(nodes: set[str], share: WorkerShare, task_cpus: float, free_only: bool = False) -> int:
    """How many workers fit on the nodes with these ids, each with its share on one node, and `task_cpus` CPUs left for data tasks on any of
    them. `free_only`: count only the resources that are unused now."""
    by_node = free_resources() if free_only else nodes_now()
    return fitting([resources for node, resources in by_node.items() if node in nodes], share, task_cpus)


def nodes_now() -> dict[str, dict[str, float]]:
    """The resources of the nodes that Ray considers alive, by id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def fitting(counted: Sequence[Mapping[str, float]], share: WorkerShare, task_cpus: float) -> int:
    """`worker_capacity` of nodes with these resources."""
    each = {name: amount for name, amount in share.resources().items() if amount}
    slots = sum(min(_fits(resources.get(name, 0.0), amount) for name, amount in each.items()) for resources in counted)
    return max(0, min(slots, _fits(sum(resources.get("CPU", 0.0) for resources in counted) - task_cpus, share.cpus)))


def missing_room(nodes: set[str], share: WorkerShare, workers: int) -> str:
    """What the nodes with these ids lack for `workers` workers, in words: how many fit now, and what is free."""
    free, whole = free_resources(), nodes_now()
    fit = worker_capacity(nodes, share, TASK_CPUS, free_only=True)
    names = [name for name, amount in share.resources().items() if amount]
    sums = {name: [sum(of.get(node, {}).get(name, 0.0) for node in nodes) for of in (free, whole)] for name in names}
    unused = " and ".join(f"{left:g} of {has:g} {name}" for name, (left, has) in sums.items())
    which = f"{unused} on {count_of(len(nodes), 'node')}"
    return f"{count_of(workers, 'worker')} of {share} each are needed, the cluster has room for {fit}; free are {which}"


def _fits(available: float, each: float) -> int:
    return math.floor(available / each + 1e-6)  # fractions of a CPU add up with rounding errors


def release_workers() -> None:
    """End the workers that this driver still has and free their resources, between attempts only: Ray Train 2.60 keeps both for as long as
    the driver lives where a worker group fails while it starts, for example because the network does not connect its nodes."""
    own = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(own) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


class AutoscalerRequest:
    """Requests room for a run's workers from a cluster that grows by itself.

    An attempt waits for room before it asks Ray Train for workers, so the autoscaler would otherwise not learn that the cluster is too
    small. Ray merges the requests of all drivers; each expires after `_REQUEST_S` seconds.
    """

    def __init__(self, share: WorkerShare, workers: int, task_cpus: float) -> None:
        self._bundles = [*([share.resources()] * workers), {"CPU": task_cpus}]
        self._renewed = -math.inf  # when, on the monotonic clock
        self._coordinator: DefaultAutoscalingCoordinator | None = None

    def renew(self) -> None:
        """Send the request again once a sixth of its time is over; to be called repeatedly while the run needs the room."""
        if time.monotonic() - self._renewed < _REQUEST_S / 6:
            return
        self._renewed = time.monotonic()
        try:
            if self._coordinator is None and has_autoscaler():
                # Imported here: it brings all of Ray Data, which a cluster without an autoscaler needs later, or not at all.
                from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator

                self._coordinator = DefaultAutoscalingCoordinator(f"most_ray-{uuid.uuid4().hex}")
            if self._coordinator:
                self._coordinator.request_resources(self._bundles, expire_after_s=_REQUEST_S)
        except Exception as error:  # noqa: BLE001 - Ray may be handling a failure
            logger.warning("the autoscaler did not take the request for room, which is sent again in %g s: %s", _REQUEST_S / 6, error)

    def cancel(self) -> None:
        """Withdraw the request, so that the autoscaler may remove idle nodes."""
        try:
            if self._coordinator:
                self._coordinator.cancel_request()
        except Exception as error:  # noqa: BLE001 - Ray may have ended already
            logger.warning("the request for room could not be withdrawn and expires within %g s: %s", _REQUEST_S, error)
