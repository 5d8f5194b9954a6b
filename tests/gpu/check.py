"""Correctness and speed on this machine's GPUs, without Ray and without data: `python -m tests.gpu.check [--nproc N]`.

One GPU against the CPU in float32, half precision against float32, a checkpoint there and back, a repeated deterministic run; with several
GPUs every layout of them against one, through torchrun and NCCL; tokens per second. Figures go to a JSON file; exit code 1 where one is out
of its bound. Without a GPU it says so and does nothing; `--device cpu` runs the same on CPUs and gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import nn

from most_ray.checkpoint import reader
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.config import config_from
from most_ray.data.batch import Batch
from most_ray.distributed.determinism import reset_deterministic, set_deterministic
from most_ray.model.build import load_model
from most_ray.optim.train_state import TrainState, make_state
from most_ray.records.record import TASKS
from most_ray.records.template import AUDIO, IGNORE, PADDING, TEXT
from most_ray.train.recompute import apply_recompute
from most_ray.train.replicas import check_replicas
from most_ray.train.step import run_step
from tests.support.builders import IDS, tiny_model
from tests.support.training import differences, full_weights, layout_of, loss_of, spy_gradients, step_settings

STEPS = 4
# float32 on both sides, sums in another order: entries of some hundred terms differ by 2**-24 of their size times the square root of their
# number, through a dozen layers' products. TensorFloat-32, which keeps 2**-11, would be outside.
FLOAT32_BOUND = 1e-4
# Of the loss, as in tests/unit/test_step.py: three times the type's spacing.
HALF = {torch.bfloat16: 3 * 2.0**-7, torch.float16: 3 * 2.0**-10}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 2048,
}


def batch_of(step: int, rank: int, world: int, packs: int, length: int) -> Batch:
    """`packs` rows of two records each, half text and half speech, shared out over ranks in one forward pass; any rank's at once."""
    rng = np.random.default_rng(step)
    ids, modality, labels, positions, task = (np.zeros((packs, length), np.int32) for _ in range(5))
    n_supervised = [0] * len(TASKS)
    for row in range(packs):
        cut = int(rng.integers(length // 4, length // 2))
        end = length - int(rng.integers(1, length // 4))
        ids[row] = rng.integers(3, 259, length)
        modality[row, end:], labels[row], task[row] = PADDING, IGNORE, -1
        for start, stop, kind in ((0, cut, "tts"), (cut, end, "asr")):
            half = (start + stop) // 2
            speech = slice(half, stop) if kind == "tts" else slice(start, half)
            ids[row, speech] = rng.integers(IDS.unit_base, IDS.unit_base + 500, speech.stop - speech.start)
            modality[row, start:stop], modality[row, speech] = TEXT, AUDIO
            labels[row, half:stop], task[row, start:stop] = ids[row, half:stop], TASKS.index(kind)
            positions[row, start:stop] = np.arange(stop - start)
            n_supervised[TASKS.index(kind)] += stop - half
        positions[row, end:] = np.arange(length - end)
    mine = slice(rank, None, world)
    arrays = (array[mine][None] for array in (ids, labels, positions, modality, task))
    n_tokens = int((modality != PADDING).sum())
    return Batch(step, *arrays, n_supervised, 2 * packs, n_tokens, packs, [f"record_{rank}"])


def fresh(model_dir: str, device: torch.device, topology: tuple[int, int, int] = (1, 1, 1), **options: Any) -> TrainState:
    model: nn.Module = load_model(model_dir, distributed=layout_of(topology))
    if topology[0] * topology[1] == 1:
        model.to(device)
    return make_state(model, config_from({"learning_rate": 1e-3, "lr_scheduler": "constant", **options}), STEPS)


def train(state: TrainState, device: torch.device, dtype: torch.dtype | None = None, count: int = STEPS) -> dict[str, Any]:
    """Losses, norms, expert counts of `count` steps, and the first step's gradients, on the CPU."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    make_step, gradients, results = state.optimizer.step, spy_gradients(state), []
    for _ in range(count):
        results.append(run_step(state, batch_of(state.step + 1, rank, world, 8, 160), step_settings(dtype, device)))
        state.optimizer.step = make_step  # type: ignore[method-assign]
    return {
        "losses": [loss_of(result) for result in results],
        "norms": [result.grad_norm for result in results],
        "loads": [result.load for result in results],
        "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
    }


def compared(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Largest relative differences: gradients per kind of parameter, norms, losses."""
    losses = max(abs(a / b - 1) for a, b in zip(found["losses"], expected["losses"], strict=True))
    return {**differences(expected, found), "loss": losses}


def one_device(model_dir: str, folder: Path, device: torch.device) -> dict[str, Any]:
    on_cpu = train(fresh(model_dir, torch.device("cpu")), torch.device("cpu"))
    exact = train(fresh(model_dir, device), device)
    report: dict[str, Any] = {"float32": within(compared(on_cpu, exact), FLOAT32_BOUND)}
    for dtype, bound in HALF.items():
        half = train(fresh(model_dir, device, fp16=dtype is torch.float16), device, dtype)
        report[str(dtype).removeprefix("torch.")] = within({"loss": compared(exact, half)["loss"]}, bound)
    recomputed = fresh(model_dir, device)
    apply_recompute(recomputed.model, "full")
    report["recomputed"] = within(compared(exact, train(recomputed, device)), FLOAT32_BOUND)
    report["checkpoint"] = there_and_back(model_dir, folder, device)
    set_deterministic(0)
    runs = [train(fresh(model_dir, device), device) for _ in range(2)]
    reset_deterministic()
    same = all(torch.equal(gradient, runs[1]["gradients"][name]) for name, gradient in runs[0]["gradients"].items())
    report["deterministic"] = {"ok": same and runs[0]["losses"] == runs[1]["losses"]}
    return report


def there_and_back(model_dir: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint read into a fresh state: equal weights to the bit, the next loss as it would have been."""
    state = fresh(model_dir, device)
    train(state, device, count=2)
    writer = CheckpointWriter(background=False)
    started = time.perf_counter()
    writer.save(str(folder / "step-000000002"), state, {}, lambda _: None, lambda: True)
    seconds = time.perf_counter() - started
    writer.close()
    other = fresh(model_dir, device)
    reader.load(str(folder / "step-000000002"), other)
    weights = full_weights(other)
    equal = all(torch.equal(weight, weights[name]) for name, weight in full_weights(state).items())
    difference = abs(train(other, device, count=1)["losses"][0] / train(state, device, count=1)["losses"][0] - 1)
    return {"ok": equal and difference < 1e-6, "weights_equal": equal, "next_loss": difference, "save_seconds": round(seconds, 3)}


def within(figures: dict[str, float], bound: float) -> dict[str, Any]:
    return {"ok": max(figures.values()) < bound, "bound": bound, **figures}


def layouts(world: int) -> list[tuple[int, int, int]]:
    """(replicas, shards, expert-parallel size) for so many devices; the small model has 8 experts."""
    found = [(1, world, 1)]
    found += [(1, world, experts) for experts in (2, 4, 8) if world % experts == 0]
    if world % 2 == 0 and world > 2:
        found += [(2, world // 2, 1), (2, world // 2, 2 if world % 4 == 0 else 1)]
    return sorted(set(found))


def worker(folder: Path, kind: str) -> None:
    """One of several ranks, started by torchrun."""
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    found = {}
    for topology in layouts(dist.get_world_size()):
        state = fresh(str(folder / "model"), device, topology)
        found[topology] = train(state, device)
        check_replicas(state)
        found[topology]["half"] = train(fresh(str(folder / "model"), device, topology), device, torch.bfloat16)["losses"]
    speed = tokens_per_second(str(folder / "large"), device, (1, dist.get_world_size(), 1))
    if dist.get_rank() == 0:
        torch.save({"runs": found, "speed": speed}, folder / "parallel.pt")
    dist.destroy_process_group()


def several_devices(folder: Path, kind: str, nproc: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m", "tests.gpu.check"]
    subprocess.run([*command, "--worker", str(folder), "--device", kind], check=True)
    answer = torch.load(folder / "parallel.pt", weights_only=False)
    device = torch.device(kind)
    expected = train(fresh(str(folder / "model"), device), device)
    report: dict[str, Any] = {}
    for topology, found in answer["runs"].items():
        figures = within(compared(expected, found), FLOAT32_BOUND)
        half = max(abs(a / b - 1) for a, b in zip(found["half"], expected["losses"], strict=True))
        report[",".join(map(str, topology))] = {**figures, "bfloat16_loss": half, "ok": figures["ok"] and half < HALF[torch.bfloat16]}
    return {**report, "speed": answer["speed"]}


def tokens_per_second(model_dir: str, device: torch.device, topology: tuple[int, int, int] = (1, 1, 1)) -> dict[str, Any]:
    """bfloat16 steps of a model of LARGE size (on a CPU: of the small one), the median of ten after three."""
    on_gpu = device.type == "cuda"
    state = fresh(model_dir, device, topology)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    packs, length = (8 * world, 2048) if on_gpu else (2 * world, 128)
    seconds = []
    for step in range(1, 14 if on_gpu else 5):
        batch = batch_of(step, rank, world, packs, length)
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run_step(state, batch, step_settings(torch.bfloat16, device))
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds[3:]))
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    parameters = sum(p.numel() for p in state.model.parameters())
    return {"tokens_per_second": round(batch.n_tokens / median, 1), "step_seconds": median, "parameters": parameters, "peak_bytes": peak}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--nproc", type=int, help="devices to use together (default: all GPUs; with --device cpu: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu.json"), help="where the figures go")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    kind = options.device
    if kind == "cuda" and not torch.cuda.is_available():
        print("tests.gpu.check: skipped, there is no GPU here (--device cpu runs the same on CPUs)")
        return 0
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and the deterministic runs are not the first
    if options.worker:
        worker(options.worker, kind)
        return 0
    nproc = options.nproc or (torch.cuda.device_count() if kind == "cuda" else 1)
    name = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
    report: dict[str, Any] = {"device": name, "nproc": nproc, "torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as uri:
        folder = Path(uri)
        tiny_model().save_pretrained(folder / "model")
        tiny_model(**(LARGE if kind == "cuda" else {})).save_pretrained(folder / "large")
        report["one_device"] = one_device(str(folder / "model"), folder, torch.device(kind))
        report["speed"] = tokens_per_second(str(folder / "large"), torch.device(kind))
        if nproc > 1:
            report["several_devices"] = several_devices(folder, kind, nproc)
    sections = [*report["one_device"].values(), *report.get("several_devices", {}).values()]
    report["ok"] = all(section.get("ok", True) for section in sections)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
