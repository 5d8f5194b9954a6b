"""Writing checkpoints while training continues.

The calling thread only copies this rank's tensors, or leaves that to the background until the next optimizer step. A thread writes the copy
and synchronises with the other ranks through a process group of its own; rank 0 writes the commit marker last.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

import most_ray
from most_ray.checkpoint.catalog import COMMIT, FORMAT, hash_file, latest_valid
from most_ray.checkpoint.content import STATE
from most_ray.checkpoint.reader import random_shards, state_shards
from most_ray.checkpoint.shards import Staging, TensorShard
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import CheckpointError, count_of
from most_ray.io import storage
from most_ray.optim.train_state import TrainState

logger = logging.getLogger(__name__)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GROUP_TIMEOUT = timedelta(hours=1)  # for the slowest rank to write its file
_FATAL_FIELDS = ("output_dir", "attempt")  # of errors that a retry cannot fix: no room left, another attempt owns the run


_Written = tuple[str, tuple[int, str], dict[str, int]]  # a rank's file: name, size and hash, and how many values of each tensor it holds


class Saved(NamedTuple):
    """A checkpoint that was committed."""

    step: int
    uri: str


class CheckpointWriter:
    """Saves checkpoints. Every rank makes one and calls it at the same steps.

    Args:
        background: write in a thread; otherwise `save` returns when the checkpoint is complete.
        overlap: let the thread also copy, during the next forward and backward pass (CPU tensors only). Nothing may then change the state
            before the next `step` of its optimizer, which waits for the copy.

    Attributes:
        stall_seconds: how long the calling thread has waited in `save`, in `wait` and before optimizer steps, in total.
    """

    def __init__(self, background: bool = True, overlap: bool = False) -> None:
        self._background = background
        self._overlap = overlap and background and not torch.cuda.is_available()  # a GPU's copies are only queued by the caller
        self._copied = threading.Event()
        self._copied.set()
        self._hooks: dict[torch.optim.Optimizer, Any] = {}
        self._staging = Staging()
        # Not training's group: there the order of collectives must stay.
        apart = background and dist.is_initialized()
        self._group: Any = dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT) if apart else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved: list[Saved] = []
        self.stall_seconds = 0.0

    def prepare(self, state: TrainState) -> None:
        """Allocate the buffers for a state in advance of the first save."""
        self._staging.prepare(state_shards(state) + random_shards())

    def save(
        self, uri: str, state: TrainState, content: dict[str, Any], write_files: Callable[[Path], None], may_commit: Callable[[], bool]
    ) -> None:
        """Start a checkpoint of the state as it is now. A save that is still under way is waited for.

        Args:
            content: further keys of state.json.
            write_files: writes tokenizer and configuration to a local folder; called on rank 0, in the thread.
            may_commit: returns whether this attempt still owns the run; called on rank 0, before anything is changed and again before the
                commit marker is written.

        Raises:
            CheckpointError: the save before failed, or, without `background`, this one.
        """
        with self._count_stall():
            self._join()
            shards = state_shards(state)
            state_json = json.dumps({**_describe(state, shards), **content}, indent=1)
            self._staging.plan(shards + random_shards())
            if self._overlap:
                self._copied.clear()
                if state.optimizer not in self._hooks:
                    self._hooks[state.optimizer] = state.optimizer.register_step_pre_hook(lambda *_: self._await_copy())
            else:
                self._staging.copy(torch.get_num_threads())
            values, nbytes = {shard.name: math.prod(shard.shape) for shard in shards}, sum(shard.global_bytes for shard in shards)
            callbacks = (write_files, may_commit)
            task = _SaveTask(uri, state.step, this_rank(), values, nbytes, state_json, *callbacks, self._staging, self._group)
            if self._background:
                self._thread = threading.Thread(target=self._run, args=(task,), name="checkpoint", daemon=True)
                self._thread.start()
            else:
                self._run(task)
                self._join()

    def poll(self) -> list[Saved]:
        """Return what was committed since the last call, without waiting: ranks may learn of a commit at different steps. Raises
        CheckpointError if a save failed, on any rank."""
        if self._thread is None or not self._thread.is_alive():
            self._join()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Wait for the save under way. Afterwards all ranks know of the same commits. Raises CheckpointError if it failed."""
        with self._count_stall():
            self._join()

    def close(self, timeout: float = 20.0) -> None:
        """Release buffers and process group once training has ended or failed. A save under way gets `timeout` more seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        if self._error is not None:
            logger.error("%s", self._error)
        if self._thread is None or not self._thread.is_alive():
            self._staging = Staging()
            if self._group is not None and dist.is_initialized():
                dist.destroy_process_group(self._group)
        self._thread = self._error = self._group = None
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def _run(self, task: _SaveTask) -> None:
        try:
            try:
                if self._overlap:
                    self._staging.copy(1)
            finally:
                self._copied.set()
            task.run()
            self._saved.append(Saved(task.step, task.uri))
        except CheckpointError as error:
            # What only the user can fix ends the run. After a RuntimeError it resumes from the checkpoint before.
            self._error = error if error.field in _FATAL_FIELDS else RuntimeError(str(error))
        except Exception as error:  # noqa: BLE001 - a thread's errors are raised by the next call; this one: another rank was lost
            self._error = RuntimeError(f"checkpoint {storage.redact(task.uri)} was not completed: {error}")

    def _await_copy(self) -> None:
        if not self._copied.is_set():
            with self._count_stall():
                self._copied.wait()

    def _join(self) -> None:
        """Wait for the thread, if there is one, and raise the error of the save."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _count_stall(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start


def _describe(state: TrainState, shards: list[TensorShard]) -> dict[str, Any]:
    """Return what state.json holds of a training state."""
    versions = {"most_ray": most_ray.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "format": FORMAT,
        "step": state.step,
        "skipped_in_row": state.skipped_in_row,
        "scheduler": {"last_epoch": state.scheduler.last_epoch},
        "loss_scale": asdict(state.loss_scale),
        "n_tensors": sum(shard.name.startswith("model.") for shard in shards),
        "tensor_bytes": sum(shard.global_bytes for shard in shards),
        "versions": {**versions, "python": platform.python_version()},
        "ranks": {"world_size": world_size(), "meshes": _meshes(state.model)},
    }


def _meshes(model: nn.Module) -> list[dict[str, int]]:
    """Return the dimensions, name -> size, of each mesh that parameters are laid out on."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    named = [{str(name): size for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)} for mesh in meshes]
    return sorted(named, key=str)


@dataclass(frozen=True)
class _SaveTask:
    """One checkpoint, from the copy to the commit. Every rank runs it."""

    uri: str
    step: int
    rank: int
    values: dict[str, int]  # name -> number of values of the global tensor
    nbytes: int  # of all ranks' tensors
    state_json: str
    write_files: Callable[[Path], None]
    may_commit: Callable[[], bool]
    staging: Staging
    group: Any  # of gloo, or None without other ranks

    def run(self) -> None:
        """Write and commit the checkpoint. Raises CheckpointError on all ranks, if one fails; then nothing is committed."""
        self._on_all_ranks(self._begin)
        try:
            written = self._on_all_ranks(self._write)
            self._on_all_ranks(lambda: self._commit(written) if self.rank == 0 else None)
        except CheckpointError:
            self._remove()
            raise

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Return what `work` returned on every rank; an error of one is raised on all."""

        def explained() -> Any:
            try:
                return work()
            except CheckpointError:
                raise
            except Exception as error:  # any (a tokenizer's, the storage's) means that there is no checkpoint
                raise self._explain(error) from error

        return all_gather_or_raise(explained, self.group)

    def _explain(self, error: Exception) -> CheckpointError:
        if not isinstance(error, OSError) or error.errno not in _DISK_FULL:
            return CheckpointError("checkpoint", storage.redact(self.uri), f"could not be written on rank {self.rank} ({error}).")
        where = "" if error.filename is None or not storage.is_remote(self.uri) else f" at {error.filename}"
        rule = f"has no room left for a checkpoint of {self.nbytes / 1e6:,.0f} MB ({error.strerror}{where})."
        remedy = f"Make room, then start the same command again. {self._latest_valid()}".rstrip()
        return CheckpointError("output_dir", storage.redact(self.uri), rule, remedy)

    def _latest_valid(self) -> str:
        """Say whether there is a checkpoint to resume from."""
        try:
            uri, _ = latest_valid(storage.parent(self.uri), deep_bytes=0)
            return f"The last checkpoint is intact: {storage.redact(uri)}." if uri else "There is no earlier checkpoint."
        except Exception as error:  # noqa: BLE001 - a remark in an error must not replace that error
            logger.warning("earlier checkpoints could not be listed: %s", error)
            return ""

    def _begin(self) -> None:
        if self.rank == 0:
            self._require_ownership()
            storage.remove(self.uri)  # left by an attempt that died before its commit

    def _require_ownership(self) -> None:
        """Raise CheckpointError if another attempt owns the run now, or has committed this very step."""
        if not self.may_commit() or storage.exists(storage.join(self.uri, COMMIT)):
            raise CheckpointError("attempt", None, "has been replaced by a newer one of the same run; its checkpoint was not committed.")

    def _write(self) -> _Written:
        """Write this rank's file."""
        name = f"rank-{self.rank:05d}.safetensors"
        if not storage.is_remote(self.uri):
            return name, self._write_file(storage.local(self.uri) / name), self.staging.values
        with tempfile.TemporaryDirectory(prefix="most_ray-save-") as folder:
            entry = self._write_file(Path(folder) / name)
            storage.publish(Path(folder), self.uri, name)
        return name, entry, self.staging.values

    def _write_file(self, path: Path) -> tuple[int, str]:
        def write() -> tuple[int, str]:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self.staging.write(path)

        try:
            return storage.with_retries(write, str(path))
        except BaseException:  # also an interrupt: a partial file must not stay
            with contextlib.suppress(OSError):  # the error that is raised again counts
                path.unlink(missing_ok=True)
            raise

    def _require_complete(self, written: list[dict[str, int]]) -> None:
        """Raise CheckpointError unless the files of all ranks hold every value of every tensor exactly once."""
        found = sum(map(collections.Counter, written), collections.Counter())
        if wrong := sorted(name for name, count in self.values.items() if found[name] != count):
            most, tensors = count_of(self.values[wrong[0]], "value"), count_of(len(wrong), "tensor")
            rule = f"would hold {found[wrong[0]]} of {most} of {wrong[0]} (not whole: {tensors})."
            raise CheckpointError("checkpoint", storage.redact(self.uri), rule)

    def _commit(self, written: list[_Written]) -> None:
        """Write state.json, the caller's files, and last the commit marker."""
        self._require_complete([values for _, _, values in written])
        files = {name: entry for name, entry, _ in written}
        root = storage.with_retries(lambda: self._write_shared_files(files), self.uri)
        marker = json.dumps({"format": FORMAT, "step": self.step, "files": files}, indent=1)
        self._require_ownership()
        storage.write_bytes(storage.join(self.uri, COMMIT), marker.encode())
        if not storage.is_remote(self.uri):
            for path in (root / COMMIT, root, root.parent):
                _sync(path)

    def _write_shared_files(self, files: dict[str, tuple[int, str]]) -> Path:
        """Write all files but the ranks' and add them to `files`. Returns the local folder that they were written to."""
        remote = storage.is_remote(self.uri)
        with tempfile.TemporaryDirectory(prefix="most_ray-save-") if remote else contextlib.nullcontext("") as folder:
            root = Path(folder) if folder else storage.local(self.uri)
            (root / STATE).write_text(self.state_json, encoding="utf-8")
            self.write_files(root)
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                name = path.relative_to(root).as_posix()
                if name.startswith("rank-"):
                    continue
                files[name] = (path.stat().st_size, hash_file(path))
                if remote:
                    storage.write_bytes(storage.join(self.uri, name), path.read_bytes())
                else:
                    _sync(path)
        return root

    def _remove(self) -> None:
        """On rank 0 remove what was written, unless the folder belongs to another attempt by now."""
        if self.rank == 0:
            try:
                if self.may_commit() and not storage.exists(storage.join(self.uri, COMMIT)):
                    storage.remove(self.uri)
            except Exception as error:  # noqa: BLE001 - the error that made the save fail counts; what stays has no marker
                logger.warning("%s, which has no commit marker, could not be removed: %s", storage.redact(self.uri), error)


def _sync(path: Path) -> None:
    """Sync a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
