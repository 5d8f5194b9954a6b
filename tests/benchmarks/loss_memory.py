"""Head and loss: peak memory and seconds, forward and backward, of our head, of transformers' way (full float32 logits, as its
`ForCausalLMLoss`) and of torch's `linear_cross_entropy` (in its chunks), beyond what all need: weights, hidden states, gradients of both.

    python -m tests.benchmarks.loss_memory [--vocabulary 102400 --tokens 4096 --hidden 2048] [--dtype bfloat16|float32] [--device cpu|cuda]

Each way runs in a process of its own: the peak of resident memory (on a GPU, of allocated memory) less what was there before and less the
gradients, which are there behind every pass. `dtype` is that of our products, as autocast has it; transformers' way is in float32 and, in a
second line, under the same autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it, before torch loads

import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from most_ray.model.head import MostHead
from tests.benchmarks import common

WAYS = {
    "ours": "most_ray",
    "ours_fp32": "most_ray, float32",
    "transformers": "transformers, float32",
    "transformers_half": "transformers, autocast",
    "torch_chunked": "F.linear_cross_entropy, float32",
}
BOUND = 0.1  # of transformers'
VOCABULARIES = (8_192, 32_768, 102_400)


def status(key: str) -> int:
    """Bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024


def way_of(name: str, head: MostHead, hidden: torch.Tensor, targets: torch.Tensor, half: torch.dtype | None) -> Callable[[], torch.Tensor]:
    """One forward pass: hidden (N, D), targets (N,) -> their mean loss."""
    device, vocabulary = hidden.device.type, head.out_features

    def cast() -> contextlib.AbstractContextManager[Any]:
        lowered = half if name in ("ours", "transformers_half") else None
        return torch.autocast(device, lowered) if lowered else contextlib.nullcontext()

    def ours() -> torch.Tensor:
        with cast():
            return head(hidden, targets).sum() / len(targets)

    def theirs() -> torch.Tensor:
        with cast():
            logits = nn.functional.linear(hidden, head.weight).unsqueeze(0)
            return ForCausalLMLoss(logits, labels=None, vocab_size=vocabulary, shift_labels=targets)

    def chunked() -> torch.Tensor:
        return F.linear_cross_entropy(hidden, head.weight, targets, options=nn.LinearCrossEntropyOptions())

    return {"ours": ours, "ours_fp32": ours, "transformers": theirs, "transformers_half": theirs, "torch_chunked": chunked}[name]


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """In a fresh process: bytes at the peak, seconds, the loss and the norms of gradients of one pass."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, half = torch.device(options.device), getattr(torch, options.dtype) if options.dtype != "float32" else None
    head = MostHead(options.hidden, options.vocabulary, bias=False, device=device)
    hidden = torch.randn(options.tokens, options.hidden, device=device, requires_grad=True)
    targets = torch.randint(options.vocabulary, (options.tokens,), device=device)
    once = way_of(name, head, hidden, targets, half)
    # Libraries come in, and threads, before it counts.
    small = (MostHead(64, 256, bias=False, device=device), torch.randn(32, 64, device=device, requires_grad=True), targets[:32] % 256)
    way_of(name, *small, half)().backward()
    _wait(device)
    before, start = _begin(device), time.perf_counter()
    loss = once()
    loss.backward()
    _wait(device)
    seconds = time.perf_counter() - start
    needed = before + sum(tensor.numel() * tensor.element_size() for tensor in (hidden, head.weight))
    assert hidden.grad is not None and head.weight.grad is not None
    norms = {"hidden_grad": float(hidden.grad.norm()), "weight_grad": float(head.weight.grad.norm())}
    return {"bytes": _peak(device) - needed, "seconds": seconds, "loss": float(loss.detach()), **norms}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _begin(device: torch.device) -> int:
    """Bytes in use, and the peak begins anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def in_process(name: str, options: argparse.Namespace, vocabulary: int) -> dict[str, float]:
    given = {**vars(options), "way": name, "vocabulary": vocabulary}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "tests.benchmarks.loss_memory", *flags]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} at {vocabulary}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(options: argparse.Namespace, vocabulary: int, ways: dict[str, str]) -> dict[str, float]:
    found = {name: in_process(name, options, vocabulary) for name in ways}
    full = found["transformers"]
    figures: dict[str, float] = {}
    rows: list[list[object]] = []
    for name, title in ways.items():
        one = found[name]
        share = one["bytes"] / full["bytes"]
        errors = [one[key] / full[key] - 1 for key in ("loss", "hidden_grad", "weight_grad")]
        rows.append([title, one["bytes"] / 1e6, f"{share:.3f}", one["seconds"], max(map(abs, errors))])
        figures |= {f"{name}_mb_{vocabulary}": one["bytes"] / 1e6, f"{name}_seconds_{vocabulary}": one["seconds"]}
        figures |= {f"{name}_share_{vocabulary}": share, f"{name}_error_{vocabulary}": max(map(abs, errors))}
    common.show(
        f"Head and loss of {options.tokens:,} tokens, hidden {options.hidden:,}, vocabulary {vocabulary:,}",
        ["", "peak MB", "of transformers'", "seconds", "relative difference"],
        rows,
    )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=102_400)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return 0
    del options.way
    figures = table(options, options.vocabulary, WAYS)
    flat = {name: WAYS[name] for name in ("ours", "transformers")}
    for vocabulary in VOCABULARIES:
        if vocabulary != options.vocabulary:
            figures |= table(options, vocabulary, flat)
    share = figures[f"ours_share_{options.vocabulary}"]
    common.console.print(f"Ours needs {share:.3f} of transformers' memory (bound: {BOUND}).")
    common.write("loss_memory", {"share": share, **vars(options), "torch": torch.__version__, **figures})
    return int(share >= BOUND)


if __name__ == "__main__":
    sys.exit(main())
