"""Three streams of batches that stall, in a process that ends with them: threads that wait for Ray's tasks would outlive Ray in the tests'.

    python -m tests.support.stalled_streams ADDRESS FOLDER

Prints the error of a stream whose tasks cannot be scheduled, of one whose tasks read for ever, and of one that reads its first block,
which the training process makes, for ever; a line each.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray

from most_ray.data import feed
from most_ray.data.feed import StreamSpec, StreamStalledError
from most_ray.service.tasks import batch_stream
from tests.support.builders import make_plan
from tests.unit.test_plan import LAYOUT


def _slow(*_: Any) -> Any:
    time.sleep(25)


def _stalled(spec: StreamSpec) -> None:
    try:
        for _ in batch_stream.stream_batches(spec, 1, 10):
            pass
    except StreamStalledError as error:
        print(error, flush=True)


def main(address: str, folder: str) -> None:
    ray.init(address, log_to_driver=False)
    spec = StreamSpec(make_plan(Path(folder)).spec, LAYOUT, 0, 1, 2, timeout_s=8.0)
    batch_stream.steps_per_block = lambda _: 2
    batch_stream.TASK_CPUS, cpus = 1e4, batch_stream.TASK_CPUS
    _stalled(spec)
    batch_stream.TASK_CPUS, batch_stream.rank_batch = cpus, _slow
    batch_stream._fetch.__module__ = "__main__"  # by value, so that the task has the slow one
    ray.cloudpickle.register_pickle_by_value(batch_stream)
    _stalled(spec)
    feed.rank_batch = _slow
    _stalled(spec)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
