"""Reading checkpoints: any number of ranks in any layout reads what any other wrote, each only the slices that it needs.

Every rank writes one safetensors file; nothing is pickled. Tensors are named `model.NAME`, `optimizer.NAME.MOMENT` (in 8 bits MOMENT_codes
and MOMENT_scale), `state.NAME` and `random.DEVICE.RANK`. Everything else is in state.json. Which checkpoints there are is in catalog.py,
writing in writer.py.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from most_ray.checkpoint.catalog import check_format, read_marker
from most_ray.checkpoint.content import STATE, check_state, parse_state
from most_ray.checkpoint.files import DamagedFileError, read_header
from most_ray.checkpoint.shards import StoredTensor, TensorShard, index_tensors, read_shards, shard_of
from most_ray.distributed.ranks import this_rank
from most_ray.errors import CheckpointError, count_of
from most_ray.io import storage
from most_ray.model.placement import row_order
from most_ray.model.routing import BALANCE_BIAS
from most_ray.optim.optimizer import saved_state
from most_ray.optim.train_state import LossScale, TrainState, set_schedule
from most_ray.records.model_files import check_weight_count


@contextlib.contextmanager
def _explained(uri: str, what: str, *damage: type[Exception]) -> Iterator[None]:
    """Raise errors of the types `damage` as a CheckpointError that says, after `what`, what is wrong with a checkpoint."""
    caught: tuple[type[Exception], ...] = (DamagedFileError, *damage)
    try:
        yield
    except caught as error:
        rule = f"has a damaged file ({what}{error})."
        raise CheckpointError("checkpoint", storage.redact(uri), rule, "Delete it to resume from an older one.") from error


def read_state(uri: str | Path) -> dict[str, Any]:
    """Read state.json of a complete checkpoint. Raises CheckpointError if the folder is missing, was never committed, is damaged, or has
    another format."""
    uri = str(uri)
    with _explained(uri, ""):
        marker = read_marker(uri)
    with _explained(uri, f"{STATE}: ", FileNotFoundError):
        content = parse_state(storage.read_bytes(storage.join(uri, STATE)))
    check_format(uri, content["format"])
    with _explained(uri, ""):
        check_state(content, marker["step"])
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
    states = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})}
    return [shard_of(f"random.{device}.{this_rank()}", value, rank=0) for device, value in states.items()]


def load(uri: str | Path, state: TrainState, with_optimizer: bool = True) -> dict[str, Any]:
    """Read a checkpoint of any layout into a live training state, in place. Every rank calls it.

    Args:
        with_optimizer: read the optimizer's state, step, schedule, loss scale, buffers and random states too, not the weights alone.

    Returns:
        The content of state.json.

    Raises:
        CheckpointError: it is incomplete or damaged, or a tensor is missing or has another shape.
    """
    uri = str(uri)
    content = read_state(uri)
    files = CheckpointFiles(uri)
    n_tensors = sum(name.startswith("model.") for name in files.index)
    if n_tensors != content["n_tensors"]:
        with _explained(uri, ""):
            raise DamagedFileError(f"{n_tensors} of {count_of(content['n_tensors'], 'model tensor')} are there")
    # Missing buffers that the run did not need before (balance biases are zeros), and random states of ranks that did not exist, keep
    # their initial values.
    shards, finishers = _state_shards(state, files.index) if with_optimizer else (model_shards(state.model), [])
    found = [s for s in shards if s.name in files.index or not (s.name.startswith("state.") or s.name.endswith(BALANCE_BIAS))]
    if not with_optimizer:
        files.read(found)
        return content
    random = [shard for shard in random_shards() if shard.name in files.index]
    files.read(found + random)
    for finish in finishers:
        finish()
    for shard in random:
        with _explained(uri, f"{shard.name}: ", RuntimeError):
            (torch.set_rng_state if ".cpu." in shard.name else torch.cuda.set_rng_state)(shard.chunks[0].local)
    state.step = content["step"]
    state.skipped_in_row = content["skipped_in_row"]
    set_schedule(state, content["scheduler"]["last_epoch"])
    stored_scale = LossScale(**content["loss_scale"])
    if state.loss_scale.enabled and stored_scale.enabled:
        state.loss_scale = stored_scale  # a run that was not in float16 before starts with a fresh scale
    return content


def check_model_size(uri: str, wanted: int) -> None:
    """Raise CheckpointError if a model of `wanted` weights is far larger than a checkpoint's, before memory is allocated for it, or if
    the checkpoint is incomplete or damaged."""
    index = CheckpointFiles(uri).index
    held = {name: tuple(entry.metadata.size) for name, entry in index.items() if name.startswith("model.")}
    check_weight_count(wanted, held, uri, "checkpoint")


def read_model(uri: str, model: nn.Module) -> None:
    """Fill a model, on any number of ranks, with a checkpoint's weights. Raises CheckpointError as `load` does."""
    CheckpointFiles(uri).read(model_shards(model))


class CheckpointFiles:
    """The tensors in a complete checkpoint's files.

    Attributes:
        index: name -> the tensor's shape, type, and chunks in files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        with _explained(uri, ""):
            names = sorted(name for name in read_marker(uri)["files"] if name.endswith(".safetensors"))
        headers = {}
        for name in names:
            with _explained(uri, f"{name}: ", FileNotFoundError), storage.open_read(storage.join(uri, name)) as stream:
                headers[name] = read_header(stream)
        with _explained(uri, ""):
            self.index: dict[str, StoredTensor] = index_tensors(headers)

    def read(self, shards: list[TensorShard]) -> None:
        """Fill the live tensors that `shards` share memory with. The model's must be all that the checkpoint has. Raises CheckpointError if
        a tensor is missing, unknown or of another shape, or a file is damaged."""
        shown, live = storage.redact(self._uri), {shard.name for shard in shards}
        stored = {name: tuple(entry.metadata.size) for name, entry in self.index.items()}
        if missing := sorted(live - set(stored)):
            raise CheckpointError("checkpoint", shown, f"lacks {count_of(len(missing), 'tensor')}, the first being {missing[0]}.")
        for shard in shards:
            if stored[shard.name] != shard.shape:
                rule = f"holds {shard.name} in shape {stored[shard.name]}, the model has {shard.shape}."
                raise CheckpointError("checkpoint", shown, rule)
        if unread := sorted(name for name in stored if name.startswith("model.") and name not in live):
            rule = f"holds {count_of(len(unread), 'tensor')} unknown to the model, the first {unread[0]}."
            raise CheckpointError("checkpoint", shown, rule)
        with _explained(self._uri, "", FileNotFoundError):
            read_shards(shards, self.index, self._fetched)

    @contextlib.contextmanager
    def _fetched(self, name: str) -> Iterator[Path]:
        """Yield the local path of a file, for a remote one that of a copy, which is then removed."""
        if not storage.is_remote(self._uri):
            yield storage.local(self._uri) / name
            return
        with tempfile.TemporaryDirectory(prefix="most_ray-load-") as folder:
            storage.download(storage.join(self._uri, name), Path(folder) / name)
            yield Path(folder) / name
