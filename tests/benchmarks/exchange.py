"""Expert parallelism on 4 gloo ranks: rows and bytes that tokens cost under transformers' exchange and under ours, seconds of both side by
side, and how evenly speech loads the ranks with experts placed by modality and without.

    python -m tests.benchmarks.exchange [--tokens 1024] [--rounds 15] [--steps 60]

Same experts, tokens and routes for both exchanges; they take turns. Loads come from real routing: routers as they start and after training
on words with patterns of units, text groups of experts beside those of speech, 85% of the tokens speech.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.distributed import expert_parallel
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2MLP

from most_ray.data.batch import open_plan
from most_ray.data.plan import PlanSpec
from most_ray.model.exchange import EXCHANGE
from most_ray.model.experts import DEFAULT_KERNEL
from most_ray.model.placement import experts_of_ranks, rank_load_ratio
from most_ray.records.record import units_to_text
from tests.benchmarks.common import show, write
from tests.support.builders import WORDS, asr, make_store, tiny_config, tiny_model, tts
from tests.support.gloo import run_ranks
from tests.support.training import loss_of, make, steps

RANKS, N_EXPERTS, K = 4, 64, 6  # experts and choices of DeepSeek-V2-Lite
SIZES = {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": N_EXPERTS, "num_experts_per_tok": K, "n_shared_experts": 2}
WAYS = {"transformers": "all_to_all", "ours": EXCHANGE, "ours, begun early": EXCHANGE}
EXPECTED = RANKS * (1 - math.comb(N_EXPERTS - N_EXPERTS // RANKS, K) / math.comb(N_EXPERTS, K))
BOUND = 1.15


def layer_of(way: str, mesh: DeviceMesh) -> nn.ModuleDict:
    """This rank's experts, reached the given way, and the shared ones; alike for every way."""
    config = tiny_config(**SIZES)
    config._experts_implementation = DEFAULT_KERNEL
    torch.manual_seed(dist.get_rank())
    layer = nn.ModuleDict({"shared": DeepseekV2MLP(config, config.moe_intermediate_size * 2), "experts": DeepseekV2Experts(config)})
    experts: Any = layer["experts"]
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(torch.randn_like(parameter.chunk(RANKS)[0]) * 0.02))
    experts.num_experts, experts._is_expert_parallel = N_EXPERTS // RANKS, True
    dispatch = expert_parallel.EpDispatchExpertsParallel()
    dispatch.install_forward(experts, mesh["ep"], tp_mesh=mesh["tp"], ep_implementation=WAYS[way])
    return layer


def forward_and_backward(way: str, layer: Any, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tokens, weights = tokens.requires_grad_(), weights.requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=tokens.dtype is torch.bfloat16):
        if "early" in way:
            arguments = layer["experts"].exchange.start_dispatch(tokens, slots, weights).send_rows()
            shared = layer["shared"](tokens)
            output = layer["experts"](*arguments) + shared
        else:
            output = layer["experts"](tokens, slots, weights) + layer["shared"](tokens)
    output.float().square().mean().backward()
    return output.detach()


def count_messages() -> list[tuple[int, int]]:
    """Fills up with (rows, bytes) of what either exchange sends in its forward passes; ours sends backwards by the same function."""
    seen: list[tuple[int, int]] = []

    def counting(send: Any, position: int) -> Any:
        def counted(*args: Any, **keywords: Any) -> Any:
            seen.append((len(args[position]), args[position].nbytes))
            return send(*args, **keywords)

        return counted

    expert_parallel.all_to_all_single = counting(expert_parallel.all_to_all_single, 1)
    expert_parallel.all_to_all_single_autograd = counting(expert_parallel.all_to_all_single_autograd, 0)
    dist.all_to_all_single = counting(dist.all_to_all_single, 1)
    return seen


def exchanges(n_tokens: int, rounds: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """By way: seconds of each round, and per token the rows sent there and the bytes of a forward pass, counts left out."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("tp", "ep"))
    torch.manual_seed(100 + dist.get_rank())
    tokens, slots = torch.randn(n_tokens, SIZES["hidden_size"]).to(dtype), torch.rand(n_tokens, N_EXPERTS).topk(K).indices
    weights = torch.rand(n_tokens, K)
    layers = {way: layer_of(way, mesh) for way in WAYS}
    outputs = {way: forward_and_backward(way, layer, tokens, slots, weights) for way, layer in layers.items()}
    found: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in WAYS}
    for number in range(rounds):
        for way in list(WAYS) if number % 2 else reversed(WAYS):
            dist.barrier()
            start = time.perf_counter()
            forward_and_backward(way, layers[way], tokens, slots, weights)
            dist.barrier()
            found[way]["seconds"].append(time.perf_counter() - start)
    seen = count_messages()
    for way, layer in layers.items():
        seen.clear()
        forward_and_backward(way, layer, tokens, slots, weights)
        (_, _), there, back = seen[:3]
        found[way] |= {"rows": there[0] / n_tokens, "bytes": (there[1] + back[1]) / n_tokens}
        difference = (outputs[way] - outputs["transformers"]).abs().max() / outputs["transformers"].abs().max()
        assert difference <= 4 * torch.finfo(dtype).eps, "the ways compute the same"
    return found


def mean_of(ranks: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Rows and bytes over all ranks; the seconds are those of any, behind a barrier."""
    return {
        way: got | {name: statistics.mean(rank[way][name] for rank in ranks) for name in ("rows", "bytes")} for way, got in ranks[0].items()
    }


def speech_plan(root: Path) -> PlanSpec:
    """Words and their patterns of 145 units, each unit wrong once in ten; both ways round: 85% of the tokens are speech."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 500, (len(WORDS), 145))
    places = []
    for task, record_of in (("asr", asr), ("tts", tts)):
        records = []
        for index in range(64):
            units = np.where(random.random(145) < 0.1, random.integers(0, 500, 145), patterns[index % len(WORDS)])
            record = {**record_of(index), "instruction": "Go."}
            record["input" if task == "asr" else "output"] = units_to_text(units.tolist())
            records.append(record)
        places.append(make_store(root / task, task, records, task, 256).uri)
    return PlanSpec(tuple(places), (1, 1), 0, 32, 256, "records")


def loads(model_dir: str, spec: PlanSpec, n_steps: int, bias_rate: float) -> dict[str, Any]:
    """Busiest rank's selections over the mean rank's, in the worst layer and as the mean of layers (what a step waits for), by placement;
    at the first steps and after `n_steps`."""
    state = make(model_dir, (1, RANKS, RANKS), total=n_steps, learning_rate=1e-3, balance_bias_rate=bias_rate)
    placed = experts_of_ranks(state.model)
    assert placed is not None
    plain = torch.arange(N_EXPERTS).view(RANKS, -1).tolist()
    results = steps(state, open_plan(spec), n_steps, max_rows=8)
    found: dict[str, Any] = {"losses": [loss_of(results[0]), loss_of(results[-1])]}
    for when, some in (("fresh", results[:5]), ("trained", results[-5:])):
        load = torch.stack([result.load for result in some]).sum(0)
        found[when] = {"speech": float(load[:, 1].sum() / load.sum())}
        for name, ranks in (("plain", plain), ("placed", placed)):
            of_layers = [rank_load_ratio(layer.unsqueeze(0), ranks) for layer in load]
            found[when] |= {name: statistics.mean(of_layers), f"{name}_worst_layer": max(of_layers)}
    return found


def measure_loads(n_steps: int) -> dict[str, Any]:
    """Without any bias, where the balance loss has DeepSeek-V2-Lite's weight, and with DeepSeek-V3's."""
    with tempfile.TemporaryDirectory() as place:
        spec = speech_plan(Path(place))
        model = tiny_model(hidden_size=64, num_hidden_layers=5, n_routed_experts=N_EXPERTS, num_experts_per_tok=K, aux_loss_alpha=0.001)
        model.save_pretrained(f"{place}/model")
        rates = {"balance loss": 0.0, "balance bias": 0.01}
        return {name: run_ranks(RANKS, loads, f"{place}/model", spec, n_steps, rate, deadline=590.0)[0] for name, rate in rates.items()}


def show_exchanges(n_tokens: int, found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    rows, figures = [], {"rows_expected": EXPECTED}
    for kind, ways in found.items():
        theirs = statistics.median(ways["transformers"]["seconds"])
        for way, got in ways.items():
            took = statistics.median(got["seconds"])
            rows.append(
                [
                    kind if way == "transformers" else "",
                    way,
                    got["rows"],
                    K if way == "transformers" else EXPECTED,
                    got["bytes"],
                    took,
                    theirs / took,
                ]
            )
            name = f"{kind}_{way}".replace(", ", "_").replace(" ", "_")
            figures |= {f"{name}_rows": got["rows"], f"{name}_bytes": got["bytes"], f"{name}_s": took, f"{name}_ratio": theirs / took}
    headings = ["type", "exchange", "rows a token", "arithmetic", "bytes a token, both ways", "s", "ratio"]
    notes = [f"{n_tokens} tokens a rank, {K} of {N_EXPERTS} experts, {RANKS} ranks; forward and backward, shared experts included."]
    show("Exchange of tokens", headings, rows, notes)
    return figures


def show_loads(found: dict[str, Any]) -> dict[str, float]:
    rows, figures = [], {}
    for balanced, got in found.items():
        for when in ("fresh", "trained"):
            of = got[when]
            rows.append([f"{balanced}, {when}", *of.values()])
            figures |= {f"load_{balanced.replace(' ', '_')}_{when}_{name}": value for name, value in of.items()}
    headings = ["routers", "speech", "plain", "worst layer", "placed", "worst layer"]
    notes = [f"{name}: loss {got['losses'][0]:.2f} -> {got['losses'][1]:.2f}" for name, got in found.items()]
    show(f"Busiest of {RANKS} ranks' load over the mean, mean of layers: at most {BOUND} placed", headings, rows, notes)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.exchange", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    found = {
        name: mean_of(run_ranks(RANKS, exchanges, args.tokens, args.rounds, dtype, deadline=590.0))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    figures = show_exchanges(args.tokens, found) | show_loads(measure_loads(args.steps))
    write("exchange", figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
