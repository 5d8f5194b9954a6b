"""Where a job's files lie. A job that Ray runs for a submitter works in a copy of the submitter's folder, which Ray removes some time
after the job: what it writes there would be lost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from most_ray.config import RunConfig
from most_ray.io import storage

WRITTEN = ("output", "output_dir", "store_dir", "trace_records")
READ = (
    "model",
    "input",
    "input_dir",
    "records",
    "checkpoint",
    "kmeans",
    "recogniser",
    "vocoder",
    "from_audio",
)  # of commands that have no configuration
HOME = "MOST_RAY_HOME"


def job_home(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that a job's relative places are taken from: MOST_RAY_HOME of the cluster's machines, else the user's home there.
    None in a process that is no submitted job."""
    try:
        about = json.loads(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
        submitted = "job_submission_id" in about["metadata"]
    except (ValueError, TypeError, KeyError):
        submitted = False
    return Path(environ.get(HOME) or Path.home()).absolute() if submitted else None


def placed(config: RunConfig, home: Path | None = None) -> RunConfig:
    """The run with its places as they are meant in a job: what it writes lies below `home` (default: `job_home`), what it reads too
    where the folder that was submitted does not hold it. Elsewhere the run as it is."""
    home = home or job_home()
    if home is None:
        return config
    changes: dict[str, object] = {}
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if each.name in WRITTEN:
            changes[each.name] = value and _below(home, value)
        elif value and each.name.endswith("_dirs"):
            changes[each.name] = tuple(found(home, directory) for directory in value)
        elif value and each.name.endswith(("_path", "_checkpoint", "recogniser", "vocoder")) and "/" in value:  # no name of a preset
            changes[each.name] = found(home, value)
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def place_arguments(args: argparse.Namespace) -> None:
    """The same for a command's own flags, in a job."""
    home = job_home()
    if home is None:
        return
    for name, value in vars(args).items():
        if name in WRITTEN and isinstance(value, str | Path):
            setattr(args, name, type(value)(_below(home, str(value))))
        elif name in READ and isinstance(value, str | Path):
            setattr(args, name, type(value)(found(home, str(value))))
        elif (name in READ or name.endswith("_dirs")) and isinstance(value, list):
            setattr(args, name, [type(each)(found(home, str(each))) for each in value])


def found(home: Path, uri: str) -> str:
    """A place to read from: in the submitted folder, else below `home`, else as it was, for it may be a name on a hub."""
    if storage.is_remote(uri) or storage.exists(uri):
        return uri
    below = _below(home, uri)
    return below if storage.exists(below) else uri


def _below(home: Path, uri: str) -> str:
    return uri if storage.is_remote(uri) else str(home / storage.local(uri).expanduser())
