"""The exchange of tokens between expert-parallel ranks: who gets what, and answers, gradients and volume against experts on one rank."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from most_ray.model.exchange import EXCHANGE, DispatchPlan, destination_ranks, plan_dispatch
from most_ray.model.experts import DEFAULT_KERNEL
from tests.support.builders import tiny_config
from tests.support.gloo import run_ranks

Pair = tuple[torch.Tensor, torch.Tensor | None]
RANKS = 4
N_EXPERTS = 16  # in all
D = 24
UNEVEN, SOME, NONE = (5, 9, 1, 30), (7, 0, 3, 0), (0, 0, 0, 0)  # tokens of each rank


@dataclass(frozen=True)
class Case:
    """k experts of `where` ("any"; "own" rank's; those of rank 2) for each of a rank's tokens; `way`: the call is plain, begun early, or
    made again in the backward pass."""

    n_tokens: tuple[int, ...] = UNEVEN
    where: str = "any"
    k: int = 3
    way: str = "plain"
    kind: str = "eager"
    dtype: torch.dtype = torch.float64
    bound: float = 1e-12


# float32 sums of some tens of terms; bfloat16: tokens, products, answers and their gradients are rounded a few times each on both sides,
# by up to 2**-9 of themselves, and partial sums of a token's experts once more than on one rank.
FLOAT32, BFLOAT16 = 1e-5, 2**-6
CASES = {
    "random": Case(),
    "begun": Case(way="begun"),
    "recomputed": Case(way="recomputed"),
    "more choices than experts on a rank": Case(k=6),
    "all to one rank": Case(where="one"),
    "all to one rank, recomputed": Case(where="one", way="recomputed"),
    "all to the own rank": Case(where="own"),
    "ranks without tokens": Case(SOME),
    "ranks without tokens, begun": Case(SOME, way="begun"),
    "no rank has tokens": Case(NONE),
    "no rank has tokens, recomputed": Case(NONE, way="recomputed"),
    "grouped": Case(kind="grouped_mm", dtype=torch.float32, bound=FLOAT32),
    "ours": Case(kind=DEFAULT_KERNEL, dtype=torch.float32, bound=FLOAT32),
    "ours, all to one rank": Case(where="one", kind=DEFAULT_KERNEL, dtype=torch.float32, bound=FLOAT32),
    "ours in bfloat16": Case(kind=DEFAULT_KERNEL, dtype=torch.bfloat16, bound=BFLOAT16),
}


def random_slots(n_tokens: int, n_slots: int, k: int, seed: int) -> torch.Tensor:
    return torch.rand(n_tokens, n_slots, generator=torch.Generator().manual_seed(seed)).topk(k, 1).indices


def plan_of(slots: torch.Tensor, n_local: int, n_ranks: int) -> DispatchPlan:
    goes = destination_ranks(slots, n_local, n_ranks)
    return plan_dispatch(slots, goes, n_local, int(goes.sum()))


@pytest.mark.parametrize("seed", range(30))
def test_a_token_goes_once_to_each_rank_that_holds_any_of_its_experts(seed: int) -> None:
    """With its experts there, numbered as they are there; whatever the sizes."""
    random = torch.Generator().manual_seed(seed)
    n_ranks, n_local, n_tokens = (int(torch.randint(low, high, (), generator=random)) for low, high in ((1, 6), (1, 9), (0, 40)))
    k = int(torch.randint(1, n_ranks * n_local + 1, (), generator=random))
    slots = random_slots(n_tokens, n_ranks * n_local, k, seed)
    plan = plan_of(slots, n_local, n_ranks)
    chosen = slots.tolist()
    wanted = [(rank, token) for rank in range(n_ranks) for token in range(n_tokens) if any(s // n_local == rank for s in chosen[token])]
    assert plan.tokens.tolist() == [token for _, token in wanted]
    assert plan.slots.tolist() == [[s % n_local if s // n_local == rank else n_local for s in chosen[token]] for rank, token in wanted]
    rows = {pair: row for row, pair in enumerate(wanted)}
    assert plan.rows.tolist() == [[rows.get((rank, token), len(wanted)) for rank in range(n_ranks)] for token in range(n_tokens)]
    assert plan.ranks.tolist() == [[s // n_local for s in of_token] for of_token in chosen]


@pytest.mark.parametrize(("n_experts", "k", "n_ranks"), [(8, 2, 2), (8, 3, 4), (12, 6, 3), (12, 5, 12)])
def test_rows_are_those_of_the_arithmetic(n_experts: int, k: int, n_ranks: int) -> None:
    """R (1 - C(E - E/R, K) / C(E, K)) a token: over every choice of K experts once, to the row."""
    slots = torch.tensor(list(itertools.combinations(range(n_experts), k)))
    n_local = n_experts // n_ranks
    expected = n_ranks * (math.comb(n_experts, k) - math.comb(n_experts - n_local, k))
    assert int(destination_ranks(slots, n_local, n_ranks).sum()) == expected <= k * len(slots)


def experts_of(kind: str, dtype: torch.dtype, share: slice) -> DeepseekV2Experts:
    """The same experts on every rank, of which it keeps a share."""
    config = tiny_config(hidden_size=D, n_routed_experts=N_EXPERTS, moe_intermediate_size=12)
    config._experts_implementation = kind
    experts = DeepseekV2Experts(config)
    random = torch.Generator().manual_seed(1)
    for name in ("gate_up_proj", "down_proj"):
        full = torch.randn(getattr(experts, name).shape, generator=random, dtype=torch.float64) * 0.3
        setattr(experts, name, nn.Parameter(full[share].to(torch.float32 if dtype is torch.bfloat16 else dtype)))
    experts.num_experts = len(experts.down_proj)
    experts._is_expert_parallel = experts.num_experts < N_EXPERTS
    return experts


def shared_out(kind: str, dtype: torch.dtype, mesh: DeviceMesh) -> DeepseekV2Experts:
    n_local = N_EXPERTS // RANKS
    experts = experts_of(kind, dtype, slice(dist.get_rank() * n_local, (dist.get_rank() + 1) * n_local))
    EpDispatchExpertsParallel().install_forward(experts, mesh["ep"], tp_mesh=mesh["tp"], ep_implementation=EXCHANGE)
    return experts


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's tokens, slots and weights."""
    rank, n_local = dist.get_rank(), N_EXPERTS // RANKS
    n_tokens = case.n_tokens[rank]
    slots = random_slots(n_tokens, N_EXPERTS if case.where == "any" else n_local, case.k, rank)
    slots += {"any": 0, "own": rank, "one": 2}[case.where] * n_local
    random = torch.Generator().manual_seed(10 + rank)
    dtype = torch.float32 if case.dtype is torch.bfloat16 else case.dtype
    tokens, weights = (torch.randn(n_tokens, n, generator=random, dtype=dtype) for n in (D, case.k))
    return tokens.requires_grad_(), slots, weights.abs().requires_grad_()


def layer(experts: nn.Module, case: Case, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Experts beside something shared."""

    def run(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        arguments = (tokens, slots, weights)
        if case.way != "plain" and hasattr(experts, "exchange"):
            arguments = experts.exchange.start_dispatch(*arguments).send_rows()
        shared = tokens.sin()
        output = experts(*arguments) + shared
        # On one rank alone something is kept behind the exchange, as where only one rank's batch has padding.
        return output * output.new_full((), 1.0).expand_as(output) if dist.get_rank() == 0 else output

    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype is torch.bfloat16):
        return checkpoint(run, tokens, weights, use_reentrant=False) if case.way == "recomputed" else run(tokens, weights)  # type: ignore[no-any-return]


def results(experts: nn.Module, case: Case) -> dict[str, torch.Tensor | None]:
    tokens, slots, weights = inputs(case)
    output = layer(experts, case, tokens, slots, weights)
    random = torch.Generator().manual_seed(dist.get_rank())
    (output * torch.randn(output.shape, generator=random, dtype=torch.float64).to(output.dtype)).sum().backward()
    found = {"output": output.detach(), "tokens": tokens.grad, "weights": weights.grad}
    return {**found, **{name: parameter.grad for name, parameter in experts.named_parameters()}}


def compared() -> dict[str, dict[str, Pair]]:
    """By case and name: (with all experts on each rank, shared out) of this rank's answers and gradients; of experts its share."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("tp", "ep"))
    found: dict[str, dict[str, Pair]] = {}
    for name, case in CASES.items():
        plain = experts_of(case.kind, case.dtype, slice(None))
        # Without a token, the plain experts and weights have no gradients at all.
        like = {"weights": inputs(case)[2], **dict(plain.named_parameters())}
        expected = {key: torch.zeros_like(like[key]) if value is None else value for key, value in results(plain, case).items()}
        for projection, _ in plain.named_parameters():
            dist.all_reduce(expected[projection])
            expected[projection] = expected[projection].chunk(RANKS)[dist.get_rank()]
        actual = results(shared_out(case.kind, case.dtype, mesh), case)
        found[name] = {key: (expected[key], actual[key]) for key in expected}
    return found


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, dict[str, Pair]]]:
    return run_ranks(RANKS, compared, deadline=60.0)


@pytest.mark.parametrize("name", CASES)
def test_answers_and_gradients_are_those_of_experts_on_one_rank(on_ranks: list[Any], name: str) -> None:
    """Of tokens, routing weights and experts; zeros, not nothing, where no token came."""
    for rank in on_ranks:
        for what, (expected, found) in rank[name].items():
            assert found is not None and found.shape == expected.shape and found.dtype == expected.dtype, what
            scale = max(1.0, float(expected.abs().amax())) if expected.numel() else 1.0
            assert not found.numel() or float((found - expected).abs().nan_to_num(torch.inf).amax()) <= CASES[name].bound * scale, what
    if CASES[name].where == "one":
        assert all(not rank[name]["down_proj"][1].any() for number, rank in enumerate(on_ranks) if number != 2)
        assert on_ranks[2][name]["down_proj"][1].any()


class Noted:
    """A collective under way whose wait is written down."""

    def __init__(self, work: dist.Work, events: list[tuple[str, int, int]], name: tuple[str, int, int]) -> None:
        self.work, self.events, self.name = work, events, name

    def wait(self) -> None:
        self.events.append(("waited", *self.name[1:]))
        self.work.wait()


def note_collectives() -> list[tuple[str, int, int]]:
    """Fills up with (what, rows, bytes of a row): "sent" and "waited" for; rows of counts are the ranks."""
    events: list[tuple[str, int, int]] = []
    all_to_all = dist.all_to_all_single

    def noting(output: torch.Tensor, rows: torch.Tensor, *args: Any, **keywords: Any) -> Noted:
        name = ("sent", len(rows), rows[:1].nbytes)
        events.append(name)
        work = all_to_all(output, rows, *args, **keywords)
        assert keywords["async_op"] and work is not None
        return Noted(work, events, name)

    dist.all_to_all_single = noting
    return events


class Beside(torch.autograd.Function):
    """Other work, which writes down when it is done."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, events: list[Any]) -> torch.Tensor:
        ctx.events = events
        events.append(("beside", 0, 0))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.events.append(("beside", 0, 0))
        return grad, None


def order_of_events(case: Case) -> dict[str, Any]:
    """What happens forwards and backwards in one begun exchange, and the rows that this rank's tokens are worth."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("tp", "ep"))
    experts = shared_out(case.kind, case.dtype, mesh)
    tokens, slots, weights = inputs(case)
    events = note_collectives()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype is torch.bfloat16):
        outgoing = experts.exchange.start_dispatch(tokens, slots, weights)
        events.append(("quick", 0, 0))
        arguments = outgoing.send_rows()
        shared = Beside.apply(tokens, events)
        output = experts(*arguments) + shared
    forwards = list(events)
    events.clear()
    output.sum().backward()
    return {
        "forwards": forwards,
        "backwards": list(events),
        "rows": sum(len(set(of_token)) for of_token in (slots // (N_EXPERTS // RANKS)).tolist()),
    }


@pytest.mark.parametrize("name", ["random", "ours in bfloat16"])
def test_rows_travel_once_per_rank_and_while_other_work_is_done(name: str) -> None:
    """As many rows as tokens have distinct ranks, in the autocast's type, beside the weights and slots; one exchange of counts is all that
    is waited for before the rows are under way. The order is that of a layer, forwards and backwards."""
    case = CASES[name]
    itemsize, weight = case.dtype.itemsize, 8 if case.dtype is torch.float64 else 4
    answer = D * itemsize
    there, home = (-(-(answer + case.k * of_choice) // 16) * 16 for of_choice in (weight + 4, weight))
    ranks = run_ranks(RANKS, order_of_events, case)
    for found in ranks:
        n, counts, beside = found["rows"], (RANKS, 8), ("beside", 0, 0)
        forwards, backwards = found["forwards"], found["backwards"]
        m = forwards[-2][1]
        assert forwards == [
            ("sent", *counts), ("quick", 0, 0), ("waited", *counts), ("sent", n, there), beside, ("waited", n, there),
            ("sent", m, answer), ("waited", m, answer),
        ]  # fmt: skip
        assert backwards == [
            ("sent", n, answer), ("waited", n, answer), ("sent", m, home), beside, ("waited", m, home),
        ]  # fmt: skip
    assert sum(found["rows"] for found in ranks) == sum(found["forwards"][-2][1] for found in ranks)


def added_up() -> torch.Tensor:
    """256 + 1 + 1 + 1 in bfloat16, each from another rank, behind an exchange that was begun and given up."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("tp", "ep"))
    experts = shared_out("eager", torch.bfloat16, mesh)
    here = 256.0 if dist.get_rank() == 0 else 1.0
    experts.exchange.experts_forward = lambda rows, slots, weights: torch.full_like(rows, here)
    slots = torch.arange(0, N_EXPERTS, N_EXPERTS // RANKS).view(1, RANKS)
    experts.exchange.start_dispatch(torch.zeros(2, D, dtype=torch.bfloat16), slots.expand(2, -1), torch.ones(2, RANKS)).send_rows()
    return experts(torch.zeros(1, D, dtype=torch.bfloat16), slots, torch.ones(1, RANKS))  # type: ignore[no-any-return]


def test_the_ranks_answers_are_added_up_in_float32() -> None:
    """In bfloat16 each 1 would be lost. A call with other slots than were sent is an exchange of its own."""
    assert all(torch.equal(found, torch.full_like(found, 260.0)) and len(found) == 1 for found in run_ranks(RANKS, added_up))
