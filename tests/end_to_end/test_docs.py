"""The commands of the documentation as they are written, on a few records and without Ray: those that need a cluster, a GPU or data of the
reader's own are checked by tests/unit/test_docs.py alone."""

from __future__ import annotations

import shlex
import shutil
from itertools import islice
from pathlib import Path

import pytest
import soundfile
import yaml

from most_ray.cli import main
from most_ray.records.files import read_raw
from most_ray.train.run import main as train_without_ray
from tests.conftest import ROOT
from tests.support.audio import tone, tones
from tests.support.builders import write_records
from tests.support.documents import Block, blocks, commands

PAGES = ("quickstart", "data", "evaluation", "tracking", "checkpoints")
STEPS = 4
# What cannot run here, by a part of it, and why.
ELSEWHERE = {
    "--from_audio": "trains under Ray: tests/end_to_end/test_from_recordings.py",
    "data/run.yaml": "the same",
    "--num_workers 4": "evaluates by Ray tasks",
    "--resume_from_checkpoint": "trains under Ray",
    "runs/second": "a run of the reader's own",
    "--config FILE": "a list of the reader's own",
    "--text": "takes a model that has learned to speak",
}
REPLACED = {
    "step-000001700": f"step-{STEPS:09d}",
    "step-000001400": f"step-{STEPS // 2:09d}",
    "--input DIR": "--input recordings",
    "--audio DIR": "--audio recordings",
}


@pytest.fixture
def workspace(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a checkout is one: the digits' configuration for a few steps, forty records of each folder, some recordings."""
    for name in ("train_asr", "train_tts", "test_takes", "test_speaker", "test_tts"):
        folder = tmp_path / "jobs" / "data" / "digits" / name
        write_records(folder, [raw for _, raw in islice(read_raw(str(digits / name / "records.jsonl.gz")), 40)])
        for beside in ("units.json", "kmeans.npy", "vocoder.safetensors"):
            if (digits / name / beside).exists():
                shutil.copy(digits / name / beside, folder)
    values = yaml.safe_load((ROOT / "jobs" / "configs" / "digits.yaml").read_text(encoding="utf-8"))
    values |= {"max_steps": STEPS, "save_steps": STEPS // 2, "warmup_steps": 0, "eval_steps": None, "max_new_units": 20}
    (tmp_path / "jobs" / "configs").mkdir()
    (tmp_path / "jobs" / "configs" / "digits.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    tones(tmp_path / "recordings", count=12)
    for name in ("a.wav", "b.flac"):
        soundfile.write(tmp_path / name, tone(0.6, 300), 8000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_of(page: str) -> list[tuple[Block, list[str]]]:
    """Those of `most-ray` on a page, `train` by the digits' configuration among them."""
    found = [(block, words) for block in blocks(ROOT / "docs" / f"{page}.md") if block.language == "sh" for words in commands(block.text)]
    return [(block, words) for block, words in found if words[0] == "most-ray"]


def test_commands_and_python_of_the_pages_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []
    for page in PAGES:
        for block, words in commands_of(page):
            text = shlex.join(words)
            if any(part in text for part in ELSEWHERE):
                continue
            for written, here in REPLACED.items():
                text = text.replace(written, here)
            if text in ran:
                continue
            command = shlex.split(text)[1:]
            code = train_without_ray(command[1:]) if command[0] == "train" else main(command)
            assert code == 0, f"{block.where}: {text}: {capsys.readouterr().err}"
            ran.append(text)
    kinds = {" ".join(text.split()[1:3]) if text.split()[1] == "prepare" else text.split()[1] for text in ran}
    made = {"prepare units", "prepare vocoder", "prepare tts", "prepare store"}
    assert kinds == {*made, "train", "plan", "transcribe", "synthesize", "evaluate", "report", "export"}, sorted(kinds)
    assert (workspace / "runs/digits/export/config.json").exists() and (workspace / "scores.hypotheses.jsonl").exists()
    (example,) = (block for block in blocks(ROOT / "docs" / "quickstart.md") if block.language == "python")
    scope: dict[str, object] = {}
    exec(compile(example.text, example.where, "exec"), scope)
    assert type(scope["model"]).__name__ == "MostForCausalLM"


def test_every_exception_is_still_needed() -> None:
    written = " ".join(shlex.join(words) for page in PAGES for _, words in commands_of(page))
    assert not [part for part in (*ELSEWHERE, *REPLACED) if part not in written]
