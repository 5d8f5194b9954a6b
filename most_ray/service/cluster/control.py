"""How a driver asks its workers to stop behind a checkpoint, and when it does: a signal, a node that will be taken away, room for more.

The wish stands in Ray's key-value store under the driver's mark; rank 0 looks for it once a second and the ranks agree on the step in
the all-reduce that every step makes anyway.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ray
import ray.exceptions
from ray import PlacementGroupID
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from most_ray.config import RunConfig
from most_ray.errors import STOPPED, UserError

logger = logging.getLogger(__name__)
TASK_CPUS = 0.25  # of a task that fetches batches; small, so that it fits beside the training workers
LOOK_EVERY_S = 1.0
_WISH_S = 180.0
TERMINATED, PREEMPTED, RESIZED = "terminated", "preempted", "resized"


def _key(driver: str, what: str) -> bytes:
    return f"most_ray/{what}/{driver}".encode()


def request_stop(driver: str, reason: str) -> None:
    internal_kv._internal_kv_put(_key(driver, "stop"), reason.encode(), overwrite=True)


def register_worker_node(driver: str, rank: int) -> None:
    """Say which node a worker is on; called in the worker."""
    internal_kv._internal_kv_put(_key(driver, f"node/{rank}"), ray.get_runtime_context().get_node_id().encode(), overwrite=True)


def clear_run_keys(driver: str, n_workers: int) -> None:
    """Remove what an attempt has left in the store."""
    for what in ("stop", *(f"node/{rank}" for rank in range(n_workers))):
        internal_kv._internal_kv_del(_key(driver, what))


def nodes_of(driver: str, n_workers: int) -> list[str]:
    """The node of each of an attempt's workers, as far as those have come up."""
    found = (internal_kv._internal_kv_get(_key(driver, f"node/{rank}")) for rank in range(n_workers))
    return [node.decode() for node in found if node]


class StopListener:
    """Looks for the driver's wish on a thread of its own; for rank 0."""

    def __init__(self, driver: str) -> None:
        self._driver, self._asked, self._ended = driver, threading.Event(), threading.Event()
        threading.Thread(target=self._look, name="stop-listener", daemon=True).start()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S) and not self._asked.is_set():
            try:
                if internal_kv._internal_kv_get(_key(self._driver, "stop")):
                    self._asked.set()
            except Exception:  # a store that does not answer for a moment is asked again; a lost one ends the worker anyway
                logger.debug("Ray's key-value store did not answer", exc_info=True)

    def __call__(self) -> bool:
        return self._asked.is_set()

    def close(self) -> None:
        self._ended.set()


class RunStoppedError(UserError):
    """The run was asked to stop, and has; nothing is lost."""

    kind = "stopped"
    exit_code = STOPPED


class ShutdownSignal(threading.Event):
    """Set once the process has been asked to end. While workers train they are given the time for a checkpoint (`patient`); else, and
    the second time, the process ends at once."""

    patient = False
    name = "SIGTERM"  # of the signal that came

    def install(self, interrupt: bool = False) -> None:
        """Take SIGTERM; once more behind `ray.init`, which sets a handler of its own. `interrupt`: Ctrl-C too."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT) if interrupt else (signal.SIGTERM,):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        del frame
        again, self.name = self.is_set(), signal.Signals(number).name
        self.set()
        if again or not self.patient:
            raise stopped("came.", self.name)

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[ShutdownSignal]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.install()
        try:
            yield self
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)


def stopped(rule: str, name: str = "SIGTERM") -> RunStoppedError:
    return RunStoppedError(name, None, rule, "The same command goes on.")


class Watcher:
    """While an attempt runs: asks it to stop when the job is to end, a node of its is about to go, or more workers would have room.

    `reason` says which of them it was, or None.
    """

    def __init__(
        self, driver: str, n_workers: int, terminated: ShutdownSignal, more_room: Callable[[], bool], every_s: float = 2.0
    ) -> None:
        self.reason: str | None = None
        self._driver, self._n_workers, self._terminated, self._more_room, self._every = driver, n_workers, terminated, more_room, every_s
        self._ended, self._next_look, self._room_seen = threading.Event(), 0.0, 0
        self._thread = threading.Thread(target=self._watch, name="attempt-watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        while not self._ended.wait(0.2) and self.reason != TERMINATED:
            try:
                found = TERMINATED if self._terminated.is_set() else self._look()
                if found:
                    request_stop(self._driver, found)
                    self.reason = found
            except Exception:  # Ray may be busy with the very failure, or gone: look again as long as the attempt lasts
                logger.debug("Ray did not answer", exc_info=True)

    def _look(self) -> str | None:
        """Now and then: whether the attempt should move. Once it is on its way out, no more."""
        if self.reason or time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + self._every
        nodes = nodes_of(self._driver, self._n_workers)
        if set(nodes) & set(draining_nodes()):
            return PREEMPTED
        # Until all workers are up what they will take seems to be free; what has just been freed may be wanted by others.
        self._room_seen = self._room_seen + 1 if len(nodes) == self._n_workers and self._more_room() else 0
        return RESIZED if self._room_seen > 2 else None


def draining_nodes() -> dict[str, int]:
    """Nodes that will be taken away, with their deadlines (UNIX time in ms, 0: none); what `ray.train` itself looks at."""
    from ray._private.state import state  # no public way in Ray 2.60

    found: dict[str, int] = state.get_draining_nodes()
    return found


def usable_nodes() -> set[str]:
    """The nodes that Ray takes for alive, without those about to go."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - set(draining_nodes())


def answering_nodes(nodes: set[str], timeout_s: float) -> set[str]:
    """Those of `nodes` that run a task within `timeout_s`. Ray takes a node that is gone for alive until it has missed some heartbeats,
    and would wait a minute for workers on it."""

    def answer() -> None:
        return None

    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(answer).remote()] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
    for reference in late:
        ray.cancel(reference, force=True)
    found = set()
    for reference in done:
        with contextlib.suppress(ray.exceptions.RayError):  # its node went meanwhile
            ray.get(reference)
            found.add(asked[reference])
    return found


def release_room() -> None:
    """Give back what this driver holds for workers, and end those that are left; between attempts only. Of a group that failed while its
    workers were coming up (a network that does not carry it) Ray Train 2.60 keeps both for as long as the driver lives."""
    own = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(own) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


class AutoscalerRequest:
    """Asks a cluster that grows by itself for room for a run's workers.

    `wait_for_resources` looks for room before Ray is asked for workers, so without it such a cluster would never learn that it is too
    small. Ray merges the requests of all callers; each lasts `_WISH_S`.
    """

    def __init__(self, share: WorkerShare, workers: int, task_cpus: float) -> None:
        self._bundles = [*([share.resources()] * workers), {"CPU": task_cpus}]
        self._asked = -math.inf
        self._coordinator: DefaultAutoscalingCoordinator | None = None

    def renew(self) -> None:
        """Called again and again while the run wants the room."""
        if time.monotonic() - self._asked < _WISH_S / 6:
            return
        self._asked = time.monotonic()
        try:
            if self._coordinator is None and grows():
                self._coordinator = DefaultAutoscalingCoordinator(f"most_ray-{uuid.uuid4().hex}")
            if self._coordinator:
                self._coordinator.request_resources(self._bundles, expire_after_s=_WISH_S)
        except Exception:  # Ray may be busy with a failure: it is asked again
            logger.debug("the autoscaler could not be asked", exc_info=True)

    def cancel(self) -> None:
        """Nodes that stand idle may go."""
        try:
            if self._coordinator:
                self._coordinator.cancel_request()
        except Exception:  # Ray may be gone; wishes end by themselves
            logger.debug("the autoscaler could not be told", exc_info=True)


def grows() -> bool:
    """Whether the cluster has an autoscaler: the second version says so, the first tells what types its nodes have. (One that only
    watches calls each node's type by the node.)"""
    if is_autoscaler_v2(fetch_from_server=True):
        return True
    report = json.loads(internal_kv._internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = (report.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    return any(not kind.startswith("node_") for kind in types.values())


@dataclass(frozen=True)
class WorkerShare:
    """What one training worker takes of the cluster."""

    cpus: float = 1.0
    gpus: float = 0.0

    @classmethod
    def of(cls, config: RunConfig, use_gpu: bool) -> WorkerShare:
        return cls(config.cpus_per_worker, config.gpus_per_worker if use_gpu else 0.0)

    def resources(self, workers: int = 1) -> dict[str, float]:
        """As Ray names them."""
        return {"CPU": workers * self.cpus, **({"GPU": workers * self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def room(nodes: set[str], share: WorkerShare, task_cpus: float, free_only: bool = False) -> int:
    """Workers that `nodes` have room for beside `task_cpus` for data tasks. `free_only`: of what nobody uses now."""
    if free_only:
        from ray._private.state import available_resources_per_node

        by_node = {node: resources for node, resources in available_resources_per_node().items() if node in nodes}
    else:
        by_node = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["NodeID"] in nodes}
    slots = sum(
        min(_fits(resources.get(name, 0.0), each) for name, each in share.resources().items() if each) for resources in by_node.values()
    )
    total = sum(resources.get("CPU", 0.0) for resources in by_node.values())
    return max(0, min(slots, _fits(total - task_cpus, share.cpus)))


def _fits(there: float, each: float) -> int:
    return math.floor(there / each + 1e-6)  # fractions of a CPU add up with rounding errors
