"""Reading checkpoints: any number of ranks in any layout reads what any other wrote, each only the slices that it needs.

Every rank writes one safetensors file; nothing is pickled. Tensors are named `model.NAME`, `optimizer.NAME.MOMENT` (in 8 bits MOMENT_codes
and MOMENT_scale), `state.NAME` and `random.DEVICE.RANK`. Everything else is in state.json. Which checkpoints there are is in catalog.py,
writing in writer.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from most_ray.checkpoint.catalog import check_format, read_marker
from most_ray.checkpoint.shards import DamagedFileError, StoredTensor, TensorShard, index_tensors, read_header, read_shards, shard_of
from most_ray.distributed.ranks import this_rank
from most_ray.errors import CheckpointError
from most_ray.io import storage
from most_ray.model.placement import row_order
from most_ray.model.routing import BALANCE_BIAS
from most_ray.optim.optimizer import saved_state
from most_ray.optim.train_state import LossScale, TrainState, set_schedule

STATE = "state.json"


def _require_marker(uri: str) -> dict[str, Any]:
    """Read the commit marker, with a damaged one as a CheckpointError too."""
    try:
        return read_marker(uri)
    except DamagedFileError as error:
        raise _damaged(uri, str(error)) from error


def _damaged(uri: str, reason: str) -> CheckpointError:
    return CheckpointError("checkpoint", storage.redact(uri), f"has a damaged file ({reason}).", "Delete it to resume from an older one.")


def read_state(uri: str | Path) -> dict[str, Any]:
    """Read state.json of a complete checkpoint.

    Raises:
        CheckpointError: the folder is missing, was never committed, is damaged, or has another format.
    """
    uri = str(uri)
    _require_marker(uri)
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, STATE)))
        found = content["format"]
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise _damaged(uri, f"{STATE}: {error}") from error
    check_format(uri, found)
    return content


def model_shards(model: nn.Module) -> list[TensorShard]:
    """Return this rank's shards of the model's tensors under their names in checkpoints. They share memory with the model."""
    tensors = model.state_dict(keep_vars=True)
    return [shard_of(f"model.{name}", tensor.detach(), row_order(model, name)) for name, tensor in tensors.items()]


def state_shards(state: TrainState) -> list[TensorShard]:
    """Return this rank's shards of all tensors of a training state. They share memory with it."""
    return _state_shards(state, ())[0]


def _state_shards(state: TrainState, stored: Container[str]) -> tuple[list[TensorShard], list[Callable[[], None]]]:
    """Return the shards of a training state, with moments in the form (float32 or 8 bits) of the names in `stored`, and functions that take
    over moments of the other form once they have been read."""
    shards, finishers = model_shards(state.model), []
    for name, parameter in state.model.named_parameters():
        order = row_order(state.model, name)
        tensors, finish = saved_state(state.optimizer, parameter, f"optimizer.{name}.", stored)
        shards += [shard_of(key, value, order if value.dim() else None) for key, value in tensors.items()]
        finishers.append(finish)
    return shards + [shard_of(f"state.{name}", value) for name, value in sorted(state.buffers.items())], finishers


def random_shards() -> list[TensorShard]:
    """Return copies of this rank's random number generator states."""
    rank = this_rank()
    states = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return [shard_of(name, value, rank=0) for name, value in states.items()]


def load(uri: str | Path, state: TrainState, with_optimizer: bool = True, scratch: Path | None = None) -> dict[str, Any]:
    """Read a checkpoint of any layout into a live training state, in place. Every rank calls it.

    Args:
        with_optimizer: read the optimizer's state, step, schedule, loss scale, buffers and random states too, not the weights alone.
        scratch: folder for the files of a remote checkpoint, one at a time; by default the temporary folder.

    Returns:
        The content of state.json.

    Raises:
        CheckpointError: it is incomplete or damaged, or a tensor is missing or has another shape.
    """
    uri = str(uri)
    content = read_state(uri)
    files = CheckpointFiles(uri, scratch)
    n_tensors = sum(name.startswith("model.") for name in files.index)
    if n_tensors != content["n_tensors"]:
        raise _damaged(uri, f"{n_tensors} of {content['n_tensors']} model tensors are there")
    # Missing buffers that the run did not need before (balance biases are zeros), and random states of ranks that did not exist, keep
    # their initial values.
    shards, finishers = _state_shards(state, files.index) if with_optimizer else (model_shards(state.model), [])
    found = [shard for shard in shards if shard.name in files.index or not _is_optional(shard.name)]
    if not with_optimizer:
        files.read(found)
        return content
    random = [shard for shard in random_shards() if shard.name in files.index]
    files.read(found + random)
    for finish in finishers:
        finish()
    for shard in random:
        (torch.set_rng_state if ".cpu." in shard.name else torch.cuda.set_rng_state)(shard.chunks[0].local)
    state.step = content["step"]
    state.skipped_in_row = content["skipped_in_row"]
    set_schedule(state, content["scheduler"]["last_epoch"])
    stored_scale = LossScale(**content["loss_scale"])
    if state.loss_scale.enabled and stored_scale.enabled:
        state.loss_scale = stored_scale  # a run that was not in float16 before starts with a fresh scale
    return content


def _is_optional(name: str) -> bool:
    return name.startswith("state.") or name.endswith(BALANCE_BIAS)


def read_model(uri: str, model: nn.Module) -> None:
    """Fill a model, on any number of ranks, with a checkpoint's weights.

    Raises:
        CheckpointError: it is incomplete or damaged, or its tensors are not the model's.
    """
    CheckpointFiles(uri).read(model_shards(model))


class CheckpointFiles:
    """The tensors in a complete checkpoint's files.

    Attributes:
        index: name -> the tensor's shape, type, and chunks in files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, uri: str, scratch: Path | None = None) -> None:
        self._uri, self._scratch = uri, scratch
        headers = {}
        for name in sorted(_require_marker(uri)["files"]):
            if name.endswith(".safetensors"):
                try:
                    with storage.open_read(storage.join(uri, name)) as stream:
                        headers[name] = read_header(stream)
                except (FileNotFoundError, DamagedFileError) as error:
                    raise _damaged(uri, f"{name}: {error}") from error
        try:
            self.index: dict[str, StoredTensor] = index_tensors(headers)
        except (KeyError, ValueError, TypeError) as error:
            raise _damaged(uri, f"the header of one of {len(headers)}: {error}") from error

    def read(self, shards: list[TensorShard]) -> None:
        """Fill the live tensors that `shards` share memory with. The model's must be all that the checkpoint has.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape, or a file is damaged.
        """
        shown = storage.redact(self._uri)
        stored = {name: tuple(entry.metadata.size) for name, entry in self.index.items()}
        missing = sorted(shard.name for shard in shards if shard.name not in stored)
        if missing:
            raise CheckpointError("checkpoint", shown, f"lacks {len(missing)} tensors, the first being {missing[0]}.")
        for shard in shards:
            if stored[shard.name] != shard.shape:
                rule = f"holds {shard.name} in shape {stored[shard.name]}, the model has {shard.shape}."
                raise CheckpointError("checkpoint", shown, rule)
        live = {shard.name for shard in shards}
        unread = sorted(name for name in stored if name.startswith("model.") and name not in live)
        if unread:
            raise CheckpointError("checkpoint", shown, f"holds {len(unread)} tensors unknown to the model, the first {unread[0]}.")
        with tempfile.TemporaryDirectory(prefix="most_ray-load-", dir=self._scratch) as folder:
            try:
                read_shards(shards, self.index, lambda name: self._fetch(name, Path(folder)), self._release)
            except (FileNotFoundError, DamagedFileError) as error:
                raise _damaged(self._uri, str(error)) from error

    def _fetch(self, name: str, folder: Path) -> Path:
        uri = storage.join(self._uri, name)
        if not storage.is_remote(uri):
            return storage.local(uri)
        storage.download(uri, folder / name)
        return folder / name

    def _release(self, path: Path) -> None:
        if storage.is_remote(self._uri):
            path.unlink()
