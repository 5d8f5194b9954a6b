"""Writing checkpoints while training goes on.

The calling thread only copies this rank's tensors, or, where asked to, has them copied before the next optimizer step; a thread writes the
copy, agrees with the other ranks through a process group of its own, and rank 0 writes the commit marker last.
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
from most_ray.checkpoint.reader import COMMIT, FORMAT, STATE, committed, find_corruption, hash_file, random_parts, state_parts
from most_ray.checkpoint.shards import Staging, TensorShard
from most_ray.distributed.collectives import all_gather_or_raise
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import CheckpointError
from most_ray.io import storage
from most_ray.optim.train_state import TrainState

logger = logging.getLogger(__name__)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PATIENCE = timedelta(hours=1)  # for the slowest rank to write its file
_FOR_USERS = ("output_dir", "attempt")  # fields of errors that no further try mends: no room left, another attempt


class Saved(NamedTuple):
    """A checkpoint that was committed. `seconds`: from the copy to the marker."""

    step: int
    uri: str
    seconds: float


class CheckpointWriter:
    """Saves checkpoints; every rank makes one and calls it at the same steps.

    Args:
        background: write in a thread. Otherwise `save` returns when the checkpoint is complete.
        scratch: where a rank's file is kept while it goes to a remote place; by default the temporary folder.
        overlap: let the thread copy too (tensors of the CPU), beside the next forward and backward pass. Then nothing may change the
            state before the next `step` of its optimizer, which waits for the copy.

    Attributes:
        stall_seconds: how long the calling thread has been held up in all, by `save`, by `wait` and before optimizer steps.
    """

    def __init__(self, background: bool = True, scratch: Path | None = None, overlap: bool = False) -> None:
        self._background, self._scratch = background, scratch
        self._overlap = overlap and background and not torch.cuda.is_available()  # a GPU's copies are queued: nobody waits for them
        self._copied = threading.Event()
        self._copied.set()
        self._hooks: dict[torch.optim.Optimizer, Any] = {}
        self._staging = Staging()
        self._group: Any = None
        if background and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)  # collectives of training keep their order in theirs
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._saved: list[Saved] = []
        self.stall_seconds = 0.0

    def prepare(self, state: TrainState) -> None:
        """Make the buffers for a state, so that the first save need not."""
        self._staging.prepare(state_parts(state) + random_parts())

    def save(
        self,
        uri: str,
        state: TrainState,
        content: dict[str, Any],
        files: Callable[[Path], None],
        may_commit: Callable[[], bool],
    ) -> None:
        """Begin a checkpoint of the state as it is now. One that is still under way is waited for.

        Args:
            content: goes into state.json.
            files: called on rank 0, in the thread, with a local folder, for the tokenizer and configuration.
            may_commit: asked on rank 0 before anything is touched and again before the marker is written: False if another attempt has
                taken over the run.

        Raises:
            CheckpointError: the one before failed, or, without a background, this one.
        """
        with self._stalling():
            self._join()
            rank, world = this_rank(), world_size()
            parts = state_parts(state)
            whole_bytes = sum(part.whole_bytes for part in parts)
            text = json.dumps({**_content(state, parts, world), **content}, indent=1)
            self._staging.plan(parts + random_parts())
            if self._overlap:
                self._copied.clear()
                if state.optimizer not in self._hooks:
                    self._hooks[state.optimizer] = state.optimizer.register_step_pre_hook(lambda *_: self._await_copy())
            else:
                self._staging.copy(torch.get_num_threads())
            sizes = {part.name: math.prod(part.shape) for part in parts}
            job = _Job(uri, state.step, rank, self._group, self._staging, text, sizes, whole_bytes, files, may_commit, self._scratch)
            self._thread = threading.Thread(target=self._run, args=(job, time.monotonic()), name="checkpoint", daemon=True)
            if self._background:
                self._thread.start()
                return
            self._thread = None
            self._run(job, time.monotonic())
            self._raise()

    def poll(self) -> list[Saved]:
        """What has been committed since the last call. Does not wait: ranks may hear of it at different steps.

        Raises:
            CheckpointError: a save failed, on whichever rank.
        """
        if self._thread is None or not self._thread.is_alive():
            self._join()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Wait for the save under way. Ranks that call it know alike what has been committed.

        Raises:
            CheckpointError: it failed.
        """
        with self._stalling():
            self._join()

    def close(self, timeout: float = 20.0) -> None:
        """Give up buffers and process group; for when training has ended or failed. A save under way gets `timeout` seconds more."""
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

    def _run(self, job: _Job, started: float) -> None:
        try:
            try:
                if self._overlap:
                    self._staging.copy(1)
            finally:
                self._copied.set()
            job.run()
            self._saved.append(Saved(job.step, job.uri, time.monotonic() - started))
        except CheckpointError as error:
            # What a user must mend ends the run; after anything else it goes on from the checkpoint before.
            self._error = error if error.field in _FOR_USERS else RuntimeError(str(error))
        except Exception as error:  # noqa: BLE001 - a thread's errors are raised by the next call; here: another rank was lost
            # Nothing that a user can mend: the run goes on from the checkpoint before.
            self._error = RuntimeError(f"checkpoint {storage.redact(job.uri)} was not completed: {error}")

    def _await_copy(self) -> None:
        if not self._copied.is_set():
            with self._stalling():
                self._copied.wait()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - start


def _content(state: TrainState, parts: list[TensorShard], world: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": state.step,
        "skipped_in_row": state.skipped_in_row,
        "scheduler": {"last_epoch": state.scheduler.last_epoch},
        "loss_scale": asdict(state.loss_scale),
        "n_tensors": sum(part.name.startswith("model.") for part in parts),
        "tensor_bytes": sum(part.whole_bytes for part in parts),
        "versions": {
            "most_ray": most_ray.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "ranks": {"world_size": world, "meshes": _meshes(state.model)},
    }


def _meshes(model: nn.Module) -> list[dict[str, int]]:
    """Names and sizes of the meshes that the parameters lie on."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    named = [{str(name): size for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)} for mesh in meshes]
    return sorted(named, key=str)


@dataclass(frozen=True)
class _Job:
    """One checkpoint, from the copy on; every rank runs it."""

    uri: str
    step: int
    rank: int
    group: Any
    staging: Staging
    text: str
    sizes: dict[str, int]
    whole_bytes: int
    files: Callable[[Path], None]
    may_commit: Callable[[], bool]
    scratch: Path | None

    def run(self) -> None:
        """Raises CheckpointError, on all ranks, where one fails; then nothing is committed."""
        self._agree(self._begin if self.rank == 0 else lambda: None)
        try:
            written = self._agree(self._write)
            files = {name: entry for name, entry, _ in written}
            self._agree((lambda: self._commit(files, [values for _, _, values in written])) if self.rank == 0 else lambda: None)
        except CheckpointError:
            self._clear()
            raise

    def _agree(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gave on every rank; an error of one is raised on all."""

        def explained() -> Any:
            try:
                return work()
            except CheckpointError:
                raise
            except OSError as error:
                raise self._explain(error) from error
            except Exception as error:  # whatever it is (a tokenizer's, the storage's): there is no checkpoint
                raise CheckpointError(
                    "checkpoint", storage.redact(self.uri), f"could not be written on rank {self.rank} ({error})."
                ) from error

        return all_gather_or_raise(explained, self.group)

    def _explain(self, error: OSError) -> CheckpointError:
        shown = storage.redact(self.uri)
        if error.errno not in _FULL:
            return CheckpointError("checkpoint", shown, f"could not be written on rank {self.rank} ({error}).")
        where = "" if error.filename is None or not storage.is_remote(self.uri) else f" at {error.filename}"
        size = f"{self.whole_bytes / 1e6:,.0f} MB"
        rule = f"has no room left for a checkpoint of {size} ({error.strerror}{where})."
        return CheckpointError("output_dir", shown, rule, f"Make room, then start the same command again. {self._last_intact()}")

    def _last_intact(self) -> str:
        with contextlib.suppress(Exception):  # a remark in an error that is being told must not hide it
            intact = (uri for uri in reversed(committed(storage.parent(self.uri))) if find_corruption(uri) is None)
            if uri := next(intact, None):
                return f"The last checkpoint is intact: {storage.redact(uri)}."
        return "There is no earlier checkpoint."

    def _begin(self) -> None:
        self._require_turn()
        storage.remove(self.uri)  # left by an attempt that died before its commit

    def _require_turn(self) -> None:
        """Raises CheckpointError where another attempt has taken over, or has committed this very step."""
        if not self.may_commit() or storage.exists(storage.join(self.uri, COMMIT)):
            raise CheckpointError("attempt", None, "has been replaced by a newer one of the same run; its checkpoint was not committed.")

    def _write(self) -> tuple[str, tuple[int, str], dict[str, int]]:
        """This rank's file: its name, its size and hash, and how many values of each tensor it holds."""
        name = f"rank-{self.rank:05d}.safetensors"
        if not storage.is_remote(self.uri):
            return name, self._write_file(storage.local(self.uri) / name), self.staging.values
        with tempfile.TemporaryDirectory(prefix="most_ray-save-", dir=self.scratch) as folder:
            entry = self._write_file(Path(folder) / name)
            storage.publish(Path(folder), self.uri, name)
        return name, entry, self.staging.values

    def _write_file(self, path: Path) -> tuple[int, str]:
        def write() -> tuple[int, str]:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self.staging.write(path)

        try:
            return storage.with_retries(write, str(path))
        except BaseException:  # whatever ends the attempt, also an interrupt: half a file must not stay; raised again
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise

    def _require_whole(self, written: list[dict[str, int]]) -> None:
        """Raises CheckpointError where the files of all ranks do not hold every value of every tensor just once."""
        found: collections.Counter[str] = collections.Counter()
        for values in written:
            found.update(values)
        wrong = sorted(name for name, count in self.sizes.items() if found[name] != count)
        if wrong:
            rule = f"would hold {found[wrong[0]]} of {self.sizes[wrong[0]]} values of {wrong[0]} ({len(wrong)} tensors are not whole)."
            raise CheckpointError("checkpoint", storage.redact(self.uri), rule)

    def _commit(self, files: dict[str, tuple[int, str]], written: list[dict[str, int]]) -> None:
        """state.json, the caller's files, and the marker."""
        self._require_whole(written)
        root = storage.with_retries(lambda: self._write_rest(files), self.uri)
        marker = json.dumps({"format": FORMAT, "step": self.step, "files": files}, indent=1)
        self._require_turn()
        storage.write_bytes(storage.join(self.uri, COMMIT), marker.encode())
        if not storage.is_remote(self.uri):
            for path in (root / COMMIT, root, root.parent):
                _sync(path)

    def _write_rest(self, files: dict[str, tuple[int, str]]) -> Path:
        """All but the ranks' files, which `files` lists and to which these are added. Returns the folder that they were made in."""
        remote = storage.is_remote(self.uri)
        with tempfile.TemporaryDirectory(prefix="most_ray-save-", dir=self.scratch) if remote else contextlib.nullcontext("") as folder:
            root = Path(folder) if folder else storage.local(self.uri)
            (root / STATE).write_text(self.text, encoding="utf-8")
            self.files(root)
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

    def _clear(self) -> None:
        """Rank 0 takes away what was written, unless the folder is another attempt's by now."""
        if self.rank == 0:
            with contextlib.suppress(Exception):  # the error that is being told counts; what stays has no marker
                if self.may_commit() and not storage.exists(storage.join(self.uri, COMMIT)):
                    storage.remove(self.uri)


def _sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
