"""Our fast paths against transformers' plain ones on this machine's GPU, without Ray and without data: `python -m tests.gpu.run`.

First whether they are right: loss and gradients of a shallow model, in float32 and bfloat16, against transformers' DeepSeek-V2 in float32.
Then tokens per second, model FLOPs utilisation and peak memory of a model in DeepSeek-V2-Lite's shape, as many layers as fit, on rows of
packed records, its routers free to route as they come to. Contenders take turns, each built anew from the same weights. A table is
printed, the figures go to a JSON file; exit code 1 where one is out of its bound. Without a GPU it says so and does nothing;
`--device cpu` runs the same at toy size.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

from most_ray.config import config_from
from most_ray.data.batch import Batch
from most_ray.distributed.devices import peak_flops
from most_ray.distributed.topology import Topology
from most_ray.metrics.flops import model_flops
from most_ray.model.modeling import MostForCausalLM
from most_ray.optim.train_state import make_state
from most_ray.planner.memory import ForwardPass, ModelShapes, memory_of
from most_ray.train.step import attended_pairs, run_step
from tests.benchmarks.peers import stock_model
from tests.gpu.check import FLOAT32_BOUND, HALF, batch_of, within
from tests.support.builders import tiny_config
from tests.support.training import KINDS, kind_of, loss_of, spy_gradients, step_settings

# deepseek-ai/DeepSeek-V2-Lite's config.json; 512 more tokens for units. Neither modalities nor a balance loss, which the peer has not.
LITE = {
    "vocab_size": 102_912,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "norm_topk_prob": False,
}
PLAIN = {"use_modality_aware_routing": False, "aux_loss_alpha": 0.0}
MOST_LAYERS = 27
ROOM = 0.9  # of a GPU's memory, for what the estimate does not count
# Of a kind's gradients, Euclidean, against float32's: products in bfloat16 are off by 2**-8 each, and tokens whose choice of experts is a
# near tie go elsewhere, in the plain path as in ours; but its experts stay in float32. Ours may lose twice as much, and two products more.
TWICE, TWO_PRODUCTS = 2.0, 2 * 2.0**-8
OPTIONS = {"learning_rate": 1e-4, "lr_scheduler": "constant"}
Step = Callable[[Batch], float]


@dataclass(frozen=True)
class Work:
    """What every contender does: `packs` rows of `length` tokens a step; per round, steps that are not timed and steps that are."""

    device: torch.device
    settings: dict[str, Any]
    packs: int
    length: int
    rounds: int
    warmup: int
    timed: int

    def config(self, layers: int) -> Any:
        return tiny_config(**{**self.settings, **PLAIN, "num_hidden_layers": layers, "max_position_embeddings": max(4096, self.length)})

    def batch(self, step: int) -> Batch:
        return batch_of(step, 0, 1, self.packs, self.length)


def built(work: Work, layers: int) -> MostForCausalLM:
    """Our model with the library's initial weights, on the device."""
    torch.manual_seed(0)
    with torch.device(work.device):
        return MostForCausalLM(work.config(layers)).train()


def ours(model: MostForCausalLM, dtype: torch.dtype | None, device: torch.device) -> Step:
    """`run_step`, as training takes it."""
    state = make_state(model, config_from(OPTIONS), 1_000_000)
    return lambda batch: loss_of(run_step(state, batch, step_settings(dtype, device)))


def stock_on(model: MostForCausalLM, device: torch.device) -> nn.Module:
    """transformers' model with the same weights, made on the device: on the CPU that takes minutes at full size."""
    with torch.device(device):
        return stock_model(model).to(device)  # type: ignore[no-any-return]


def peer(model: MostForCausalLM, dtype: torch.dtype | None, device: torch.device) -> Step:
    """transformers' model in a plain loop."""
    stock = stock_on(model, device)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=OPTIONS["learning_rate"])

    def step(batch: Batch) -> float:
        loss = plain_loss(stock, batch, dtype, device)
        loss.backward()
        nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def plain_loss(stock: nn.Module, batch: Batch, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """The mean over supervised tokens, of rows whose records transformers tells apart by their positions."""
    ids, positions, labels = (torch.from_numpy(array[0]).long().to(device) for array in (batch.input_ids, batch.positions, batch.labels))
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        return stock(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, labels=labels).loss  # type: ignore[no-any-return]


def checked(work: Work, layers: int = 2) -> dict[str, Any]:
    """Loss and gradients of one step of a shallow model: ours in float32 and bfloat16, and the plain path in bfloat16, against the plain
    path in float32."""
    device, batch = work.device, work.batch(1)
    stock = stock_on(built(work, layers), device)
    exact, plain = (plain_gradients(stock, batch, dtype, device) for dtype in (None, torch.bfloat16))
    del stock
    full, half = (our_gradients(work, layers, batch, dtype) for dtype in (None, torch.bfloat16))
    lost = off(exact, plain)
    bounds = {"loss": HALF[torch.bfloat16], **{kind: TWICE * lost[kind] + TWO_PRODUCTS for kind in KINDS}}
    found = off(exact, half)
    return {
        "float32": within(off(exact, full), FLOAT32_BOUND),
        "bfloat16": {"ok": all(found[what] < bound for what, bound in bounds.items()), "bounds": bounds, "plain": lost, **found},
    }


Outcome = tuple[float, dict[str, torch.Tensor]]


def plain_gradients(stock: nn.Module, batch: Batch, dtype: torch.dtype | None, device: torch.device) -> Outcome:
    stock.zero_grad()
    loss = plain_loss(stock, batch, dtype, device)
    loss.backward()
    nn.utils.clip_grad_norm_(stock.parameters(), 1.0)
    return float(loss.detach()), {name: p.grad.cpu() for name, p in stock.named_parameters() if p.grad is not None}


def our_gradients(work: Work, layers: int, batch: Batch, dtype: torch.dtype | None) -> Outcome:
    state = make_state(built(work, layers), config_from(OPTIONS), 1)
    gradients = spy_gradients(state)
    loss = loss_of(run_step(state, batch, step_settings(dtype, work.device)))
    return loss, {name: gradient.cpu() for name, gradient in gradients.items()}


def off(expected: Outcome, found: Outcome) -> dict[str, float]:
    """Relative difference of the loss, and of each kind's gradients in Euclidean norm."""
    difference, whole = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for name, gradient in expected[1].items():
        kind = kind_of(name)
        difference[kind] += float((found[1][name] - gradient).double().square().sum())
        whole[kind] += float(gradient.double().square().sum())
    return {"loss": abs(found[0] / expected[0] - 1), **{kind: (difference[kind] / whole[kind]) ** 0.5 for kind in KINDS}}


@dataclass(frozen=True)
class Contender:
    """`precision`: that of matrix products in float32 (torch.set_float32_matmul_precision)."""

    make: Callable[[MostForCausalLM, torch.dtype | None, torch.device], Step]
    dtype: torch.dtype | None
    precision: str = "highest"


CONTENDERS = {
    "most_ray, bfloat16": Contender(ours, torch.bfloat16),
    "transformers, bfloat16": Contender(peer, torch.bfloat16),
    "transformers, TF32": Contender(peer, None, "high"),
    "transformers, float32": Contender(peer, None),
}


def layers_that_fit(work: Work) -> int:
    """By the estimate of what a rank holds, in this device's free memory."""
    if work.device.type == "cpu":
        return 2
    free = ROOM * torch.cuda.mem_get_info(work.device)[0]
    load = ForwardPass(work.packs, work.length, work.packs * work.length // 2, half=True, on_gpu=True)
    for layers in range(2, MOST_LAYERS + 1):
        if memory_of(ModelShapes(work.config(layers)), Topology(1, 1, 1), load).total("none") > free:
            return max(2, layers - 1)
    return MOST_LAYERS


def measured(work: Work, layers: int) -> dict[str, dict[str, Any]]:
    """Per contender: seconds of its timed steps in all rounds, peak memory and losses. One that has no kernel for its type says so.

    Raises:
        torch.OutOfMemoryError: one of them does not fit.
    """
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "peak_bytes": 0, "losses": []} for name in CONTENDERS}
    for _ in range(work.rounds):
        for name, contender in CONTENDERS.items():
            if "error" in found[name]:
                continue
            try:
                one_round(work, layers, contender, found[name])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # NotImplementedError is one
                found[name]["error"] = " ".join(str(error).split())[:200]
            gc.collect()
            if work.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def one_round(work: Work, layers: int, contender: Contender, found: dict[str, Any]) -> None:
    on_gpu = work.device.type == "cuda"
    torch.set_float32_matmul_precision(contender.precision)
    try:
        step = contender.make(built(work, layers), contender.dtype, work.device)
        losses = [step(work.batch(number)) for number in range(1, work.warmup + 1)]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(work.device)
        for number in range(work.warmup + 1, work.warmup + work.timed + 1):
            batch = work.batch(number)
            started = time.perf_counter()
            losses.append(step(batch))  # a number: the device has been waited for
            if on_gpu:
                torch.cuda.synchronize(work.device)
            found["seconds"].append(time.perf_counter() - started)
        found["losses"] = losses
        if on_gpu:
            found["peak_bytes"] = max(found["peak_bytes"], torch.cuda.max_memory_allocated(work.device))
    finally:
        torch.set_float32_matmul_precision("highest")


def compared(work: Work, layers: int) -> dict[str, Any]:
    """Rates of all contenders at one depth, fewer layers where a contender ran out of memory."""
    while True:
        try:
            found = measured(work, layers)
            break
        except torch.OutOfMemoryError:
            if layers <= 2:
                raise
        # Behind the handler, whose traceback holds the model that did not fit.
        layers = max(2, layers - max(1, layers // 8))
        gc.collect()
        torch.cuda.empty_cache()
    config, batch = work.config(layers), work.batch(1)
    operations = model_flops(config).of_training(batch.n_tokens, attended_pairs(batch), sum(batch.n_supervised))
    peak = peak_flops(work.device, torch.bfloat16)
    for entry in found.values():
        if "error" not in entry:
            seconds = median(entry["seconds"])
            entry |= {"tokens_per_second": batch.n_tokens / seconds, "mfu": operations / seconds / peak}
    first = next(iter(found.values()))
    ratios = {name: first["tokens_per_second"] / entry["tokens_per_second"] for name, entry in found.items() if "error" not in entry}
    count = ModelShapes(config).count
    return {"layers": layers, "parameters": count, "rows": [work.packs, work.length], "contenders": found, "ratios": ratios}


def table(speed: dict[str, Any]) -> str:
    lines = [
        f"{speed['layers']} layers, {speed['parameters'] / 1e9:.2f} G parameters, rows of {speed['rows'][1]} tokens x {speed['rows'][0]}"
    ]
    lines.append(f"{'':24}{'tokens/s':>12}{'MFU':>8}{'peak GB':>9}{'ours is':>9}")
    for name, entry in speed["contenders"].items():
        if "error" in entry:
            lines.append(f"{name:24}{entry['error']}")
            continue
        figures = f"{entry['tokens_per_second']:12,.0f}{entry['mfu']:8.1%}{entry['peak_bytes'] / 1e9:9.1f}{speed['ratios'][name]:8.2f}x"
        lines.append(f"{name:24}{figures}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, help="depth of the model that is timed (default: as many as fit)")
    parser.add_argument("--length", type=int, help="tokens in a row (default: 4096; on a CPU 128)")
    parser.add_argument("--packs", type=int, default=2, help="rows in a step")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu_run.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("tests.gpu.run: skipped, there is no GPU here (--device cpu runs the same at toy size)")
        return 0
    rounds, warmup, timed = (3, 5, 7) if on_gpu else (1, 1, 2)
    length = options.length or (4096 if on_gpu else 128)
    work = Work(torch.device(options.device), LITE if on_gpu else {}, options.packs, length, rounds, warmup, timed)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    report["right"] = checked(work)
    report["speed"] = compared(work, options.layers or layers_that_fit(work))
    report["ok"] = all(section["ok"] for section in report["right"].values())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report["speed"]))
    print(json.dumps({key: report[key] for key in ("device", "right", "ok")}))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
