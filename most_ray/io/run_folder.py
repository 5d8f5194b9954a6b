"""A run's folder: used directly where it is a path, through a working copy on each machine where it is a remote URI."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Collection

from most_ray.errors import CheckpointError, DataError
from most_ray.io import storage
from most_ray.io.hub import check_model_name, model_folder, model_path
from most_ray.io.node_cache import node_cache

LEDGER = "trials.jsonl"  # in the folder of a sweep; a run has none
TRIALS = "trials"  # the folder in the folder of a sweep that its trials' runs are in
EXPORT = "export"  # a run's exported model, in its folder
CHECKPOINTS = "checkpoints"  # and the folder of its checkpoints
_OF_A_RUN = (CHECKPOINTS, "metrics.jsonl", "environment.json", "summary.json")  # by any of which a folder is known to be a run's
_MODEL = "config.json"  # in every model's folder
COMMIT = "commit.json"  # written last into a checkpoint, which is complete when it contains this file


STEP = re.compile(r"step-(\d{9,})")  # the name of a checkpoint's folder


def find_steps(checkpoints: str) -> dict[int, bool]:
    """The steps that have a folder in `checkpoints`, each with whether it has a commit marker."""
    if not storage.is_remote(checkpoints):
        marked = [(path.name, (path / COMMIT).exists()) for path in storage.local(checkpoints).glob("step-*")]
    else:
        names = [entry.name.split("/") for entry in storage.list_files(checkpoints, ("",))] if storage.exists(checkpoints) else []
        marked = sorted((folder, rest == [COMMIT]) for folder, *rest in names if rest)  # the marker last
    return {int(match[1]): complete for folder, complete in marked if (match := STEP.fullmatch(folder))}


def model_source(source: str, field: str = "model_name_or_path", *, checkpoints: bool = False, known: Collection[str] = ()) -> str:
    """The model that a user's path, URI or name means, in a form that does not depend on the working directory: of a run's folder its
    export, or, before there is one, its newest checkpoint; of anything else itself. Nothing is fetched.

    Args:
        field: the flag or key that names the model, for errors.
        checkpoints: the model may be a checkpoint, as where it is only opened.
        known: see `check_model_name`.

    Raises:
        CheckpointError: there is no such model, or the run or checkpoint cannot be used as one, with the command that makes one of it.
    """
    if not storage.is_remote(source) and storage.base_name(source) == EXPORT and not storage.exists(source):
        run = storage.parent(source)
        if _is_run(run):
            raise _no_export(run, source, field, newest_checkpoint(run))
    check_model_name(source, field, known)
    if not storage.is_remote(source) and not os.path.isdir(model_path(source)):
        return source  # a name on the hub
    folder = storage.absolute(source)
    if storage.exists(storage.join(folder, COMMIT)):
        if checkpoints:
            return folder
        raise CheckpointError(field, storage.redact(source), "is a checkpoint, not a model's folder.", _convert(source, "DIR"))
    if storage.exists(storage.join(folder, _MODEL)):
        return folder
    if storage.exists(storage.join(folder, EXPORT, _MODEL)):
        return storage.join(folder, EXPORT)
    newest = newest_checkpoint(folder)
    if newest and checkpoints:
        return newest
    if storage.exists(storage.join(folder, LEDGER)):
        rule = "is the folder of a sweep, which has no model of its own."
        raise CheckpointError(field, storage.redact(source), rule, "Name the folder of one of its runs, or train its best.yaml first.")
    if newest or _is_run(folder):
        raise _no_export(source, storage.join(source, EXPORT), field, newest)
    return folder  # whoever reads it says what it lacks


def _no_export(run: str, export: str, field: str, newest: str | None) -> CheckpointError:
    """The error of a run whose model is wanted, and that has none yet."""
    if newest:
        rule = "is a run without an export, which it gets at its end."
        return CheckpointError(field, storage.redact(run), rule, _convert(run, storage.redact(export)))
    rule = "is a run without an export and without a complete checkpoint: it has no model yet."
    return CheckpointError(field, storage.redact(run), rule, "Train it first, or name another.")


def _convert(checkpoint: str, output: str) -> str:
    return f"Make one of its checkpoint: most-ray export --checkpoint {storage.redact(checkpoint)} --output {output}"


def _is_run(folder: str) -> bool:
    return any(storage.exists(storage.join(folder, name)) for name in _OF_A_RUN)


def checkpoint_source(source: str, field: str = "checkpoint") -> str:
    """The checkpoint that a user's path or URI means: of a run's folder, or of its folder of checkpoints, the newest complete one; of
    anything else itself. Raises CheckpointError where a run has none, and for a model's folder."""
    if storage.exists(storage.join(source, COMMIT)):
        return source
    if newest := newest_checkpoint(source):
        return newest
    if _is_run(source):
        raise CheckpointError(field, storage.redact(source), "is a run without a complete checkpoint.", "Train it first, or name another.")
    if storage.exists(storage.join(source, _MODEL)) and not STEP.fullmatch(storage.base_name(source)):
        raise CheckpointError(
            field, storage.redact(source), "is a model's folder, not a checkpoint.", "Name a run, or one of its checkpoints."
        )
    return source


def newest_checkpoint(folder: str) -> str | None:
    """The newest complete checkpoint of a run's folder, or of a folder of checkpoints; None if there is none."""
    for checkpoints in (storage.join(folder, CHECKPOINTS), folder):
        if complete := [step for step, committed in find_steps(checkpoints).items() if committed]:
            return step_uri(checkpoints, max(complete))
    return None


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
        return self.at(CHECKPOINTS)

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


def local_copy(uri: str, last: str = "config.json", field: str = "model_name_or_path") -> str:
    """A model's folder on this machine: `uri` itself where it is a path; for a name on the hub, that in the cache (see `hub.model_folder`);
    else a copy, which is downloaded once. `field`: the flag or key that names it, for errors.

    Raises:
        CheckpointError: there is no folder and no model of that name.
        DataError: the remote folder does not exist, has no file `last`, or cannot be read.
    """
    if not storage.is_remote(uri):
        return model_folder(uri, field)
    try:
        stamps = "".join(entry.stamp for entry in storage.list_files(uri, (last,)))
    except DataError as error:
        raise DataError(field, storage.redact(uri), error.rule, error.remedy) from error
    target = node_cache().directory / "models" / _hash(uri + stamps)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".lock-{target.name}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / last).exists():
            partial = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            entries = storage.list_files(uri, ("",))
            if last not in {entry.name for entry in entries}:
                raise DataError(field, storage.redact(uri), f"holds no {last}.")
            for entry in entries:
                (partial / entry.name).parent.mkdir(parents=True, exist_ok=True)
                storage.download(entry.uri, partial / entry.name)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    return str(target)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
