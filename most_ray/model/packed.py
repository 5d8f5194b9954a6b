"""Packed rows without their padding: the input of a forward pass of training.

The records of all rows follow one another in one sequence, so that nothing is computed for padding. Attention runs over records, not over
rows, and needs no mask of S x S. Everything is computed on the host, from arrays, so that the device is never waited for.

Shapes: B rows, S positions of a row, T tokens that are not padding, R: T and a few tokens more, so that the number recurs, G records,
N supervised tokens, P tokens in groups of records, each record filled up to the longest of its group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from most_ray.model.kernels import round_up
from most_ray.records.template import IGNORE, PADDING

_MIN_FILL = 0.8  # length of the shortest record of a group at least, over that of the longest


@dataclass(frozen=True)
class RecordLayout:
    """Where the records are among the tokens, and how they are grouped by length."""

    starts: torch.Tensor  # int32 (G + 1,), the first token of each record, and T
    longest: int  # tokens of the longest record
    segments: torch.Tensor  # (T,), the record of each token
    groups: tuple[tuple[int, int], ...]  # number of records and length of the longest, for each group of records of similar length
    gather: torch.Tensor  # (P,), tokens in the order of groups; any token fills records up, as causal attention ignores what comes later
    restore: torch.Tensor  # (T,), the index of each token in `gather`

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, device: torch.device) -> RecordLayout:
        """A copy on a device, which the host does not wait for."""
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in ("starts", "segments", "gather", "restore")}
        return replace(self, **moved)


@dataclass(frozen=True)
class PackedRows:
    """The rows of one forward pass of a rank, without padding."""

    input_ids: torch.Tensor  # (1, R)
    positions: torch.Tensor  # (1, R), from 0 in each record
    modality: torch.Tensor  # (1, R): TEXT or AUDIO; PADDING for the tokens after the T-th
    records: RecordLayout
    supervised: torch.Tensor  # (N,), the tokens whose next one is supervised, in the order of rows
    targets: torch.Tensor  # (N,), the ids of those next tokens

    def to(self, device: torch.device) -> PackedRows:
        """A copy on a device, which the host does not wait for."""
        moved: dict[str, Any] = {name: to_device(value, device) for name, value in vars(self).items() if name != "records"}
        return PackedRows(records=self.records.to(device), **moved)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor on a device, which the host does not wait for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait for all queued work


def pack_rows(input_ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, modality: np.ndarray) -> PackedRows:
    """Pack the rows of one forward pass: integers (B, S), as in `Batch`. Positions restart at each record; labels are aligned with
    input_ids and are IGNORE where unsupervised."""
    kept = modality.reshape(-1) != PADDING
    token = np.cumsum(kept) - 1  # (B * S,), the token at each position
    row_starts = np.zeros_like(positions)
    row_starts[:, 0] = 1
    first = ((positions == 0) | (row_starts == 1)).reshape(-1)[kept]
    lengths = np.diff(np.append(np.flatnonzero(first), len(first)))
    supervised = np.flatnonzero(np.pad(labels[:, 1:] != IGNORE, ((0, 0), (0, 1))).reshape(-1))  # those whose next label counts

    n_tokens = int(kept.sum())
    filling = (0, round_up(n_tokens) - n_tokens)

    def flat(array: np.ndarray, filler: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.pad(array.reshape(-1)[kept].astype(np.int64), filling, constant_values=filler)).unsqueeze(0)

    return PackedRows(
        input_ids=flat(input_ids),
        positions=flat(positions),
        modality=flat(modality, PADDING),
        records=lay_out_records(lengths),
        supervised=torch.from_numpy(token[supervised].astype(np.int64)),
        targets=torch.from_numpy(labels.reshape(-1)[supervised + 1].astype(np.int64)),
    )


def lay_out_records(lengths: np.ndarray) -> RecordLayout:
    """The layout of records that follow one another; lengths: their numbers of tokens, integers (G,)."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    order = np.argsort(-lengths, kind="stable")
    gather: list[np.ndarray] = []
    groups: list[tuple[int, int]] = []
    restore = np.empty(starts[-1], np.int64)
    offset = done = 0
    while done < len(order):
        longest = int(lengths[order[done]])
        count = int(np.searchsorted(-lengths[order[done:]], -_MIN_FILL * longest, side="right"))
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
