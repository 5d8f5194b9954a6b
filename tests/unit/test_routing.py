from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from most_ray.errors import ConfigError
from most_ray.model.configuration import MostConfig
from most_ray.model.routing import (
    MostRouter,
    balance_loss,
    expert_load,
    leaked_selections,
    load_summary,
    make_routing,
    modality_of,
    update_balance_bias,
)
from most_ray.records.template import AUDIO, PADDING, TEXT
from tests.support.builders import tiny_config, tiny_model

# gate_configs.json keeps what differs from the model's defaults in these two cases to itself; the values follow from the vectors.
UNWRITTEN: dict[str, dict[str, Any]] = {"norm_topk": {"norm_topk_prob": True}, "uneven": {"routed_scaling_factor": 1.5}}


@pytest.mark.parametrize("case", ["greedy", "greedy_batch_aux", "norm_topk", "interleaved", "uneven", "group_limited"])
def test_the_originals_router(shared: Path, case: str) -> None:
    folder = shared / "vectors" / "most_reference"
    vectors = load_file(folder / "vectors.safetensors")
    settings = json.loads((folder / "gate_configs.json").read_text())[case]
    config = MostConfig(**{**settings, **UNWRITTEN.get(case, {})})
    router = MostRouter(config)
    router.weight.data = vectors[f"{case}.weight"].clone()
    marks = vectors[f"{case}.marks"]
    routing = make_routing(marks, None, config)
    _, weights, indices, probabilities = router(vectors[f"{case}.hidden"].reshape(-1, config.hidden_size), routing.allowed)
    indices, order = indices.sort(-1)
    assert torch.equal(indices, vectors[f"{case}.topk_idx"])
    torch.testing.assert_close(weights.gather(1, order), vectors[f"{case}.topk_weight"], rtol=0, atol=1e-5)
    count = len(marks) if config.seq_aux else marks.numel()
    aux = config.aux_loss_alpha * balance_loss(indices, probabilities, routing, config.seq_aux) / count
    torch.testing.assert_close(aux, vectors[f"{case}.aux"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_expert_indices": [], "audio_expert_indices": list(range(8))}, "text tokens would have no expert"),
        ({"text_expert_indices": [0, 1, 2, 3], "audio_expert_indices": None}, "audio tokens would have no expert"),
        ({"text_expert_indices": [0, 1, 2, 3, 4], "audio_expert_indices": [4, 5, 6, 7]}, r"experts \[4\] are in audio"),
        ({"text_expert_indices": [0, 1, 2], "audio_expert_indices": [4, 5, 6, 7]}, r"experts \[3\] are in no group"),
        ({"text_expert_indices": [0, 1, 2, 3], "audio_expert_indices": [4, 5, 6, 8]}, "different experts out of 0..7"),
        ({"text_expert_indices": [0, 0, 2, 3], "audio_expert_indices": [4, 5, 6, 7, 1]}, "different experts"),
        ({"text_expert_indices": [0], "audio_expert_indices": [1, 2, 3, 4, 5, 6, 7]}, "more than the 1 expert of text_expert_indices"),
        ({"num_experts_per_tok": 9, "use_modality_aware_routing": False}, "1..8"),
        ({"num_experts_per_tok": None}, "1..8"),
        ({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group"),
    ],
)
def test_groups_that_cannot_work_are_refused_before_anything_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_modality_follows_from_the_id() -> None:
    config = MostConfig(num_experts_per_tok=6)
    ids = torch.tensor([0, 100001, 100002, 100501, 100503, 100504])
    assert modality_of(ids, config).tolist() == [TEXT, TEXT, AUDIO, AUDIO, AUDIO, TEXT]


@pytest.mark.parametrize("method", [{}, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}])
def test_no_score_however_small_leaks_to_the_other_group(method: dict[str, Any]) -> None:
    """Probabilities that underflow to 0 still beat experts of the other modality."""
    config = tiny_config(**method)
    router = MostRouter(config)
    router.weight.data = torch.zeros(8, 32)
    router.weight.data[0] = 400.0
    hidden = torch.ones(2, 32)
    routing = make_routing(torch.tensor([[TEXT, AUDIO]]), None, config)
    _, _, indices, _ = router(hidden, routing.allowed)
    assert set(indices[0].tolist()) <= {0, 1, 2, 3} and set(indices[1].tolist()) <= {4, 5, 6, 7}
    assert leaked_selections(expert_load(indices, routing.modality, 8), config) == 0


def test_the_leak_counter_counts() -> None:
    config = tiny_config()
    load = expert_load(torch.tensor([[0, 4], [5, 6]]), torch.tensor([TEXT, TEXT]), 8)
    assert leaked_selections(load, config) == 3
    assert leaked_selections(load, tiny_config(use_modality_aware_routing=False)) == 0


def test_sequence_balance_is_a_sum_over_records_however_they_are_packed() -> None:
    config = tiny_config()
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(12, 8, generator=generator).softmax(-1)
    indices = probabilities.topk(2).indices
    marks = torch.full((1, 12), TEXT)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    packed = balance_loss(indices, probabilities, make_routing(marks, positions, config), True)
    alone = sum(
        balance_loss(indices[a:b], probabilities[a:b], make_routing(marks[:, a:b], None, config), True)
        for a, b in ((0, 5), (5, 9), (9, 12))
    )
    torch.testing.assert_close(packed, alone)


def test_padding_is_not_routed() -> None:
    config = tiny_config()
    marks = torch.tensor([[TEXT, AUDIO, PADDING], [PADDING, PADDING, PADDING]])
    routing = make_routing(marks, torch.tensor([[0, 1, 0], [0, 1, 2]]), config)
    assert routing.tokens is not None and routing.tokens.tolist() == [0, 1]
    assert routing.modality.tolist() == [TEXT, AUDIO] and routing.n_segments == 1
    empty = make_routing(torch.full((1, 3), PADDING), torch.tensor([[0, 1, 2]]), config)
    assert empty.n_segments == 0 and empty.modality.numel() == 0


def biased_router(bias: list[float], **changes: Any) -> MostRouter:
    config = tiny_config(use_balance_bias=True, **changes)
    torch.manual_seed(0)
    router = MostRouter(config)
    router.weight.data.normal_(std=0.3)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router


@pytest.mark.parametrize("method", [{}, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}])
def test_the_bias_counts_in_the_choice_but_not_in_the_weights(method: dict[str, Any]) -> None:
    bias = [0.0, 9.0, -9.0, 9.0, 99.0, -9.0, -9.0, -9.0]  # whatever it is, experts of the other modality stay out of reach
    router = biased_router(bias, **method)
    hidden = torch.randn(20, 32)
    routing = make_routing(torch.tensor([[TEXT] * 10 + [AUDIO] * 10]), None, tiny_config())
    _, weights, indices, probabilities = router(hidden, routing.allowed)
    torch.testing.assert_close(weights, probabilities.gather(1, indices))
    plain = biased_router([0.0] * 8, **method)(hidden, routing.allowed)
    assert torch.equal(plain[3], probabilities)
    assert leaked_selections(expert_load(indices, routing.modality, 8), tiny_config()) == 0
    if not method:
        assert all(set(row) == {1, 3} for row in indices[:10].tolist()) and all(4 in row for row in indices[10:].tolist())


def test_the_bias_follows_the_load_within_each_group() -> None:
    """arXiv 2408.15664: up by the rate where the load is below the mean, down where it is above."""
    model = tiny_model(use_balance_bias=True)
    load = torch.zeros(2, 2, 8, dtype=torch.long)
    load[0, AUDIO, 4:] = torch.tensor([7, 1, 0, 4])  # mean 3
    load[1, TEXT, :4] = torch.tensor([5, 5, 5, 5])
    load[1, AUDIO, 4:] = torch.tensor([1000, 1, 2, 1])
    update_balance_bias(model, load, 0.25)
    update_balance_bias(model, load, 0.25)
    found = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in model.model.layers[1:]]
    assert found == [[0.0, 0, 0, 0, -0.5, 0.5, 0.5, -0.5], [0.0, 0, 0, 0, -0.5, 0.5, 0.5, 0.5]]
    unaware = tiny_model(use_balance_bias=True, use_modality_aware_routing=False)
    load = torch.zeros(2, 2, 8, dtype=torch.long)
    load[:, TEXT, 0] = load[:, AUDIO, 0] = 4  # mean 1, over both
    update_balance_bias(unaware, load, 0.5)
    assert unaware.model.layers[2].mlp.gate.e_score_correction_bias.tolist() == [-0.5] + [0.5] * 7


def test_biases_balance() -> None:
    """A router whose inputs are all alike in direction crowds one expert; steps of the bias spread them, without a loss."""
    router = biased_router([0.0] * 8, num_experts_per_tok=1, use_modality_aware_routing=False)
    model = tiny_model(use_balance_bias=True, num_experts_per_tok=1, use_modality_aware_routing=False)
    model.model.layers[1].mlp.gate, model.model.layers[2] = router, torch.nn.Identity()
    router.weight.data.mul_(0.2)
    hidden = torch.randn(400, 32) + 2 * torch.randn(32)
    ratios = []
    for _ in range(200):
        load = expert_load(router(hidden)[2], torch.full((400,), TEXT), 8)
        ratios.append(float(load.sum(0).max()) / 50)
        update_balance_bias(model, load.unsqueeze(0), 0.002)
    assert ratios[0] > 3 and sum(ratios[-20:]) / 20 < 1.3, (ratios[0], ratios[-20:])


def test_batch_balance_with_the_load_of_the_step_before_is_a_sum_over_tokens() -> None:
    config = tiny_config(seq_aux=False)
    probabilities = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    indices = probabilities.topk(2).indices
    marks = torch.full((1, 12), TEXT)
    load = torch.tensor([4, 0, 0, 4, 0, 0, 0, 8])

    def loss(start: int, end: int, previous: torch.Tensor) -> torch.Tensor:
        routing = make_routing(marks[:, start:end], None, config)._replace(previous_load=previous)
        return balance_loss(indices[start:end], probabilities[start:end], routing, False)

    whole = loss(0, 12, load)
    torch.testing.assert_close(whole, (probabilities.sum(0) @ load.float()) * 8 / 16)
    torch.testing.assert_close(whole, loss(0, 5, load) + loss(5, 12, load))
    assert loss(0, 12, torch.zeros_like(load)) == 0
    own = expert_load(indices, torch.full((12,), TEXT), 8).sum(0)
    torch.testing.assert_close(loss(0, 12, own), balance_loss(indices, probabilities, make_routing(marks, None, config), False))


def test_figures_of_the_load() -> None:
    config = tiny_config()
    load = torch.zeros(2, 2, 8, dtype=torch.long)
    load[:, TEXT, :4] = torch.tensor([[5, 5, 5, 5], [0, 20, 0, 0]])
    summary = load_summary(load, config)
    assert summary["expert_load"] == {"text": [5, 25, 5, 5, 0, 0, 0, 0], "audio": [0] * 8}
    assert summary["expert_max_over_mean"] == {"text": 4.0} and summary["expert_entropy"] == {"text": 0.5}
    assert summary["layers"]["expert_max_over_mean"] == {"text": [1.0, 4.0]}
    assert summary["layers"]["expert_entropy"] == {"text": [1.0, 0.0]}
    assert summary["layers"]["busiest_expert"] == {"text": [0, 1]}
    load[1, AUDIO, 4:] = torch.tensor([6, 2, 0, 0])
    load[0, AUDIO, 4:] = 2
    summary = load_summary(load, config)
    assert summary["layers"]["expert_entropy"]["audio"] == [1.0, 0.4056]  # (3/4 ln 4/3 + 1/4 ln 4) / ln 4
    assert summary["layers"]["busiest_expert"]["audio"] == [4, 4] and summary["expert_max_over_mean"]["audio"] == 3.0
    unaware = load_summary(load, tiny_config(use_modality_aware_routing=False))
    assert unaware["expert_max_over_mean"]["text"] == 8.0 and unaware["leaked"] == 0
