"""What this machine's CPU reaches in training: a few real steps of the model, in this process, and gloo's collectives between its threads.

Steps are those of a run, of the same code on the same rows, with random weights. Large models are cut to fewer layers and rows; the rate
that these reach is taken for all. The work of FSDP and of the token exchange beside what they send, most of it in the interpreter, is the
difference that they make to steps of one rank.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

from most_ray.config import OptimizerOptions
from most_ray.data.batch import Batch
from most_ray.metrics.flops import model_flops
from most_ray.model.compat import SUPPORTS_MANY_WORKERS
from most_ray.model.configuration import MostConfig
from most_ray.model.exchange import EXCHANGE
from most_ray.model.modeling import MostForCausalLM, MostMoe
from most_ray.optim.train_state import TrainState, make_state
from most_ray.planner.cost import Collective, Kind, Speed
from most_ray.planner.memory import Shapes
from most_ray.records.template import IGNORE, PADDING
from most_ray.train.step import Precision, StepSettings, attended_pairs, run_step

CALIBRATED = 5  # batches that are wanted
clock: Callable[[], float] = time.perf_counter  # where others use the same cores, a benchmark takes processor time
_CPU = torch.device("cpu")
_MOST_PARAMETERS = 1 << 26  # of what is measured: a GiB with gradients and moments, and three of them are there at once
_PASS_S = 1.0  # that a pass should take at most, at a share of the peak that is only guessed
_LAST_S = 7.0  # after which no more batches are begun: with the last one some ten seconds
_SHARE = 0.1  # of the peak that is reached, about: to choose by, and for models of which not even a part can be measured
_UPDATED = 2e8  # parameters a second of the optimizer, about, where nothing can be measured
ParallelMode = Literal["plain", "sharded", "exchanged"]
_MODES: tuple[ParallelMode, ...] = ("plain", "sharded", "exchanged")  # each is the one before and something more
_MOST_RANKS = 8  # of gloo that are measured: each has sockets to all others, and this process only so many files
_SMALL, _LARGE, _CALLS = 1 << 12, 1 << 21, 12  # bytes of a collective's whole message, and how often it is sent


@dataclass(frozen=True)
class CpuLinks:
    """gloo between `ranks` processes of this machine: seconds of a call among all of them, however small, and of each byte that a rank
    sends, by kind. Nothing is hidden: who sends keeps the same cores busy as who computes."""

    ranks: int
    call: dict[Kind, float]
    byte: dict[Kind, float]

    @property
    def overlap(self) -> bool:
        return False

    def seconds(self, collective: Collective) -> float:
        """Calls of fewer ranks take as many rounds fewer."""
        rounds = (collective.ranks - 1) / max(1, self.ranks - 1)
        return collective.calls * rounds * self.call[collective.kind] + collective.nbytes * self.byte[collective.kind]


@dataclass(frozen=True)
class Calibration:
    """Of one rank with as many threads as it has in the run. rate: operations a second in a forward and backward pass; updated: parameters
    a second of the optimizer; sharding, sharding_update: see `Speed`. measured: False where it is assumed."""

    rate: float
    updated: float
    sharding: float
    sharding_update: float
    exchange: float
    threads: int
    measured: bool = True

    def speed(self, workers: int) -> Speed:
        """Of each of so many workers on this machine, whose cores they share."""
        crowd = max(1.0, workers * self.threads / (os.cpu_count() or 1))
        return Speed(
            half=self.rate / crowd,
            full=self.rate / crowd,
            moved=float("inf"),
            updated=self.updated / crowd,
            links=measure_links(workers),
            sharding=self.sharding * crowd,
            sharding_update=self.sharding_update * crowd,
            exchange=self.exchange * crowd,
        )


def calibrate(
    config: MostConfig, options: OptimizerOptions, batches: Sequence[Batch], dtype: torch.dtype | None, peak: float, threads: int
) -> Calibration:
    """Measure steps of a model on a rank's batches, up to some ten seconds; the first is a warm-up, and where steps are slow not all of
    the others are taken. They must differ as a run's do: what libraries keep for shapes that they have seen would help equal ones. dtype:
    of the autocast, in which the device has this peak.

    The modes take turns on each batch, so that whatever else slows the machine slows all of them: their models, up to a GiB each, are in
    memory together."""
    part = _part(config, Shapes(config), batches[0], peak)
    if part is None:
        return Calibration(_SHARE * peak, _UPDATED, 0.0, 0.0, 0.0, threads, measured=False)
    twin, rows = part
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(), _alone():
            modes = [ProxyModel(twin, options, dtype, mode) for mode in (_MODES if SUPPORTS_MANY_WORKERS else _MODES[:1])]
            taken = _timed(modes, [_first_rows(batch, rows) for batch in batches])
    finally:
        torch.set_num_threads(before)
    passed = float(np.median(taken[1:, 0, 0]))
    updates = taken[1:, 0, 1][taken[1:, 0, 1] > 0]  # a step whose loss or gradients are not finite makes none
    added = [np.maximum(0.0, np.median(taken[1:, mode] - taken[1:, mode - 1], axis=0)) for mode in range(1, len(modes))]
    sharding, exchange = added or np.zeros((2, 2))
    layers = config.num_hidden_layers / twin.num_hidden_layers  # the model may have more of them than what was measured
    return Calibration(
        rate=statistics.median(_operations(twin, _first_rows(batch, rows)) for batch in batches[1 : len(taken)]) / passed,
        updated=Shapes(twin).count / float(np.median(updates)) if len(updates) else _UPDATED,
        sharding=float(sharding[0]) * layers,
        sharding_update=float(sharding[1]) * layers,
        exchange=float(exchange[0]) * layers,
        threads=threads,
    )


def _timed(modes: Sequence[ProxyModel], batches: Sequence[Batch]) -> np.ndarray:
    """Seconds (batches, modes, 2) of a pass and of an update: of the warm-up, of the next batch, and of others while there is time."""
    started, taken = clock(), []
    for index, batch in enumerate(batches):
        if index > 1 and clock() - started > _LAST_S:
            break
        taken.append(_by_turns(modes, batch, index))
    return np.array(taken)


def _by_turns(modes: Sequence[ProxyModel], batch: Batch, first: int) -> list[tuple[float, float]]:
    """Seconds of each mode on the same batch, in the order of modes; for who comes first no shape is in any cache yet."""
    found = {mode: mode.seconds(batch) for mode in (modes[(first + turn) % len(modes)] for turn in range(len(modes)))}
    return [found[mode] for mode in modes]


class ProxyModel:
    """The model, or its first layers, in training."""

    def __init__(self, config: MostConfig, options: OptimizerOptions, dtype: torch.dtype | None, mode: ParallelMode) -> None:
        model = MostForCausalLM(config)
        if mode != "plain":
            _shard(model, exchange=mode == "exchanged")
        self._state: TrainState = make_state(model, options, CALIBRATED)
        settings = StepSettings.of(options, _CPU)
        self._settings = dataclasses.replace(settings, precision=Precision(dtype), max_skipped_steps=CALIBRATED + 1)  # no number ends it

    def seconds(self, batch: Batch) -> tuple[float, float]:
        """Of a forward and backward pass, and of the optimizer's update."""
        marks: list[float] = []
        hooks = [
            register(lambda *_: marks.append(clock()))
            for register in (self._state.optimizer.register_step_pre_hook, self._state.optimizer.register_step_post_hook)
        ]
        started = clock()
        run_step(self._state, batch, self._settings)
        whole = clock() - started
        for hook in hooks:
            hook.remove()
        updated = marks[-1] - marks[0] if marks else 0.0  # none where a loss was not finite
        return whole - updated, updated


def _shard(model: MostForCausalLM, exchange: bool) -> None:
    """As transformers lays DeepSeek-V2 out, over one rank, with expert parallelism or without."""
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
def _alone() -> Iterator[None]:
    """A process group of this process, for as long as it lasts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _part(config: MostConfig, shapes: Shapes, batch: Batch, peak: float) -> tuple[MostConfig, int] | None:
    """As many rows of one pass, then as many layers, as can be measured; None where not even one of each kind on one row can."""
    n_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    rows = batch.input_ids.shape[1]
    while rows:
        one = _first_rows(batch, rows)
        for layers in range(config.num_hidden_layers, min(2, config.num_hidden_layers) - 1, -1):
            twin = copy.deepcopy(config)
            twin.num_hidden_layers = layers
            if layers < config.num_hidden_layers:
                twin.first_k_dense_replace = min(1, n_dense)
            if _operations(twin, one) <= _PASS_S * _SHARE * peak and _count(twin, shapes) <= _MOST_PARAMETERS:
                return twin, rows
        rows //= 2
    return None


def _count(twin: MostConfig, shapes: Shapes) -> int:
    """Parameters of the first layers of a model."""
    units = {name: sum(unit) for name, unit in shapes.units().items()}
    dense, experts = (f"model.layers.{index}" for index in (0, shapes.config.num_hidden_layers - 1))
    n_dense = min(twin.first_k_dense_replace, twin.num_hidden_layers)
    ends = units["model.embed_tokens"] + units["lm_head"]
    return ends + n_dense * units[dense] + (twin.num_hidden_layers - n_dense) * units[experts]


def _first_rows(batch: Batch, rows: int) -> Batch:
    names = ("input_ids", "labels", "positions", "modality", "task")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[:1, :rows] for name in names})


def _operations(config: MostConfig, batch: Batch) -> float:
    tokens, targets = int((batch.modality != PADDING).sum()), int((batch.labels[..., 1:] != IGNORE).sum())
    return model_flops(config).of_training(tokens, attended_pairs(batch), targets)


def measure_links(ranks: int) -> CpuLinks:
    """gloo among so many threads of this process, over the loopback device as between processes; of many ranks a few, by which the rounds
    of all are reckoned. A second or two."""
    ranks = min(ranks, _MOST_RANKS)
    seconds: dict[Kind, dict[int, float]] = {}
    if ranks > 1:
        together = threading.Barrier(ranks)
        store = dist.HashStore()
        failures: list[BaseException] = []

        def rank_main(rank: int) -> None:
            try:
                found = _time_collectives(_group(store, rank, ranks), ranks, together)
                if rank == 0:
                    seconds.update(found)
            except BaseException as error:  # noqa: BLE001 - raised below, by the caller's thread
                failures.append(error)
                together.abort()

        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
    return CpuLinks(
        ranks=ranks,
        call={kind: each[_SMALL] for kind, each in seconds.items()},
        byte={kind: max(0.0, each[_LARGE] - each[_SMALL]) / _sent(kind, _LARGE, ranks) for kind, each in seconds.items()},
    )


def _sent(kind: Kind, whole: int, ranks: int) -> float:
    """Bytes that a rank sends of a message, as `Collective.nbytes` counts them."""
    return (2 if kind == "all-reduce" else 1) * whole * (ranks - 1) / ranks


def _group(store: dist.Store, rank: int, ranks: int) -> Any:
    """One rank's end of a group beside the process's own, on an address that every machine has. torch's stubs know little of it."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=60)
    options._threads = 2
    return gloo(store, rank, ranks, options)


def _time_collectives(group: Any, ranks: int, together: threading.Barrier) -> dict[Kind, dict[int, float]]:
    """Mean seconds of each kind and size; every rank makes the same calls."""
    found: dict[Kind, dict[int, float]] = {}
    for size in (_SMALL, _LARGE):
        for kind, call in _calls(group, size // 4 // ranks, ranks).items():
            call().wait()
            together.wait()
            started = clock()
            for _ in range(_CALLS):
                call().wait()
            found.setdefault(kind, {})[size] = (clock() - started) / _CALLS
    return found


def _calls(group: Any, count: int, ranks: int) -> dict[Kind, Callable[[], dist.Work]]:
    """Of messages of `count` numbers a rank."""
    part, whole, other = torch.zeros(count), torch.zeros(count * ranks), torch.zeros(count * ranks)
    return {
        "all-gather": lambda: group._allgather_base(whole, part),
        "reduce-scatter": lambda: group._reduce_scatter_base(part, whole),
        "all-reduce": lambda: group.allreduce([whole]),
        "all-to-all": lambda: group.alltoall_base(other, whole, [], []),
    }
