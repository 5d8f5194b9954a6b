"""Model FLOPs against torch's own count of what is executed; peaks of devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from most_ray.distributed.devices import listed_peak, measured_peak
from most_ray.metrics.flops import model_flops
from most_ray.records.template import IGNORE
from tests.support.builders import tiny_config, tiny_model

LENGTH, PROMPT = 24, 15


def counted(model: Any, backward: bool) -> int:
    """Operations of the matrix products of one pass over two rows, counted as they are executed."""
    torch.manual_seed(1)
    ids = torch.randint(3, 800, (2, LENGTH))
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORE
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, labels=labels, token_losses_only=True)
        if backward:
            (output.token_losses.sum() + output.aux_sum).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": 24}, {"first_k_dense_replace": 2, "n_shared_experts": 2, "num_experts_per_tok": 3, "v_head_dim": 8}],
    ids=["plain", "compressed queries", "other sizes"],
)
def test_model_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """To the last one. What is executed beyond the model's mathematics: attention of each token to all of its row, causal or not."""
    model = tiny_model(**changes).train()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    flops = model_flops(model.config)
    tokens, pairs, targets = 2 * LENGTH, 2 * LENGTH * (LENGTH + 1) // 2, 2 * (LENGTH - PROMPT)
    masked = 2 * LENGTH**2 - pairs
    assert counted(model, backward=True) == flops.of_training(tokens, pairs + masked, targets)
    with torch.no_grad():
        assert 3 * counted(model, backward=False) == flops.of_training(tokens, pairs + masked, targets)


def test_model_flops_of_deepseek_v2_lite() -> None:
    """Twice the 2.4e9 parameters that the paper says a token activates (arXiv 2405.04434, appendix B), and attention by hand."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    sizes |= {"v_head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2}
    sizes |= {"num_experts_per_tok": 6, "num_hidden_layers": 27, "first_k_dense_replace": 1, "vocab_size": 102400}
    flops = model_flops(tiny_config(**sizes))
    assert (flops.per_token + flops.per_target) / 2 == pytest.approx(2.4e9, rel=0.03)
    assert flops.per_pair == 2 * 27 * 16 * (192 + 128)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4),
        ("NVIDIA H100 80GB HBM3", None, True, 494.7),
        ("NVIDIA H100 80GB HBM3", None, False, 66.9),
        ("NVIDIA H100 PCIe", torch.float16, False, 756.0),
        ("NVIDIA H100 NVL", torch.bfloat16, False, 835.5),
        ("NVIDIA H200", torch.bfloat16, False, 989.4),
        ("NVIDIA B200", torch.bfloat16, False, 2250.0),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312.0),
        ("NVIDIA L40S", torch.bfloat16, False, 362.0),
        ("NVIDIA L4", torch.bfloat16, False, 121.0),
        ("NVIDIA A10", None, False, 31.2),
        ("Tesla V100-SXM2-16GB", torch.float16, False, 125.0),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, False, 15.7),
        ("Tesla T4", torch.float16, False, 65.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2),
        ("AMD Instinct MI300X", torch.bfloat16, False, 1307.4),
    ],
)
def test_peaks_by_name(name: str, dtype: torch.dtype | None, tf32: bool, tera: float) -> None:
    assert listed_peak(name, dtype, tf32) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A10G", "NVIDIA RTX A1000", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU"]
)
def test_other_devices_are_measured(name: str) -> None:
    assert listed_peak(name, torch.bfloat16, False) is None


def test_a_measured_peak_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    peak = measured_peak(torch.device("cpu"), torch.float32, torch.get_num_threads())
    assert 1e8 < peak < 1e14 and torch.equal(torch.get_rng_state(), before)
    assert measured_peak(torch.device("cpu"), torch.float32, torch.get_num_threads()) == peak  # once per process
