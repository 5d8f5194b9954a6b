"""A run's folder: used directly where it is a path, through a working copy on each machine where it is a remote URI."""

from __future__ import annotations

import fcntl
import hashlib
import shutil

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.hub import model_folder
from most_ray.io.node_cache import node_cache

LEDGER = "trials.jsonl"  # in the folder of a sweep; a run has none
COMMIT = "commit.json"  # written last into a checkpoint, which is complete when it contains this file


def step_uri(checkpoints: str, step: int) -> str:
    """The URI of a step's checkpoint in `checkpoints`, the URI of a run's folder of checkpoints."""
    return storage.join(checkpoints, f"step-{step:09d}")


class RunFolder:
    """A run's folder and its working copy on this machine."""

    def __init__(self, uri: str) -> None:
        self.uri = uri  # of the folder
        self.remote = storage.is_remote(uri)  # if not, `push` and `pull` do nothing
        # Where this machine reads and writes files: the folder itself, or a working copy of a remote one.
        self.local = node_cache().directory / "runs" / _hash(uri) if self.remote else storage.local(uri)
        self.local.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> str:
        """The URI of the folder of checkpoints."""
        return self.at("checkpoints")

    def at(self, *names: str) -> str:
        """The URI of a file or folder of the run."""
        return storage.join(self.uri, *names)

    def push(self, *names: str) -> None:
        """Copy files of the working copy to the remote folder."""
        for name in names if self.remote else ():
            if (self.local / name).is_file():
                storage.write_bytes(self.at(name), (self.local / name).read_bytes())

    def pull(self, *names: str) -> None:
        """Copy files of the remote folder to the working copy, and remove from it those that the remote folder does not have."""
        for name in names if self.remote else ():
            try:
                content = storage.read_bytes(self.at(name))
            except FileNotFoundError:
                (self.local / name).unlink(missing_ok=True)
            else:
                storage.write_bytes(self.local / name, content)

    def push_folder(self, name: str, last: str) -> None:
        """Replace a folder of the remote folder by that of the working copy; the file `last` is written after all others."""
        if self.remote:
            storage.remove(self.at(name))
            storage.publish(self.local / name, self.at(name), last)

    def claim(self, owner: str) -> None:
        """Record the run's owner, the mark of a driver or of one of its attempts; processes with another mark must stop writing."""
        storage.write_bytes(self.at(".attempt"), owner.encode())

    def owner(self) -> str:
        """The mark that the latest `claim` recorded; empty before the first."""
        try:
            return storage.read_bytes(self.at(".attempt")).decode()
        except FileNotFoundError:
            return ""


def local_copy(uri: str, last: str = "config.json") -> str:
    """A model's folder on this machine: `uri` itself where it is a path; for a name on the hub, that in the cache (see `hub.model_folder`);
    else a copy, which is downloaded once.

    Raises:
        CheckpointError: there is no folder and no model of that name.
        DataError: the remote folder does not exist, has no file `last`, or cannot be read.
    """
    if not storage.is_remote(uri):
        return model_folder(uri)
    try:
        stamps = "".join(entry.stamp for entry in storage.list_files(uri, (last,)))
    except DataError as error:
        raise DataError("model_name_or_path", storage.redact(uri), error.rule, error.remedy) from error
    target = node_cache().directory / "models" / _hash(uri + stamps)
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
