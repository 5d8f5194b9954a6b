"""A run's folder: on a path directly, behind a URI through a working copy on each machine."""

from __future__ import annotations

import fcntl
import hashlib
import shutil

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.node_cache import node_cache

LEDGER = "trials.jsonl"  # in the folder of a sweep, which is no run's
COMMIT = "commit.json"  # the last file of a checkpoint: with it, the checkpoint counts


def step_uri(checkpoints: str, step: int) -> str:
    """Where the checkpoint of a step lies below a run's folder of checkpoints."""
    return storage.join(checkpoints, f"step-{step:09d}")


class RunFolder:
    """`local` is where files are read and written on this machine; `push` and `pull` bring them to and from a place behind a URI, and
    do nothing on a path."""

    def __init__(self, uri: str) -> None:
        self.uri, self.remote = uri, storage.is_remote(uri)
        self.local = node_cache().directory / "runs" / _hash(uri) if self.remote else storage.local(uri)
        self.local.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> str:
        return self.at("checkpoints")

    def at(self, *names: str) -> str:
        """The place of a file or folder of the run."""
        return storage.join(self.uri, *names)

    def push(self, *names: str) -> None:
        """Bring files from here to the place."""
        for name in names if self.remote else ():
            if (self.local / name).is_file():
                storage.write_bytes(self.at(name), (self.local / name).read_bytes())

    def pull(self, *names: str) -> None:
        """Bring files from the place to here; what is missing there goes here too."""
        for name in names if self.remote else ():
            try:
                content = storage.read_bytes(self.at(name))
            except FileNotFoundError:
                (self.local / name).unlink(missing_ok=True)
            else:
                storage.write_bytes(self.local / name, content)

    def push_folder(self, name: str, last: str) -> None:
        """Bring a folder from here to the place, anew, the file `last` behind all others."""
        if self.remote:
            storage.remove(self.at(name))
            storage.publish(self.local / name, self.at(name), last)

    def claim(self, attempt: str) -> None:
        """Write down whose the run is."""
        storage.write_bytes(self.at(".attempt"), attempt.encode())

    def owner(self) -> str:
        """Whose the run is; empty where nobody's."""
        try:
            return storage.read_bytes(self.at(".attempt")).decode()
        except FileNotFoundError:
            return ""


def local_copy(uri: str, last: str = "config.json") -> str:
    """A model's folder on this machine: itself where it is a path (or a hub name), else a copy, made once.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    if not storage.is_remote(uri):
        return uri
    target = node_cache().directory / "models" / _hash(uri + "".join(e.stamp for e in storage.list_files(uri, (last,))))
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".lock-{target.name}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / last).exists():
            partial = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            entries = storage.list_files(uri, ("",))
            if last not in {entry.name for entry in entries}:
                raise DataError("model_name_or_path", storage.redact(uri), f"holds no {last}.")
            for entry in entries:
                (partial / entry.name).parent.mkdir(parents=True, exist_ok=True)
                storage.download(entry.uri, partial / entry.name)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    return str(target)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
