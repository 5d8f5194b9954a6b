"""The stream of batches that a rank trains on: built one ahead, with an error that names the stage when none arrives in time."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from most_ray.data.batch import Batch, TokenLayout, open_plan, rank_batch
from most_ray.data.plan import PlanSpec
from most_ray.errors import UserError


class StreamStalledError(UserError):
    """No batch arrived for `data_timeout_s`."""

    kind = "data stalled"


@dataclass(frozen=True)
class StreamSpec:
    """The batches of one rank."""

    plan: PlanSpec
    layout: TokenLayout
    rank: int
    world_size: int
    max_rows: int  # of a forward pass
    timeout_s: float = 0.0  # seconds without a batch after which StreamStalledError is raised; 0 waits without limit


def local_batches(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last, built in this process, one ahead of the training.

    Raises:
        DataError: a shard is damaged.
        StreamStalledError: building one took more than `spec.timeout_s` seconds.
    """
    return prefetch(own_batches(spec, first, last), spec.timeout_s, lambda: "stage read (records from the token store)")


def own_batches(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last, each built in this process when it is requested. DataError: a shard is damaged."""
    if first <= last:
        plan = open_plan(spec.plan)
        for step in range(first, last + 1):
            yield rank_batch(plan, step, spec.rank, spec.world_size, spec.max_rows, spec.layout)


def prefetch(batches: Iterator[Batch], timeout_s: float, stage: Callable[[], str]) -> Iterator[Batch]:
    """Iterate over `batches` on a thread of its own, which starts now and keeps one batch ahead; its errors are raised here.

    Args:
        timeout_s: seconds to wait for a batch; 0 waits without limit.
        stage: called for the message of the error, to name what is being waited for.

    Raises:
        StreamStalledError: no batch arrived for `timeout_s` seconds.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: Batch | BaseException) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):  # look again whether the consumer has stopped
                ready.put(item, timeout=1.0)
                return True
        return False

    def pump() -> None:
        try:
            if all(map(put, batches)):
                put(StopIteration())  # the end
        except BaseException as error:  # noqa: BLE001 - raised where the batches are consumed
            put(error)

    def take() -> Iterator[Batch]:
        try:
            while True:
                try:
                    item = ready.get(timeout=timeout_s or None)
                except queue.Empty:
                    rule, remedy = (
                        f"passed without a batch: {stage()}.",
                        "The same command tries again, from the newest checkpoint where there is one.",
                    )
                    raise StreamStalledError("data_timeout_s", timeout_s, rule, remedy) from None
                if isinstance(item, StopIteration):
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    threading.Thread(target=pump, name="stream", daemon=True).start()
    return take()
