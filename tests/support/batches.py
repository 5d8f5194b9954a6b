"""Batches changed on purpose: padded further, or told to be of one modality."""

from __future__ import annotations

import dataclasses

import numpy as np

from most_ray.data.batch import Batch
from most_ray.records.record import TASKS
from most_ray.records.template import AUDIO, IGNORE, PADDING
from tests.support.builders import IDS


def padded(batch: Batch, rows: int = 1, columns: int = 37) -> Batch:
    """The same records with more empty rows in each forward pass and longer rows. Padding is a segment of its own, as everywhere."""

    def grown(array: np.ndarray, value: int) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, rows), (0, columns)), constant_values=value)

    positions = grown(batch.positions, 0)
    positions[:, :, -columns:] = np.arange(columns)
    positions[:, -rows:] = np.arange(positions.shape[-1])
    return dataclasses.replace(
        batch,
        input_ids=grown(batch.input_ids, IDS.pad),
        labels=grown(batch.labels, IGNORE),
        positions=positions,
        modality=grown(batch.modality, PADDING),
        task=grown(batch.task, -1),
    )


def speech_is_all_audio(batch: Batch) -> Batch:
    """Every token of an ASR record counts as audio, its instruction too: no such token goes to a text expert."""
    return dataclasses.replace(batch, modality=np.where(batch.task == TASKS.index("asr"), AUDIO, batch.modality).astype(np.int8))
