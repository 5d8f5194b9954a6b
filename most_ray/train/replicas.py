"""Whether ranks that hold the same weights still do, to the bit.

FSDP shards a parameter over some ranks and keeps copies of each shard on others (replicas of the model); buffers are on every rank.
Nothing in training makes copies differ, so a difference is a fault: of memory, of a link, or of code that updated one rank alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from most_ray.errors import UserError
from most_ray.optim.train_state import TrainState

_CHUNK = 1 << 22  # elements hashed at once, each of them 8 bytes twice
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, as a signed number: odd, bits well spread
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(UserError):
    """Weights that should be equal are not."""

    kind = "training error"


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Hash of a plain tensor's bits, int64 scalar on its device: the sum modulo 2**64 of words times odd numbers that differ from place
    to place. Sums of integers are exact in any order; a single changed word always shows, since its difference times an odd number is
    not 0 modulo 2**64."""
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        weights = torch.arange(start + 1, start + 1 + part.numel(), device=tensor.device).mul_(_MIX)
        weights.bitwise_xor_(weights >> 29).bitwise_or_(1)
        total += weights.mul_(part).sum()
    return total


def shard_index(tensor: torch.Tensor) -> int:
    """Which shard of a tensor this rank holds; two ranks with the same number hold copies. 0 for plain tensors."""
    index = 0
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, "every rank is in every mesh"
        for place, placement, size in zip(coordinate, tensor.placements, tensor.device_mesh.shape, strict=True):
            if not placement.is_replicate():
                index = index * size + place
    return index


def unequal(held: torch.Tensor) -> tuple[int, list[list[int]]] | None:
    """The first tensor whose copies differ, and its ranks by what they hold; None where all agree. Pure.

    `held`: (ranks, tensors, 2) int64, shard indices and checksums.
    """
    for tensor, column in enumerate(held.transpose(0, 1).tolist()):
        shards: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, (shard, value) in enumerate(column):
            shards[shard][value].append(rank)
        for values in shards.values():
            if len(values) > 1:
                return tensor, sorted(values.values())
    return None


def check_replicas(state: TrainState) -> None:
    """Compare all that several ranks hold: parameters, buffers of the model, buffers of the state. Collective, one all-gather of two
    numbers a tensor.

    Raises:
        ReplicaError: on every rank; names the first tensor whose copies differ, and the ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    names, mine = [], []
    for name, tensor in _tensors(state):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        value = checksum(local)
        names.append(name)
        mine.append(torch.stack([torch.full_like(value, shard_index(tensor)), value]))
    devices = {pair.device for pair in mine}
    device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    own = torch.stack([pair.to(device) for pair in mine])
    held = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(held, own)
    found = unequal(torch.stack(held).cpu())
    if found:
        tensor_index, groups = found
        ranks = " and ".join(f"ranks {group}" for group in groups)
        raise ReplicaError(
            names[tensor_index],
            None,
            f"should be the same on {ranks}, and differs after step {state.step}.",
            "Go on from the newest checkpoint; if it happens again, look for a faulty machine.",
        )


def _tensors(state: TrainState) -> Iterator[tuple[str, torch.Tensor]]:
    yield from state.model.named_parameters()
    yield from state.model.named_buffers()
    yield from sorted(state.buffers.items())
