"""Weights & Biases."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from most_ray.config import RunConfig
from most_ray.io import storage
from most_ray.io.journal import journal_lines
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import AXES, Key, exchange, key_of, row_of, rows_in_wandb_files
from most_ray.trackers.base import Secret

logger = logging.getLogger(__name__)


class Wandb:
    """The run in W&B. Its id follows the run's folder, so that a resume goes on in the same run; a line is known by its kind and step,
    each kind over a step axis of its own, for evaluations arrive late.

    What W&B holds already is read from its local files, offline all of them, online up to the step that the server has come to; lines
    that are missing are taken from metrics.jsonl, and those that come once more are passed over: they are computed alike.
    """

    failure: str | None = None  # it raises instead

    def __init__(self, config: RunConfig, run_uri: str, key: Secret | None) -> None:
        self._config, self._key, self._folder = config, key, RunFolder(run_uri)
        identity = hashlib.blake2b(run_uri.encode(), digest_size=6).hexdigest()
        self.id = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', config.name)[:80]}-{identity}"
        self._mode = config.wandb_mode or ("online" if key else "offline")
        self._start: Mapping[str, Any] = {}
        self._logged: set[Key] = set()
        self._marks: dict[str, int] = {}  # by kind, the step up to which the server has the lines
        self._next = 0
        self._run: Any = None

    def begin(self, step: int, metrics: Path) -> None:
        del step  # metrics.jsonl has been cut back to it
        if self._mode == "offline":
            if self._config.wandb_mode is None:
                logger.info("no key of W&B was found: the run is kept in %s/wandb, from where `wandb sync` uploads it", self._folder.local)
            exchange(self._folder, "wandb")
        root = self._folder.local / "wandb"
        root.mkdir(parents=True, exist_ok=True)
        rows = rows_in_wandb_files(root, self.id)
        self._run = self._init(root)
        for axis in AXES.values():
            self._run.define_metric(axis)
        for group, kind in {"train": "train", "mix": "train", "experts": "train", "layers": "experts", "eval": "evaluation"}.items():
            self._run.define_metric(f"{group}/*", step_metric=AXES[kind])
        self._take_stock(rows)
        for line in journal_lines(metrics):
            self.log(line)

    def _init(self, root: Path) -> Any:
        import wandb  # heavy, and used by few runs

        config, online = self._config, self._mode == "online"
        os.environ.setdefault("WANDB_DATA_DIR", str(root / "data"))  # tables wait there until they are uploaded
        settings = wandb.Settings(
            api_key=self._key.reveal() if self._key and online else None,  # by settings: a login would write it to ~/.netrc
            console="off",
            silent=True,
            x_disable_meta=True,  # it would hold the worker's command line
        )
        return wandb.init(
            project=config.wandb_project,
            name=config.name,
            group=config.wandb_group,
            id=self.id,
            resume="allow" if online else None,
            mode=self._mode,
            tags=list(config.wandb_tags) or None,
            dir=str(self._folder.local),
            config={key: value for key, value in vars(config.redacted()).items() if not key.startswith("wandb")},
            settings=settings,
        )

    def _take_stock(self, rows: Mapping[int, Key | None]) -> None:
        """Which lines W&B has, and the number of its next row."""
        self._next = max(rows, default=-1) + 1
        if self._mode == "online":
            known = self._next
            self._next = self._run.step  # behind the last one that has reached the server
            if known < self._next:  # another machine has written those: a mark is all that the server tells
                summary = self._run.summary
                self._marks = {kind: int(summary[axis]) for kind, axis in AXES.items() if isinstance(summary.get(axis), int | float)}
        self._logged = {key for row, key in rows.items() if key and row < self._next}

    def log(self, line: dict[str, Any]) -> None:
        kind, step = key = key_of(line)
        if kind == "start":
            self._start = line
            self._run.config.update({"start": {k: v for k, v in line.items() if k != "kind"}}, allow_val_change=True)
        if kind not in AXES or key in self._logged or step <= self._marks.get(kind, -1):
            return
        row: dict[str, Any] = {**row_of(line, self._start), AXES[kind]: step}
        if kind == "evaluation" and line.get("samples"):
            row["eval/samples"] = _table(step, line["samples"])
        self._run.log(row, step=self._next, commit=True)
        self._next += 1
        self._logged.add(key)

    def checkpoint(self, step: int, uri: str) -> None:
        """An artifact that names the checkpoint's place; nothing is uploaded."""
        import wandb
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

        shown = storage.redact(uri)
        artifact = wandb.Artifact(f"model-{self.id}", type="model", metadata={"step": step, "place": shown})
        if not storage.is_remote(uri):
            path = storage.local(uri).absolute()
            if not path.exists():
                return  # it was not kept
            artifact.add_reference(path.as_uri(), checksum=False)
        else:  # `add_reference` would want the store's own client and credentials
            artifact.manifest.add_entry(ArtifactManifestEntry(path="checkpoint", ref=shown, digest=shown))
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def close(self) -> None:
        """Everything is flushed, and W&B's own process ends."""
        if self._run is None:
            return
        import wandb

        self._run.finish()
        wandb.teardown()
        if self._mode == "offline":
            exchange(self._folder, "wandb")


def _table(step: int, samples: list[dict[str, Any]]) -> Any:
    import wandb

    columns = ["set", "id", "reference", "hypothesis"]
    return wandb.Table(columns=[*columns, "step"], data=[[*(str(sample.get(name, "")) for name in columns), step] for sample in samples])
