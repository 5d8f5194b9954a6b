"""Checkpoints: sharded safetensors in place, a commit marker last. A folder without the marker is not a checkpoint.

Nothing in a checkpoint is pickled. Tensors are named `model.NAME`, `optimizer.NAME.MOMENT` and `random.DEVICE.RANK`; a tensor's shards
carry their offsets, so any number of ranks in any layout reads what any other wrote. All else is in state.json.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from most_ray.data.plan import Cursor
from most_ray.errors import CheckpointError
from most_ray.train.state import LossScale, TrainState

logger = logging.getLogger(__name__)
FORMAT = 1
COMMIT = "commit.json"


def step_dir(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:09d}"


def committed(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step-*/{COMMIT}"))


def read_state(directory: Path) -> dict[str, Any]:
    """state.json of a complete checkpoint.

    Raises:
        CheckpointError: the folder is missing, was not committed, or is of another format.
    """
    if not (directory / COMMIT).exists():
        raise CheckpointError("checkpoint", str(directory), "is missing or was never completed (no commit.json).")
    state: dict[str, Any] = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError("checkpoint", str(directory), f"has format {state.get('format')}, not {FORMAT}.")
    return state


def save(
    directory: Path,
    state: TrainState,
    cursor: Cursor,
    extra: dict[str, Any],
    may_commit: Callable[[], bool],
    write_more: Callable[[Path], None],
) -> None:
    """Write a checkpoint; every rank calls it.

    Args:
        extra: goes into state.json.
        may_commit: asked on rank 0 before anything is touched and again before the marker is written: False if another attempt has
            taken over the run.
        write_more: called on rank 0 with the folder, for the tokenizer and configuration.

    Raises:
        CheckpointError: another attempt has taken over.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    _require_turn(rank != 0 or (may_commit() and not (directory / COMMIT).exists()))
    if rank == 0:
        if directory.exists():
            shutil.rmtree(directory)  # left by an attempt that died before its commit
        directory.mkdir(parents=True)
    _barrier()
    tensors = {**_contiguous(_tensors(state)), **_random_state(rank)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True), no_dist=not dist.is_initialized())
    _barrier()
    allowed = True
    if rank == 0:
        content = {
            "format": FORMAT,
            "step": state.step,
            "cursor": asdict(cursor),
            "scheduler": {"last_epoch": state.scheduler.last_epoch},
            "loss_scale": asdict(state.loss_scale),
            "n_tensors": len([name for name in tensors if name.startswith("model.")]),
            **extra,
        }
        (directory / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        write_more(directory)
        allowed = may_commit()
        if allowed:
            marker = directory / f".{COMMIT}"
            marker.write_text(json.dumps({"step": state.step}), encoding="utf-8")
            marker.rename(directory / COMMIT)
    _require_turn(allowed)


def _require_turn(allowed: bool) -> None:
    """Rank 0's answer, on every rank.

    Raises:
        CheckpointError: another attempt has taken over, or has committed this very step.
    """
    answer = [allowed]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if not answer[0]:
        raise CheckpointError("attempt", None, "has been replaced by a newer one of the same run; its checkpoint was not committed.")


def load(directory: Path, state: TrainState, with_optimizer: bool = True) -> dict[str, Any]:
    """Read a checkpoint of any layout into a live state; every rank calls it. Returns state.json.

    With `with_optimizer` the step, schedule, loss scale and random state come along; without, only the weights.

    Raises:
        CheckpointError: incomplete, or a tensor is missing or of another shape.
    """
    content = read_state(directory)
    live = _tensors(state) if with_optimizer else model_tensors(state.model)
    read_tensors(directory, live)
    if with_optimizer:
        state.step = content["step"]
        _set_schedule(state, content["scheduler"]["last_epoch"])
        stored_scale = LossScale(**content["loss_scale"])
        if state.loss_scale.enabled and stored_scale.enabled:
            state.loss_scale = stored_scale  # a run that was not in float16 before begins with a fresh scale
        _restore_random_state(directory)
    return content


def _set_schedule(state: TrainState, last_epoch: int) -> None:
    """The schedule is a function of one number; rates per parameter group are made anew, for another layout has other groups."""
    scheduler = state.scheduler
    scheduler.last_epoch = last_epoch
    rates = [base * factor(last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def read_tensors(directory: Path, live: dict[str, torch.Tensor]) -> None:
    """Fill live tensors (plain or sharded) from a checkpoint, exactly those asked for."""
    reader = HuggingFaceStorageReader(str(directory))
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise CheckpointError(
            "checkpoint", str(directory), f"has a damaged file ({error}).", "Delete it to go on from an older one."
        ) from error
    stored = {name: tuple(entry.size) for name, entry in metadata.items() if _is_tensor(entry)}
    missing = sorted(name for name in live if name not in stored)
    if missing:
        raise CheckpointError("checkpoint", str(directory), f"lacks {len(missing)} tensors, the first being {missing[0]}.")
    for name, tensor in live.items():
        if stored[name] != tuple(tensor.shape):
            raise CheckpointError(
                "checkpoint",
                str(directory),
                f"holds {name} in shape {stored[name]}, the model has {tuple(tensor.shape)}.",
            )
    unread = sorted(name for name in stored if name.startswith("model.") and name not in live)
    if unread:
        raise CheckpointError("checkpoint", str(directory), f"holds {len(unread)} tensors unknown to the model, the first {unread[0]}.")
    targets = _contiguous(live)
    _dcp_load(targets, reader, alone=not dist.is_initialized())
    with torch.no_grad():
        for name, tensor in live.items():
            filled = targets[name]
            if filled is not tensor:
                assert isinstance(tensor, DTensor)
                assert isinstance(filled, DTensor)
                tensor.copy_(filled.redistribute(placements=tensor.placements))


def _dcp_load(targets: dict[str, torch.Tensor], reader: HuggingFaceStorageReader, alone: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(targets, storage_reader=reader, no_dist=alone)
        except (CheckpointException, SafetensorError) as error:
            raise CheckpointError("checkpoint", str(reader.path), f"has a damaged file ({' '.join(str(error).split())[:200]}).") from error


def _is_tensor(entry: Any) -> TypeGuard[TensorStorageMetadata]:
    return isinstance(entry, TensorStorageMetadata)


def keep_last(checkpoints: Path, count: int) -> None:
    """Delete all but the newest `count` complete checkpoints, marker first."""
    for old in committed(checkpoints)[:-count]:
        (old / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under their checkpoint names; shares memory with the model."""
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def _tensors(state: TrainState) -> dict[str, torch.Tensor]:
    tensors = model_tensors(state.model)
    for name, parameter in state.model.named_parameters():
        for moment, value in sorted(state.optimizer.state.get(parameter, {}).items()):
            tensors[f"optimizer.{name}.{moment}"] = value
    return tensors


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strided shards (experts split over both expert-parallel and FSDP ranks) as plain ones: the storage layer describes a shard as
    one rectangle and would write strided ones to the wrong place without a word."""

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        placements = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
        return tensor if placements == list(tensor.placements) else tensor.redistribute(placements=placements)

    return {name: plain(tensor) for name, tensor in tensors.items()}


def _random_state(rank: int) -> dict[str, torch.Tensor]:
    states = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return states


def _restore_random_state(directory: Path) -> None:
    """This rank's random state, where the checkpoint holds one (it was written by as many ranks)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    reader = HuggingFaceStorageReader(str(directory))
    stored = reader.read_metadata().state_dict_metadata
    states = {name: value for name, value in _random_state(rank).items() if name in stored}
    _dcp_load(states, HuggingFaceStorageReader(str(directory)), alone=True)
    for name, value in states.items():
        (torch.set_rng_state if ".cpu." in name else torch.cuda.set_rng_state)(value)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
