"""Batches on their way to a rank: what is asked for, made one ahead, and a named error when nothing comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from most_ray.data.batch import Batch, TokenLayout, open_plan, rank_batch
from most_ray.data.plan import PlanSpec
from most_ray.errors import UserError


class StreamStalledError(UserError):
    """Nothing came for `data_timeout_s`."""

    kind = "data stalled"


@dataclass(frozen=True)
class StreamSpec:
    """What one rank reads: steps first..last of the plan."""

    plan: PlanSpec
    layout: TokenLayout
    rank: int
    world_size: int
    max_rows: int
    timeout_s: float = 0.0


def local_batches(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last, made in this process, one ahead of the training.

    Raises:
        DataError: a shard is damaged. StreamStalledError: the storage gave nothing for `spec.timeout_s` seconds.
    """
    plan = open_plan(spec.plan)
    steps = range(first, last + 1)
    made = (rank_batch(plan, step, spec.rank, spec.world_size, spec.max_rows, spec.layout) for step in steps)
    return prefetch(made, spec.timeout_s, lambda: "stage read (records from the token store)")


def prefetch(batches: Iterator[Batch], timeout_s: float, stage: Callable[[], str]) -> Iterator[Batch]:
    """The same batches, one ahead, made on a thread of their own from now on.

    Raises:
        StreamStalledError: none came for `timeout_s` seconds (0: wait for ever).
    """
    made: queue.Queue[tuple[Batch | None, BaseException | None]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(batch: Batch | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                made.put((batch, error), timeout=1.0)
                return True
            except queue.Full:
                continue
        return False

    def pump() -> None:
        try:
            for batch in batches:
                if not put(batch, None):
                    return
            put(None, None)
        except BaseException as error:  # noqa: BLE001 - it is raised where the batches are taken
            put(None, error)

    def take() -> Iterator[Batch]:
        try:
            while True:
                try:
                    batch, error = made.get(timeout=timeout_s or None)
                except queue.Empty:
                    rule = f"passed without a batch: {stage()}."
                    raise StreamStalledError(
                        "data_timeout_s", timeout_s, rule, "The same command goes on from the last checkpoint."
                    ) from None
                if error is not None:
                    raise error
                if batch is None:
                    return
                yield batch
        finally:
            stopped.set()

    threading.Thread(target=pump, name="stream", daemon=True).start()
    return take()
