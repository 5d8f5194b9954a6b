from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from most_ray.data.batch import AUDIO, PADDING, TEXT
from most_ray.errors import ConfigError
from most_ray.model.configuration import MostConfig
from most_ray.model.routing import MostRouter, balance_loss, expert_load, leaked_selections, make_routing, modality_of
from tests.support.builders import tiny_config

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
        ({"text_expert_indices": [0], "audio_expert_indices": [1, 2, 3, 4, 5, 6, 7]}, "more than the 1 experts of text"),
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
