"""Expert placement without ranks: the plan, its figures, and a model whose rows are in slot order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from most_ray.model.placement import experts_of_ranks, place_experts, plan_placement, rank_load_ratio, row_order
from tests.support.builders import IDS, tiny_model


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    """Any split of E experts into two groups, in any order, over any number of ranks that divides E."""
    ep_size = draw(st.integers(2, 8))
    n_experts = ep_size * draw(st.integers(1, 8))
    experts = draw(st.permutations(range(n_experts)))
    border = draw(st.integers(1, n_experts - 1))
    return list(experts[:border]), list(experts[border:]), n_experts, ep_size


@given(groups())
def test_every_rank_has_its_share_of_both_groups(drawn: tuple[list[int], list[int], int, int]) -> None:
    text, audio, n_experts, ep_size = drawn
    placement = plan_placement(text, audio, n_experts, ep_size)
    assert sorted(placement) == list(range(n_experts))
    share = n_experts // ep_size
    ranks = [set(placement[rank * share : (rank + 1) * share]) for rank in range(ep_size)]
    for group in (set(text), set(audio)):
        counts = [len(rank & group) for rank in ranks]
        assert max(counts) - min(counts) <= 1 and sum(counts) == len(group)


def test_the_plan_leaves_alone_what_needs_none() -> None:
    assert plan_placement(range(4), range(4, 8), 8, 1) == tuple(range(8))
    assert plan_placement((), (), 8, 4) == tuple(range(8))
    assert plan_placement(range(4), range(4, 8), 8, 4) == (0, 4, 1, 5, 2, 6, 3, 7)


def test_a_model_in_slot_order_gives_the_same_numbers() -> None:
    """Only the fused tensors know of slots; logits, statistics and the gradients of all else are the same."""
    uneven = {"text_expert_indices": [0, 2, 3, 4, 7], "audio_expert_indices": [6, 1, 5]}
    plain, placed = tiny_model(**uneven).train(), tiny_model(**uneven).train()
    place_experts(placed, 4)
    order = row_order(placed, "model.layers.1.mlp.experts.down_proj")
    assert order == (0, 7, 2, 6, 3, 1, 4, 5)
    ids = torch.tensor([[5, 9, IDS.unit_base + 1, IDS.unit_base + 7, 12, IDS.unit_base + 2]])
    outputs = [model(input_ids=ids, labels=ids, use_cache=False) for model in (plain, placed)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=0, atol=1e-6)
    assert torch.equal(outputs[0].expert_load, outputs[1].expert_load)
    for output in outputs:
        output.loss.backward()
    for (name, one), two in zip(plain.named_parameters(), placed.parameters(), strict=True):
        rows = list(row_order(placed, name) or range(len(one)))
        assert torch.equal(one[rows], two), name
        torch.testing.assert_close(one.grad[rows], two.grad, rtol=0, atol=1e-6)


def test_which_parameters_are_in_slot_order() -> None:
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    assert all(row_order(model, name) is None for name in names) and experts_of_ranks(model) is None
    place_experts(model, 2)
    ordered = {name for name in names if row_order(model, name)}
    assert ordered == {f"model.layers.{layer}.mlp.experts.{last}" for layer in (1, 2) for last in ("gate_up_proj", "down_proj")}
    assert experts_of_ranks(model) == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert not any("slots" in name for name in model.state_dict())


def test_without_groups_rows_stay_and_ranks_are_known() -> None:
    model = tiny_model(use_modality_aware_routing=False)
    place_experts(model, 2)
    assert row_order(model, "model.layers.1.mlp.experts.down_proj") is None
    assert experts_of_ranks(model) == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_a_model_in_slot_order_is_not_written_as_it_lies(tmp_path: Path) -> None:
    model = tiny_model()
    place_experts(model, 2)
    with pytest.raises(AssertionError, match="slot order"):
        model.save_pretrained(tmp_path)


def test_the_load_of_ranks() -> None:
    """One layer is even, in the other speech has 90 of 100 selections: the worst counts."""
    load = torch.zeros(2, 2, 4, dtype=torch.long)
    load[0, 0, :2] = load[0, 1, 2:] = 25
    load[1, 0, :2] = 5
    load[1, 1, 2:] = 45
    assert rank_load_ratio(load, ((0, 1), (2, 3))) == pytest.approx(1.8)
    assert rank_load_ratio(load, ((0, 2), (1, 3))) == pytest.approx(1.0)
    assert rank_load_ratio(torch.zeros_like(load), ((0, 1), (2, 3))) == 1.0
