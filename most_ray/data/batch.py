"""Batches: the packs of an optimizer step as arrays, for one rank.

Shapes: M forward passes, B rows per forward pass, S tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from most_ray.data.noise import noisy_units
from most_ray.data.plan import Plan, PlanSpec
from most_ray.records.record import N_UNITS, TASKS
from most_ray.records.template import IGNORE, PADDING


@dataclass(frozen=True)
class TokenLayout:
    """The token ids that a batch needs to know."""

    first_audio: int  # ids first_audio..last_audio are audio: the units and their two markers
    last_audio: int
    pad: int  # fills rows
    unit_base: int  # unit u is token unit_base + u


@dataclass(frozen=True)
class Batch:
    """One optimizer step of one rank. M and B are equal on every rank; the counts are of the whole step over all ranks."""

    step: int  # counted from 1
    input_ids: np.ndarray  # int32 (M, B, S)
    labels: np.ndarray  # int32 (M, B, S), aligned with input_ids; IGNORE where unsupervised
    positions: np.ndarray  # int32 (M, B, S), from 0 in each record
    modality: np.ndarray  # int8 (M, B, S): TEXT, AUDIO or PADDING
    task: np.ndarray  # int8 (M, B, S): index in TASKS of the task of the token's record, -1 in padding
    n_supervised: list[int]  # supervised tokens of each task, in the order of TASKS
    n_records: int
    n_tokens: int  # before unit noise
    n_packs: int  # rows that hold records
    record_ids: list[str]  # of this rank, sorted


def forward_shape(n_packs: int, world_size: int, max_rows: int) -> tuple[int, int]:
    """(M, B), equal on every rank: the fewest forward passes of at most `max_rows` rows each, with as few empty rows as possible."""
    per_rank = max(1, -(-n_packs // world_size))
    passes = -(-per_rank // max_rows)
    return passes, -(-per_rank // passes)


def rank_batch(plan: Plan, step: int, rank: int, world_size: int, max_rows: int, layout: TokenLayout) -> Batch:
    """The batch of `rank` of `world_size` in `step`: pack p belongs to rank p mod world_size. At most `max_rows` rows per forward pass."""
    step_plan = plan.step(step)
    length = plan.spec.max_seq_length
    passes, rows = forward_shape(len(step_plan.packs), world_size, max_rows)
    shape, n_rows = (passes, rows, length), passes * rows
    input_ids = np.full((n_rows, length), layout.pad, np.int32)
    labels = np.full((n_rows, length), IGNORE, np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (n_rows, 1))
    modality = np.full((n_rows, length), PADDING, np.int8)
    task = np.full((n_rows, length), -1, np.int8)
    ids: list[str] = []
    for row, pack in enumerate(step_plan.packs[rank::world_size]):
        start = 0
        for index in pack:
            store = plan.stores[step_plan.sources[index]]
            record = int(step_plan.rows[index])
            record_id, tokens = store.record(record)
            supervised_length = len(tokens) - int(store.prompt_lengths[record])
            if plan.spec.noise.any and store.task == "asr":
                global_index = (step - 1) * plan.spec.global_batch_size + index
                tokens = apply_unit_noise(tokens, supervised_length, plan, int(step_plan.sources[index]), global_index, layout)
            end = start + len(tokens)
            input_ids[row, start:end] = tokens
            supervised = end - supervised_length
            labels[row, supervised:end] = input_ids[row, supervised:end]
            positions[row, start:end] = np.arange(len(tokens))
            modality[row, start:end] = (tokens >= layout.first_audio) & (tokens <= layout.last_audio)
            task[row, start:end] = TASKS.index(store.task)
            ids.append(record_id)
            start = end
        positions[row, start:] -= start
    return Batch(
        step=step,
        input_ids=input_ids.reshape(shape),
        labels=labels.reshape(shape),
        positions=positions.reshape(shape),
        modality=modality.reshape(shape),
        task=task.reshape(shape),
        n_supervised=step_plan.n_supervised,
        n_records=plan.spec.global_batch_size,
        n_tokens=step_plan.n_tokens,
        n_packs=len(step_plan.packs),
        record_ids=sorted(ids),
    )


def apply_unit_noise(tokens: np.ndarray, supervised: int, plan: Plan, source: int, index: int, layout: TokenLayout) -> np.ndarray:
    """Apply the plan's noise to the input units of an ASR record; other tokens stay.

    Args:
        tokens: of the record, int32 (tokens,); the last `supervised` are supervised.
        source: the record's source in the plan.
        index: the record's global index in the run, which seeds the noise.
    """
    prompt = tokens[: len(tokens) - supervised]
    is_unit = (prompt >= layout.unit_base) & (prompt < layout.unit_base + N_UNITS)
    first, last = np.flatnonzero(is_unit)[[0, -1]]
    units = noisy_units(prompt[first : last + 1] - layout.unit_base, plan.spec.noise, plan.neighbours[source], plan.spec.seed, index)
    return np.concatenate([tokens[:first], units + layout.unit_base, tokens[last + 1 :]])


@lru_cache(maxsize=4)
def open_plan(spec: PlanSpec) -> Plan:
    """The plan of `spec`, created once per process."""
    return Plan(spec)
