"""Trackers: Weights & Biases and TensorBoard. Each holds every line of metrics.jsonl once per step, after any kill and resume."""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from most_ray.config import RunConfig
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import AXES, Key, exchange, key_of, lines_in_event_files, lines_of, row_of, rows_in_wandb_files
from most_ray.service.cluster.prometheus import RayMetrics
from most_ray.train.reporter import Tracker

logger = logging.getLogger(__name__)
_BACKLOG = 20_000  # lines that wait for a tracker, at most
_CLOSING_S = 60.0  # for what a tracker has not brought to its place yet
_GROWTH = 1.25  # of TensorBoard's files before they go to the run's place again: all in all a few times their size


class Secret:
    """A text that is shown nowhere: not when printed, not as JSON."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"


def uses_wandb(config: RunConfig) -> bool:
    return bool(config.wandb_project) and config.wandb_mode != "disabled"


def wandb_key(config: RunConfig) -> Secret | None:
    """The key of W&B as the library finds it on this machine (WANDB_API_KEY, netrc), where the run can use it."""
    if not uses_wandb(config) or config.wandb_mode == "offline":
        return None
    text = os.environ.get("WANDB_API_KEY")
    if not text:
        try:
            from wandb import setup  # heavy, and used by few runs
            from wandb.sdk.lib import wbauth

            text = wbauth.read_netrc_auth(host=setup().settings.base_url)
        except Exception as error:  # noqa: BLE001 - the look-up is not W&B's public interface: without it, no key is found
            logger.warning("the key of W&B could not be looked up: %s", _shown(error))
    return Secret(text) if text else None


def trackers_of(config: RunConfig, run_place: str, key: Secret | None) -> list[Tracker]:
    """The trackers that a run asks for, and Ray's own metrics where Ray runs it; on rank 0. None can hold up training or end it."""
    trackers: list[Tracker] = []
    if uses_wandb(config):
        trackers.append(Background("Weights & Biases", Wandb(config, run_place, key), key))
    if config.tensorboard:
        trackers.append(Background("TensorBoard", TensorBoard(run_place)))
    if ray.is_initialized():
        trackers.append(Background("Ray's metrics", RayMetrics(config)))
    return trackers


def _shown(error: BaseException, key: Secret | None = None) -> str:
    """What an error says, in one line without secrets."""
    text = storage.redact(str(error)).strip() or type(error).__name__
    return (text.replace(key.reveal(), "***") if key else text).splitlines()[0][:300]


class Background:
    """A tracker on a thread of its own: one that is slow is not waited for, one that fails is dropped, both with a warning. What it
    misses then is in metrics.jsonl, and goes to it at the run's next start.

    Args:
        patience: seconds that `close` waits.
    """

    def __init__(self, name: str, tracker: Tracker, key: Secret | None = None, patience: float = _CLOSING_S) -> None:
        self._name, self._tracker, self._key, self._patience = name, tracker, key, patience
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._dropped = threading.Event()
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._closed = False

    def begin(self, step: int, metrics: Path) -> None:
        self._thread.start()
        self._put(lambda: self._tracker.begin(step, metrics))

    def log(self, line: dict[str, Any]) -> None:
        self._put(lambda: self._tracker.log(line))

    def checkpoint(self, step: int, place: str) -> None:
        self._put(lambda: self._tracker.checkpoint(step, place))

    def close(self) -> None:
        """Waits until everything is written, but not for ever."""
        if self._closed or not self._thread.is_alive():
            return
        self._closed = True
        self._calls.put(self._tracker.close)
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            logger.warning("%s has not taken everything within %g s and is left behind.", self._name, self._patience)

    def _put(self, call: Callable[[], None]) -> None:
        if self._dropped.is_set():
            return
        if self._calls.qsize() > _BACKLOG:
            self._drop(f"more than {_BACKLOG} lines wait for it")
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._dropped.is_set() and call != self._tracker.close:
                continue
            try:
                call()
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._drop(_shown(error, self._key))

    def _drop(self, reason: str) -> None:
        if not self._dropped.is_set():
            self._dropped.set()
            self.failure = f"{self._name} is not written to any more: {reason}"
            logger.warning("%s is not written to any more, training goes on: %s", self._name, reason)


class Wandb:
    """The run in W&B. Its id follows the run's folder, so that a resume goes on in the same run; a line is known by its kind and step,
    each kind over a step axis of its own, for evaluations arrive late.

    What W&B holds already is read from its local files, offline all of them, online up to the step that the server has come to; lines
    that are missing are taken from metrics.jsonl, and those that come once more are passed over: they are computed alike.
    """

    failure: str | None = None  # it raises instead

    def __init__(self, config: RunConfig, run_place: str, key: Secret | None) -> None:
        self._config, self._key, self._folder = config, key, RunFolder(run_place)
        identity = hashlib.blake2b(run_place.encode(), digest_size=6).hexdigest()
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
        for line in lines_of(metrics):
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

    def checkpoint(self, step: int, place: str) -> None:
        """An artifact that names the checkpoint's place; nothing is uploaded."""
        import wandb
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

        shown = storage.redact(place)
        artifact = wandb.Artifact(f"model-{self.id}", type="model", metadata={"step": step, "place": shown})
        if not storage.is_remote(place):
            path = storage.local(place).absolute()
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


class TensorBoard:
    """Event files in the run's folder, under the names that W&B has. A start at step k hides what older files hold beyond it; lines up to
    it that a kill took from them are written again."""

    failure: str | None = None  # it raises instead

    def __init__(self, run_place: str) -> None:
        self._folder = RunFolder(run_place)
        self._root = self._folder.local / "tensorboard"
        self._start: Mapping[str, Any] = {}
        self._logged: set[Key] = set()
        self._pushed = 0
        self._writer: Any = None

    def begin(self, step: int, metrics: Path) -> None:
        from tensorboardX import SummaryWriter  # heavy, and used by few runs

        exchange(self._folder, "tensorboard")
        self._root.mkdir(parents=True, exist_ok=True)
        self._logged = {key for key in lines_in_event_files(self._root) if key[1] <= step}
        # Two starts within a second would otherwise write to one file.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(logdir=str(self._root), purge_step=step + 1, flush_secs=10, filename_suffix=suffix)
        for line in lines_of(metrics):
            self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        kind, step = key = key_of(line)
        if kind == "start":
            self._start = line
        if kind not in AXES or key in self._logged:
            return
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row_of(line, self._start).items()]
        if kind == "evaluation" and line.get("samples"):
            values += text("eval/samples", _markdown(line["samples"])).value
        self._writer.file_writer.add_summary(Summary(value=values), step, line.get("time"))
        self._logged.add(key)

    def checkpoint(self, step: int, place: str) -> None:
        del step, place
        size = sum(path.stat().st_size for path in self._root.iterdir())
        if size > _GROWTH * self._pushed:
            self._pushed = size
            exchange(self._folder, "tensorboard")

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            exchange(self._folder, "tensorboard")


def _markdown(samples: list[dict[str, Any]]) -> str:
    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    columns = ("set", "id", "reference", "hypothesis")
    rows = ["| " + " | ".join(cell(sample.get(name, "")) for name in columns) + " |" for sample in samples]
    return "\n".join(["| " + " | ".join(columns) + " |", "|---|---|---|---|", *rows])
