"""Experts placed over expert-parallel ranks by modality, against one process and against contiguous placement, on gloo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate

from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.model.build import load_model
from most_ray.model.placement import experts_of_ranks, rank_load_ratio
from tests.support.builders import asr, make_plan, make_store, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import kind_of, layout_of, make, steps, trajectory

LAYOUTS = {2: [(1, 2, 2)], 4: [(1, 4, 2), (1, 4, 4), (2, 2, 2)]}
GROUPS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "interleaved": {"text_expert_indices": [0, 2, 4, 6], "audio_expert_indices": [1, 3, 5, 7]},
    "uneven": {"text_expert_indices": [0, 1, 2, 3, 4], "audio_expert_indices": [5, 6, 7]},
}
TOPOLOGIES = [topology for layouts in LAYOUTS.values() for topology in layouts]


@dataclass(frozen=True)
class Setting:
    models: dict[str, str]
    spec: PlanSpec
    speech: PlanSpec


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("placement")
    models = {name: str(root / name) for name in (*GROUPS, "wide")}
    for name, changes in GROUPS.items():
        tiny_model(**changes).save_pretrained(models[name])
    wide = tiny_model(n_routed_experts=32, num_experts_per_tok=4)
    with torch.no_grad():
        for layer in wide.model.layers[1:]:
            layer.mlp.gate.weight.mul_(0.05)  # near to indifferent: what is uneven is the share of speech
    wide.save_pretrained(models["wide"])
    speech = make_store(root / "speech", "speech", [{**asr(i, 145, "x"), "instruction": "Go."} for i in range(16)], limit=256)
    return Setting(models, make_plan(root / "data", batch=11).spec, PlanSpec((speech.uri,), (1,), 0, 8, 256, "records"))


def trajectories(setting: Setting, topologies: list[tuple[int, int, int]]) -> dict[Any, Any]:
    return {
        (topology, groups): trajectory(setting.models[groups], setting.spec, topology, 3, {})
        for topology in topologies
        for groups in GROUPS
    }


@pytest.fixture(scope="module")
def single(setting: Setting) -> dict[str, Any]:
    return {groups: value for (_, groups), value in trajectories(setting, [(1, 1, 1)]).items()}


@pytest.fixture(scope="module")
def parallel(setting: Setting) -> dict[Any, Any]:
    return {key: value for world, layouts in LAYOUTS.items() for key, value in run_ranks(world, trajectories, setting, layouts)[0].items()}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradients_and_losses_are_those_of_one_process(
    single: dict[str, Any], parallel: dict[Any, Any], topology: tuple[int, int, int], groups: str
) -> None:
    expected, found = single[groups], parallel[topology, groups]
    worst = {"dense": 0.0, "router": 0.0, "expert": 0.0}
    for name, gradient in expected["gradients"].items():
        worst[kind_of(name)] = max(worst[kind_of(name)], float((found["gradients"][name] - gradient).abs().nan_to_num(9.0).max()))
    assert max(worst.values()) < 1e-5, worst
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found["aux"] == pytest.approx(expected["aux"], abs=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found["loads"], expected["loads"], strict=True))


def held_experts(setting: Setting, topologies: list[tuple[int, int, int]]) -> dict[Any, Any]:
    """Per layout and groups: this rank's index among expert-parallel ranks, and the experts whose weights it has, found by value."""
    found = {}
    for topology in topologies:
        for groups in GROUPS:
            model_dir = setting.models[groups]
            plain = load_model(model_dir).model.layers[2].mlp.experts.down_proj.detach()
            model = load_model(model_dir, distributed=layout_of(topology))
            rows = model.model.layers[2].mlp.experts.down_proj
            mesh = rows.device_mesh
            owned = rows.redistribute(placements=[*[Replicate()] * (mesh.ndim - 1), rows.placements[-1]]).to_local()
            experts = [int((plain == row).all((1, 2)).nonzero()) for row in owned]
            found[topology, groups] = (mesh.get_local_rank(mesh.ndim - 1), experts, experts_of_ranks(model))
    return found


def test_each_rank_holds_its_share_of_both_groups(setting: Setting) -> None:
    for world, layouts in LAYOUTS.items():
        for found in run_ranks(world, held_experts, setting, layouts):
            for (topology, groups), (rank, experts, ranks) in found.items():
                assert tuple(experts) == ranks[rank], (topology, groups)
                text = GROUPS[groups].get("text_expert_indices", [0, 1, 2, 3])
                share = len(set(experts) & set(text)) - len(text) / topology[2]
                assert len(experts) == 8 // topology[2] and abs(share) < 1, (topology, groups)


def received(setting: Setting, topology: tuple[int, int, int], placed: bool) -> dict[str, Any]:
    """Selections that this rank's experts got in one step on speech, and the figure of the metrics line."""
    from most_ray.model import build

    if not placed:
        build.place_experts = lambda model, ep_size: None  # type: ignore[assignment]
    counts: list[int] = []

    def counted(exchange: Any) -> Any:
        forward = exchange.experts_forward

        def counting(rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            counts.append(int((slots < exchange.num_local_experts).sum()))
            return forward(rows, slots, weights)  # type: ignore[no-any-return]

        return counting

    state = make(setting.models["wide"], topology)
    for module in state.model.modules():
        if hasattr(module, "exchange"):
            module.exchange.experts_forward = counted(module.exchange)
    result = steps(state, open_plan(setting.speech), 1)[0]
    rows = torch.zeros(dist.get_world_size(), dtype=torch.long)
    rows[dist.get_rank()] = sum(counts)
    dist.all_reduce(rows)
    ranks = experts_of_ranks(state.model)
    return {
        "rows": rows.tolist(),
        "speech": float(result.load[:, 1].sum() / result.load.sum()),
        "figure": ranks and rank_load_ratio(result.load, ranks),
        "loss": result.loss_sums,
    }


def test_speech_loads_all_ranks_alike(setting: Setting) -> None:
    """85% of the tokens are speech: in contiguous ranges the ranks of speech have 1.7 times the mean, placed they do not."""
    plain = run_ranks(4, received, setting, (1, 4, 4), False)[0]
    placed = run_ranks(4, received, setting, (1, 4, 4), True)[0]
    assert 0.83 < placed["speech"] < 0.87 and placed["speech"] == plain["speech"]
    assert placed["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    busiest = {name: max(run["rows"]) * 4 / sum(run["rows"]) for name, run in (("plain", plain), ("placed", placed))}
    assert busiest["plain"] > 1.6 and busiest["placed"] < 1.25
    assert placed["figure"] >= busiest["placed"] - 1e-9  # the worst layer's, of which the sum over layers is the mean
