"""The plan carried out by Ray Data: each rank streams its own batches, in order, from stateless tasks.

A task is a pure function of (steps, rank): one that dies is run again and gives the same. Every rank has the same number of steps by
construction, so no rank can run dry before another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext
from safetensors.numpy import load as unpack_arrays
from safetensors.numpy import save as pack_arrays

from most_ray.data.batch import Batch, TokenLayout, open_plan, rank_batch
from most_ray.data.plan import PlanSpec

TASK_CPUS = 0.25  # of one fetching task; small, so that it fits beside the training workers
_BLOCK_BYTES = 4 << 20
_BLOCKS_PER_DATASET = 256
_ARRAYS = ("input_ids", "labels", "positions", "modality", "task")


@dataclass(frozen=True)
class StreamSpec:
    """What one rank reads: steps first..last of the plan."""

    plan: PlanSpec
    layout: TokenLayout
    rank: int
    world_size: int
    max_rows: int


def stream_batches(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last, in order. Memory and start-up time do not depend on how many there are."""
    chunk = steps_per_block(spec)
    span = chunk * _BLOCKS_PER_DATASET
    for start in range(first, last + 1, span):
        yield from _stream_span(spec, start, min(last, start + span - 1), chunk)


def steps_per_block(spec: StreamSpec) -> int:
    """Steps fetched by one task: as many as make a block of a few megabytes, 64 at the most."""
    rows = max(1, spec.plan.global_batch_size // spec.world_size)
    bytes_per_step = min(rows, spec.max_rows * 4) * spec.plan.max_seq_length * 14
    return int(max(1, min(64, _BLOCK_BYTES // max(1, bytes_per_step))))


def _stream_span(spec: StreamSpec, first: int, last: int, chunk: int) -> Iterator[Batch]:
    n_blocks = -(-(last - first + 1) // chunk)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = ray.data.range(n_blocks, override_num_blocks=n_blocks).map_batches(
        _fetch,
        fn_kwargs={"spec": spec, "first": first, "last": last, "chunk": chunk},
        batch_size=1,
        num_cpus=TASK_CPUS,
        concurrency=2,
    )
    for table in dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        for payload in table.column("payload"):
            yield decode_batch(payload.as_py())


def _fetch(block: dict[str, np.ndarray], spec: StreamSpec, first: int, last: int, chunk: int) -> dict[str, list[Any]]:
    """The batches of one block; runs in a Ray task, without torch."""
    plan = open_plan(spec.plan)
    start = first + int(block["id"][0]) * chunk
    steps = range(start, min(last, start + chunk - 1) + 1)
    batches = [rank_batch(plan, step, spec.rank, spec.world_size, spec.max_rows, spec.layout) for step in steps]
    return {"payload": [encode_batch(batch) for batch in batches]}


def encode_batch(batch: Batch) -> bytes:
    """A batch as bytes; its shape may differ from the next one's, which columns of tensors would not take."""
    arrays = {name: np.ascontiguousarray(getattr(batch, name)) for name in _ARRAYS}
    rest = {name: value for name, value in asdict(batch).items() if name not in _ARRAYS}
    arrays["rest"] = np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8)
    return bytes(pack_arrays(arrays))


def decode_batch(payload: bytes) -> Batch:
    values: dict[str, Any] = unpack_arrays(payload)
    rest = json.loads(values.pop("rest").tobytes())
    return Batch(**values, **rest)
