"""What runs in each training worker of Ray Train: a rank of the training session, whose hooks stream batches, stop and evaluate by Ray."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ray.train

from most_ray.data.batch import Batch
from most_ray.data.feed import StreamSpec
from most_ray.errors import UserError
from most_ray.evaluation.inline import EvaluationJob, InlineEvaluation
from most_ray.runs.job import Job
from most_ray.service.cluster.prometheus import RayMetrics
from most_ray.service.cluster.stop_requests import StopListener, register_worker_node
from most_ray.service.tasks.batch_stream import stream_batches
from most_ray.service.tasks.evaluation_tasks import EvaluationQueue
from most_ray.trackers.base import Background, Secret, Tracker
from most_ray.trackers.select import trackers_of
from most_ray.train.hooks import TrainHooks
from most_ray.train.session import run_rank

_SWITCH_S = 1e-4  # seconds after which a thread must release the interpreter's lock to another; Python's default is 5e-3


@dataclass(frozen=True)
class WorkerJob:
    """What each worker is given."""

    job: Job
    validation: EvaluationJob | None  # how checkpoints are evaluated, if they are
    stream: Callable[[StreamSpec, int, int], Iterator[Batch]] = field(default=stream_batches)  # of a rank's batches
    wandb_key: Secret | None = field(default=None, repr=False)  # as the driver has found it


def train_worker(work: WorkerJob) -> None:
    """The training function that Ray Train runs in each worker, after it has set up the process group."""
    # Ray Data's threads are busy in this process: a step, which takes the interpreter's lock again after each operation, would wait for it
    # a hundred times, by default 5 ms each time.
    sys.setswitchinterval(_SWITCH_S)
    context = ray.train.get_context()
    rank, job = context.get_world_rank(), work.job
    # transformers reads the layout's rank from the environment; Ray Train has set it, on every backend.
    os.environ.setdefault("LOCAL_RANK", str(context.get_local_rank()))
    register_worker_node(job.driver, rank)
    listener = StopListener(job.driver) if rank == 0 else None
    validation, inline = work.validation, job.config.eval_inline
    queue = (lambda report: EvaluationQueue(validation, job.run_uri, job.total_steps, report)) if validation and not inline else None
    evaluate = InlineEvaluation(validation, job.run_uri, job.model_path) if validation and inline else None
    hooks = TrainHooks(work.stream, listener or (lambda: False), queue, evaluate, _trackers(work) if rank == 0 else ())
    try:
        run_rank(job, ray.train.torch.get_device(), hooks)
    except UserError:
        raise
    except Exception as error:  # Ray Train passes an error on without its traceback, so the text holds it
        raise RuntimeError(traceback.format_exc()) from error
    finally:
        if listener:
            listener.close()


def _trackers(work: WorkerJob) -> list[Tracker]:
    """The trackers that the run is configured for, and Ray's metrics, which Prometheus scrapes."""
    config = work.job.config
    return [*trackers_of(config, work.job.run_uri, work.wandb_key), Background("Ray's metrics", RayMetrics(config))]
