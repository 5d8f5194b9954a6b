"""Where numbers go while a run lives: Weights & Biases, and the progress shown on the driver's screen."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from most_ray.config import RunConfig
from most_ray.train.folder import RunFolder


class Wandb:
    """The run in W&B, or nothing where no project is named. The id follows the run's folder: a restart goes on in the same run."""

    def __init__(self, config: RunConfig, run_place: str) -> None:
        self._run: Any = None
        if config.wandb_project and config.wandb_mode != "disabled":
            import wandb  # heavy, and used by few runs

            identity = hashlib.blake2b(run_place.encode(), digest_size=6).hexdigest()
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.name,
                id=f"{config.name}-{identity}",
                resume="allow",
                mode=config.wandb_mode,
                dir=str(RunFolder(run_place).local),
                config={key: value for key, value in vars(config.redacted()).items() if not key.startswith("wandb")},
            )
            self._run.define_metric("*", step_metric="step")

    def log(self, line: dict[str, Any]) -> None:
        if self._run:
            self._run.log(flatten(line))

    def close(self) -> None:
        if self._run:
            self._run.finish()


def flatten(line: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures as `a/b`; lists by index."""
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            flat |= {f"{prefix}{key}/{index}": item for index, item in enumerate(value)}
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class ProgressWatcher:
    """Follows metrics.jsonl on a thread of its own and shows step, loss, tokens/s and time left: as a bar on a terminal, as a line
    now and then elsewhere."""

    def __init__(self, metrics: Path, total_steps: int, first_step: int, console: Console) -> None:
        self._path, self._total, self._first, self._console = metrics, total_steps, first_step, console
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressWatcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _lines(self) -> Any:
        """New lines since the last call; a file cut back by a restart is read on from its new end."""
        offset = self._path.stat().st_size if self._path.exists() else 0
        while True:
            found = []
            if self._path.exists():
                size = self._path.stat().st_size
                offset = min(offset, size)
                with self._path.open("rb") as stream:
                    stream.seek(offset)
                    data = stream.read(size - offset)
                whole = data.rfind(b"\n") + 1
                offset += whole
                for raw in data[:whole].splitlines():
                    try:
                        found.append(json.loads(raw))
                    except ValueError:
                        continue  # the middle of a line, after the file was cut back
            yield found

    def _follow(self) -> None:
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        started, shown = time.monotonic(), 0.0
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            bar = progress.add_task("train", total=self._total, completed=self._first, figures="starting workers")
            for lines in self._lines():
                stopping = self._stop.is_set()
                for line in lines[-1:]:
                    loss = "skipped" if line["loss"] is None else f"{line['loss']:.4f}"
                    figures = f"loss {loss}  {line['tokens_per_second']:,.0f} tokens/s"
                    progress.update(bar, completed=line["step"], figures=figures)
                    share = line["step"] / self._total
                    if not self._console.is_terminal and (share - shown >= 0.05 or line["step"] == self._total):
                        shown = share
                        done = max(1, line["step"] - self._first)
                        left = (time.monotonic() - started) / done * (self._total - line["step"])
                        self._console.print(f"step {line['step']}/{self._total}  {figures}  {left:.0f} s left", highlight=False)
                if stopping:
                    return
                self._stop.wait(0.5)
