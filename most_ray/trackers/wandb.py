"""Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from most_ray.checkpoint import catalog
from most_ray.config import RunConfig
from most_ray.io import storage
from most_ray.io.json_values import read_lines
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import AXES, GROUPS, kind_of, row_of
from most_ray.metrics.schema import EVALUATION
from most_ray.trackers.base import SAMPLE_COLUMNS, Line, Secret, push_files, sample_cells

logger = logging.getLogger(__name__)
_ROWS_PER_STEP = 100  # row numbers for each step of training: its own row, the experts', and evaluations that end meanwhile
_EVALUATIONS = "wandb/evaluations.jsonl"  # in the run's folder: the row number of each evaluation


class Wandb:
    """The run in W&B. Its id follows from the run's folder, so that a later start of the run continues it.

    W&B takes rows in ascending order of their number, which it calls the step, and drops others. The number of a row of training follows
    from its step in training, so a start can go through all lines of metrics.jsonl again. Online, W&B says which number comes next; rows
    below it have arrived. Only evaluations end at any time: their row numbers are kept in a file of ours beside W&B's, from which a start
    knows those that have arrived. Offline, nothing says what a killed start has written, so each start writes all lines to a file of its
    own, and deletes the files of earlier starts; `wandb sync` of it replaces the run in W&B.
    """

    failure: str | None = None  # it raises instead

    def __init__(self, config: RunConfig, run_uri: str, key: Secret | None) -> None:
        self._config, self._key, self._folder = config, key, RunFolder(run_uri)
        identity = hashlib.blake2b(run_uri.encode(), digest_size=6).hexdigest()
        self.id = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', config.name)[:80]}-{identity}"
        self._online = (config.wandb_mode or ("online" if key else "offline")) == "online"
        self._start: Line = {}
        self._next = 0  # the lowest row number that W&B takes
        self._evaluated: set[int] = set()  # steps of the evaluations that W&B has
        self._marks: dict[str, int] = {}  # by kind, the step up to which W&B has the lines, where row numbers do not say it
        self._run: Any = None

    def begin(self, step: int, lines: Iterable[Line]) -> None:
        del step  # the lines are those up to it
        if not self._online and self._config.wandb_mode is None:
            logger.info("no key of W&B was found: the run is kept in %s/wandb, from where `wandb sync` uploads it", self._folder.local)
        root = self._folder.local / "wandb"
        root.mkdir(parents=True, exist_ok=True)
        self._run = self._init(root)
        for axis in AXES.values():
            self._run.define_metric(axis)
        for group, kind in GROUPS.items():
            self._run.define_metric(f"{group}/*", step_metric=AXES[kind])
        if self._online:
            self._find_arrived()
        # Keep only what has arrived: numbers that were given to lost rows are given again.
        text = "".join(json.dumps({"row": -1, "step": step}) + "\n" for step in sorted(self._evaluated))
        storage.write_bytes(self._folder.local / _EVALUATIONS, text.encode())
        self._folder.push(_EVALUATIONS)
        for line in lines:
            self.log(line)
        # Offline files of earlier starts, synchronised after this one, would replace it by less.
        for folder in root.iterdir():
            if self._is_offline(folder.name) and folder != Path(self._run.dir).parent:
                shutil.rmtree(folder, ignore_errors=True)  # W&B's process of a killed start may still write there
        if not self._online:
            for uri in catalog.committed(self._folder.checkpoints):
                self.checkpoint(catalog.step_of(uri), uri)

    def _init(self, root: Path) -> Any:
        import wandb  # heavy, and used by few runs

        config, online = self._config, self._online
        os.environ.setdefault("WANDB_DATA_DIR", str(root / "data"))  # tables are kept there until they are uploaded
        key = self._key.reveal() if self._key and online else None  # by settings: a login would write it to ~/.netrc
        settings = wandb.Settings(api_key=key, console="off", silent=True, x_disable_meta=True)  # meta has the worker's command line
        return wandb.init(
            project=config.wandb_project,
            name=config.name,
            group=config.wandb_group,
            id=self.id,
            resume="allow" if online else None,
            mode="online" if online else "offline",
            tags=list(config.wandb_tags) or None,
            dir=str(self._folder.local),
            config={key: value for key, value in vars(config.redacted()).items() if not key.startswith("wandb")},
            settings=settings,
        )

    def _find_arrived(self) -> None:
        """Find out which lines W&B has of earlier starts."""
        self._next = self._run.step
        summary = self._run.summary
        marks = {kind: int(summary[axis]) for kind, axis in AXES.items() if isinstance(summary.get(axis), int | float)}
        self._folder.pull(_EVALUATIONS)
        path = self._folder.local / _EVALUATIONS
        self._evaluated = {entry["step"] for entry in read_lines(path) if entry["row"] < self._next}
        if self._next < _ROWS_PER_STEP * marks.get("train", 0):  # version 0.1 has numbered the rows one after the other
            self._marks = marks
        elif self._next and not path.exists():
            self._marks = {kind: step for kind, step in marks.items() if kind == "evaluation"}

    def log(self, line: Line) -> None:
        kind = kind_of(line)
        if kind == "start":
            self._start = line
            self._run.config.update({"start": {k: v for k, v in line.items() if k != "kind"}}, allow_val_change=True)
        if kind not in AXES or (number := self._number(kind, line["step"])) is None:
            return
        row: dict[str, Any] = {**row_of(line, self._start), AXES[kind]: line["step"]}
        if kind == "evaluation" and line.get("samples"):
            import wandb

            data = [[*sample_cells(sample), line["step"]] for sample in line["samples"]]
            row[EVALUATION["samples"].tracker] = wandb.Table(columns=[*SAMPLE_COLUMNS, "step"], data=data)
        self._run.log(row, step=number, commit=True)
        self._next = number + 1

    def _number(self, kind: str, step: int) -> int | None:
        """The row number of a line; None if W&B has the line."""
        arrived = step <= self._marks.get(kind, -1)
        if kind != "evaluation":
            number = _ROWS_PER_STEP * step + (kind == "experts")
            return None if arrived or number < self._next else number
        if step in self._evaluated:
            return None
        self._evaluated.add(step)
        # Before the row is sent: a row that was sent and is not noted here would be sent again by the next start.
        with (self._folder.local / _EVALUATIONS).open("a") as stream:
            stream.write(json.dumps({"row": -1 if arrived else self._next, "step": step}) + "\n")
        self._folder.push(_EVALUATIONS)
        return None if arrived else self._next

    def _is_offline(self, name: str) -> bool:
        """Whether a folder's name is of a start of this run that was offline: two within a second differ in a number at the end."""
        return re.fullmatch(rf"offline-run-\d+_\d+-{re.escape(self.id)}(-\d+)?", name) is not None

    def checkpoint(self, step: int, uri: str) -> None:
        """Log an artifact that names the checkpoint's URI; nothing is uploaded."""
        import wandb
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

        shown = storage.redact(uri)
        artifact = wandb.Artifact(f"model-{self.id}", type="model", metadata={"step": step, "place": shown})
        if storage.is_remote(uri):  # `add_reference` would need the store's own client and credentials
            artifact.manifest.add_entry(ArtifactManifestEntry(path="checkpoint", ref=shown, digest=shown))
        elif (path := storage.local(uri).absolute()).exists():
            artifact.add_reference(path.as_uri(), checksum=False)
        else:
            return  # it was deleted meanwhile
        self._run.log_artifact(artifact, aliases=[f"step-{step}"])

    def close(self) -> None:
        """Write everything and end W&B's own process."""
        if self._run is None:
            return
        import wandb

        own = Path(self._run.dir).parent
        self._run.finish()
        wandb.teardown()
        if not self._online and self._folder.remote:  # this start's files replace those of earlier starts at the run's URI
            push_files(self._folder, f"wandb/{own.name}")
            for name in {entry.name.split("/")[0] for entry in storage.list_files(self._folder.at("wandb"), ("",))}:
                if self._is_offline(name) and name != own.name:
                    storage.remove(self._folder.at("wandb", name))
