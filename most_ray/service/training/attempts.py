"""Attempts at a run, each with as many workers as the cluster has room for: until its last step, a stop request, or too many failures."""

from __future__ import annotations

import functools
import logging
import re
import time
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError
from rich.console import Console

from most_ray.checkpoint import catalog
from most_ray.console.library_log import LIBRARIES
from most_ray.console.terminal import print_line
from most_ray.distributed.topology import Topology
from most_ray.errors import UserError, count_of
from most_ray.evaluation.inline import EvaluationJob
from most_ray.io import storage
from most_ray.runs.interrupts import newest_text, resuming_text, stopped_text
from most_ray.runs.lifecycle import is_complete
from most_ray.runs.resolve import Prepared
from most_ray.runs.room import cluster_address
from most_ray.service.cluster import capacity
from most_ray.service.cluster.capacity import TASK_CPUS, AutoscalerRequest, WorkerShare
from most_ray.service.cluster.process_group import OnNodeAddress
from most_ray.service.cluster.stop_requests import PREEMPTED, AttemptWatcher, LocalRayWatcher, ShutdownSignal, clear_run_keys, run_stopped
from most_ray.service.training.entry import run_worker
from most_ray.service.training.worker import WorkerJob
from most_ray.trackers.select import wandb_key
from most_ray.train.attempt import claim_run

logger = logging.getLogger(__name__)
_ray_logger = logging.getLogger("ray.most_ray")  # for errors in full, which go where what Ray says goes
_SETTLE_S = 3.0  # seconds of waiting before fewer workers than configured are used
_RETURN_S = 20.0  # seconds of waiting before fewer workers are used than the nodes could hold
_ANNOUNCE_S = 15.0  # seconds between lines about what is missing
_ANSWER_S = 10.0  # seconds for a node to finish an empty task, including the start of a process


class RunIncompleteError(UserError):
    """The workers ended before the last step, or its evaluation."""

    kind, exit_code = "training failed", 1


@dataclass
class FailureWindow:
    """Counts the failures after which a run is started again."""

    most: int  # failures that are allowed within the window
    seconds: float  # length of the window; 0: all failures count
    times: list[float] = field(default_factory=list)  # of the failures within the window

    def allows(self, now: float) -> bool:
        """Count a failure at `now` (seconds of any monotonic clock). Returns whether the run may be started again."""
        self.times = [at for at in (*self.times, now) if self.seconds <= 0 or at > now - self.seconds]
        return len(self.times) <= self.most


class _Trainer(TorchTrainer):
    """Ray Train's trainer, without two of its ways.

    Ctrl-C is left to the command: Ray Train's own handler would end the process with exit code 0 before the last step. And on the Ray that
    this process has started, the controller has the environment of all other processes: with one of its own, which all that it starts
    inherit, none of the processes that Ray holds ready could be used, and each of some ten would take two seconds to start.
    """

    own_ray = False  # whether this process has started Ray, as it is configured now

    def _register_sigint_handler(self, controller: Any) -> None:
        del controller

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if not self.own_ray:
            return super()._initialize_and_run_controller(**given)
        controller = ray.remote(num_cpus=0)(TrainController).remote(**given)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def run_attempts(prepared: Prepared, validation: EvaluationJob | None, console: Console, shutdown: ShutdownSignal) -> None:
    """Train until the run is complete. `validation`: how its checkpoints are evaluated, if they are.

    Raises:
        RunStoppedError: SIGTERM or SIGHUP was received; a checkpoint was written if workers were training.
        RunIncompleteError: too many failures, or no room for the workers.
        UserError: raised by a rank, for something that the user can fix.
    """
    uri = prepared.job.config.run_uri

    def without_ray() -> UserError:
        if shutdown.is_set():
            return run_stopped(f"was received, by Ray's processes too, which have ended: {newest_text(uri)}.", shutdown.name)
        rule = f"has ended on this machine: its processes were killed. {_see_libraries()}"
        return RunIncompleteError("Ray", None, rule.strip(), "The same command resumes the run.")

    with LocalRayWatcher(without_ray):
        _attempts(prepared, validation, console, shutdown)


def _attempts(prepared: Prepared, validation: EvaluationJob | None, console: Console, shutdown: ShutdownSignal) -> None:
    """See `run_attempts`."""
    config = prepared.job.config
    request = AutoscalerRequest(WorkerShare.of(config, prepared.use_gpu), prepared.topologies[-1].world_size, TASK_CPUS)
    again = functools.partial(resuming_text, config.run_uri, config.resume_from_checkpoint)
    failures, check_nodes = FailureWindow(config.max_failures, config.failure_window_s), False
    try:
        while True:
            topology = _wait_for_resources(prepared, check_nodes, shutdown, console, request)
            print_line(console, f"Starting {count_of(topology.world_size, 'worker')}")
            watcher, error = _attempt(prepared, topology, validation, shutdown, request)
            if error is None and (watcher.reason is None or is_complete(prepared)):
                return
            cause = _cause(error) if error else ""
            check_nodes = error is not None
            if isinstance(cause, UserError):
                raise cause from error
            if shutdown.is_set():
                lost = f"the workers were lost before they could write one: {newest_text(config.run_uri)}"
                result = lost if error else stopped_text(config.run_uri)
                raise run_stopped(f"was received: {result}, the run has stopped.", shutdown.name) from error
            if error is None:
                text = f"The workers were stopped after a checkpoint ({watcher.reason}); {again()}."
            elif watcher.reason == PREEMPTED or isinstance(error, PreemptionError):
                text = f"A node was taken away before a checkpoint was written; {again()}."
            elif isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):  # it could not be placed
                text = "Others took the room for the workers; looking again."
            elif failures.allows(time.monotonic()):
                left = config.max_failures - len(failures.times)
                text = f"The workers were lost ({cause}); {again()}, {left} more allowed. {_see_libraries()}"
            else:
                within = f" within {config.failure_window_s:g} s" if config.failure_window_s else ""
                rule = f"failed {count_of(len(failures.times), 'time')}{within}, the last time: {cause.rstrip('.')}."
                raise RunIncompleteError("workers", None, rule, "The same command tries again.") from error
            print_line(console, text.strip())
    finally:
        request.cancel()


def _attempt(
    prepared: Prepared, topology: Topology, validation: EvaluationJob | None, shutdown: ShutdownSignal, request: AutoscalerRequest
) -> tuple[AttemptWatcher, BaseException | None]:
    """Run one worker group until it ends. Returns the watcher, which knows whether the group was asked to stop, and the group's failure."""
    n_workers, driver = topology.world_size, claim_run(prepared.folder)
    job = prepared.job_for(topology, driver)
    share = WorkerShare.of(job.config, prepared.use_gpu)
    larger = [other.world_size for other in prepared.topologies if other.world_size > n_workers]
    last = catalog.step_uri(prepared.folder.checkpoints, job.total_steps)

    def can_grow() -> bool:
        request.renew()
        if not larger or last in catalog.committed(prepared.folder.checkpoints):  # in the latter case only the last evaluation is left
            return False
        return n_workers + capacity.worker_capacity(capacity.usable_nodes(), share, TASK_CPUS, free_only=True) >= larger[0]

    trainer = _Trainer(
        # Not as train_loop_config, which Ray's dashboard would show, and which must be a dict.
        functools.partial(run_worker, WorkerJob(job, validation, wandb_key=wandb_key(job.config))),
        torch_config=OnNodeAddress(),
        scaling_config=ray.train.ScalingConfig(num_workers=n_workers, use_gpu=prepared.use_gpu, resources_per_worker=share.resources()),
        # Failures are counted here: Ray Train's own count has no window, and a new attempt may have another size.
        run_config=ray.train.RunConfig(
            name=job.config.name,
            storage_path=storage.join(job.run_uri, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    trainer.own_ray = cluster_address(job.config) is None
    error: BaseException | None = None
    with AttemptWatcher(driver, n_workers, shutdown, can_grow) as watcher:
        try:
            with shutdown.grace_period(trains=False):
                trainer.fit()
        except (TrainingFailedError, ray.exceptions.RayError) as failure:
            error = failure
    try:
        if error is not None:
            capacity.release_workers()
        clear_run_keys(driver, n_workers)
    except Exception as failure:  # noqa: BLE001 - Ray may be gone together with the workers
        logger.warning("what attempt %s used in Ray could not all be released: %s", driver, failure)
    return watcher, error


def _wait_for_resources(
    prepared: Prepared, check_nodes: bool, shutdown: ShutdownSignal, console: Console, request: AutoscalerRequest
) -> Topology:
    """The largest topology that the cluster has room for now; waits until there is room for the smallest, at most `room_timeout_s` seconds.
    `check_nodes`: count only nodes that answer, for workers were lost, so that a node that Ray considers alive may be gone."""
    smallest, largest = prepared.topologies[0], prepared.topologies[-1]
    timeout, share = prepared.job.config.room_timeout_s, WorkerShare.of(prepared.job.config, prepared.use_gpu)
    # At the first start what is missing is said at once; later, the resources of the attempt before are free within seconds.
    began, due = time.monotonic(), _SETTLE_S if check_nodes else 0.0
    while not shutdown.is_set():
        request.renew()
        nodes = capacity.answering_nodes(capacity.usable_nodes(), _ANSWER_S) if check_nodes else capacity.usable_nodes()
        most, free = (capacity.worker_capacity(nodes, share, TASK_CPUS, free_only=free_only) for free_only in (False, True))
        fitting = [topology for topology in prepared.topologies if topology.world_size <= free]
        expected = max((t.world_size for t in prepared.topologies if t.world_size <= most), default=largest.world_size)
        waited = time.monotonic() - began
        # The resources of the attempt before are free within seconds, and a node that has just come or gone is seen late.
        if fitting and (fitting[-1] == largest or waited > (_SETTLE_S if fitting[-1].world_size == expected else _RETURN_S)):
            return fitting[-1]
        if not fitting and (waited >= due or waited > timeout):
            needs = capacity.missing_room(nodes, share, smallest.world_size)
            if waited > timeout:
                rule, remedy = f"found no room for {timeout:g} s: {needs}.", "Free some, use fewer, or raise room_timeout_s."
                raise RunIncompleteError("num_workers", smallest.world_size, rule, remedy)
            print_line(console, f"Waiting for room, {waited:.0f} of at most {timeout:g} s: {needs}.")
            due = waited + _ANNOUNCE_S
        shutdown.wait(1.0)
    raise run_stopped("was received before training had started again.", shutdown.name)


def _cause(error: BaseException) -> UserError | str:
    """Why an attempt failed: the UserError of a rank if there is one, else the last line of the traceback, which is logged."""
    ranks: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    shown: dict[int, str] = {}
    for rank, failure in sorted(ranks.items()):
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
        # Of a lost worker the error says only that it is lost; Ray's account of its end is an attribute.
        shown[rank] = str(getattr(failure, "health_check_failure", failure)).strip()
    if (own := _first_to_fail(shown)) is not None:
        for line in shown[own].splitlines():
            _ray_logger.error("rank %d failed: %s", own, line)
        return f"rank {own}: {_headline(shown[own])}"
    # A failure before the workers have started is in a task's error inside Ray Train's, whose own first lines do not name it.
    inner = getattr(error, "controller_failure", None) or error
    inner = getattr(inner, "cause", None) or inner
    return _headline(str(inner)) or repr(inner)


def _see_libraries() -> str:
    """Where the whole error is, as a sentence; empty where it was shown."""
    return f"The whole error is in {LIBRARIES.path}." if LIBRARIES.path is not None and not LIBRARIES.temporary else ""


def _first_to_fail(failures: dict[int, str]) -> int | None:
    """The rank that failed by itself: ranks that only lost a peer in a collective come last."""
    peers = ("Connection closed by peer", "Connection reset", "NCCL", "gloo", "Gloo", "ActorDiedError")
    return min(failures, key=lambda rank: (any(word in failures[rank] for word in peers), rank), default=None)


def _headline(text: str) -> str:
    """A failure in one line: the last line of a traceback, or the first one of an explanation by Ray."""
    if "OUT_OF_MEMORY" in text or "low on memory" in text:
        return "its process was killed because the node ran out of memory"
    if "its node has died" in text:
        address = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
        return f"its node{' ' + address[1] if address else ''} is gone"
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[-1 if lines[0].startswith("Traceback") else 0] if lines else ""
