"""Every figure of a run is the same on its screen, in its report, in summary.json and in Weights & Biases, and rounded alike."""

from __future__ import annotations

import html
import io
import json
import random
import re
from dataclasses import dataclass
from typing import Any

import pytest

from most_ray.config import config_from
from most_ray.console.progress import ProgressText
from most_ray.console.run_screens import last_screen
from most_ray.console.terminal import Terminal
from most_ray.data.plan import Plan
from most_ray.io.journal import read_journal
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.notes import run_notes
from most_ray.metrics.texts import duration, percent
from most_ray.report.collect import collect
from most_ray.report.page import page
from most_ray.runs.lifecycle import training_figures
from most_ray.trackers.base import Secret
from most_ray.trackers.wandb import Wandb
from most_ray.train.reporter import RunReporter
from tests.support.report_data import _evaluation, _start, _train
from tests.support.tracking import WandbServer

STEPS, RESUMED, CUT = 40, 15, 19  # the first start is killed after CUT steps and resumes after RESUMED


@dataclass(frozen=True)
class Shown:
    """A run in all places."""

    summary: dict[str, Any]
    screen: str
    progress: str  # the last line
    report: str  # text of the page, without markup
    logged: dict[str, Any]  # W&B's summary: the last value of each name


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Shown:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    draw, server, progress = random.Random(1), WandbServer(), ProgressText(STEPS, 0, live=True)
    evaluation = _evaluation(STEPS, STEPS, draw)
    evaluation["sets"]["tts/dev_tts"] |= {"outside": evaluation["sets"]["tts/dev_tts"]["cycle"], "short_records": 7}
    evaluation["sets"]["tts/dev_tts"] |= {"generated_seconds": 0.183, "recorded_seconds": 0.512}
    evaluation["sets"]["tts/dev_tts"] |= {"generated_seconds_median": 0.18, "recorded_seconds_median": 0.5}
    for first, last in ((0, CUT), (RESUMED, STEPS)):
        tracker = Wandb(config_from({"name": "mine", "wandb_project": "p", "wandb_mode": "online"}), str(folder), Secret("k"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracker, "_init", lambda root: server.begin(root / "run"))
            patch.setattr(tracker, "close", lambda: None)
            about = {key: value for key, value in _start(first, 0.0, STEPS, 2).items() if key not in ("kind", "step", "time", "wanted_mix")}
            reporter = RunReporter(None, plan, RunFolder(str(folder)), first, 0, [tracker], {**about, "exact": True, "changed": []})
            for step in range(first + 1, last + 1):
                reporter.log(_train(step, STEPS, draw, 1.0e9 + step, 1.0))
            if last == STEPS:
                reporter.evaluation(evaluation)
            reporter.close(push=False)
        server.arrive()
    lines = read_journal(folder / "metrics.jsonl")
    for line in lines:
        progress.update(line, 0.0)
    summary = {"step": STEPS, "sets": evaluation["sets"], "wer": evaluation["wer"], **training_figures(lines, RESUMED)}
    newest = {line["kind"]: line for line in lines}
    summary["notes"] = run_notes(newest["start"], newest["train"], summary["sets"], 4.0)
    (folder / "summary.json").write_text(json.dumps(summary))
    console = Terminal(file=io.StringIO(), width=400)
    last_screen(summary, console)
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", page(collect([str(folder)])), flags=re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
    return Shown(summary, console.file.getvalue(), progress.line(400), text, {name: v for _, row in server.rows for name, v in row.items()})  # type: ignore[attr-defined]


def test_time_and_speed(shown: Shown) -> None:
    seconds, speed = shown.summary["training_seconds"], shown.summary["tokens_per_second"]
    assert f"Time:       {duration(seconds)} of training, {speed:,} tokens/s" in shown.screen
    assert f"{duration(seconds)} so far" in shown.progress and f"{speed:,} tokens/s" in shown.progress
    assert f"Training time {duration(seconds)}" in shown.report and f"Tokens per second {speed:,}" in shown.report
    assert round(shown.logged["train/training_seconds"], 1) == seconds and round(shown.logged["train/run_tokens_per_second"]) == speed
    assert f"; 2 starts, the last one {duration(shown.summary['start_seconds'])}" in shown.screen


def test_amounts(shown: Shown) -> None:
    assert (shown.summary["tokens"], shown.summary["trained_records"]) == (STEPS * 20000, STEPS * 64), "steps that were cut off count once"
    assert f"Training:   {STEPS} steps, {STEPS * 64:,} records, {STEPS * 20000:,} tokens" in shown.screen
    assert f"{STEPS * 20000:,} tokens" in shown.report and f"Records trained on {STEPS * 64:,}" in shown.report
    assert re.search(rf"Steps {STEPS}\b", shown.report) and shown.progress.startswith(f"step {STEPS}/{STEPS}")
    assert (shown.logged["train/run_tokens"], shown.logged["train/run_records"]) == (STEPS * 20000, STEPS * 64)
    assert shown.logged["train/step"] == STEPS


def test_losses(shown: Shown) -> None:
    loss = shown.summary["loss"]
    tasks = ", ".join(f"{task} {value:.4f}" for task, value in shown.summary["losses"].items())
    assert f"loss {loss:.4f} ({tasks})" in shown.screen and f"Loss, last line {loss:.4f}" in shown.report
    assert f"loss {loss:.4f}  " + tasks.replace(", ", "  ") in shown.progress
    assert shown.logged["train/loss"] == loss
    assert {task: shown.logged[f"train/{task}_loss"] for task in ("asr", "tts", "text")} == shown.summary["losses"]


NAMES = {"words": "wer", "characters": "cer", "cycle": "cycle_wer", "outside": "outside_wer", "units": "unit_error_rate"}


@pytest.mark.parametrize("what", NAMES)
def test_error_rates_with_their_intervals(shown: Shown, what: str) -> None:
    sets = {name: figures for name, figures in shown.summary["sets"].items() if what in figures}
    assert sets
    for name, figures in sets.items():
        value, (low, high) = percent(figures[what]["rate"]), map(percent, figures[what]["interval"])
        row = next(line for line in shown.screen.splitlines() if name in line)
        assert value in row and f"{value} [{low}, {high}]" in shown.report
        if what in ("words", "cycle", "outside"):
            assert f"{low} to {high}" in row
        tracked = f"eval/{name}/{NAMES[what]}"
        assert [shown.logged[tracked + end] for end in ("", "_low", "_high")] == [figures[what]["rate"], *figures[what]["interval"]]
    if what == "words":
        for name, rate in shown.summary["wer"].items():
            assert f"{name} {percent(rate)}" in shown.progress


def test_losses_records_and_lengths_of_sets(shown: Shown) -> None:
    for name, figures in shown.summary["sets"].items():
        row = next(line for line in shown.screen.splitlines() if name in line)
        assert (
            f"{figures['loss']:.4f}" in row
            and f"{figures['loss']:.4f}" in shown.report
            and shown.logged[f"eval/{name}/loss"] == figures["loss"]
        )
        assert f" {figures['records']} " in row
    speech = next(line for line in shown.screen.splitlines() if "tts/dev_tts" in line)
    assert all(f" {figure} " in speech for figure in ("0.18 (0.18)", "0.51 (0.50)", "1.04", "7"))
    assert all(f" {figure} " in shown.report for figure in ("0.18", "0.51", "0.50", "1.04", "7"))


def test_notes(shown: Shown) -> None:
    (note,) = [text for text in shown.summary["notes"] if "tts/dev_tts" in text]
    assert "7 of 100 synthesised records last less than 0.5 times as long as their recordings" in note
    assert f"Note: {note}" in shown.screen and note in shown.report
    assert shown.screen.index("outside WER") < shown.screen.index("cycle WER"), "the judge from outside stands first"
