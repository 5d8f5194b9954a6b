"""Measures what this machine's CPU reaches in training: a few real steps of the model, and gloo's collectives, in this process.

The steps are a run's, by the same code on the same rows, with random weights. A large model is replaced by a proxy with fewer layers and
rows, whose rate is assumed for all of it. The work of FSDP and of the token exchange apart from communication, most of it in the
interpreter, is measured as the difference that they make to steps on a single rank.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

from most_ray.config import OptimizerOptions
from most_ray.data.batch import Batch
from most_ray.distributed.determinism import torch_threads
from most_ray.metrics.flops import model_flops
from most_ray.model.compat import SUPPORTS_MANY_WORKERS
from most_ray.model.configuration import MostConfig
from most_ray.model.exchange import EXCHANGE
from most_ray.model.modeling import MostForCausalLM, MostMoe
from most_ray.optim.train_state import TrainState, make_state
from most_ray.planner.cost import Collective, CollectiveKind, Speed
from most_ray.planner.memory import ModelShapes
from most_ray.records.template import IGNORE, PADDING
from most_ray.train.step import StepSettings, attended_pairs, run_step

CALIBRATION_BATCHES = 5  # how many batches `calibrate` should get
clock: Callable[[], float] = time.perf_counter  # a benchmark replaces it by processor time, when other processes use the same cores
_CPU = torch.device("cpu")
_MAX_PARAMETERS = 1 << 26  # of a proxy: a GiB with gradients and moments, and three proxies are in memory at once
_MAX_PASS_S = 1.0  # longest estimated pass of a proxy
_TIME_LIMIT_S = 7.0  # no further batch is started after this time; with the last one it takes about ten seconds
_ASSUMED_EFFICIENCY = 0.1  # share of the peak, used to choose a proxy, and for models of which none is small enough
_ASSUMED_UPDATE_RATE = 2e8  # parameters/s of the optimizer, if nothing can be measured
ParallelMode = Literal["plain", "sharded", "exchanged"]
_MODES: tuple[ParallelMode, ...] = ("plain", "sharded", "exchanged")  # each adds something to the one before
_MAX_RANKS = 8  # of gloo that are measured: each has sockets to all others, and a process may open only so many files
_SMALL, _LARGE, _CALLS = 1 << 12, 1 << 21, 12  # bytes of a collective's two messages, and how often each is sent


@dataclass(frozen=True)
class CpuLinks:
    """gloo between processes of this machine."""

    ranks: int
    call: dict[CollectiveKind, float]  # seconds of a call among all ranks, however small
    byte: dict[CollectiveKind, float]  # seconds for each byte that a rank sends
    overlaps: ClassVar = False  # sending uses the same cores as computing

    def seconds(self, collective: Collective) -> float:
        """Return the time of a collective's calls; with fewer ranks a call takes proportionally fewer rounds."""
        rounds = (collective.ranks - 1) / max(1, self.ranks - 1)
        return collective.calls * rounds * self.call[collective.kind] + collective.nbytes * self.byte[collective.kind]


@dataclass(frozen=True)
class Calibration:
    """What a single rank reaches."""

    flops: float  # operations/s in a forward and backward pass
    update_rate: float  # parameters/s of the optimizer
    fsdp_s: float  # see `Speed`
    fsdp_update_s: float
    exchange_s: float
    threads: int  # of the rank, as in the run
    measured: bool = True  # else assumed

    def speed(self, workers: int) -> Speed:
        """Return the speed of each of `workers` that share this machine's cores."""
        sharing = max(1.0, workers * self.threads / (os.cpu_count() or 1))
        flops, own_work = self.flops / sharing, (self.fsdp_s, self.fsdp_update_s, self.exchange_s)
        links = measure_links(workers)
        return Speed(flops, flops, math.inf, self.update_rate / sharing, links, *(seconds * sharing for seconds in own_work))


def calibrate(
    config: MostConfig, options: OptimizerOptions, batches: Sequence[Batch], dtype: torch.dtype | None, peak: float, threads: int
) -> Calibration:
    """Measure steps of a model on one rank, for about ten seconds at most.

    The modes alternate on each batch, so that whatever else slows the machine slows all of them.

    Args:
        batches: a rank's batches of several steps. They must differ as a run's do, since libraries cache what depends on shapes. The first
            is a warm-up; if steps are slow, not all are used.
        dtype, peak: type of the autocast (None: float32), and the device's operations/s in it.
    """
    found = _choose_proxy(config, ModelShapes(config), batches[0], peak)
    if found is None:
        return Calibration(_ASSUMED_EFFICIENCY * peak, _ASSUMED_UPDATE_RATE, 0.0, 0.0, 0.0, threads, measured=False)
    proxy, rows = found
    with torch_threads(threads), torch.random.fork_rng(), _single_rank_group():
        modes = [ProxyModel(proxy, options, dtype, mode) for mode in (_MODES if SUPPORTS_MANY_WORKERS else _MODES[:1])]
        seconds = _time_batches(modes, [_first_rows(batch, rows) for batch in batches])
    pass_s = float(np.median(seconds[1:, 0, 0]))
    updates = seconds[1:, 0, 1][seconds[1:, 0, 1] > 0]  # a step whose loss or gradients are not finite makes no update
    added = [np.maximum(0.0, np.median(seconds[1:, mode] - seconds[1:, mode - 1], axis=0)) for mode in range(1, len(modes))]
    sharding, exchange = added or np.zeros((2, 2))
    layers = config.num_hidden_layers / proxy.num_hidden_layers
    flops = statistics.median(_operations(proxy, _first_rows(batch, rows)) for batch in batches[1 : len(seconds)]) / pass_s
    update_rate = ModelShapes(proxy).count / float(np.median(updates)) if len(updates) else _ASSUMED_UPDATE_RATE
    fsdp_s, fsdp_update_s, exchange_s = (float(seconds) * layers for seconds in (*sharding, exchange[0]))
    return Calibration(flops, update_rate, fsdp_s, fsdp_update_s, exchange_s, threads)


def _time_batches(modes: Sequence[ProxyModel], batches: Sequence[Batch]) -> np.ndarray:
    """Return the seconds `(batches, modes, 2)` of a pass and of an update, for the warm-up, the next batch, and more while time is left."""
    started = clock()
    wanted = itertools.takewhile(lambda entry: entry[0] < 2 or clock() - started <= _TIME_LIMIT_S, enumerate(batches))
    return np.array([_time_batch(modes, batch, index) for index, batch in wanted])


def _time_batch(modes: Sequence[ProxyModel], batch: Batch, first: int) -> list[tuple[float, float]]:
    """Return the seconds of each mode on a batch, starting with mode `first`, for which no shape is cached yet."""
    found = {mode: mode.seconds(batch) for mode in (modes[(first + turn) % len(modes)] for turn in range(len(modes)))}
    return [found[mode] for mode in modes]


class ProxyModel:
    """The model, or its first layers, in training on a single rank."""

    def __init__(self, config: MostConfig, options: OptimizerOptions, dtype: torch.dtype | None, mode: ParallelMode) -> None:
        model = MostForCausalLM(config)
        if mode != "plain":
            _shard(model, exchange=mode == "exchanged")
        self._state: TrainState = make_state(model, options, CALIBRATION_BATCHES)
        skips = CALIBRATION_BATCHES + 1  # however many steps are skipped, none ends the calibration
        self._settings = dataclasses.replace(StepSettings.of(options, _CPU), dtype=dtype, max_skipped_steps=skips)

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """Train on a batch. Returns the seconds of the forward and backward passes, and of the optimizer's update."""
        marks: list[float] = []
        optimizer = self._state.optimizer
        registers = (optimizer.register_step_pre_hook, optimizer.register_step_post_hook)
        hooks = [register(lambda *_: marks.append(clock())) for register in registers]
        started = clock()
        run_step(self._state, batch, self._settings)
        total = clock() - started
        for hook in hooks:
            hook.remove()
        updated = marks[-1] - marks[0] if marks else 0.0  # no update if a loss was not finite
        return total - updated, updated


def _shard(model: MostForCausalLM, exchange: bool) -> None:
    """Shard a model over a single rank as transformers lays DeepSeek-V2 out, with expert parallelism or without."""
    mesh = init_device_mesh("cpu", (1,))
    for module in model.modules() if exchange else ():
        if isinstance(module, MostMoe):
            EpDispatchExpertsParallel().install_forward(module.experts, mesh, tp_mesh=mesh, ep_implementation=EXCHANGE)
            fully_shard(module.experts, mesh=mesh)
    for module in (model.model.embed_tokens, *model.model.layers):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def _single_rank_group() -> Iterator[None]:
    """Initialise a process group of this process alone, and destroy it at the end."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _choose_proxy(config: MostConfig, shapes: ModelShapes, batch: Batch, peak: float) -> tuple[MostConfig, int] | None:
    """Return the proxy with the most rows of one pass, then with the most layers, that is fast and small enough, and its rows; None if not
    even one layer of each kind on one row is."""
    total, rows = config.num_hidden_layers, batch.input_ids.shape[1]
    while rows:
        cut = _first_rows(batch, rows)
        for layers in range(total, min(2, total) - 1, -1):
            proxy = copy.deepcopy(config)
            proxy.num_hidden_layers = layers
            if layers < total:
                proxy.first_k_dense_replace = min(1, config.first_k_dense_replace, total)
            if _operations(proxy, cut) <= _MAX_PASS_S * _ASSUMED_EFFICIENCY * peak and _count(proxy, shapes) <= _MAX_PARAMETERS:
                return proxy, rows
        rows //= 2
    return None


def _count(proxy: MostConfig, shapes: ModelShapes) -> int:
    """Return the number of a proxy's parameters, from the shapes of the whole model."""
    units = {name: sum(unit) for name, unit in shapes.units().items()}
    dense, experts = (units[f"model.layers.{index}"] for index in (0, shapes.config.num_hidden_layers - 1))
    n_dense = min(proxy.first_k_dense_replace, proxy.num_hidden_layers)
    return units["model.embed_tokens"] + units["lm_head"] + n_dense * dense + (proxy.num_hidden_layers - n_dense) * experts


def _first_rows(batch: Batch, rows: int) -> Batch:
    """Return the first rows of a batch's first forward pass."""
    names = ("input_ids", "labels", "positions", "modality", "task")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:1, :rows] for name in names})


def _operations(config: MostConfig, batch: Batch) -> float:
    """Return the floating-point operations of training on a batch."""
    tokens, targets = int((batch.modality != PADDING).sum()), int((batch.labels[..., 1:] != IGNORE).sum())
    return model_flops(config).of_training(tokens, attended_pairs(batch), targets)


def measure_links(ranks: int) -> CpuLinks:
    """Measure gloo between threads of this process, over the loopback device as between processes. Takes a second or two. With many ranks
    only some are measured; the number of rounds of all is extrapolated from them."""
    ranks = min(ranks, _MAX_RANKS)
    seconds: dict[CollectiveKind, dict[int, float]] = {}
    if ranks > 1:
        barrier, store = threading.Barrier(ranks), dist.HashStore()

        def rank_main(rank: int) -> dict[CollectiveKind, dict[int, float]]:
            try:
                return _time_collectives(_group(store, rank, ranks), ranks, barrier)
            except BaseException:  # whatever it is, the other ranks must not wait; it is raised again
                barrier.abort()
                raise

        with ThreadPoolExecutor(ranks) as pool:
            futures = [pool.submit(rank_main, rank) for rank in range(ranks)]
            for future in as_completed(futures):
                future.result()  # raises the first error
        seconds = futures[0].result()
    sent = {kind: (2 if kind == "all-reduce" else 1) * _LARGE * (ranks - 1) / ranks for kind in seconds}  # as in `Collective.nbytes`
    byte = {kind: max(0.0, each[_LARGE] - each[_SMALL]) / sent[kind] for kind, each in seconds.items()}
    return CpuLinks(ranks, {kind: each[_SMALL] for kind, each in seconds.items()}, byte)


def _group(store: dist.Store, rank: int, ranks: int) -> Any:
    """Return a rank's member of a group that is separate from the process's own, on the loopback address."""
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack most of it
    options = gloo._Options()
    options._devices, options._timeout, options._threads = [gloo.create_device(hostname="127.0.0.1")], timedelta(seconds=60), 2
    return gloo(store, rank, ranks, options)


def _time_collectives(group: Any, ranks: int, barrier: threading.Barrier) -> dict[CollectiveKind, dict[int, float]]:
    """Return the mean seconds of a call by kind and size. Every rank makes the same calls."""
    found: dict[CollectiveKind, dict[int, float]] = {}
    for size in (_SMALL, _LARGE):
        for kind, call in _calls(group, size // 4 // ranks, ranks).items():
            call().wait()
            barrier.wait()
            started = clock()
            for _ in range(_CALLS):
                call().wait()
            found.setdefault(kind, {})[size] = (clock() - started) / _CALLS
    return found


def _calls(group: Any, count: int, ranks: int) -> dict[CollectiveKind, Callable[[], dist.Work]]:
    """Return a call of each kind, on messages of `count` numbers for each rank."""
    shard, full, other = (torch.zeros(size) for size in (count, count * ranks, count * ranks))
    return {
        "all-gather": lambda: group._allgather_base(full, shard),
        "reduce-scatter": lambda: group._reduce_scatter_base(shard, full),
        "all-reduce": lambda: group.allreduce([full]),
        "all-to-all": lambda: group.alltoall_base(other, full, [], []),
    }
