"""Packed rows without their padding: what a forward pass of training is given.

Records of all rows lie one behind the other, so that nothing is computed for padding, and attention runs over records, not over rows: no
mask of S x S. All of it is made on the host, from arrays, so that the device is never waited for.

Shapes: B rows, S positions, T tokens that are not padding, G records, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from most_ray.model.kernels import round_up
from most_ray.records.template import IGNORE, PADDING

_ALIKE = 0.8  # a record shares a group with one that is longer where it is at least so much of its length


@dataclass(frozen=True)
class RecordLayout:
    """Where the records lie among the T tokens.

    starts: (G + 1,) int32, their first tokens, and T. longest: in tokens. segments: (T,) the record of each token.
    groups: (records, length) of groups of records of about one length, each record filled up to its group's longest; gather: (P,) the
    tokens in that order (any token where a record is filled up: causal attention sees nothing behind a record's end). restore: (T,) each
    token's place in it.
    """

    starts: torch.Tensor
    longest: int
    segments: torch.Tensor
    groups: tuple[tuple[int, int], ...]
    gather: torch.Tensor
    restore: torch.Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, device: torch.device) -> RecordLayout:
        starts, segments, gather, restore = (to_device(each, device) for each in (self.starts, self.segments, self.gather, self.restore))
        return replace(self, starts=starts, segments=segments, gather=gather, restore=restore)


@dataclass(frozen=True)
class PackedRows:
    """One forward pass of a rank. input_ids, positions, modality: (1, R), R >= T: a few tokens that fill up to a number of tokens which
    recurs, of modality PADDING, stand at the end. supervised: (N,) the tokens from which another is predicted, in
    row order; targets: (N,) those."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    modality: torch.Tensor
    records: RecordLayout
    supervised: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> PackedRows:
        ids, positions, modality = (to_device(each, device) for each in (self.input_ids, self.positions, self.modality))
        return PackedRows(
            ids, positions, modality, self.records.to(device), to_device(self.supervised, device), to_device(self.targets, device)
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy there that the host does not wait for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # else the host would wait for all that the device has to do


def pack_rows(input_ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, modality: np.ndarray) -> PackedRows:
    """Of rows (B, S) as `Batch` has them: positions restart at each record, labels are aligned with input_ids and IGNORE where
    unsupervised."""
    kept = modality.reshape(-1) != PADDING
    place = np.cumsum(kept) - 1  # of a position of the rows among the tokens
    row_starts = np.zeros_like(positions)
    row_starts[:, 0] = 1
    first = ((positions == 0) | (row_starts == 1)).reshape(-1)[kept]
    lengths = np.diff(np.append(np.flatnonzero(first), len(first)))
    supervised = np.flatnonzero(np.pad(labels[:, 1:] != IGNORE, ((0, 0), (0, 1))).reshape(-1))  # the next one's label counts

    n_tokens = int(kept.sum())
    filling = (0, round_up(n_tokens) - n_tokens)

    def flat(array: np.ndarray, filler: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.pad(array.reshape(-1)[kept].astype(np.int64), filling, constant_values=filler)).unsqueeze(0)

    return PackedRows(
        input_ids=flat(input_ids),
        positions=flat(positions),
        modality=flat(modality, PADDING),
        records=lay_out_records(lengths),
        supervised=torch.from_numpy(place[supervised].astype(np.int64)),
        targets=torch.from_numpy(labels.reshape(-1)[supervised + 1].astype(np.int64)),
    )


def lay_out_records(lengths: np.ndarray) -> RecordLayout:
    """Of records of so many tokens each (G,), one behind the other."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    gather: list[np.ndarray] = []
    groups: list[tuple[int, int]] = []
    restore = np.empty(starts[-1], np.int64)
    offset = done = 0
    while done < len(order):
        longest = int(lengths[order[done]])
        count = int(np.searchsorted(-lengths[order[done:]], -_ALIKE * longest, side="right"))
        members = order[done : done + count]
        within = np.arange(longest)
        filled = np.minimum(starts[members, None] + within, starts[-1] - 1)
        real = within < lengths[members, None]
        restore[filled[real]] = offset + np.flatnonzero(real)
        gather.append(filled.reshape(-1))
        groups.append((count, longest))
        offset += count * longest
        done += count
    return RecordLayout(
        starts=torch.from_numpy(starts.astype(np.int32)),
        longest=int(lengths.max(initial=0)),
        segments=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        groups=tuple(groups),
        gather=torch.from_numpy(np.concatenate(gather) if gather else np.empty(0, np.int64)),
        restore=torch.from_numpy(restore),
    )
