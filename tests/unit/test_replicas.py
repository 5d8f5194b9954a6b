from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from most_ray.data.plan import Plan
from most_ray.distributed.determinism import reset_deterministic, set_deterministic
from most_ray.train.replicas import check_replicas, checksum, find_mismatch, shard_index
from tests.support.training import full_weights, make, steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_checksum_shows_every_bit_and_place(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 8).to(dtype)
    same = int(checksum(tensor))
    assert int(checksum(tensor.clone())) == same and checksum(tensor).dtype is torch.int64
    for uri in range(len(tensor)):
        changed = tensor.clone()
        words = changed.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
        words[uri] ^= 1
        assert int(checksum(changed)) != same
    if dtype is not torch.bool:
        assert int(checksum(tensor.flip(0))) != same, "the same values in another order"


def test_a_checksum_tells_what_floats_hide() -> None:
    zeros = torch.zeros(4)
    assert int(checksum(zeros)) != int(checksum(-zeros))
    nan = torch.tensor([float("nan")])
    assert int(checksum(nan)) == int(checksum(nan.clone()))
    assert int(checksum(torch.empty(0))) == 0


def test_a_checksum_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from most_ray.train import replicas

    tensor = torch.randn(37, 11)
    whole = int(checksum(tensor))
    monkeypatch.setattr(replicas, "_CHUNK", 10)
    assert int(checksum(tensor)) == whole
    assert int(checksum(tensor.t().contiguous().t())) == whole, "strides do not matter"


def test_find_mismatch() -> None:
    # Ranks 0 and 1 hold shards 0 and 1, ranks 2 and 3 their copies; the second tensor is on every rank.
    equal = [[[0, 5], [0, 9]], [[1, 6], [0, 9]], [[0, 5], [0, 9]], [[1, 6], [0, 9]]]
    assert find_mismatch(torch.tensor(equal)) is None
    drifted = torch.tensor(equal)
    drifted[3, 0, 1] = 7
    drifted[0, 1, 1] = 8
    assert find_mismatch(drifted) == (0, [[1], [3]])
    drifted[3, 0, 1] = 6
    assert find_mismatch(drifted) == (1, [[0], [1, 2, 3]])


def test_one_process_has_nothing_to_compare(model_dir: str) -> None:
    state = make(model_dir)
    check_replicas(state)
    assert shard_index(next(state.model.parameters())) == 0


@pytest.fixture
def deterministic() -> Iterator[None]:
    set_deterministic(3)
    yield
    reset_deterministic()


def test_deterministic_mode(model_dir: str, plan: Plan, deterministic: None) -> None:
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    runs = []
    for _ in range(2):
        set_deterministic(3)
        state = make(model_dir, gradient_checkpointing=True)
        results = steps(state, plan, 3)
        runs.append(([r.loss_sums for r in results], [r.grad_norm for r in results], full_weights(state), torch.rand(3)))
    assert runs[0][:2] == runs[1][:2] and torch.equal(runs[0][3], runs[1][3])
    assert all(torch.equal(weight, runs[1][2][name]) for name, weight in runs[0][2].items())


def test_deterministic_mode_ends() -> None:
    """No test leaves it on for the others."""
    set_deterministic(3)
    reset_deterministic()
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
