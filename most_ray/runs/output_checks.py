"""Checks of what a run writes to, before a worker starts."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from most_ray.config import RunConfig
from most_ray.errors import ConfigError, DataError
from most_ray.io import storage


def check_outputs(config: RunConfig) -> None:
    """Check that the run's folder, the folder of token stores and the trace can be written to, that the disk has room, and that W&B has a
    key where wandb_mode is online; raise ConfigError where one of these does not hold."""
    _check_writable("output_dir", config.run_uri)
    if config.store_dir:
        _check_writable("store_dir", config.store_dir)
    if not storage.is_remote(config.run_uri) and shutil.disk_usage(storage.local(config.run_uri)).free < 1 << 28:
        raise ConfigError("output_dir", config.output_dir, "has less than 256 MiB free.")
    if config.trace_records:
        try:
            Path(config.trace_records).parent.mkdir(parents=True, exist_ok=True)
            with Path(config.trace_records).open("a+b") as stream:
                stream.seek(0)
                first = stream.readline(1 << 26)
        except OSError as error:
            raise ConfigError("trace_records", config.trace_records, f"cannot be written to ({error.strerror}).") from error
        if first and not first.startswith(b'{"step"'):
            raise ConfigError("trace_records", config.trace_records, "exists and is no trace.", "Name another file.")
    if config.wandb_project and config.wandb_mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
        remedy = "Set WANDB_API_KEY, run `wandb login`, or use wandb_mode offline or disabled."
        raise ConfigError("wandb_mode", "online", "needs a key.", remedy)


def _check_writable(field: str, uri: str) -> None:
    """Check that bytes written below a path or URI can be read back. Raises ConfigError."""
    probe = storage.join(uri, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes(probe, b"probe")
        if storage.read_bytes(probe) != b"probe":
            raise OSError("reads other bytes than were written")
        storage.remove(probe)
    except (OSError, DataError) as error:
        rule = f"{failure_rule(error, 'written to')}."
        raise ConfigError(field, storage.redact(uri), rule, "Name a folder or URI that can be written to.") from error


def failure_rule(error: OSError | DataError, what: str) -> str:
    """Why a path or URI cannot be `what` ("read", "written to"), as the end of a sentence, without its full stop."""
    return error.rule.rstrip(".") if isinstance(error, DataError) else f"cannot be {what} ({error.strerror or error})"


def _has_netrc() -> bool:
    """Whether ~/.netrc mentions wandb."""
    try:
        return "wandb" in (Path.home() / ".netrc").read_text(encoding="utf-8")
    except OSError:  # no such file, or not readable for wandb either
        return False
