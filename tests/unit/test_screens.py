from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from most_ray.config import config_from
from most_ray.console.run_screens import first_screen, last_screen, spread, where
from most_ray.console.terminal import Terminal
from most_ray.distributed.topology import Topology
from most_ray.io.run_folder import RunFolder
from tests.support.builders import make_plan


def screen() -> Console:
    return Terminal(file=io.StringIO(), width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def prepared(root: Path, **changes: Any) -> Any:
    """What the first screen looks at, without a model and a tokenizer."""
    plan = make_plan(root)
    model = root / "model"
    model.mkdir()
    save_file({"a": np.zeros((20, 30), np.float32), "b": np.zeros(7, np.float32)}, model / "model.safetensors")
    asked = {"output_dir": str(root), "name": "mine", "wandb_project": "speech", "tensorboard": True}
    job = SimpleNamespace(config=config_from(asked), total_steps=40, plan=plan.spec, threads=1, model_path=str(model))
    settings = {"job": job, "plan": plan, "folder": RunFolder(str(root / "mine")), "topologies": (Topology(1, 2, 2),)}
    return SimpleNamespace(**{**settings, "done_steps": 0, "use_gpu": False, "n_rejected": 0, "changed": [], "also_changed": [], **changes})


def test_the_first_screen_says_what_will_be_done(tmp_path: Path) -> None:
    """Promise 4 of docs/promises.md: where the run starts, what it has consumed of each source, and whether it continues exactly."""
    console = screen()
    first_screen(prepared(tmp_path), console, validation="at the end, beside training, sharing the 2 CPUs")
    text = shown(console)
    assert f"Run {tmp_path}/mine: 40 steps of 6 records; 23 asr (a), 17 tts (b)\n" in text
    assert "Starting after step 0, epoch 0.000, records trained on: 0 asr/a, 0 tts/b; exact: yes\n" in text
    assert "where       2 workers: 1 replica x 2 shards, expert parallel 2; CPU, 1 thread each\n" in text
    assert "model       tiny, 607 parameters\n" in text and "evaluation  at the end, beside training, sharing the 2 CPUs\n" in text
    words = " ".join(text.split())
    assert "TensorBoard" in words and "project speech (online where there is a key, else offline)" in words
    row = next(line for line in text.splitlines() if "asr/a" in line and "│" in line)
    assert "60.0%" in row and "23" in row and f"{144 / 23:.2f}" in row, "240 records at 3:2 are 144 of 23"


def test_the_first_screen_of_a_resumed_run_says_where_and_whether_exactly(tmp_path: Path) -> None:
    console = screen()
    first_screen(prepared(tmp_path, done_steps=10, changed=["packer"], n_rejected=3), console, validation=None)
    text = shown(console)
    assert "Resuming after step 10, epoch 1.412" in text and "exact: no, changed since: packer" in text
    assert "3 records were rejected" in text and "30 to make" in text and "evaluation  none" in text


@pytest.mark.parametrize(
    ("topologies", "gpu", "text"),
    [
        ((Topology(1, 1, 1),), False, "1 worker; CPU, 2 threads"),
        ((Topology(2, 4, 2),), True, "8 workers: 2 replicas x 4 shards, expert parallel 2; a GPU, 2 threads each"),
        (
            (Topology(1, 2, 1), Topology(1, 3, 1), Topology(2, 2, 1)),
            False,
            "2 to 4 workers, at most: 2 replicas x 2 shards, expert parallel 1; CPU, 2 threads each",
        ),
    ],
)
def test_where_names_the_layout(topologies: tuple[Topology, ...], gpu: bool, text: str) -> None:
    assert where(topologies, 2, gpu) == text


def rate(value: float | None) -> dict[str, Any]:
    interval = None if value is None else [value / 2, value * 2]
    return {"rate": value, "substitutions": 2, "deletions": 1, "insertions": 1, "reference": 200, "interval": interval}


SUMMARY: dict[str, Any] = {
    "sets": {
        "asr/takes": {"task": "asr", "records": 100, "loss": 0.0272, "words": rate(0.02), "characters": rate(0.011)},
        "asr/silent": {"task": "asr", "records": 3, "loss": None, "words": rate(None), "characters": rate(None)},
        "tts/takes": {"task": "tts", "records": 50, "loss": 2.5, "units": rate(0.4), "cycle": rate(0.125), "duration_ratio": 1.034},
        "text/books": {"task": "text", "records": 9, "loss": 3.0, "perplexity": 20.0855},
    },
    "samples": [{"set": "tts/takes", "id": "u[1]", "reference": "one", "hypothesis": "[Hu7][/Hu8]"}],
    "routing": {"expert_load": {"text": [3, 1, 0, 0], "audio": [0, 0, 1, 1]}, "leaked": 0},
    "training_seconds": 430.0,
    "tokens_per_second": 11391,
    "checkpoint": "runs/mine/checkpoints/step-000000040",
    "export": "runs/mine/export",
    "report": "runs/mine/report.html",
}


def rows(text: str, name: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line and name in line]


def test_the_last_screen_shows_figures_of_every_task_and_where_things_lie() -> None:
    console = screen()
    last_screen(SUMMARY, console)
    text = shown(console)
    assert rows(text, "asr/takes") == [["asr/takes", "2.00%", "1.00% to 4.00%", "1.10%", "4 of 200", "100", "0.0272"]]
    assert rows(text, "asr/silent")[0][1:4] == ["-", "-", "-"]
    assert rows(text, "tts/takes ")[0] == ["tts/takes", "12.5%", "6.25% to 25.0%", "40.0%", "1.03", "50", "2.5000"]
    assert rows(text, "text/books") == [["text/books", "20.09", "9", "3.0000"]]
    assert rows(text, "u[1]") == [["tts/takes u[1]", "one", "[Hu7][/Hu8]"]]
    assert rows(text, "audio")[0] == ["audio", "-", "-", "50.0%", "50.0%"]
    ends = (
        "Selections across the modality border: 0",
        "Time:       7 min 10 s of training, 11,391 tokens/s",
        "Checkpoint: runs/mine/",
        "Report:     runs/mine/",
    )
    assert all(line in text for line in ends) and "Export:     runs/mine/export\n" in text


def test_the_last_screen_reads_older_and_bare_summaries() -> None:
    errors = {"wer": 0.02, "substitutions": 2, "deletions": 1, "insertions": 1, "words": 200, "records": 100}
    console = screen()
    last_screen({"sets": {"asr/takes": {"task": "asr", "records": 100, "loss": 0.0272, "errors": errors}}, "export": "there"}, console)
    assert rows(shown(console), "asr/takes") == [["asr/takes", "2.00%", "-", "-", "4 of 200", "100", "0.0272"]]
    console = screen()
    last_screen({"checkpoint": "here"}, console)
    assert shown(console) == "Checkpoint: here\n"


def test_many_experts_are_summed_up() -> None:
    console = screen()
    last_screen({"routing": {"expert_load": {"text": [1] * 63 + [9]}, "leaked": 0}}, console)
    assert rows(shown(console), "text") == [["text", "64 of 64", "63: 12.5%"]]


def test_samples_are_taken_in_turn_from_each_set() -> None:
    samples = [{"set": name, "id": index} for name in ("a", "b") for index in range(3)]
    assert [(s["set"], s["id"]) for s in spread(samples, 3)] == [("a", 0), ("b", 0), ("a", 1)]
    assert spread([], 3) == []
