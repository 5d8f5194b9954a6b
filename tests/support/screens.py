"""docs/screens.md: the screens of a made-up run at 80 and 120 columns and in a log, as they are printed.

    python -m tests.support.screens

writes the page.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from most_ray.config import config_from
from most_ray.console.progress import ProgressText
from most_ray.console.run_screens import first_screen, last_screen
from most_ray.console.terminal import LOG_WIDTH, Terminal, print_line
from most_ray.distributed.topology import Topology
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.notes import run_notes
from most_ray.runs.lifecycle import training_figures
from tests.support.builders import make_plan

PAGE = Path(__file__).parents[2] / "docs" / "screens.md"
_HEAD = """# Screens of a run

What `most-ray train` prints at its start, while it trains and at its end, of a made-up run. On a terminal the line of progress stays in its
place; figures for which there is no room are left out, the least important first. Tables that are too wide fold their names, and then
continue below. A file or a pipe gets no colours, tables as lines, and a line of progress a minute, with the first and last step of each
start, evaluations and failures. Time and speed are those of the whole run, see [Training](training.md#time-and-speed).

Written by `python -m tests.support.screens`; a test compares.
"""
_STEPS = 1700


def _prepared(root: Path) -> Any:
    """What the first screen looks at, of a run that resumes with changed settings."""
    plan, model = make_plan(root), root / "model"
    model.mkdir()
    save_file({"a": np.zeros((2000, 600), np.float32)}, model / "model.safetensors")
    job = SimpleNamespace(
        config=config_from({"output_dir": "runs", "name": "digits"}), total_steps=_STEPS, plan=plan.spec, threads=2, model_path=str(model)
    )
    changes = {"changed": ["learning_rate (0.003 -> 0.001)"], "also_changed": ["save_steps (200 -> 400)"]}
    place = {"folder": RunFolder("runs/digits"), "topologies": (Topology(1, 1, 1),), "use_gpu": False}
    return SimpleNamespace(job=job, plan=plan, done_steps=400, n_rejected=0, **place, **changes)


def _rate(errors: int, words: int, low: float, high: float) -> dict[str, Any]:
    return {"rate": errors / words, "substitutions": errors, "deletions": 0, "insertions": 0, "reference": words, "interval": [low, high]}


def _evaluation() -> dict[str, Any]:
    takes = {"task": "asr", "records": 200, "loss": 0.0381, "words": _rate(5, 200, 0.005, 0.05), "characters": _rate(18, 800, 0, 0)}
    speaker = {"task": "asr", "records": 500, "loss": 0.128, "words": _rate(40, 500, 0.056, 0.104), "characters": _rate(132, 2000, 0, 0)}
    sets: dict[str, dict[str, Any]] = {
        "asr/test_takes": takes,
        "asr/test_speaker": speaker,
        "tts/test_tts": {
            "task": "tts",
            "records": 200,
            "loss": 3.1274,
            "units": _rate(938, 1000, 0.92, 0.95),
            "cycle": _rate(0, 200, 0.0, 0.0),
            "outside": _rate(64, 200, 0.255, 0.385),
            "generated_seconds": 0.33,
            "generated_seconds_median": 0.31,
            "recorded_seconds": 0.43,
            "recorded_seconds_median": 0.41,
            "short_records": 21,
            "duration_ratio": 0.77,
        },
    }
    wer = {name.split("/")[1]: figures["words"]["rate"] for name, figures in sets.items() if "words" in figures}
    return {"kind": "evaluation", "step": 1600, "wer": wer, "sets": sets}


def _lines() -> list[dict[str, Any]]:
    """The run's lines of metrics.jsonl: the first line of each start is slow."""
    lines: list[dict[str, Any]] = []
    for step in range(1, _STEPS + 1):
        if step in (1, 401):
            groups = {"text": [0, 1, 2, 3], "audio": [4, 5, 6, 7]}
            lines.append({"kind": "start", "step": step - 1, "experts": groups, "experts_per_token": 2})
        seconds = 40.0 if step in (1, 401) else 0.16
        losses = {"loss": 2.4406, "asr_loss": 0.0123, "tts_loss": 3.1274, "expert_max_over_mean": {"text": 1.91, "audio": 1.2}}
        lines.append({"kind": "train", "step": step, "tokens": 2175, "samples": 64, "tokens_per_second": 2175 / seconds, **losses})
    return [*lines[:-100], _evaluation(), *lines[-100:]]


def _screen(console: Terminal, prepared: Any) -> None:
    """Print the run to a console, of its progress on a terminal two lines."""
    lines, log = _lines(), console.is_log
    progress, now = ProgressText(_STEPS, 400, live=not log), 0.0
    first_screen(prepared, console, validation="every 400 steps and at the end, beside training, sharing the 2 CPUs")
    for line in lines:
        if line["kind"] == "train" and line["step"] <= 400:
            progress.recall(line)
            continue
        now += 0.16 if line["kind"] == "train" else 0.0
        text = progress.update(line, now)
        if not log and line["kind"] == "train" and line["step"] in (402, _STEPS):
            text = progress.line(console.width - 2)
        if text:
            print_line(console, text)
    evaluation, newest = _evaluation(), {line["kind"]: line for line in lines}
    summary = {"step": _STEPS, "sets": evaluation["sets"], **training_figures(lines, 400)}
    summary["samples"] = [{"set": "asr/test_takes", "id": "fsdd_0_george_0", "reference": "zero", "hypothesis": "zero"}]
    summary["routing"] = {"expert_load": {"text": [225, 477, 231, 67, 0, 0, 0, 0], "audio": [0, 0, 0, 0, 202, 249, 274, 275]}, "leaked": 0}
    summary["notes"] = run_notes(newest["start"], newest["train"], summary["sets"], 4.0)
    last_screen({**summary, "checkpoint": "runs/digits/checkpoints/step-000001700", "report": "runs/digits/report.html"}, console)


def screens_markdown() -> str:
    """The page."""
    parts = [_HEAD]
    with _in_a_new_folder() as root:
        prepared = _prepared(root)
        for title, options in (
            ("A terminal of 80 columns", {"width": 80}),
            ("A terminal of 120 columns", {"width": 120}),
            ("A file or a pipe", {"log_width": LOG_WIDTH}),
        ):
            console = Terminal(file=io.StringIO(), **options)  # type: ignore[arg-type]
            _screen(console, prepared)
            text = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
            parts.append(f"## {title}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


@contextlib.contextmanager
def _in_a_new_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


if __name__ == "__main__":
    PAGE.write_text(screens_markdown(), encoding="utf-8")
