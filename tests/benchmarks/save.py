"""Checkpoints: for how long a save holds up the training loop, beside `torch.distributed.checkpoint` saving the same state in the same run.

About 1 GB of state (weights and two moments in float32), in one process with two threads and on two gloo ranks under FSDP with one each.
Ways take turns. Behind each save the loop goes on with real steps (forward, backward, AdamW) until the checkpoint is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from most_ray.checkpoint import catalog, reader
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.optim.train_state import TrainState
from tests.benchmarks import common
from tests.support.gloo import run_ranks
from tests.support.training import bare_state

WIDTH, LAYERS = 2048, 21  # 21 x 16.8 MB of weights, three times with the moments: 1.06 GB
WAYS = {"sync": "dcp.save", "dcp_async": "dcp.async_save", "ours": "CheckpointWriter", "overlap": "  overlap=True"}
WORLDS = (1, 2)
LABELS = {"stall": "stall_s", "cpu": "stall_cpu_s", "complete": "complete_s", "before": "step_s", "during": "step_s_during"}


def make_bench_state(width: int, layers: int) -> TrainState:
    """On one process plain, else sharded over all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return bare_state(model)


def step(state: TrainState, inputs: torch.Tensor) -> float:
    """One step of training; its seconds."""
    start = time.perf_counter()
    state.model(inputs).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return time.perf_counter() - start


def tensors_of(state: TrainState) -> dict[str, Any]:
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return {"model": state.model.state_dict(), "optimizer": {names[key]: dict(value) for key, value in state.optimizer.state.items()}}


class Way:
    """A way to save: `save` is what the loop waits for; `busy` and `finish` are of what goes on behind it."""

    def __init__(self, name: str, state: TrainState) -> None:
        self._name, self._state, self._future = name, state, None
        self._writer = CheckpointWriter(overlap=name == "overlap") if name in ("ours", "overlap") else None
        self._stalled = 0.0
        # As its documentation has it: collectives of a thread need a group of their own.
        self._group = dist.new_group(backend="gloo") if name == "dcp_async" and dist.is_initialized() else None
        if self._writer:
            self._writer.prepare(state)

    def save(self, uri: str) -> None:
        start = time.perf_counter()
        self._save(uri)
        self._stalled += time.perf_counter() - start

    def stalled(self) -> float:
        """Seconds in all, those for which an optimizer step waited for a copy with them."""
        return self._writer.stall_seconds if self._writer else self._stalled

    def _save(self, uri: str) -> None:
        if self._writer:
            self._writer.save(uri, self._state, {}, lambda _: None, lambda: True)
        elif self._name == "sync":
            dcp.save(tensors_of(self._state), checkpoint_id=uri)
        else:
            self._future = dcp.async_save(tensors_of(self._state), checkpoint_id=uri, process_group=self._group)

    def busy(self) -> bool:
        if self._writer:
            return self._writer._thread is not None and self._writer._thread.is_alive()
        return self._future is not None and not self._future.done()

    def finish(self) -> None:
        if self._writer:
            self._writer.wait()
        elif self._future is not None:
            self._future.result()
            self._future = None

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def one_save(way: Way, state: TrainState, inputs: torch.Tensor, uri: str) -> dict[str, float]:
    """Seconds: the stall, processor time in it, the steps while writing goes on, until the checkpoint is complete."""
    start, cpu, stall = time.perf_counter(), time.process_time(), way.stalled()
    way.save(uri)
    cpu = time.process_time() - cpu
    during = []
    while _any(way.busy()):  # all ranks make the same steps
        during.append(step(state, inputs))
    stall = way.stalled() - stall
    way.finish()
    return {"stall": stall, "cpu": cpu, "during": median(during) if during else 0.0, "complete": time.perf_counter() - start}


def _any(busy: bool) -> bool:
    flag = torch.tensor(float(busy))
    if dist.is_initialized():
        dist.all_reduce(flag)
    return bool(flag > 0)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def stalls(folder: str, rounds: int, size: tuple[int, int]) -> dict[str, list[dict[str, float]]]:
    """What each way took, round by round; the first round is that of new buffers. Then, whether ours can be read back."""
    quiet()
    if not dist.is_initialized():
        torch.set_num_threads(2)
    state = make_bench_state(*size)
    inputs = torch.randn(32, size[0])
    ways = {name: Way(name, state) for name in WAYS}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in ways.items():
            before = median(step(state, inputs) for _ in range(4))
            uri = f"{folder}/{name}-{number}"
            found[name].append({"before": before, **one_save(way, state, inputs, uri)})
            if name in ("ours", "overlap") and number == rounds:
                verify(uri, state, size)
            barrier()
            if not dist.is_initialized() or dist.get_rank() == 0:
                shutil.rmtree(uri)
    for way in ways.values():
        way.close()
    return found


def verify(uri: str, state: TrainState, size: tuple[int, int]) -> None:
    """Every hash, and a fresh state filled with it, against one that is saved and read the plain way: training has gone on meanwhile."""
    again = make_bench_state(*size)
    reader.load(uri, again)
    assert catalog.find_corruption(uri, deep=True) is None
    assert again.step < state.step or not dist.is_initialized()
    other = CheckpointWriter(background=False)
    other.save(f"{uri}-again", again, {}, lambda _: None, lambda: True)
    other.close()
    barrier()
    files = [catalog.read_marker(at)["files"] for at in (uri, f"{uri}-again")]
    assert files[0] == files[1], "what was read and written again is the same, to the byte"
    barrier()
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(f"{uri}-again")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def peak(folder: str, name: str, size: tuple[int, int]) -> dict[str, float]:
    """MB by which the resident memory of this rank grew in the first and second save, at most."""
    quiet()
    state = make_bench_state(*size)
    way = Way(name, state) if name in ("sync", "dcp_async") else None
    step(state, torch.randn(32, size[0]))
    grown = {}
    for turn in ("first", "second"):
        barrier()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before = _status("VmRSS")
        way = way or Way(name, state)  # our buffers are made ahead: they count all the same
        way.save(f"{folder}/{name}-{turn}")
        way.finish()
        grown[turn] = _status("VmHWM") - before
    return grown


def _status(key: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[key].split()[0]) * 1024 / 1e6


def in_folder(root: str | None, world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="most_ray-bench-", dir=root) as folder:
        return run_ranks(world, partial(work, folder), *args, deadline=1800.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", help="where to write; by default the temporary folder")
    options = parser.parse_args()
    size = (WIDTH, options.layers)
    figures: dict[str, Any] = {"state_mb": 3 * options.layers * WIDTH**2 * 4 / 1e6, "rounds": options.rounds}
    for world in WORLDS:
        told = in_folder(options.folder, world, stalls, options.rounds, size)[0]
        rows = []
        for name, title in WAYS.items():
            peaks = in_folder(options.folder, world, peak, name, size)
            grown = {turn: max(rank[turn] for rank in peaks) for turn in ("first", "second")}
            middle = {key: median(took[key] for took in told[name][1:]) for key in LABELS}
            middle["first"] = told[name][0]["stall"]
            noise = common.spread([took["stall"] for took in told[name][1:]])
            figures.update({f"{name}_{label}_{world}": middle[key] for key, label in LABELS.items() if (key, name) != ("during", "sync")})
            figures.update({f"{name}_first_stall_s_{world}": middle["first"], f"{name}_peak_mb_{world}": max(grown.values())})
            slower = middle["during"] / middle["before"] if middle["during"] else ""
            timed = [middle[key] for key in ("stall", "cpu", "first", "complete", "before")]
            rows.append([title, *timed, slower, *grown.values(), noise])
        for name in ("ours", "overlap"):
            figures[f"ratio_sync_over_{name}_{world}"] = figures[f"sync_stall_s_{world}"] / figures[f"{name}_stall_s_{world}"]
        common.show(
            f"{figures['state_mb']:,.0f} MB of state on {world} rank{'s' * (world > 1)} (median of {options.rounds})",
            ["", "stall s", "CPU s", "first", "done s", "step s", "x writing", "peak MB", "2nd", "noise"],
            rows,
            [
                f"Stall of dcp.save over ours: {figures[f'ratio_sync_over_ours_{world}']:.1f}, with overlap "
                f"{figures[f'ratio_sync_over_overlap_{world}']:.1f}. "
                "x writing: a step while the checkpoint is written over one without. peak: growth of resident memory in the first save.",
            ],
        )
    common.write("save", figures)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
