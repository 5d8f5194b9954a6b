"""Attempts at a run: as many as it takes, each at the number of workers that the cluster has room for, until the goal, a request to stop,
or too many failures."""

from __future__ import annotations

import collections
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
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError
from rich.console import Console

from most_ray.checkpoint import catalog
from most_ray.distributed.topology import Topology
from most_ray.errors import UserError
from most_ray.evaluation.inline import EvaluationJob
from most_ray.io import storage
from most_ray.io.journal import evaluated_steps
from most_ray.runs.resolve import Prepared
from most_ray.service.cluster.capacity import (
    TASK_CPUS,
    AutoscalerRequest,
    WorkerShare,
    answering_nodes,
    release_workers,
    usable_nodes,
    worker_capacity,
)
from most_ray.service.cluster.process_group import OnNodeAddress
from most_ray.service.cluster.stop_requests import PREEMPTED, AttemptWatcher, ShutdownSignal, clear_run_keys, run_stopped
from most_ray.service.training.worker import WorkerJob, train_worker
from most_ray.trackers.select import wandb_key
from most_ray.train.session import claim_run

logger = logging.getLogger(__name__)
_SETTLE_S, _RETURN_S = 3.0, 20.0  # before fewer workers than asked for are taken, and fewer than the nodes could hold
_ANSWER_S = 10.0  # for a task that does nothing, a new process for it included


class RunIncompleteError(UserError):
    """The workers ended short of the goal."""

    kind = "training failed"
    exit_code = 1


@dataclass
class FailureWindow:
    """Failures that a run goes on after: at most `most` within `seconds` (0: ever)."""

    most: int
    seconds: float
    times: collections.deque[float] = field(default_factory=collections.deque)

    def allows(self, now: float) -> bool:
        """Count a failure at `now` (seconds, any steady clock); whether the run may go on."""
        self.times.append(now)
        while self.seconds > 0 and self.times[0] <= now - self.seconds:
            self.times.popleft()
        return len(self.times) <= self.most


class _Trainer(TorchTrainer):
    """Ctrl-C stays with the command: Ray Train's own handler would end the process with exit code 0, short of the goal."""

    def _register_sigint_handler(self, controller: Any) -> None:
        del controller


def run_attempts(prepared: Prepared, validation: EvaluationJob | None, console: Console, terminated: ShutdownSignal) -> None:
    """Train to the goal.

    Raises:
        RunStoppedError: SIGTERM came; a checkpoint was written where workers were training. RunIncompleteError: too many failures, or
            no room. UserError: what a user can mend, as a rank has raised it.
    """
    request = AutoscalerRequest(WorkerShare.of(prepared.job.config, prepared.use_gpu), prepared.topologies[-1].world_size, TASK_CPUS)
    try:
        _run_attempts(prepared, validation, console, terminated, request)
    finally:
        request.cancel()


def _run_attempts(
    prepared: Prepared, validation: EvaluationJob | None, console: Console, terminated: ShutdownSignal, request: AutoscalerRequest
) -> None:
    config = prepared.job.config
    failures = FailureWindow(config.max_failures, config.failure_window_s)
    doubtful = False
    while True:
        topology = wait_for_resources(prepared, doubtful, terminated, console, request)
        watcher, error = _attempt(prepared, topology, validation, terminated, request)
        if error is None and (watcher.reason is None or complete(prepared)):
            return
        cause = _cause(error) if error else ""
        doubtful = error is not None
        if isinstance(cause, UserError):
            raise cause from error
        if terminated.is_set():
            behind = "the workers were lost before a checkpoint could be written" if error else "a checkpoint was written"
            raise run_stopped(f"came: {behind}, the run has stopped.") from error
        if error is None:
            console.print(f"The workers were stopped behind a checkpoint ({watcher.reason}); going on.", highlight=False)
        elif watcher.reason == PREEMPTED or isinstance(error, PreemptionError):
            console.print("A node was taken away before a checkpoint was written; going on from the one before.", highlight=False)
        elif _found_no_room(error):
            console.print("Others took the room for the workers; looking again.", highlight=False)
        elif failures.allows(time.monotonic()):
            left = config.max_failures - len(failures.times)
            text = f"The workers were lost ({cause}); going on from the last checkpoint, {left} more allowed."
            console.print(text, highlight=False, markup=False, soft_wrap=True)  # gloo's words hold brackets
        else:
            times = f"{len(failures.times)} times" + (f" within {config.failure_window_s:g} s" if config.failure_window_s else "")
            rule = f"failed {times}, at last so: {cause.rstrip('.')}."
            raise RunIncompleteError("workers", None, rule, "The same command tries again.") from error


def complete(prepared: Prepared) -> bool:
    """Whether the last step's checkpoint is there, and its evaluation where one was asked for. Between attempts only."""
    job, folder = prepared.job, prepared.folder
    committed = catalog.step_uri(folder.checkpoints, job.total_steps) in catalog.committed(folder.checkpoints)
    return committed and (not job.has_validation or job.total_steps in evaluated_steps(folder))


def _found_no_room(error: BaseException) -> bool:
    """Whether a worker group could not be placed, rather than having failed."""
    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def _attempt(
    prepared: Prepared, topology: Topology, validation: EvaluationJob | None, terminated: ShutdownSignal, request: AutoscalerRequest
) -> tuple[AttemptWatcher, BaseException | None]:
    """One worker group, until it ends: what it was asked meanwhile, and how it failed."""
    n_workers = topology.world_size
    driver = claim_run(prepared.folder)
    job = prepared.job_for(topology, driver)
    share = WorkerShare.of(job.config, prepared.use_gpu)
    larger = [other.world_size for other in prepared.topologies if other.world_size > n_workers]

    last = catalog.step_uri(prepared.folder.checkpoints, job.total_steps)

    def more_room() -> bool:
        request.renew()
        if not larger or last in catalog.committed(prepared.folder.checkpoints):  # then only the last evaluation is under way
            return False
        return n_workers + worker_capacity(usable_nodes(), share, TASK_CPUS, free_only=True) >= larger[0]

    trainer = _Trainer(
        # Not as train_loop_config: Ray's dashboard would show it, and wants a dict.
        functools.partial(train_worker, WorkerJob(job, validation, wandb_key=wandb_key(job.config))),
        torch_config=OnNodeAddress(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=n_workers,
            use_gpu=prepared.use_gpu,
            resources_per_worker=share.resources(),
        ),
        # Failures are counted here: Ray Train's own count knows no window, and a new attempt may have another size.
        run_config=ray.train.RunConfig(
            name=job.config.name,
            storage_path=storage.join(job.run_uri, "ray"),
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    error: BaseException | None = None
    with AttemptWatcher(driver, n_workers, terminated, more_room) as watcher:
        try:
            with terminated.grace_period():
                trainer.fit()
        except (TrainingFailedError, ray.exceptions.RayError) as failure:
            error = failure
    try:
        if error is not None:
            release_workers()
        clear_run_keys(driver, n_workers)
    except Exception:  # Ray may be gone with the workers: some bytes stay in a store that does not answer
        logger.debug("Ray's key-value store did not answer", exc_info=True)
    return watcher, error


def wait_for_resources(
    prepared: Prepared, doubtful: bool, terminated: ShutdownSignal, console: Console, request: AutoscalerRequest
) -> Topology:
    """The largest layout that the cluster has room for beside its other work; waits for room for the smallest.

    Args:
        doubtful: workers were lost, so a node that is said to be alive may be gone.

    Raises:
        RunIncompleteError: there was none for `room_timeout_s`. RunStoppedError: SIGTERM came meanwhile.
    """
    smallest, largest = prepared.topologies[0], prepared.topologies[-1]
    timeout, share = prepared.job.config.room_timeout_s, WorkerShare.of(prepared.job.config, prepared.use_gpu)
    began, told = time.monotonic(), 0.0
    while not terminated.is_set():
        request.renew()
        nodes = answering_nodes(usable_nodes(), _ANSWER_S) if doubtful else usable_nodes()
        most, free = (worker_capacity(nodes, share, TASK_CPUS, free_only=free_only) for free_only in (False, True))
        fitting = [topology for topology in prepared.topologies if topology.world_size <= free]
        hoped_for = max((t.world_size for t in prepared.topologies if t.world_size <= most), default=largest.world_size)
        waited = time.monotonic() - began
        # What the attempt before held comes back within seconds, and a node that has just come or gone shows late.
        if fitting and (fitting[-1] == largest or waited > (_SETTLE_S if fitting[-1].world_size == hoped_for else _RETURN_S)):
            return fitting[-1]
        what = f"{smallest.world_size} workers of {share} each, the cluster has room for {free}"
        if not fitting and waited > timeout:
            rule = f"found no room for {timeout:g} s: {what}."
            raise RunIncompleteError("num_workers", smallest.world_size, rule, "Free some, use fewer, or raise room_timeout_s.")
        if not fitting and waited - told > 15:
            told = waited
            console.print(f"Waiting for room: {what}.", highlight=False, soft_wrap=True)
        terminated.wait(1.0)
    raise run_stopped("came before training had begun again.")


def _cause(error: BaseException) -> UserError | str:
    """The rank's own error where a user can mend it; else its traceback goes to the log and its last line comes back."""
    ranks: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    shown: dict[int, str] = {}
    for rank, failure in sorted(ranks.items()):
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
        # Of a worker that is gone Ray Train says so, and keeps what Ray says of its end beside it.
        shown[rank] = str(getattr(failure, "health_check_failure", failure)).strip()
    own = _first_to_fail(shown)
    if own is not None:
        logger.error("rank %d failed:\n%s", own, shown[own])
        return f"rank {own}: {_headline(shown[own])}"
    # What failed before the workers began is in a task's error inside Ray Train's, whose first lines only say that there is one.
    inner = getattr(error, "controller_failure", None) or error
    inner = getattr(inner, "cause", None) or inner
    return _headline(str(inner)) or repr(inner)


def _first_to_fail(failures: dict[int, str]) -> int | None:
    """The rank whose failure is not merely another's: those that lost their peer in a collective come last."""
    peers = ("Connection closed by peer", "Connection reset", "NCCL", "gloo", "Gloo", "ActorDiedError")
    return min(failures, key=lambda rank: (any(word in failures[rank] for word in peers), rank), default=None)


def _headline(text: str) -> str:
    """What a failure says in one line: the last one of a traceback, the first one of Ray's explanations."""
    if "OUT_OF_MEMORY" in text or "low on memory" in text:
        return "its process was killed, for the node ran out of memory"
    if "its node has died" in text:
        address = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
        return f"its node{' ' + address[1] if address else ''} is gone"
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[-1 if lines[0].startswith("Traceback") else 0] if lines else ""
