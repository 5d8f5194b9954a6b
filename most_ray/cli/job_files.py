"""Where a submitted job reads and writes.

Ray runs a job in a copy of the submitter's folder and removes that copy some time after the job: what the job wrote there would be lost. So
in a job, relative paths that are written to are below a home folder of the cluster's machines, and relative paths that are read are looked
for in the copy first, then below that home.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from most_ray.config import OPTIONS, RunConfig
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.uris import expand
from most_ray.options import Location

HOME = "MOST_RAY_HOME"  # environment variable that names the home folder
P = TypeVar("P", str, Path)


def job_home(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that a job's relative paths are taken from: MOST_RAY_HOME of the cluster's machines, else the user's home folder there.
    None in a process that is no submitted job."""
    try:
        submitted = "job_submission_id" in parse_json(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))["metadata"]
    except (ValueError, TypeError, KeyError):  # no job's environment
        submitted = False
    return Path(environ.get(HOME) or Path.home()).expanduser().absolute() if submitted else None


def resolve_paths(config: RunConfig, home: Path | None = None) -> RunConfig:
    """The configuration with the paths that a job uses; outside of a job the configuration as it is. `home`: by default `job_home()`."""
    home = home or job_home()
    if home is None:
        return config
    changes = {
        option.name: option.map(partial(_resolve, home, option.location), getattr(config, option.name))
        for option in OPTIONS.values()
        if option.location
    }
    return dataclasses.replace(config, **changes)


class PathFlag(Generic[P]):
    """The `type` of a flag with a path or URI: its value as a str or a Path, as a job uses it.

    Args:
        kind: str or Path.
        resolve: the path that a job uses, from the job's home and the path as it is written.
        reads: whether the command reads what is there.
    """

    def __init__(self, kind: Callable[[str], P], resolve: Callable[[Path, str], str], reads: bool = False) -> None:
        self._kind: Callable[[str], P] = kind
        self._resolve, self.reads = resolve, reads

    def __call__(self, text: str, field: str = "path") -> P:
        """The value; `field` is the flag's name, for the ConfigError of a path that cannot be meant, and of a URI where none is taken."""
        written, home = expand(field, text), job_home()
        if self._kind is Path and storage.is_remote(written):  # a Path would lose one of its slashes
            raise ConfigError(field, storage.redact(text), "is not a local path.", "Name a file or folder on this machine.")
        return self._kind(self._resolve(home, written) if home else written)


def as_given(kind: Callable[[str], P]) -> PathFlag[P]:
    """The `type` of a flag whose path is used as it is, in a job too."""
    return PathFlag(kind, lambda _, text: text)


def to_read(kind: Callable[[str], P]) -> PathFlag[P]:
    """The `type` of a flag that names what a command reads."""
    return PathFlag(kind, find, reads=True)


def to_write(kind: Callable[[str], P]) -> PathFlag[P]:
    """The `type` of a flag that names what a command writes."""
    return PathFlag(kind, _below)


def find(home: Path, uri: str) -> str:
    """A path or URI to read from: in the working directory, else below `home`, else as it is, since it may be a name on a hub."""
    if storage.is_remote(uri) or storage.exists(uri):
        return uri
    below = _below(home, uri)
    return below if storage.exists(below) else uri


def _resolve(home: Path, location: Location, uri: str) -> str:
    if location.access == "write":
        return _below(home, uri)
    return uri if location.may_be_name and "/" not in uri else find(home, uri)  # the name of a preset stays one


def _below(home: Path, uri: str) -> str:
    return uri if storage.is_remote(uri) else str(home / storage.local(uri))
