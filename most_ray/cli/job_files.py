"""Where a submitted job reads and writes.

Ray runs a job in a copy of the submitter's folder and removes that copy some time after the job: what the job wrote there would be lost. So
in a job, relative paths that are written to are below a home folder of the cluster's machines, and relative paths that are read are looked
for in the copy first, then below that home.
"""

from __future__ import annotations

import argparse
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


def as_given(kind: Callable[[str], P]) -> Callable[[str], P]:
    """The `type` of a flag with a path or URI that is used as it is, in a job too."""
    return lambda text: kind(_written(text))


@dataclasses.dataclass(frozen=True)
class to_read(Generic[P]):  # noqa: N801 - used as a function
    """The `type` of a flag that names what a command reads: its path as a job uses it, as a str or a Path."""

    kind: Callable[[str], P]

    def __call__(self, text: str) -> P:
        return self.kind(find(home, written) if (written := _written(text)) and (home := job_home()) else written)


def to_write(kind: Callable[[str], P]) -> Callable[[str], P]:
    """The `type` of a flag that names what a command writes: its path as a job uses it, as a str or a Path."""
    return lambda text: kind(_below(home, written) if (written := _written(text)) and (home := job_home()) else written)


def _written(text: str) -> str:
    """`expand` for the text of a flag, whose name argparse adds to the error."""
    try:
        return expand("path", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error.value!r} {error.rule} {error.remedy}".rstrip(". ")) from None


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
