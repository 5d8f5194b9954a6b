"""Checks of what a run writes to, before a worker starts."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from most_ray.config import RunConfig
from most_ray.errors import ConfigError, DataError
from most_ray.io import storage
from most_ray.io.journal import METRICS, TRACE
from most_ray.io.outputs import check_file, check_folder, failure_rule, nearest_folder
from most_ray.io.run_folder import LEDGER

# By which a folder is known to be a run's or a sweep's; and what a run replaces in its folder.
_OF_A_RUN = ("metrics.jsonl", "environment.json", "checkpoints", ".attempt", LEDGER)
_REPLACED = ("config.yaml", "summary.json", "evaluation.json", "hypotheses.jsonl", "report.html", "export")


def check_outputs(config: RunConfig) -> None:
    """Check that the run's folder, the folder of token stores and the trace can be written to and hold nothing of a user's that would be
    lost, that the disk has room, and that W&B has a key where wandb_mode is online; raise ConfigError where one of these does not hold."""
    _check_folder("output_dir", config.run_uri)
    if config.store_dir:
        _check_folder("store_dir", config.store_dir)
    if not storage.is_remote(config.run_uri):
        run = storage.local(config.run_uri)
        if shutil.disk_usage(nearest_folder(run)).free < 1 << 28:
            raise ConfigError("output_dir", config.output_dir, "has less than 256 MiB free.")
        check_file("output_dir", run / "metrics.jsonl", METRICS)
        _check_own(run)
    if config.trace_records:
        check_file("trace_records", Path(config.trace_records), TRACE)
    if config.wandb_project and config.wandb_mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
        remedy = "Set WANDB_API_KEY, run `wandb login`, or use wandb_mode offline or disabled."
        raise ConfigError("wandb_mode", "online", "needs a key.", remedy)


def _check_own(run: Path) -> None:
    """Raise ConfigError where a run's folder is none yet, and holds what a run would replace."""
    if any((run / name).exists() for name in _OF_A_RUN):
        return
    if mine := next((name for name in _REPLACED if os.path.lexists(run / name)), None):
        rule = f"holds {mine}, which no start of a run has written: it would be lost."
        raise ConfigError("name", str(run), rule, "Choose another name, or move it away.")


def _check_folder(field: str, uri: str) -> None:
    """Check that files can be written below a path, or that bytes written below a URI can be read back. Raises ConfigError."""
    if not storage.is_remote(uri):
        return check_folder(field, storage.local(uri))
    probe = storage.join(uri, f".probe-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes(probe, b"probe")
        if storage.read_bytes(probe) != b"probe":
            raise OSError("reads other bytes than were written")
        storage.remove(probe)
    except (OSError, DataError) as error:
        rule = f"{failure_rule(error, 'written to')}."
        raise ConfigError(field, storage.redact(uri), rule, "Name a folder or URI that can be written to.") from error


def _has_netrc() -> bool:
    """Whether ~/.netrc mentions wandb."""
    try:
        return "wandb" in (Path.home() / ".netrc").read_text(encoding="utf-8")
    except OSError:  # no such file, or not readable for wandb either
        return False
