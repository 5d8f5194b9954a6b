"""The plan carried out by Ray Data: each rank streams its own batches, in order, from stateless tasks.

A task is a pure function of (steps, rank): one that dies is run again and gives the same. Every rank has the same number of steps by
construction, so no rank can run dry before another.
"""

from __future__ import annotations

import json
import logging
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext, ExecutionResources, TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.experimental import internal_kv
from safetensors.numpy import load as unpack_arrays
from safetensors.numpy import save as pack_arrays

from most_ray.data.batch import Batch, open_plan, rank_batch
from most_ray.data.feed import StreamSpec, prefetch
from most_ray.errors import DataError
from most_ray.service.cluster.capacity import TASK_CPUS

logger = logging.getLogger(__name__)
_PAUSE_S = 0.05  # of blocks that last for seconds
_TASKS = 2  # fetching at once
_BLOCK_BYTES = 4 << 20
_BLOCKS_PER_DATASET = 256
_STORE_SHARE = 0.25  # of the cluster's object store, for the streams of all ranks together
_BYTES_PER_TOKEN = 14  # of the arrays of a batch
_ARRAYS = ("input_ids", "labels", "positions", "modality", "task")


def stream_batches(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last, in order. Memory and start-up time do not depend on how many there are, nor on the store's size.

    Raises:
        StreamStalledError: nothing came for `spec.timeout_s` seconds; names the stage that is stuck.
        DataError: a shard is damaged.
    """
    chunk = steps_per_block(spec)
    span = chunk * _BLOCKS_PER_DATASET
    board = _FetchStatus(first)

    def batches() -> Iterator[Batch]:
        for start in range(first, last + 1, span):
            yield from _stream_span(spec, start, min(last, start + span - 1), chunk, board)

    return prefetch(batches(), spec.timeout_s, board.stage)


class _FetchStatus:
    """Where fetching tasks say what they are at, for the one who waits for them. Kept in Ray's key-value store; gone with the blocks."""

    def __init__(self, first: int) -> None:
        self.key = uuid.uuid4().hex
        self.waiting_for = (first, first)

    def stage(self) -> str:
        """What holds up the block that is due."""
        first, last = self.waiting_for
        what = f"steps {first} to {last}"
        try:
            note = internal_kv._internal_kv_get(_note_key(self.key, first))
            cpus, free = (resources.get("CPU", 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
        except Exception as error:  # noqa: BLE001 - whatever it is: Ray itself does not answer, which is what is to be said
            return f"stage cluster: Ray does not answer ({error})"
        if note is None:
            return f"stage schedule: the task that fetches {what} has not begun ({free:g} of the cluster's {cpus:g} CPUs are free)"
        told = json.loads(note)
        return f"stage {told['stage']}: {what}, on {told['node']} for {time.time() - told['since']:.0f} s"


def _note_key(board: str, first: int) -> bytes:
    return f"most_ray/{board}/{first}".encode()


def steps_per_block(spec: StreamSpec) -> int:
    """Steps fetched by one task: as many as make a block of a few megabytes, 64 at the most."""
    return int(max(1, min(64, _BLOCK_BYTES // step_bytes(spec))))


def step_bytes(spec: StreamSpec) -> int:
    """About what a step of one rank takes on the wire."""
    plan = open_plan(spec.plan)
    tokens = sum(w * store.manifest["n_tokens"] / len(store) for w, store in zip(spec.plan.weights, plan.stores, strict=True))
    packs = spec.plan.global_batch_size * tokens / sum(spec.plan.weights) / (0.95 * spec.plan.max_seq_length)
    return int((packs / spec.world_size + 1) * spec.plan.max_seq_length * _BYTES_PER_TOKEN)


class _Unhurried(ExecutionCallback):
    """A pause in each turn of Ray Data's scheduling loop. It runs in the process that trains; where blocks are ready that nobody has asked
    for yet it does not wait for anything (Ray 2.60), and would hold the interpreter's lock nine tenths of the time: a step takes that lock
    again after each operation."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        del executor
        time.sleep(_PAUSE_S)


def _stream_span(spec: StreamSpec, first: int, last: int, chunk: int, board: _FetchStatus) -> Iterator[Batch]:
    n_blocks = -(-(last - first + 1) // chunk)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_store_budget(spec, chunk))
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [_Unhurried]
    board.waiting_for = (first, min(last, first + chunk - 1))
    dataset = ray.data.range(n_blocks, override_num_blocks=n_blocks).map_batches(
        _fetch,
        fn_kwargs={"spec": spec, "first": first, "last": last, "chunk": chunk, "board": board.key},
        batch_size=1,
        num_cpus=TASK_CPUS,
        compute=TaskPoolStrategy(size=_TASKS),
    )
    for table in dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        for payload, error in zip(table.column("payload"), table.column("error"), strict=True):
            if error.as_py():
                raise DataError(**json.loads(error.as_py()))
            batch = decode_batch(payload.as_py())
            if (batch.step - first) % chunk == chunk - 1:
                internal_kv._internal_kv_del(_note_key(board.key, board.waiting_for[0]))
                board.waiting_for = (batch.step + 1, min(last, batch.step + chunk))
            yield batch


def _store_budget(spec: StreamSpec, chunk: int) -> int:
    """Bytes of the object store that this rank's blocks may take: enough to keep the tasks busy, and a fair share of it at most, for Ray
    would give half of the store to each rank."""
    wanted = 4 * _TASKS * chunk * step_bytes(spec)
    there = ray.cluster_resources().get("object_store_memory", float(1 << 30))
    return int(max(1 << 20, min(wanted, there * _STORE_SHARE / spec.world_size)))


def _fetch(block: dict[str, np.ndarray], spec: StreamSpec, first: int, last: int, chunk: int, board: str) -> dict[str, list[Any]]:
    """The batches of one block; runs in a Ray task, without torch."""
    start = first + int(block["id"][0]) * chunk

    def note(stage: str) -> None:
        told = {"stage": stage, "node": socket.gethostname(), "since": time.time()}
        internal_kv._internal_kv_put(_note_key(board, start), json.dumps(told).encode(), overwrite=True)

    note("open (stores and plan)")
    plan = open_plan(spec.plan)
    note("read (records from the token store)")
    steps = range(start, min(last, start + chunk - 1) + 1)
    payload, error = [], ""
    try:
        for step in steps:
            payload.append(encode_batch(rank_batch(plan, step, spec.rank, spec.world_size, spec.max_rows, spec.layout)))
    except DataError as found:  # as a row behind the good ones: Ray would wrap it until nobody knows it
        error = json.dumps({"field": found.field, "value": str(found.value), "rule": found.rule, "remedy": found.remedy})
        payload.append(b"")
    note("deliver (the block is made and on its way)")
    return {"payload": payload, "error": [*[""] * (len(payload) - 1), error]}


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
