"""Every fast path of the model gives what the plain one gives: losses and gradients in float32 to rounding, in bfloat16 within what its
spacing explains."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

from most_ray.model import attention, experts, head
from most_ray.model.experts import EXPERT_KERNELS, experts_forward
from most_ray.model.kernels import SwiGlu, rms_norm, round_up
from most_ray.model.packed import PackedRows, lay_out_records, pack_rows
from most_ray.records.template import AUDIO, IGNORE, PADDING, TEXT
from tests.support.builders import IDS, tiny_model

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
FLOAT32 = 2e-5  # of the largest entry: sums in another order, through a dozen products


def rows_of(lengths: list[list[int]], size: int, seed: int = 0) -> Arrays:
    """Rows of records of such lengths, input_ids, labels, positions and modality: half of each record speech, its last third supervised."""
    rng = np.random.default_rng(seed)
    ids, labels, positions, modality = (np.zeros((len(lengths), size), np.int32) for _ in range(4))
    labels[:], modality[:] = IGNORE, PADDING
    for row, records in enumerate(lengths):
        start = 0
        for length in records:
            end, middle = start + length, start + length // 2
            ids[row, start:end] = rng.integers(3, 259, length)
            ids[row, start:middle] = rng.integers(IDS.unit_base, IDS.unit_base + 500, middle - start)
            modality[row, start:end], modality[row, start:middle] = TEXT, AUDIO
            supervised = end - max(1, length // 3)
            labels[row, supervised:end] = ids[row, supervised:end]
            labels[row, start] = IGNORE
            positions[row, start:end] = np.arange(length)
            start = end
        positions[row, start:] = np.arange(size - start)
    return ids, labels, positions, modality


def results(
    model: Any, arrays: Arrays, fast: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Losses, expert counts and gradients of a forward and a backward pass."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        if fast:
            output = model(packed=pack_rows(*arrays))
        else:
            ids, labels, positions, modality = (torch.from_numpy(array).long() for array in arrays)
            output = model(input_ids=ids, labels=labels, position_ids=positions, modality=modality, use_cache=False, token_losses_only=True)
    (output.token_losses.sum() / 10 + output.aux_sum).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return output.token_losses.detach(), output.expert_load, gradients  # type: ignore[return-value]


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient over the largest entry of that parameter's."""
    return max(float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)) for name, value in expected.items())


LENGTHS = {
    "one record a row": [[24], [17]],
    "several, of unequal lengths": [[3, 9, 2, 10], [12, 5], [24]],
    "a row of padding alone": [[], [7, 7]],
    "shortest records": [[2] * 12, [2]],
}
MODELS = {
    "plain": {},
    "compressed queries": {"q_lora_rank": 24},
    "values wider than keys": {"v_head_dim": 40},
    "values as wide as keys": {"v_head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "batch-wise balance": {"seq_aux": False},
    "all experts for all": {"use_modality_aware_routing": False},
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_packed_tokens_have_the_losses_and_gradients_of_padded_rows(lengths: list[list[int]]) -> None:
    """Against the library's own attention, experts and mask, on the same rows."""
    compare(lengths, {})


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_packed_tokens_do_so_in_every_kind_of_model(changes: dict[str, Any]) -> None:
    compare(LENGTHS["several, of unequal lengths"], changes)


def compare(lengths: list[list[int]], changes: dict[str, Any]) -> None:
    model, arrays = tiny_model(aux_loss_alpha=0.02, **changes).train(), rows_of(lengths, 24)
    fast = results(model, arrays, fast=True)
    fast_gradients = {name: gradient.clone() for name, gradient in fast[2].items()}
    model.set_experts_implementation("grouped_mm")
    plain = results(model, arrays, fast=False)
    torch.testing.assert_close(fast[0], plain[0], rtol=0, atol=5e-6)
    assert torch.equal(fast[1], plain[1])
    assert worst(fast_gradients, plain[2]) < FLOAT32


def test_bfloat16_is_as_near_to_float32_as_the_plain_path_is() -> None:
    """The plain one multiplies its experts in float32 even then; twice its error and the type's own spacing are allowed."""
    model, arrays = tiny_model(hidden_size=128, moe_intermediate_size=64).train(), rows_of([[40, 60], [90]], 100)
    gate_weights = [layer.mlp.gate.weight for layer in model.model.layers[1:]]
    with torch.no_grad():
        for weight in gate_weights:  # choices that rounding does not turn over
            weight.mul_(20)
    exact = results(model, arrays, fast=False)
    reference = {name: gradient.clone() for name, gradient in exact[2].items()}
    fast = results(model, arrays, fast=True, dtype=torch.bfloat16)
    fast_error = relative(fast[2], reference)
    model.set_experts_implementation("grouped_mm")
    plain_error = relative(results(model, arrays, fast=False, dtype=torch.bfloat16)[2], reference)
    assert float((fast[0] - exact[0]).abs().max()) < 0.1
    assert abs(float(fast[0].mean() / exact[0].mean()) - 1) < 2.0**-9
    assert fast_error < 2 * plain_error + 2.0**-8


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Euclidean norm of the difference of all gradients over that of the gradients."""
    difference = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(1, 40), max_size=5), min_size=1, max_size=4))
def test_every_token_is_packed_once_and_attends_within_its_record(lengths: list[list[int]]) -> None:
    size = max(map(sum, lengths), default=0) + 3
    arrays = rows_of(lengths, size)
    found = pack_rows(*arrays)
    ids, labels, positions, modality = arrays
    kept = modality != PADDING
    n_tokens = int(kept.sum())
    assert torch.equal(found.input_ids[0, :n_tokens], torch.from_numpy(ids[kept]).long())
    assert torch.equal(found.positions[0, :n_tokens], torch.from_numpy(positions[kept]).long())
    assert (found.modality[0, n_tokens:] == PADDING).all() and found.input_ids.shape[1] == round_up(n_tokens)
    assert torch.equal(found.targets, torch.from_numpy(labels[labels != IGNORE]).long())
    following = found.input_ids[0, found.supervised + 1] if len(found.targets) else found.targets
    assert torch.equal(following, found.targets)
    records = found.records
    flat = [length for row in lengths for length in row]
    assert records.starts.tolist() == np.concatenate([[0], np.cumsum(flat)]).astype(int).tolist()
    assert records.longest == max(flat, default=0) and len(records) == len(flat)
    assert torch.equal(records.gather[records.restore], torch.arange(n_tokens))
    assert sum(count * length for count, length in records.groups) == len(records.gather)


def test_records_share_a_group_where_they_are_of_about_one_length() -> None:
    records = lay_out_records(np.array([10, 100, 95, 9, 50, 81]))
    assert records.groups == ((3, 100), (1, 50), (2, 10))


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
@pytest.mark.parametrize("absent", [False, True])
def test_every_kernel_computes_the_librarys_experts(kernel: str, absent: bool) -> None:
    """In float32. Experts of other ranks add nothing and have no gradient."""
    torch.manual_seed(0)
    module = tiny_model().model.layers[1].mlp.experts
    module._is_expert_parallel = absent
    x = torch.randn(50, 32)
    index = torch.stack([torch.randperm(8 + 2 * absent)[:3] for _ in range(50)])
    weights = torch.rand(50, 3)
    answers = []
    for forward in (ALL_EXPERTS_FUNCTIONS[kernel], grouped_mm_experts_forward):
        module.zero_grad()
        own = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        hidden = own[1].masked_fill(index >= 8, 0.0) if forward is grouped_mm_experts_forward else own[1]
        output = forward(module, own[0], index.clamp(max=8), hidden)
        output.square().sum().backward()
        answers.append([output, own[0].grad, own[1].grad.masked_fill(index >= 8, 0.0), module.gate_up_proj.grad, module.down_proj.grad])
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", EXPERT_KERNELS)
def test_experts_that_get_no_token_have_gradients_of_zeros(kernel: str) -> None:
    module, forward = tiny_model().model.layers[1].mlp.experts, ALL_EXPERTS_FUNCTIONS[kernel]
    output = forward(module, torch.randn(4, 32), torch.full((4, 2), 3), torch.ones(4, 2))
    output.sum().backward()
    assert module.down_proj.grad[3].any() and not module.down_proj.grad[[0, 1, 2, 4, 5, 6, 7]].any()
    module.zero_grad()
    forward(module, torch.randn(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.ones(0, 2)).sum().backward()
    assert module.gate_up_proj.grad is not None and not module.gate_up_proj.grad.any()


def test_rows_of_experts_come_in_shapes_that_recur() -> None:
    """In half precision: a shape that is new costs oneDNN ten products."""
    assert [round_up(count) for count in (0, 1, 16, 17, 255, 256, 257, 511, 1000, 4097)] == [0, 16, 16, 32, 256, 256, 272, 512, 1024, 4352]
    assert round_up(257, torch.float32) == 257
    assert len({round_up(count) for count in range(1, 8193)}) <= 16 * 6


@pytest.mark.parametrize("blocks", [1, 5])
def test_the_head_without_logits_has_the_losses_of_cross_entropy(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block and in several, each loss weighted differently."""
    size = -(-1003 // blocks)
    monkeypatch.setattr(head, "_blocks", lambda *_: ((start, min(start + size, 1003)) for start in range(0, 1003, size)))
    torch.manual_seed(0)
    layer = head.MostHead(24, 1003, bias=False)
    hidden, targets, by = torch.randn(37, 24), torch.randint(0, 1003, (37,)), torch.rand(37)
    answers = []
    for losses_of in (layer, lambda x, t: F.cross_entropy(layer(x), t, reduction="none")):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        losses = losses_of(x, targets)
        (losses * by).sum().backward()
        answers.append([losses, x.grad, layer.weight.grad])
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert layer(torch.randn(0, 24), targets[:0]).shape == (0,)


def test_the_heads_blocks_hold_no_more_than_so_many_logits() -> None:
    blocks = list(head._blocks(4096, 102_400))
    assert [start for start, _ in blocks] == [0, *(end for _, end in blocks[:-1])] and blocks[-1][1] == 102_400
    assert max((end - start) * 4096 for start, end in blocks) <= head._MAX_LOGITS
    assert list(head._blocks(100, 1000)) == [(0, 1000)]


def test_swiglu_and_norm_have_autograds_gradients() -> None:
    """Checked against differences in float64, and against the library's norm."""
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SwiGlu.apply, (gate, up))
    norm = DeepseekV2RMSNorm(48, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(48))
    x, by = torch.randn(2, 9, 48), torch.randn(2, 9, 48)
    answers = []
    for forward in (norm, lambda each: rms_norm(each, norm.weight, 1e-5, torch.float32)):
        norm.zero_grad()
        own = x.clone().requires_grad_()
        output = forward(own)
        (output * by).sum().backward()
        answers.append([output, own.grad, norm.weight.grad])
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_variable_length_kernels_are_given_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's kernel is called with, played by attention to each record alone: the same answers."""
    torch.manual_seed(0)
    records = lay_out_records(np.array([5, 1, 9, 4]))
    query, key, value = torch.randn(19, 2, 24), torch.randn(19, 2, 24), torch.randn(19, 2, 16)
    expected = attention.packed_attention(query, key, value, records, 0.3)

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: Any, others: Any, longest: int, same: int, **causal: Any
    ) -> torch.Tensor:
        assert (longest, same) == (9, 9) and starts is others and starts.dtype == torch.int32
        assert causal in ({"window_size": (-1, 0)}, {"is_causal": True})
        ends = starts.tolist()
        parts = []
        for start, end in itertools.pairwise(ends):
            each = (x[start:end].transpose(0, 1).float() for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*each, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention.varlen, "varlen_attn", kernel)
    found = attention.varlen_attention(query, key, value, records, 0.3)
    torch.testing.assert_close(found[..., :16], expected, rtol=1e-5, atol=1e-6)


def test_packed_rows_move_whole() -> None:
    found = pack_rows(*rows_of([[4, 6]], 12)).to(torch.device("meta"))
    tensors = [found.input_ids, found.positions, found.modality, found.supervised, found.targets]
    tensors += [found.records.starts, found.records.segments, found.records.gather, found.records.restore]
    assert isinstance(found, PackedRows) and all(tensor.is_meta for tensor in tensors)


def test_grouped_products_of_gpus_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played on a CPU by a kernel that writes nothing where there is nothing to write: rows behind the last end, experts without rows."""

    def grouped(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        assert ends.dtype == torch.int32
        bounds = list(itertools.pairwise([0, *ends.tolist()]))
        if right.dim() == 3:
            output = torch.full((len(left), right.shape[2]), torch.nan)
            for matrix, (start, end) in zip(right, bounds, strict=True):
                output[start:end] = left[start:end] @ matrix
            return output
        return torch.stack(
            [
                left[:, start:end] @ right[start:end] if end > start else torch.full((len(left), right.shape[1]), torch.nan)
                for start, end in bounds
            ]
        )

    torch.manual_seed(0)
    module = tiny_model().model.layers[1].mlp.experts
    for count, index in (
        (40, torch.randint(2, 9, (40, 2))),
        (0, torch.zeros(0, 2, dtype=torch.long)),
    ):  # 8: of another rank; 0 and 1 get none
        answers = []
        x, weights = torch.randn(count, 32), torch.rand(count, 2)
        for on_gpu in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(experts, "_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
                patch.setattr(experts, "_grouped", grouped)
                module.zero_grad()
                own = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
                output = experts_forward(module, own[0], index, own[1])
                output.square().sum().backward()
                answers.append([output, own[0].grad, own[1].grad, module.gate_up_proj.grad, module.down_proj.grad])
        for found, expected in zip(*answers, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_held_in_bfloat16_can_be_trained() -> None:
    model = tiny_model().to(torch.bfloat16).train()
    model(packed=pack_rows(*rows_of([[9, 4]], 16))).token_losses.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == parameter.dtype for parameter in model.parameters())


def test_dropout_of_attention_is_applied_in_training_alone() -> None:
    model, arrays = tiny_model(attention_dropout=0.5), pack_rows(*rows_of([[9, 4]], 16))
    for training in (True, False):
        model.train(training)
        first, second = (model(packed=arrays).token_losses for _ in range(2))
        assert torch.equal(first, second) is not training
