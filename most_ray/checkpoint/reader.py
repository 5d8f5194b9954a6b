"""Checkpoints: one safetensors file per rank, a commit marker last. A folder without the marker is not a checkpoint.

Nothing in a checkpoint is pickled. Tensors are named `model.NAME`, `optimizer.NAME.MOMENT` (in 8 bits MOMENT_codes and MOMENT_scale),
`state.NAME` and `random.DEVICE.RANK`; any number of ranks in any layout reads what any other wrote. All else is in state.json. The marker,
commit.json, lists every file with its size and xxh3. Places are paths or URIs (`s3://bucket/run/checkpoints/step-000000100`). Writing is in
writer.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Collection, Container, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from most_ray.checkpoint.retention import steps_to_delete
from most_ray.checkpoint.shards import CHUNK, DamagedFileError, Stored, TensorShard, index_of, part_of, read_header, read_parts
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import CheckpointError
from most_ray.io import storage
from most_ray.io.run_folder import COMMIT, step_uri
from most_ray.model.placement import row_order
from most_ray.model.routing import BALANCE_BIAS
from most_ray.optim.optimizer import saved_state
from most_ray.optim.train_state import LossScale, TrainState, set_schedule

logger = logging.getLogger(__name__)
FORMAT = 2
STATE = "state.json"
DEEP_BYTES = 16 << 30  # a checkpoint is hashed before it is trusted where a process has no more than this to read
_STEP = re.compile(r"step-(\d{9,})")


def step_of(uri: str) -> int:
    """The step of a checkpoint's place.

    Raises:
        CheckpointError: its name is not that of a step.
    """
    match = _STEP.fullmatch(storage.name_of(uri))
    if match is None:
        raise CheckpointError("checkpoint", storage.redact(uri), "is not named step-NNNNNNNNN.")
    return int(match[1])


def _steps(checkpoints: str) -> dict[int, bool]:
    """The steps that have a folder, and whether it is committed."""
    found: dict[int, bool] = {}
    if storage.is_remote(checkpoints):
        names = [entry.name.split("/") for entry in storage.list_files(checkpoints, ("",))] if storage.exists(checkpoints) else []
        for folder, *rest in names:
            if rest and (match := _STEP.fullmatch(folder)):
                found[int(match[1])] = found.get(int(match[1]), False) or rest == [COMMIT]
    else:
        for path in storage.local(checkpoints).glob("step-*"):
            if match := _STEP.fullmatch(path.name):
                found[int(match[1])] = (path / COMMIT).exists()
    return found


def committed(checkpoints: str) -> list[str]:
    """Places of the complete checkpoints, oldest first."""
    return [step_uri(checkpoints, step) for step, done in sorted(_steps(checkpoints).items()) if done]


def read_marker(uri: str) -> dict[str, Any]:
    """commit.json: `step` and `files`, name -> [bytes, xxh3_128].

    Raises:
        CheckpointError: the folder is missing, was not committed, or is of another format. DamagedFileError: the marker is garbage.
    """
    try:
        data = storage.read_bytes(storage.join(uri, COMMIT))
    except FileNotFoundError:
        raise CheckpointError("checkpoint", storage.redact(uri), f"is missing or was never completed (no {COMMIT}).") from None
    try:
        marker: dict[str, Any] = json.loads(data)
        found, _ = marker.get("format", 1), marker["step"]
        whole = found != FORMAT or all(isinstance(size, int) and isinstance(digest, str) for size, digest in marker["files"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedFileError(f"{COMMIT} is cut off or garbage ({error})") from error
    if not whole:
        raise DamagedFileError(f"{COMMIT} is cut off or garbage (its list of files)")
    check_format(uri, found)
    return marker


def check_format(uri: str, found: object) -> None:
    """Raises CheckpointError for a checkpoint of another format than this version's."""
    if found != FORMAT:
        remedy = "Read it with the version that wrote it (export, then start from the exported model), or give the run another name."
        raise CheckpointError("checkpoint", storage.redact(uri), f"has format {found}, not {FORMAT}.", remedy)


def _marker(uri: str) -> dict[str, Any]:
    """As `read_marker`, with garbage as a CheckpointError too."""
    try:
        return read_marker(uri)
    except DamagedFileError as error:
        raise _damaged(uri, str(error)) from error


def _damaged(uri: str, reason: str) -> CheckpointError:
    return CheckpointError("checkpoint", storage.redact(uri), f"has a damaged file ({reason}).", "Delete it to go on from an older one.")


def read_state(uri: str | Path) -> dict[str, Any]:
    """state.json of a complete checkpoint.

    Raises:
        CheckpointError: the folder is missing, was not committed, is damaged, or is of another format.
    """
    uri = str(uri)
    _marker(uri)
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(storage.join(uri, STATE)))
        found = content["format"]
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise _damaged(uri, f"{STATE}: {error}") from error
    check_format(uri, found)
    return content


def find_corruption(uri: str, rank: int = 0, world: int = 1, *, deep: bool = False) -> str | None:
    """What is wrong with a checkpoint that has its marker; None where every file is there with its size and, `deep`, its hash.

    Hashing is dealt out: this call takes the files of `rank` out of `world` callers. (Sizes all of them look at: that is one listing.)

    Raises:
        CheckpointError: it was never completed, or has another format. DataError: the storage fails.
    """
    try:
        files = read_marker(uri)["files"]
    except DamagedFileError as error:
        return str(error)
    sizes = {entry.name: entry.size for entry in storage.list_files(uri, ("",))}
    for number, (name, (size, digest)) in enumerate(sorted(files.items())):
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes, not {size:,}"
        if deep and number % world == rank and hash_file(storage.join(uri, name)) != digest:
            return f"{name} has other content than was written (its hash differs)"
    return None


def hash_file(uri: str | Path) -> str:
    """xxh3_128 of a file."""
    state = xxhash.xxh3_128()
    with storage.open_read(uri) as stream:
        while chunk := stream.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def latest_valid(checkpoints: str, deep_bytes: int = DEEP_BYTES) -> tuple[str | None, list[tuple[str, str]]]:
    """The newest checkpoint without damage, and the newer ones that have some, each with what is wrong. For one process.

    Args:
        deep_bytes: a checkpoint of more bytes is judged by the sizes of its files.

    Raises:
        CheckpointError: the newest has another format. DataError: the storage fails.
    """
    return _first_valid(committed(checkpoints), lambda uri: find_corruption(uri, deep=_size(uri) <= deep_bytes))


def latest_valid_on_all_ranks(checkpoints: str, deep_bytes: int = DEEP_BYTES) -> tuple[str | None, list[tuple[str, str]]]:
    """As `latest_valid`, on all ranks of the default group: they share the hashing, up to `deep_bytes` each, and agree."""
    rank, world = this_rank(), world_size()

    def reason(uri: str) -> str | None:
        reasons = all_gather_or_raise(lambda: find_corruption(uri, rank, world, deep=_size(uri) <= deep_bytes * world))
        return next((reason for reason in reasons if reason), None)

    return _first_valid(all_gather_or_raise(lambda: committed(checkpoints) if rank == 0 else [])[0], reason)


def _first_valid(uris: list[str], reason: Callable[[str], str | None]) -> tuple[str | None, list[tuple[str, str]]]:
    torn: list[tuple[str, str]] = []
    for uri in reversed(uris):
        if (why := reason(uri)) is None:
            return uri, torn
        torn.append((uri, why))
    return None, torn


def _size(uri: str) -> int:
    try:
        return sum(size for size, _ in read_marker(uri)["files"].values())
    except DamagedFileError:
        return 0


def require_one(intact: str | None, torn: list[tuple[str, str]]) -> None:
    """A run that has checkpoints, but none to go on from, must not begin anew in silence.

    Raises:
        CheckpointError: all are damaged; names the newest.
    """
    if intact is None and torn:
        uri, reason = torn[0]
        rule = f"is damaged ({reason}), and so are all {len(torn)} of the run."
        raise CheckpointError("checkpoint", storage.redact(uri), rule, "Mend the storage, or delete them to begin anew.")


def invalidate(uri: str) -> None:
    """Take a damaged checkpoint's marker away, to where a person still finds it: it is none any more, and its step may be saved again."""
    with contextlib.suppress(FileNotFoundError):
        storage.write_bytes(storage.join(uri, f"{COMMIT}.damaged"), storage.read_bytes(storage.join(uri, COMMIT)))
    storage.remove(storage.join(uri, COMMIT))


def prune(
    checkpoints: str,
    keep_last: int,
    keep_best: int = 0,
    scores: Mapping[int, float] | None = None,
    pending: Collection[int] = (),
) -> list[int]:
    """Delete what `steps_to_delete` names, marker first, and what dead attempts left of older steps. Returns the deleted steps.

    One process calls it, at any time: a checkpoint under way is newer than all complete ones.
    """
    found = _steps(checkpoints)
    done = [step for step, is_committed in found.items() if is_committed]
    deleted = steps_to_delete(done, keep_last, keep_best, scores, pending)
    leftovers = [step for step, is_committed in found.items() if not is_committed and done and step < max(done)]
    for step in (*deleted, *sorted(leftovers)):
        uri = step_uri(checkpoints, step)
        storage.remove(storage.join(uri, COMMIT))
        storage.remove(uri)
    return deleted


def model_parts(model: nn.Module, rank: int | None = None) -> list[TensorShard]:
    """The model's tensors under their checkpoint names; they share memory with the model."""
    tensors = model.state_dict(keep_vars=True)
    return [part_of(f"model.{name}", tensor.detach(), row_order(model, name), rank) for name, tensor in tensors.items()]


def state_parts(state: TrainState, rank: int | None = None) -> list[TensorShard]:
    """All tensors of a training state under their checkpoint names; they share memory with it."""
    return _readable_parts(state, (), rank)[0]


def _readable_parts(
    state: TrainState, stored: Container[str], rank: int | None = None
) -> tuple[list[TensorShard], list[Callable[[], None]]]:
    """The same with moments in the form that `stored` names, and what is to be done when they have been read."""
    parts, ends = model_parts(state.model, rank), []
    for name, parameter in state.model.named_parameters():
        order = row_order(state.model, name)
        tensors, end = saved_state(state.optimizer, parameter, f"optimizer.{name}.", stored)
        parts += [part_of(what, value, order if value.dim() else None, rank) for what, value in tensors.items()]
        ends.append(end)
    return parts + [part_of(f"state.{name}", value, None, rank) for name, value in sorted(state.buffers.items())], ends


def random_parts() -> list[TensorShard]:
    """Copies of this rank's random states."""
    rank = this_rank()
    states = {f"random.cpu.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
    return [part_of(name, value, rank=0) for name, value in states.items()]


def load(uri: str | Path, state: TrainState, with_optimizer: bool = True, scratch: Path | None = None) -> dict[str, Any]:
    """Read a checkpoint of any layout into a live state, in place; every rank calls it. Returns state.json.

    With `with_optimizer` the step, schedule, loss scale, buffers and random state come along; without, only the weights.

    Args:
        scratch: where files of a remote place are kept while they are read, one at a time; by default the temporary folder.

    Raises:
        CheckpointError: incomplete or damaged, or a tensor is missing or of another shape.
    """
    uri = str(uri)
    content = read_state(uri)
    files = CheckpointFiles(uri, scratch)
    n_tensors = sum(name.startswith("model.") for name in files.index)
    if n_tensors != content["n_tensors"]:
        raise _damaged(uri, f"{n_tensors} of {content['n_tensors']} model tensors are there")
    # Buffers that a run has come to need since (balance biases are zeros), and random states of ranks that were not there, begin anew.
    parts, ends = _readable_parts(state, files.index) if with_optimizer else (model_parts(state.model), [])
    found = [part for part in parts if part.name in files.index or not (part.name.startswith("state.") or part.name.endswith(BALANCE_BIAS))]
    if not with_optimizer:
        files.read(found)
        return content
    random = [part for part in random_parts() if part.name in files.index]
    files.read(found + random)
    for end in ends:
        end()
    for part in random:
        (torch.set_rng_state if ".cpu." in part.name else torch.cuda.set_rng_state)(part.chunks[0].local)
    state.step = content["step"]
    state.skipped_in_row = content["skipped_in_row"]
    set_schedule(state, content["scheduler"]["last_epoch"])
    stored_scale = LossScale(**content["loss_scale"])
    if state.loss_scale.enabled and stored_scale.enabled:
        state.loss_scale = stored_scale  # a run that was not in float16 before begins with a fresh scale
    return content


def read_model(uri: str, model: nn.Module, scratch: Path | None = None) -> None:
    """Fill a model, on any number of ranks, with a checkpoint's weights.

    Raises:
        CheckpointError: incomplete or damaged, or its tensors are not the model's.
    """
    CheckpointFiles(uri, scratch).read(model_parts(model))


class CheckpointFiles:
    """The tensors of a complete checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, uri: str, scratch: Path | None = None) -> None:
        self._uri, self._scratch = uri, scratch
        headers = {}
        for name in sorted(_marker(uri)["files"]):
            if name.endswith(".safetensors"):
                try:
                    with storage.open_read(storage.join(uri, name)) as stream:
                        headers[name] = read_header(stream)
                except (FileNotFoundError, DamagedFileError) as error:
                    raise _damaged(uri, f"{name}: {error}") from error
        try:
            self.index: dict[str, Stored] = index_of(headers)
        except (KeyError, ValueError, TypeError) as error:
            raise _damaged(uri, f"the header of one of {len(headers)}: {error}") from error

    def read(self, parts: list[TensorShard]) -> None:
        """Fill the live tensors behind `parts`; those of the model must be all that there are.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape, or a file is damaged.
        """
        shown = storage.redact(self._uri)
        stored = {name: tuple(entry.metadata.size) for name, entry in self.index.items()}
        missing = sorted(part.name for part in parts if part.name not in stored)
        if missing:
            raise CheckpointError("checkpoint", shown, f"lacks {len(missing)} tensors, the first being {missing[0]}.")
        for part in parts:
            if stored[part.name] != part.shape:
                rule = f"holds {part.name} in shape {stored[part.name]}, the model has {part.shape}."
                raise CheckpointError("checkpoint", shown, rule)
        live = {part.name for part in parts}
        unread = sorted(name for name in stored if name.startswith("model.") and name not in live)
        if unread:
            raise CheckpointError("checkpoint", shown, f"holds {len(unread)} tensors unknown to the model, the first {unread[0]}.")
        with tempfile.TemporaryDirectory(prefix="most_ray-load-", dir=self._scratch) as folder:
            try:
                read_parts(parts, self.index, lambda name: self._fetch(name, Path(folder)), self._done)
            except (FileNotFoundError, DamagedFileError) as error:
                raise _damaged(self._uri, str(error)) from error

    def _fetch(self, name: str, folder: Path) -> Path:
        uri = storage.join(self._uri, name)
        if not storage.is_remote(uri):
            return storage.local(uri)
        storage.download(uri, folder / name)
        return folder / name

    def _done(self, path: Path) -> None:
        if storage.is_remote(self._uri):
            path.unlink()
