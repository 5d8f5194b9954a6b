"""Trains without Ray, in one process or under torchrun:

    torchrun --nproc_per_node 2 -m most_ray.train.run --config jobs/configs/digits.yaml --ep_size 2

The run is the one that `most-ray train` makes, in the same folder with the same files, trackers and screens: either command resumes what
the other has begun. Evaluations run on the ranks in between steps, as with `eval_inline`.

From Python, `train(config)` trains such a run in this process.

SIGTERM or SIGHUP, and Ctrl-C once it trains, stop the run after it has written a checkpoint, with exit code 75. A second Ctrl-C ends it at
once, with 130. torchrun itself then exits with 1, and kills ranks that have not ended after its `--shutdown-timeout` (30 s): set it to the
time that a save takes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

import most_ray
from most_ray import config as configuration
from most_ray.console.help import HelpParser
from most_ray.console.progress import ProgressWatcher
from most_ray.console.run_screens import evaluation_plan, first_screen, last_screen
from most_ray.console.streams import drop_lost_streams, open_streams
from most_ray.console.terminal import LOG_WIDTH, Terminal, log_to_stderr, print_line, say, say_in_handler
from most_ray.distributed.ranks import this_rank
from most_ray.distributed.stop_signals import STOPPING, interrupt_signals, stop_signals
from most_ray.errors import EXIT_INTERRUPTED, EXIT_STOPPED, CheckpointError, ConfigError, UserError, count_of, explain_os_error
from most_ray.evaluation.inline import EvaluationJob, InlineEvaluation
from most_ray.io import storage
from most_ray.options import parse_number
from most_ray.report import write_report
from most_ray.runs.first_checks import completed_line, placed
from most_ray.runs.interrupts import explained_interrupt, stopped_text
from most_ray.runs.job import Job
from most_ray.runs.lifecycle import begin_run, finish_run, finished_summary, is_complete
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.resolve import Prepared, prepare_run
from most_ray.runs.room import ranks_note
from most_ray.runs.run_lock import RunLock
from most_ray.trackers.select import trackers_of, wandb_key, with_environment
from most_ray.train.attempt import claim_run
from most_ray.train.hooks import TrainHooks
from most_ray.train.session import run_rank

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train on this rank. Returns the exit code. 0: the goal was reached; 2: an error that the user can fix; 75: stopped on request, after
    a checkpoint; 130: interrupted."""
    open_streams()
    log_to_stderr(logging.INFO)
    parser = HelpParser(prog="python -m most_ray.train.run", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--config", help="YAML file with any of the keys below; flags overrule it")
    configuration.add_flags(parser)
    args = parser.parse_args(argv)
    stop = threading.Event()
    _stop_on_signal(stop)
    try:
        config = configuration.load_config(args.config, configuration.flag_values(args))
        with explained_interrupt(config.run_uri):
            summary = _run(config, Terminal(LOG_WIDTH), stop, lambda: _stop_on_interrupt(stop))
    except KeyboardInterrupt as interrupt:
        if _number_of("RANK", 0) == 0:
            say(f"most-ray: interrupted; {interrupt}", stream=sys.stderr)
        return EXIT_INTERRUPTED
    except UserError as error:
        say(f"most-ray: {error.kind}: {error}", stream=sys.stderr)
        return error.exit_code
    except OSError as error:  # as where the disk is full
        explained = explain_os_error(error)
        sys.stderr.write(f"most-ray: {explained.kind}: {explained}\n")
        return explained.exit_code
    if summary is None and _number_of("RANK", 0) == 0:
        say(f"most-ray: stopped: {stopped_text(config.run_uri)}. Run the same command again to resume.", stream=sys.stderr)
    return EXIT_STOPPED if summary is None else 0


def _stop_on_signal(stop: threading.Event) -> None:
    """Set `stop` on the signals that stop a run."""

    def handle(number: int, frame: object) -> None:
        del frame
        stop.set()
        if number == signal.SIGHUP:
            drop_lost_streams()

    for number in stop_signals():
        signal.signal(number, handle)


@contextlib.contextmanager
def _stop_on_interrupt(stop: threading.Event) -> Iterator[None]:
    """Within the block, let the first Ctrl-C set `stop`; the second ends the process, as it does outside of the block."""

    def handle(number: int, frame: object) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if this_rank() == 0:
            say_in_handler(STOPPING)

    before = {number: signal.signal(number, handle) for number in interrupt_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: configuration.RunConfig, console: Console | None = None, stop: threading.Event | None = None) -> dict[str, Any] | None:
    """Train, evaluate and export a run, in this process or, under torchrun, as one of its ranks. A run of the same name resumes; a complete
    one is not changed.

    Args:
        config: of `most_ray.config.load_config` or `config_from`.
        console: where rank 0 prints what `most-ray train` prints; None: nowhere.
        stop: set it from another thread to stop the run after its current step, with a checkpoint.

    Returns:
        The content of summary.json, with paths that can be opened from here; on ranks other than 0 an empty dictionary. None where the run
        was stopped before its goal.

    Raises:
        UserError: something that the user can fix.
    """
    return _run(config, console or Console(quiet=True), stop or threading.Event(), contextlib.nullcontext)


def _run(
    config: configuration.RunConfig, console: Console, stop: threading.Event, training: Callable[[], AbstractContextManager[None]]
) -> dict[str, Any] | None:
    """See `train`. `training`: makes what is entered while this rank trains."""
    if most_ray.TORCH_CAME_FIRST:
        text = "torch was imported before most_ray: its threads spin while they wait, and beside other work steps take many times longer. "
        logger.warning("%sImport most_ray first, or set OMP_WAIT_POLICY=%s.", text, most_ray.THREADS["OMP_WAIT_POLICY"])
    world = _number_of("WORLD_SIZE", 1)
    device = _init_device(world)
    lock = contextlib.ExitStack()  # rank 0 holds it until the run's end
    try:
        job, prepared = _share_job(config, world, console, lock)
        if job:
            with training():
                reached = _train(job, prepared, device, stop, console)
            if not reached:
                return None
        if prepared is None:
            return {}
        if (summary := finished_summary(prepared)) is None:
            if not is_complete(prepared):
                raise CheckpointError("step", prepared.job.total_steps, "was not reached: its checkpoint or its evaluation is missing.")
            summary = finish_run(prepared, config, write_report)
        shown = placed(summary, prepared.folder.uri)
        last_screen(shown, console)
        return shown
    finally:
        lock.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _number_of(variable: str, default: int) -> int:
    """A number that torchrun states in the environment. Raises ConfigError where it is none."""
    number: int = parse_number(variable, int, os.environ.get(variable, default))
    return number


def _init_device(world: int) -> torch.device:
    """This rank's device; initialises the process group where there are several ranks."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        rank, gpus = _number_of("LOCAL_RANK", 0), torch.cuda.device_count()
        if rank >= gpus:
            rule = f"is more than this machine's {count_of(gpus, 'GPU')}, of which each takes one rank."
            raise ConfigError("LOCAL_WORLD_SIZE", _number_of("LOCAL_WORLD_SIZE", rank + 1), rule, f"Use --nproc_per_node {gpus}.")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def _share_job(
    config: configuration.RunConfig, world: int, console: Console, lock: contextlib.ExitStack
) -> tuple[Job | None, Prepared | None]:
    """Rank 0 prepares the run and sends its job to all ranks. Returns the job, None where all steps and evaluations are done; and on rank 0
    the prepared run, which `lock` then holds. Raises UserError on rank 0; the other ranks exit with its exit code: it is reported once."""
    shared: list[Any] = [None]
    # Rank 0 may ingest records for hours before it sends the job.
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=24)) if dist.is_initialized() else None
    cuda, prepared = torch.cuda.is_available(), None
    if cuda and config.use_gpu is False:
        raise ConfigError("use_gpu", False, "but this machine has GPUs.", "Hide them: CUDA_VISIBLE_DEVICES=.")
    if this_rank() == 0:
        try:
            check_outputs(config)
            lock.enter_context(RunLock(config.run_uri, "trained"))
            prepared, shared[0] = _prepare(config, cuda, world, console)
        except UserError as error:
            shared[0] = error
        except OSError as error:
            shared[0] = explain_os_error(error)
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0, group=patient)
    if isinstance(shared[0], UserError):
        raise shared[0] if this_rank() == 0 else SystemExit(shared[0].exit_code)
    return shared[0], prepared


def _prepare(config: configuration.RunConfig, cuda: bool, world: int, console: Console) -> tuple[Prepared, Job | None]:
    """Rank 0's part of `_share_job`."""
    prepared = prepare_run(replace(with_environment(config), use_gpu=cuda), workers=world)
    for uri, reason in prepared.corrupt:
        logger.warning("checkpoint %s is damaged and is skipped: %s", storage.redact(uri), reason)
    if finished_summary(prepared) is not None:
        print_line(console, completed_line(prepared.job.config.name, prepared.job.total_steps, prepared.changed))
        return prepared, None
    begin_run(prepared, config)
    if not cuda and (note := ranks_note(_number_of("LOCAL_WORLD_SIZE", world), prepared.job.threads)):
        logger.warning("%s", note)
    first_screen(prepared, console, validation=evaluation_plan(prepared, inline=True))
    if prepared.job.has_validation and (config.eval_workers > 1 or config.eval_gpus):
        logger.info("without Ray the ranks evaluate in between steps: eval_workers and eval_gpus are not used")
    if prepared.done_steps >= prepared.job.total_steps and is_complete(prepared):
        return prepared, None
    return prepared, prepared.job_for(prepared.topologies[-1], claim_run(prepared.folder))


def _train(job: Job, prepared: Prepared | None, device: torch.device, stop: threading.Event, console: Console) -> bool:
    """Train on this rank, with progress and trackers on rank 0. Returns whether the goal was reached."""
    config = job.config
    hooks = TrainHooks(
        should_stop=stop.is_set,
        evaluate_inline=InlineEvaluation(EvaluationJob.of(config), job.run_uri, job.model_path) if job.has_validation else None,
        trackers=trackers_of(config, job.run_uri, wandb_key(config)) if prepared else (),
    )
    metrics = prepared.folder.local / "metrics.jsonl" if prepared else None
    with ProgressWatcher(metrics, job.total_steps, prepared.done_steps, console) if prepared and metrics else contextlib.nullcontext():
        return run_rank(job, device, hooks)


if __name__ == "__main__":
    sys.exit(main())
