"""The cost model: what ranks send against what torch is asked to send, seconds by hand, the choice of a layout, and what is measured."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from most_ray.config import config_from
from most_ray.data.batch import rank_batch
from most_ray.data.plan import PlanSpec
from most_ray.distributed.topology import Topology
from most_ray.metrics.flops import model_flops
from most_ray.model.configuration import MostConfig
from most_ray.planner import calibration
from most_ray.planner.calibration import CALIBRATION_BATCHES, calibrate, measure_links
from most_ray.planner.cost import Collective, Speed, StepWork, collectives_of, distinct_ranks, layouts_of, step_cost
from most_ray.planner.hardware import GpuLinks, _closest_spec, device_of
from most_ray.planner.layouts import LayoutEstimator, StepRecords
from most_ray.planner.memory import ModelShapes
from most_ray.planner.published_sizes import PUBLISHED
from tests.support.builders import LAYOUT, make_plan, tiny_config, tiny_model
from tests.support.gloo import run_ranks
from tests.support.training import make, open_plan, rows_for, steps

WORK = StepWork(passes=2, tokens=400.0, pairs=9000.0, targets=150.0, half=True, kept=0.0, recompute="none")
FAST = GpuLinks(intra_node=400e9, inter_node=40e9)


def lite() -> MostConfig:
    return MostConfig(**PUBLISHED["deepseek-ai/DeepSeek-V2-Lite"])


# What ranks send


TOPOLOGIES = ((1, 2, 1), (1, 2, 2))


def record_collectives(model_dir: str, spec: PlanSpec) -> list[list[tuple[str, int]]]:
    """For each topology, kind and bytes that this rank sends of each collective of a step, as FSDP asks torch for it."""
    seen: list[list[tuple[str, int]]] = []
    for kind in ("all_gather", "reduce_scatter"):
        for name in (f"{kind}_single", f"{kind}_into_tensor" if kind == "all_gather" else f"{kind}_tensor"):
            if hasattr(dist, name):
                spy(name, kind.replace("_", "-"), seen)
    plan = open_plan(spec)
    for topology in TOPOLOGIES:
        state = make(model_dir, topology)
        seen.append([])
        steps(state, plan, 1, max_rows=rows_for(plan, 1, 1))
    return seen


def spy(name: str, kind: str, seen: list[list[tuple[str, int]]]) -> None:
    original = getattr(dist, name)

    def spying(*args: Any, **keywords: Any) -> Any:
        sizes = [each.nbytes for each in (*args, *keywords.values()) if isinstance(each, torch.Tensor)]
        if seen:
            seen[-1].append((kind, max(sizes) - min(sizes)))  # a whole message without the rank's own part
        return original(*args, **keywords)

    setattr(dist, name, spying)


def test_fsdp_sends_what_is_estimated(tmp_path: Path) -> None:
    """Calls and bytes of gathers and scatters in one pass, but for what FSDP fills pieces up with."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    plan = make_plan(tmp_path)
    found = run_ranks(2, record_collectives, str(tmp_path / "model"), plan.spec)[0]
    for topology, seen in zip(TOPOLOGIES, found, strict=True):
        expected = collectives_of(ModelShapes(model.config), Topology(*topology), dataclasses.replace(WORK, passes=1))
        for kind in ("all-gather", "reduce-scatter"):
            mine = [collective for collective in expected if collective.kind == kind]
            assert Counter(name for name, _ in seen)[kind] == sum(collective.calls for collective in mine)
            sent = sum(size for name, size in seen if name == kind)
            assert sent == pytest.approx(sum(collective.nbytes for collective in mine), rel=0.01)


def test_volumes_by_hand() -> None:
    """DeepSeek-V2-Lite on 2 replicas x 8 shards, expert parallel 4."""
    shapes, topology = ModelShapes(lite()), Topology(2, 8, 4)
    experts = 26 * 64 * 3 * 2048 * 1408
    dense, head = shapes.count - experts, 102_400 * 2048 + 2048
    every = collectives_of(shapes, topology, WORK)
    found = {(one.kind, one.ranks, one.stride): one for one in every}
    assert found["all-gather", 8, 1].nbytes == pytest.approx(4 * 7 / 8 * (2 * dense - head))
    assert found["all-gather", 8, 1].calls == 2 * 28 + 1
    assert found["all-gather", 2, 4].nbytes == pytest.approx(4 * 1 / 2 * 2 * experts / 4)
    assert found["reduce-scatter", 8, 1].nbytes == pytest.approx(4 * 7 / 8 * dense)
    assert found["reduce-scatter", 2, 4].nbytes == pytest.approx(4 * 1 / 2 * experts / 4)
    assert sum(one.nbytes for one in every if one.kind == "all-reduce") == pytest.approx(4 * shapes.count / 8)
    exchange = found["all-to-all", 4, 1]
    rows = 26 * 200 * distinct_ranks(shapes, 4) * 3 / 4
    assert exchange.nbytes == pytest.approx(rows * (4 * 4096 + 48 + 32)) and exchange.calls == 26 * 5 and not exchange.overlappable
    again = collectives_of(shapes, topology, dataclasses.replace(WORK, recompute="full"))
    assert again[-1].nbytes == pytest.approx(rows * (6 * 4096 + 48 + 32 + 48)) and again[:-1] == every[:-1]
    assert collectives_of(shapes, topology, dataclasses.replace(WORK, recompute="selective")) == every  # experts are left alone
    assert collectives_of(shapes, Topology(1, 1, 1), WORK) == []


@pytest.mark.parametrize(("aware", "ep"), [(True, 2), (True, 4), (False, 4), (True, 8)])
def test_distinct_ranks_are_those_of_random_routing(aware: bool, ep: int) -> None:
    """Every choice of a token's experts counted; without groups that is ep (1 - C(E - E/ep, k) / C(E, k))."""
    shapes = ModelShapes(tiny_config(num_experts_per_tok=3, use_modality_aware_routing=aware))
    placement = shapes.placement(ep)
    rank_of = {expert: slot // (8 // ep) for slot, expert in enumerate(placement)}
    counts = [len({rank_of[e] for e in chosen}) for group in shapes.groups for chosen in itertools.combinations(sorted(group), 3)]
    assert distinct_ranks(shapes, ep) == pytest.approx(np.mean(counts))
    if not aware:
        assert distinct_ranks(shapes, ep) == pytest.approx(ep * (1 - math.comb(8 - 8 // ep, 3) / math.comb(8, 3)))


# Seconds


def test_a_step_by_hand() -> None:
    """Products, what moves, the optimizer; recomputing adds a third of it, or attention's forward pass; on several ranks what is open."""
    shapes = ModelShapes(lite())
    speed = Speed(half_flops=400e12, full_flops=400e12, bandwidth=2e12, update_rate=1e11, links=FAST)
    work = dataclasses.replace(WORK, tokens=16384.0, pairs=2e7, targets=4000.0, kept=1e10)
    operations = model_flops(shapes.config).of_training(work.tokens, work.pairs, work.targets)
    alone = step_cost(shapes, Topology(1, 1, 1), work, speed)
    assert alone.compute == pytest.approx(operations / 400e12 + 4e10 / 2e12)
    assert alone.update == pytest.approx(shapes.count / 1e11) and alone.exposed == alone.communication == 0
    again = step_cost(shapes, Topology(1, 1, 1), dataclasses.replace(work, recompute="full"), speed)
    assert again.compute - alone.compute == pytest.approx(operations / 400e12 / 3)
    attention = step_cost(shapes, Topology(1, 1, 1), dataclasses.replace(work, recompute="selective"), speed)
    # Of DeepSeek-V2-Lite's 27 layers: 16 heads of 192 wide queries, keys of 512 + 64 that become 128 + 128, values of 128.
    projections = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * 256 + 16 * 128 * 2048
    assert attention.compute - alone.compute == pytest.approx(2 * 27 * (projections * 16384 + 16 * (192 + 128) * 2e7) / 400e12)
    eight = step_cost(shapes, Topology(1, 8, 1), work, speed)
    seconds = work.passes * sum(FAST.seconds(one) for one in collectives_of(shapes, Topology(1, 8, 1), work))
    assert eight.exposed == pytest.approx(max(seconds - eight.compute, seconds / 29))
    assert eight.update == pytest.approx(alone.update / 8, rel=0.01)
    assert sum(eight.sent.values()) == pytest.approx(work.passes * sum(o.nbytes for o in collectives_of(shapes, Topology(1, 8, 1), work)))


def test_links() -> None:
    """Within a machine of eight by the fast net; a ring over two crosses on eight ways; one member a machine has one way; rows for other
    machines go their sender's way."""

    def seconds(kind: Any, ranks: int, stride: int) -> float:
        return FAST.seconds(Collective(kind, ranks, stride, 0, 1e9, True))

    assert seconds("all-gather", 8, 1) == seconds("all-to-all", 2, 4) == pytest.approx(1e9 / 400e9)
    assert seconds("all-gather", 16, 1) == pytest.approx(1e9 / 320e9)
    assert seconds("all-reduce", 2, 8) == pytest.approx(1e9 / 40e9)
    assert seconds("all-to-all", 16, 1) == pytest.approx(8 / 15 * 1e9 / 40e9)
    assert FAST.seconds(Collective("all-gather", 8, 1, 100, 0.0, True)) == pytest.approx(100 * 20e-6)


@pytest.mark.parametrize(
    ("name", "gib", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 79, 3350),
        ("NVIDIA H100 PCIe", 79, 2000),
        ("NVIDIA A100-SXM4-40GB", 39, 1555),
        ("NVIDIA L40S", 44, 864),
        ("NVIDIA L4", 22, 300),
        ("Unknown", 8, 1000),
    ],
)
def test_cards_are_known_by_torchs_names(name: str, gib: int, bandwidth: float) -> None:
    assert _closest_spec(name, gib << 30).bandwidth == bandwidth


# Layouts


def test_all_valid_layouts() -> None:
    """Each once, and no other."""
    found = layouts_of(12, tiny_config(n_routed_experts=8))
    assert len(set(found)) == len(found) and all(one.world_size == 12 for one in found)
    assert {(t.dp_replicate, t.ep) for t in found} == {(r, e) for r in (1, 2, 3, 4, 6, 12) for e in (1, 2, 4) if 12 // r % e == 0}


def test_the_busiest_rank_of_each_pass_counts() -> None:
    step = StepRecords(np.array([5, 7, 2, 9, 4]), np.array([1, 2, 0, 3, 4]), [[0, 2], [1], [3], [4]])
    found = step.per_pass(world_size=2, passes=2, rows=1)
    assert found.tolist() == [[[7, 18, 1], [7, 28, 2]], [[9, 45, 3], [4, 10, 4]]]
    assert step.per_pass(world_size=1, passes=1, rows=4).tolist() == [[[27, 101, 10]]]
    assert step.per_pass(world_size=8, passes=1, rows=1)[0, 4:].sum() == 0


def estimator(gpu: str, workers: int, config: MostConfig, tokens: int = 8192, **options: Any) -> LayoutEstimator:
    device = device_of(gpu, True, torch.bfloat16, workers, 1)
    assert device.speed is not None
    step = StepRecords(np.full(2 * workers, tokens // 2), np.full(2 * workers, 100), [[k] for k in range(2 * workers)])
    run = config_from({"bf16": True, "train_batch_size": 2, "max_seq_length": tokens // 2, **options})
    return LayoutEstimator(run, ModelShapes(config), [step], workers, device.speed, on_gpu=True)


def test_the_best_layout_fits_and_is_the_fastest() -> None:
    """16 B parameters: whole on each of eight GPUs they do not fit; over all of them they do, best where experts need not be gathered."""
    choices = estimator("H100", 8, lite(), recompute="full").choices(79 << 30)
    fitting = [choice for choice in choices if choice.fits]
    assert 0 < len(fitting) < len(choices) == 10 and choices[: len(fitting)] == tuple(fitting)
    assert [choice.cost.seconds for choice in fitting] == sorted(choice.cost.seconds for choice in fitting)
    assert choices[0].topology.ep > 1 and not any(choice.topology == Topology(8, 1, 1) for choice in fitting)


def test_a_layouts_checkpoint_has_the_runs_moments() -> None:
    """In 8 bits a byte of each parameter and four for a block of 256, twice; the weight has four more."""
    shapes, topology = ModelShapes(lite()), Topology(1, 8, 8)
    for moments, each in (("float32", 4), ("int8", 1 + 4 / 256)):
        layout = estimator("H100", 8, lite(), optimizer_state=moments).estimate(topology)
        assert layout.checkpoint_bytes == pytest.approx((4 + 2 * each) * shapes.count, rel=1e-3)
        assert 8 * layout.checkpoint_bytes_per_rank == pytest.approx(layout.checkpoint_bytes, rel=1e-2)


def test_slow_links_want_few_bytes() -> None:
    """Between machines with one slow way for eight cards, less is sent than within one machine."""
    slow, fast = (estimator(gpu, 16, lite(), recompute="full").choices(None)[0].cost for gpu in ("L40S", "H200"))
    assert slow.communication > fast.communication and sum(slow.sent.values()) <= sum(fast.sent.values())


def test_tokens_a_second_grow_with_workers_but_less_than_they() -> None:
    cost = {n: estimator("H100", n, lite(), recompute="full").choices(None)[0].cost.seconds for n in (8, 16, 64)}
    assert cost[8] <= cost[16] <= cost[64] < 2 * cost[8]  # each rank's tokens stay the same


# What is measured


def test_a_calibration_is_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps of a small model; of one too large, its first layers and rows; of one far too large a share of the peak. No process
    group, number of threads or random state is left changed."""
    plan = make_plan(tmp_path)
    batches = [rank_batch(plan, step, 0, 1, 2, LAYOUT) for step in range(1, CALIBRATION_BATCHES + 1)]
    config, options = tiny_config(), config_from({})
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    whole = calibrate(config, options, batches, None, peak=1e11, threads=1)
    assert (
        whole.measured
        and 1e6 < whole.flops < 1e13
        and whole.update_rate > 0
        and min(whole.fsdp_s, whole.fsdp_update_s, whole.exchange_s) >= 0
    )
    assert not dist.is_initialized() and torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    shapes = ModelShapes(config)
    assert calibration._choose_proxy(config, shapes, batches[0], 1e11) is not None
    cut = calibration._choose_proxy(
        config, shapes, batches[0], calibration._operations(config, calibration._first_rows(batches[0], 2)) * 9.8
    )
    assert cut is not None and cut[0].num_hidden_layers == 2 and cut[0].first_k_dense_replace == 1
    monkeypatch.setattr(calibration, "_MAX_PARAMETERS", 1000)
    assert calibrate(config, options, batches, None, 1e11, 1) == calibration.Calibration(1e10, 2e8, 0.0, 0.0, 0.0, 1, measured=False)


def test_where_the_library_lays_nothing_out_one_worker_is_measured_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.22: neither shards nor an exchange, and so no time of theirs."""
    monkeypatch.setattr(calibration, "SUPPORTS_MANY_WORKERS", False)
    batches = [rank_batch(make_plan(tmp_path), step, 0, 1, 2, LAYOUT) for step in range(1, 3)]
    found = calibrate(tiny_config(), config_from({}), batches, None, peak=1e11, threads=1)
    assert found.measured and found.flops > 0 and (found.fsdp_s, found.fsdp_update_s, found.exchange_s) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("updates", [[0.0] * 4, [0.0, 0.5, 0.0, 0.0]], ids=["none", "one"])
def test_steps_without_an_update_say_nothing_of_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: list[float]) -> None:
    """Those that are not finite are skipped; where all are, the rate is assumed."""
    plan, config = make_plan(tmp_path), tiny_config()
    batches = [rank_batch(plan, step, 0, 1, 2, LAYOUT) for step in range(1, CALIBRATION_BATCHES + 1)]
    monkeypatch.setattr(calibration, "_time_batch", lambda modes, batch, first: [(0.1, [1.0, *updates][first])] * 3)
    found = calibrate(config, config_from({}), batches, None, peak=1e11, threads=1)
    assert found.measured and found.update_rate == (ModelShapes(config).count / 0.5 if any(updates) else 2e8)


def test_a_calibration_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow steps are measured once after the warm-up, whatever number of batches there is."""
    plan, now, taken = make_plan(tmp_path), [0.0], []
    batches = [rank_batch(plan, step, 0, 1, 2, LAYOUT) for step in range(1, CALIBRATION_BATCHES + 1)]

    def slow(modes: Any, batch: Any, first: int) -> list[tuple[float, float]]:
        taken.append(first)
        now[0] += 4.0
        return [(4.0, 0.5)] * 3

    monkeypatch.setattr(calibration, "clock", lambda: now[0])
    monkeypatch.setattr(calibration, "_time_batch", slow)
    found = calibrate(tiny_config(), config_from({}), batches, None, peak=1e11, threads=1)
    operations = calibration._operations(tiny_config(), calibration._first_rows(batches[1], batches[1].input_ids.shape[1]))
    assert taken == [0, 1] and found.measured and found.flops == pytest.approx(operations / 4.0)


def test_of_many_ranks_of_gloo_a_few_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is joined to each other, in one process; what all take follows from the rounds."""
    made, group = [], calibration._group
    monkeypatch.setattr(calibration, "_group", lambda store, rank, ranks: made.append(ranks) or group(store, rank, ranks))
    links = measure_links(12)
    assert made == [8] * 8
    assert links.seconds(Collective("all-gather", 12, 1, 7, 0.0, True)) == pytest.approx(11 * links.call["all-gather"])


def test_gloo_is_measured_between_threads() -> None:
    """All kinds; calls of fewer ranks take fewer rounds; nothing of it is hidden."""
    links = measure_links(3)
    assert set(links.call) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"} and min(links.call.values()) > 0
    call = links.call["all-gather"]
    assert links.seconds(Collective("all-gather", 2, 1, 4, 0.0, True)) == pytest.approx(2 * call) and not links.overlaps
    assert measure_links(1).call == {}


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(calibration, "measure_links", lambda ranks: None)
    found = calibration.Calibration(1e10, 1e8, 0.1, 0.01, 0.2, threads=1)
    one, two, four = (found.speed(workers) for workers in (1, 2, 4))
    assert one == two and (four.half_flops, four.update_rate, four.fsdp_s, four.fsdp_update_s, four.exchange_s) == (
        5e9,
        5e7,
        0.2,
        0.02,
        0.4,
    )


def test_the_proxies_are_the_same_model(tmp_path: Path) -> None:
    """Sharded over one rank and with its experts behind the exchange it makes the same steps."""
    plan, options = make_plan(tmp_path), config_from({"learning_rate": 1e-2})
    batches = [rank_batch(plan, step, 0, 1, 2, LAYOUT) for step in (1, 2)]
    weights = []
    with calibration._single_rank_group():
        for mode in ("plain", "sharded", "exchanged"):
            torch.manual_seed(0)
            proxy = calibration.ProxyModel(tiny_config(), options, None, mode)
            for batch in batches:
                assert min(proxy.seconds(batch)) > 0
            weights.append([each.full_tensor() if isinstance(each, DTensor) else each for each in proxy._state.model.parameters()])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])
