"""Expert and data parallelism against a single process, on gloo, without Ray (promises 12-16, 21 of docs/promises.md).

Each group of ranks is started once for all its layouts. `-s` shows the table of the largest differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from most_ray.data.batch import Batch, open_plan, rank_batch
from most_ray.data.plan import Plan, PlanSpec
from most_ray.records.template import AUDIO, IGNORE, PADDING, TEXT
from tests.support.batches import padded, speech_is_all_audio
from tests.support.builders import LAYOUT, asr, make_plan, make_store, text, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import KINDS, differences, rows_for, trajectory

LAYOUTS = {2: [(1, 2, 1), (2, 1, 1), (1, 2, 2)], 4: [(2, 2, 1), (1, 4, 2), (2, 2, 2), (1, 4, 4)]}
TOPOLOGIES = [topology for layouts in LAYOUTS.values() for topology in layouts]
FEW = [(1, 2, 2), (2, 2, 2)]  # what has nothing to do with the layout is tried on both sorts of expert meshes, and with replicas
STEPS = 2
AT_ONCE = {"warmup_steps": 0}  # so that the second step's figures show the first one's update
BOUND = 1e-5  # of a gradient's difference to the largest entry among its kind's gradients; float32 has 1.2e-7
# bfloat16 keeps 8 bits: a value is off by up to 2**-9 of itself at each rounding. Activations and their gradients are rounded some tens
# of times from layer to layer, and a rank's share of a weight's gradient is rounded before the shares meet, where one process rounds
# their sum. Errors of both signs add up like a random walk: 2**-9 * sqrt(64), doubled because both sides have them.
BF16_BOUND = 2 * 2**-9 * 8


@dataclass(frozen=True)
class Variant:
    """A way to train: where, model and data by name, further keywords of `trajectory`; `like`: the variant whose single process it must
    equal."""

    topologies: list[tuple[int, int, int]]
    keywords: dict[str, Any]
    model: str = "plain"
    data: str = "mixed"
    like: str = ""
    bound: float = BOUND


VARIANTS = {
    "plain": Variant(TOPOLOGIES, {"passes": 1}),
    "accumulated": Variant(TOPOLOGIES, {"passes": 3}, like="plain"),
    "padded": Variant([*FEW, (1, 4, 4)], {"passes": 1, "change": padded}, like="plain"),
    "apart": Variant(TOPOLOGIES, {"max_rows": 1, "change": speech_is_all_audio}, data="apart"),
    "idle": Variant(TOPOLOGIES, {}, model="narrow", data="only_text"),
    "only_text": Variant(FEW, {}, data="only_text"),
    "unrouted": Variant(FEW, {}, model="unrouted"),
    "clipped": Variant(FEW, {"clip": 0.1}),
    "weighted": Variant(FEW, {"asr_weight": 7.0}),
    "recomputed": Variant(FEW, {"passes": 1, "options": {"gradient_checkpointing": True}}, like="plain"),
    "bf16": Variant(FEW, {"dtype": torch.bfloat16}, bound=BF16_BOUND),
}
CASES = [(topology, name) for name, v in VARIANTS.items() for topology in v.topologies]
SINGLE_CASES = [((1, 1, 1), name) for name, v in VARIANTS.items() if v.like]


@dataclass(frozen=True)
class Setting:
    models: dict[str, str]
    data: dict[str, PlanSpec]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("parallel")
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "narrow": {"text_expert_indices": [0, 1], "audio_expert_indices": [2, 3, 4, 5, 6, 7]},
        "unrouted": {"use_modality_aware_routing": False},
    }
    for name, change in changes.items():
        tiny_model(**change).save_pretrained(root / name)
    plan = make_plan(root / "data", batch=21)
    one = make_store(root / "apart", "speech", [asr(i, 90, "x") for i in range(8)])
    two = make_store(root / "apart", "text", [{**text(i), "input": "y" * 127, "output": "x"} for i in range(8)], "text")
    # A pack is one record, all are equally long and kinds alternate: one rank of two holds only text, the other only speech.
    apart = PlanSpec((one.uri, two.uri), (1, 1), 0, 4, 200, "records")
    only_text = PlanSpec((two.uri,), (1,), 0, 4, 200, "records")
    return Setting({name: str(root / name) for name in changes}, {"mixed": plan.spec, "apart": apart, "only_text": only_text})


def every_variant(setting: Setting, topologies: list[tuple[int, int, int]]) -> dict[Any, Any]:
    found = {}
    for topology in topologies:
        for name, v in VARIANTS.items():
            if topology in (*v.topologies, (1, 1, 1)):
                options = {**AT_ONCE, **v.keywords.get("options", {})}
                keywords = {**v.keywords, "options": options}
                found[topology, name] = trajectory(setting.models[v.model], setting.data[v.data], topology, STEPS, keywords)
    return found


@pytest.fixture(scope="module")
def single(setting: Setting) -> dict[str, Any]:
    return {name: value for (_, name), value in every_variant(setting, [(1, 1, 1)]).items()}


@pytest.fixture(scope="module")
def on_all_ranks(setting: Setting) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for world, layouts in LAYOUTS.items():
        for rank in run_ranks(world, every_variant, setting, layouts, deadline=280.0):
            for key, value in rank.items():
                found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize(("topology", "name"), CASES + SINGLE_CASES)
def test_gradients_and_losses_are_those_of_one_process(
    single: dict[str, Any], on_all_ranks: dict[Any, list[Any]], topology: tuple[int, int, int], name: str
) -> None:
    """Promises 13 and 14 of docs/promises.md: dense, router and expert parameters apart, also where a rank gets no tokens."""
    v = VARIANTS[name]
    expected = single[v.like or name]
    found = single[name] if topology == (1, 1, 1) else on_all_ranks[topology, name][0]
    worst = differences(expected, found)
    assert max(worst.values()) < v.bound, worst
    assert found["losses"] == pytest.approx(expected["losses"], rel=v.bound)
    assert found["aux"][0] == pytest.approx(expected["aux"][0], rel=v.bound)
    # Adam's first update of a gradient near zero is its sign, which rounding decides: the balance loss, a fiftieth, shows that first.
    assert found["aux"] == pytest.approx(expected["aux"], abs=1e-6 if v.bound == BOUND else v.bound)
    moved = [int((a - b).abs().sum()) / int(b.sum()) for a, b in zip(found["loads"], expected["loads"], strict=True)]
    assert max(moved) <= (0 if v.bound == BOUND else v.bound), "expert counts, padding left out"


def test_all_ranks_decide_alike(on_all_ranks: dict[Any, list[Any]]) -> None:
    """To the bit: a clipping factor or a skip that differs would set replicas apart."""
    for ranks in on_all_ranks.values():
        for key in ("losses", "norms", "aux"):
            assert all(rank[key] == ranks[0][key] for rank in ranks)


def test_the_table_of_differences(single: dict[str, Any], on_all_ranks: dict[Any, list[Any]]) -> None:
    print(f"\n{'replicas, shards, experts':26}{'':12}" + "".join(f"{kind:>10}" for kind in (*KINDS, "norm")))
    for (topology, name), ranks in on_all_ranks.items():
        worst = differences(single[VARIANTS[name].like or name], ranks[0])
        print(f"{topology!s:26}{name:12}" + "".join(f"{worst[kind]:10.1e}" for kind in (*KINDS, "norm")))


def batches(plan: Plan, world: int, step: int, passes: int) -> list[Batch]:
    return [rank_batch(plan, step, rank, world, rows_for(plan, step, passes, world), LAYOUT) for rank in range(world)]


def test_the_batches_are_what_the_variants_are_called(setting: Setting, single: dict[str, Any], on_all_ranks: dict[Any, list[Any]]) -> None:
    mixed, apart = open_plan(setting.data["mixed"]), open_plan(setting.data["apart"])
    for world in (2, 4):
        for step in range(1, STEPS + 1):
            for passes in (1, 3):
                ranks = batches(mixed, world, step, passes)
                assert all(len(batch.input_ids) == passes for batch in ranks)
                supervised = [int((batch.labels != IGNORE).sum()) for batch in ranks]
                assert len(set(supervised)) == world, "ranks differ in their numbers of supervised tokens"
    marks = [set(speech_is_all_audio(batch).modality.flatten().tolist()) - {PADDING} for batch in batches(apart, 2, 1, 2)]
    assert sorted(map(list, marks)) == [[TEXT], [AUDIO]]
    assert all(int(load[:, 1].sum()) == 0 for load in single["only_text"]["loads"] + single["idle"]["loads"])
    (idle,) = {ranks[0]["experts"] for (topology, name), ranks in on_all_ranks.items() if name == "idle" and topology == (1, 4, 4)}
    tokens = [sum(int(load[:, :, list(experts)].sum()) for load in single["idle"]["loads"]) for experts in idle]
    assert tokens[2:] == [0, 0] and min(tokens[:2]) > 0, "two of four ranks hold experts that no token goes to"


def hang(rank_that_hangs: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() != rank_that_hangs:
        dist.barrier()
    else:
        import threading

        threading.Event().wait()


def fail() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def test_the_harness_shows_failures_and_hangs() -> None:
    with pytest.raises(AssertionError, match="rank 1 has had enough"):
        run_ranks(2, fail)
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not end within 6 s"):
        run_ranks(2, hang, 1, deadline=6.0)
