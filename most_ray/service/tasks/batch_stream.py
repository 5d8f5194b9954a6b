"""Streams a plan's batches by Ray Data: each rank reads its own batches, in order, from stateless tasks.

A task is a pure function of (steps, rank): one that dies is run again and returns the same. Every rank has the same number of steps by
construction, so no rank runs out of batches before another.
"""

from __future__ import annotations

import json
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
from safetensors.numpy import load as unpack_arrays
from safetensors.numpy import save as pack_arrays

from most_ray.data.batch import Batch, open_plan, rank_batch
from most_ray.data.feed import StreamSpec, own_batches, prefetch
from most_ray.errors import DataError, count_of
from most_ray.io.json_values import parse_json
from most_ray.service.cluster.capacity import TASK_CPUS
from most_ray.service.cluster.ray_internals import kv_delete, kv_get, kv_put

_PAUSE_S = 0.05  # seconds between two rounds of Ray Data's scheduling loop; a block lasts for seconds of training
_TASKS = 2  # tasks of a rank that fetch at once
_BLOCK_BYTES = 4 << 20  # about the size of a block, the batches that one task fetches
_BLOCKS_PER_DATASET = 256  # blocks of one Ray dataset, whose start-up time grows with their number
_STORE_SHARE = 0.25  # share of the cluster's object store for the streams of all ranks together
_BYTES_PER_TOKEN = 14  # of all arrays of a batch
_ARRAYS = ("input_ids", "labels", "positions", "modality", "task")  # fields of `Batch` that are arrays


def stream_batches(spec: StreamSpec, first: int, last: int) -> Iterator[Batch]:
    """Stream the batches of steps first..last, in order. Memory and start-up time depend neither on their number nor on the store's size.
    Those of the first block are made in this process: training does not wait for Ray Data, which meanwhile starts its processes.

    Raises:
        StreamStalledError: no batch came for `spec.timeout_s` seconds; names the stage that is stuck.
        DataError: a shard is damaged.
    """
    chunk, status = steps_per_block(spec), _FetchStatus(first)
    span, streamed = chunk * _BLOCKS_PER_DATASET, min(last + 1, first + chunk)
    status.made_here = (first, streamed - 1)

    def later_batches() -> Iterator[Batch]:
        for start in range(streamed, last + 1, span):
            yield from _stream_span(spec, start, min(last, start + span - 1), chunk, status)

    def all_batches() -> Iterator[Batch]:
        yield from own_batches(spec, first, streamed - 1)
        status.made_here = None
        yield from later

    later = prefetch(later_batches(), 0.0, status.stage)  # begins now; how long it may take is the concern of whoever reads
    return prefetch(all_batches(), spec.timeout_s, status.stage)


class _FetchStatus:
    """What the fetching tasks of a stream are doing, for the reader that waits for them. Each task writes its stage to Ray's key-value
    store, where it stays until the block has been read."""

    def __init__(self, first: int) -> None:
        self.stream = uuid.uuid4().hex  # id of the stream, part of its keys
        self.waiting_for = (first, first)  # first and last step of the block that is due
        self.made_here: tuple[int, int] | None = None  # those of the block that this process makes first, until it is read

    def stage(self) -> str:
        """What the block that is due is waiting for."""
        first, last = self.made_here or self.waiting_for
        block = f"steps {first} to {last}"
        if self.made_here:
            return f"stage read (records from the token store): {block}, on {socket.gethostname()}, in the training process"
        try:
            note = kv_get(_note_key(self.stream, first))
            cpus, free = (resources.get("CPU", 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
        except Exception as error:  # noqa: BLE001 - whatever is raised: that Ray does not answer is the reason to report
            return f"stage cluster: Ray does not answer ({error})"
        if note is None:
            return f"stage schedule: the task that fetches {block} has not begun (free of the cluster's {count_of(cpus, 'CPU')}: {free:g})"
        known = parse_json(note)
        return f"stage {known['stage']}: {block}, on {known['node']} for {time.time() - known['since']:.0f} s"


def _note_key(stream: str, first: int) -> bytes:
    return f"most_ray/{stream}/{first}".encode()


def steps_per_block(spec: StreamSpec) -> int:
    """Steps that one task fetches: as many as make a block of about `_BLOCK_BYTES`, at most 64."""
    return int(max(1, min(64, _BLOCK_BYTES // step_bytes(spec))))


def step_bytes(spec: StreamSpec) -> int:
    """About the bytes of one rank's batch of one step."""
    plan = open_plan(spec.plan)
    tokens = sum(w * store.manifest["n_tokens"] / len(store) for w, store in zip(spec.plan.weights, plan.stores, strict=True))
    packs = spec.plan.global_batch_size * tokens / sum(spec.plan.weights) / (0.95 * spec.plan.max_seq_length)
    return int((packs / spec.world_size + 1) * spec.plan.max_seq_length * _BYTES_PER_TOKEN)


class _PacingCallback(ExecutionCallback):
    """Pauses Ray Data's scheduling loop in each round: it runs in the process that trains, and in Ray 2.60 would hold the interpreter's
    lock nine tenths of the time while blocks wait to be read (docs/decisions/ray.md)."""

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        del executor
        time.sleep(_PAUSE_S)


def _stream_span(spec: StreamSpec, first: int, last: int, chunk: int, status: _FetchStatus) -> Iterator[Batch]:
    """Stream the batches of steps first..last from one Ray dataset, whose blocks hold `chunk` steps each."""
    n_blocks = -(-(last - first + 1) // chunk)
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_store_budget(spec, chunk))
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [_PacingCallback]
    status.waiting_for = (first, min(last, first + chunk - 1))
    given = {"spec": spec, "first": first, "last": last, "chunk": chunk, "stream": status.stream}
    dataset = ray.data.range(n_blocks, override_num_blocks=n_blocks).map_batches(
        _fetch, fn_kwargs=given, batch_size=1, num_cpus=TASK_CPUS, compute=TaskPoolStrategy(size=_TASKS)
    )
    for table in dataset.iter_batches(batch_size=None, prefetch_batches=2, batch_format="pyarrow"):
        for payload, error in zip(table.column("payload"), table.column("error"), strict=True):
            if found := error.as_py():
                raise DataError(*parse_json(found))
            batch = decode_batch(payload.as_py())
            if (batch.step - first) % chunk == chunk - 1:
                kv_delete(_note_key(status.stream, status.waiting_for[0]))
                status.waiting_for = (batch.step + 1, min(last, batch.step + chunk))
            yield batch


def _store_budget(spec: StreamSpec, chunk: int) -> int:
    """Bytes of the object store that this rank's blocks may take: enough to keep its tasks busy, but at most the rank's share. Without this
    limit Ray gives half of the store to each rank."""
    wanted = 4 * _TASKS * chunk * step_bytes(spec)
    available = ray.cluster_resources().get("object_store_memory", float(1 << 30))
    return int(max(1 << 20, min(wanted, available * _STORE_SHARE / spec.world_size)))


def _fetch(block: dict[str, np.ndarray], spec: StreamSpec, first: int, last: int, chunk: int, stream: str) -> dict[str, list[Any]]:
    """Fetch the batches of one block; runs in a Ray task, without torch. Returns columns of encoded batches and of errors (JSON, or "")."""
    start = first + int(block["id"][0]) * chunk

    def note(stage: str) -> None:
        kv_put(_note_key(stream, start), json.dumps({"stage": stage, "node": socket.gethostname(), "since": time.time()}).encode())

    note("open (stores and plan)")
    plan = open_plan(spec.plan)
    note("read (records from the token store)")
    payload, error = [], ""
    try:
        for step in range(start, min(last, start + chunk - 1) + 1):
            payload.append(encode_batch(rank_batch(plan, step, spec.rank, spec.world_size, spec.max_rows, spec.layout)))
    except DataError as found:  # returned as a row after the good ones: Ray would wrap an error that is raised
        error = json.dumps([found.field, str(found.value), found.rule, found.remedy])
        payload.append(b"")
    note("deliver (the block is made and on its way)")
    return {"payload": payload, "error": [*[""] * (len(payload) - 1), error]}


def encode_batch(batch: Batch) -> bytes:
    """A batch as bytes. Shapes differ from batch to batch, which columns of tensors do not allow."""
    rest = {name: value for name, value in asdict(batch).items() if name not in _ARRAYS}
    arrays = {name: np.ascontiguousarray(getattr(batch, name)) for name in _ARRAYS}
    return bytes(pack_arrays({**arrays, "rest": np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8)}))


def decode_batch(payload: bytes) -> Batch:
    """The batch that `encode_batch` has encoded."""
    values: dict[str, Any] = unpack_arrays(payload)
    return Batch(**parse_json(values.pop("rest").tobytes()), **values)
