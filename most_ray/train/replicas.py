"""Checks that ranks with copies of the same weights still hold bitwise identical values.

FSDP shards a parameter over some ranks and keeps copies of each shard on others (replicas of the model); buffers are on every rank.
Nothing in training makes copies differ, so a difference is a fault: of memory, of a link, or of code that updated a single rank.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from most_ray.errors import UserError
from most_ray.optim.train_state import TrainState

_CHUNK = 1 << 22  # elements hashed at once, with two int64 values for each
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, as a signed number: odd, its bits well spread
_WORD_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(UserError):
    """Weights that should be equal are not."""

    kind = "training error"


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Hash a plain tensor's bits, as an int64 scalar on its device. It is the sum modulo 2**64 of the tensor's words, each times an odd
    number that depends on its position. Sums of integers are exact in any order, and a single changed word always changes the sum: its
    difference times an odd number is not 0 modulo 2**64."""
    words = tensor.detach().contiguous().view(-1).view(_WORD_TYPES[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device).mul_(_GOLDEN)
        weights.bitwise_xor_(weights >> 29).bitwise_or_(1)
        total += weights.mul_(part).sum()
    return total


def shard_index(tensor: torch.Tensor) -> int:
    """Return the number of this rank's shard of a tensor: ranks with the same number hold copies. 0 for plain tensors."""
    index = 0
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, "every rank is in every mesh"
        for at, placement, size in zip(coordinate, tensor.placements, tensor.device_mesh.shape, strict=True):
            if not placement.is_replicate():
                index = index * size + at
    return index


def find_mismatch(gathered: torch.Tensor) -> tuple[int, list[list[int]]] | None:
    """Find the first tensor whose copies differ, from shard indices and checksums, int64 `(ranks, tensors, 2)`. Returns its index, and its
    ranks grouped by checksum; None if all copies agree. Pure."""
    for tensor, column in enumerate(gathered.transpose(0, 1).tolist()):
        shards: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, (shard, value) in enumerate(column):
            shards[shard][value].append(rank)
        for values in shards.values():
            if len(values) > 1:
                return tensor, sorted(values.values())
    return None


def check_replicas(state: TrainState) -> None:
    """Compare parameters, buffers of the model and buffers of the state between ranks. Collective: one all-gather of two numbers a tensor.
    Raises ReplicaError on every rank; it names the first tensor whose copies differ, and the ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names, mine = [], []
    for name, tensor in itertools.chain(state.model.named_parameters(), state.model.named_buffers(), sorted(state.buffers.items())):
        value = checksum(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        names.append(name)
        mine.append(torch.stack([torch.full_like(value, shard_index(tensor)), value]))
    device = next((pair.device for pair in mine if pair.device.type != "cpu"), torch.device("cpu"))
    own = torch.stack([pair.to(device) for pair in mine])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    if found := find_mismatch(torch.stack(gathered).cpu()):
        rule = f"should be the same on {' and '.join(f'ranks {group}' for group in found[1])}, and differs after step {state.step}."
        remedy = "Resume from the newest checkpoint; if it happens again, look for a faulty machine."
        raise ReplicaError(names[found[0]], None, rule, remedy)
