from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from most_ray.checkpoint import files, shards
from most_ray.checkpoint.shards import Staging, shard_of


def test_every_type_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Odd sizes, scalars, empty and scattered ones; safetensors reads the file too."""
    torch.manual_seed(0)
    tensors = {
        "bytes": torch.arange(13, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "long": torch.tensor(2**62 + 1),
        "flags": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 4),
        "scattered": torch.randn(6, 5).t()[1:, ::2],
        "plain": torch.randn(4, 3),
        "infinite": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    orders = {"plain": [2, 3, 0, 1], "brain": [6, 5, 4, 3, 2, 1, 0]}
    parts = [shard_of(name, tensor, orders.get(name)) for name, tensor in tensors.items()]
    staging = Staging()
    staging.plan(parts)
    staging.copy(torch.get_num_threads())
    size, _ = staging.write(tmp_path / "file.safetensors")
    assert size == (tmp_path / "file.safetensors").stat().st_size == staging.nbytes
    stored = load_file(tmp_path / "file.safetensors")
    assert torch.equal(stored["plain"], tensors["plain"][:2]) and torch.equal(stored["plain#1"], tensors["plain"][2:])
    with (tmp_path / "file.safetensors").open("rb") as stream:
        index = shards.index_tensors({"file.safetensors": files.read_header(stream)})
    assert [list(chunk.offsets) for chunk in index["plain"].metadata.chunks] == [[2, 0], [0, 0]]
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    live = [shard_of(name, tensor, orders.get(name)) for name, tensor in empty.items()]
    shards.read_shards(live, index, lambda name: nullcontext(tmp_path / name))
    for name, tensor in tensors.items():
        assert torch.equal(empty[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name
    logical = torch.zeros(4, 3)  # without an order: as the files have it
    shards.read_shards([shard_of("plain", logical)], index, lambda name: nullcontext(tmp_path / name))
    assert torch.equal(logical, tensors["plain"][[2, 3, 0, 1]])


def test_large_tensors_are_copied_whole_by_several_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tensors = [torch.randn(size) for size in (5, 5_000_000, 1, 3_000_001, 70)]  # more than a few times BLOCK_BYTES
        staging = Staging()
        staging.plan([shard_of(str(number), tensor) for number, tensor in enumerate(tensors)])
        staging.copy(torch.get_num_threads())
        staging.write(tmp_path / "file.safetensors")
    finally:
        torch.set_num_threads(before)
    stored = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(stored[str(number)], tensor) for number, tensor in enumerate(tensors))


def test_a_tensor_that_is_there_in_part_is_refused(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 3)
    staging = Staging()
    staging.plan([shards.TensorShard("x", (4, 3), tensor.dtype, (shards.Chunk((0, 0), tensor[:2]),), owned=True)])
    staging.copy(torch.get_num_threads())
    staging.write(tmp_path / "a")
    with (tmp_path / "a").open("rb") as stream:
        index = shards.index_tensors({"a": files.read_header(stream)})
    with pytest.raises(shards.DamagedFileError, match="only 6 of 12 values of x"):
        shards.read_shards([shard_of("x", tensor)], index, lambda name: nullcontext(tmp_path / name))
