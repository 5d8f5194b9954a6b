"""Wrong uses: one paragraph that says what to do, exit code 2, no traceback, before any worker starts."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from most_ray.cli import build_parser, main
from most_ray.cli.parser import tracked
from most_ray.model import compat
from tests.conftest import ROOT
from tests.support.builders import asr, tts, write_records

CONFIG = str(ROOT / "jobs" / "configs" / "digits.yaml")
DIGITS = "jobs/data/digits"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("most_ray.service.training.trainer.run_attempts", lambda *_: pytest.fail("workers were started"), raising=True)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("most-ray: ") and "Traceback" not in captured.err and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits are ingested, once for all tests."""
    return tmp_path_factory.mktemp("stores")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_worker", "2"], "Did you mean 'num_workers'"),
        (["--train_asr_dirs", "nowhere"], "train_asr_dirs = 'nowhere': does not exist"),
        (["--val_asr_dirs", "nowhere"], "val_asr_dirs = 'nowhere': does not exist"),
        (["--num_workers", "4", "--cpus_per_worker", "0.1", "--ep_size", "3"], "Use one of [1, 2, 4]"),
        (["--num_workers", "3", "--cpus_per_worker", "0.1", "--ep_size", "2"], "Use one of [1]"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path"),
        (["--text_expert_indices", "0,1,2", "--audio_expert_indices", "4,5,6,7"], "experts [3] are in no group"),
        (["--text_expert_indices", "0", "--audio_expert_indices", "1,2,3,4,5,6,7"], "more than the 1 expert of"),
        (["--max_seq_length", "30"], "max_rejected_fraction"),
        (["--max_seq_length", "100000"], "beyond the model's 4,096 positions"),
        (["--asr_tts_mix_ratio", "1"], "gives no share to train_tts_dirs"),
        (["--learning_rate", "fast"], "is not a number"),
        (["--resume_from_checkpoint", "/nowhere"], "missing or was never completed"),
        (["--output_dir", "/proc/no"], "cannot be written to"),
        (["--output_dir", "gopher://bucket/x"], "unknown scheme"),
        (["--num_workers", "4,2"], "fewest and the most"),
        (["--num_workers", "2,4", "--ep_size", "3"], "Use one of [1, 2, 4]"),
        (["--wandb_project", "p", "--wandb_mode", "online"], "needs a key"),
        (["--trace_records", "/proc/x/y"], "trace_records"),
        (["--use_gpu"], "no GPU"),
        (["--trace_records", "TEXT"], "exists and is no trace"),
        (["stray"], "belongs to no flag"),
    ],
)
def test_training(
    tmp_path: Path, stores: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    import torch

    if words == ["--use_gpu"] and torch.cuda.is_available():
        words, message = ["stray"], "belongs to no flag"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = tmp_path / "text"
    text.write_text("no trace\n")
    uris = ["--output_dir", str(tmp_path / "runs"), "--store_dir", str(stores)]
    uris += ["--train_asr_dirs", f"{DIGITS}/test_takes", "--train_tts_dirs", f"{DIGITS}/test_tts"]  # the smaller sets
    words = [word.replace("TEXT", str(text)) for word in words]
    assert message in refused(capsys, "train", "--config", CONFIG, *uris, "--max_steps", "2", *words)
    assert text.read_text() == "no trace\n"


@pytest.mark.parametrize("dry", [[], ["--dry_run"]])
def test_an_old_library_has_one_worker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    """transformers 5.22: said before any record is ingested."""
    monkeypatch.setattr(compat, "SUPPORTS_MANY_WORKERS", False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    uris = ["--output_dir", str(tmp_path / "runs"), "--store_dir", str(tmp_path / "stores")]
    told = refused(capsys, "train", "--config", CONFIG, *uris, "--num_workers", "1,2", *dry)
    assert "num_workers = 2: needs transformers 5.23 or later" in told and "pip install 'transformers>=5.23'" in told
    assert not list((tmp_path / "stores").rglob("*.arrow"))


def test_a_typo_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("max_step: 3\n")
    assert "Did you mean 'max_steps'" in refused(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert "cannot be read" in refused(capsys, "train", "--config", str(tmp_path / "none.yaml"))


def test_bad_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [asr(i) for i in range(95)]
    bad = [{**asr(200), "input": "[Hu500]"}, {**asr(201), "output": ""}, {"id": "x"}, asr(202, units=2000), tts(5)]
    write_records(tmp_path / "asr", good + bad)
    words = [
        "train",
        "--train_asr_dirs",
        str(tmp_path / "asr"),
        "--output_dir",
        str(tmp_path / "runs"),
        "--max_seq_length",
        "512",
    ]
    assert "5 of 100 records" in refused(capsys, *words)
    lines = [json.loads(line) for line in (tmp_path / "runs/run/rejected.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(set(line) >= {"file", "index", "reason"} for line in lines)
    (tmp_path / "asr" / "broken.json").write_text('[{"id": 1}, oops')
    assert "broken.json record 1, is not JSON at byte 12" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluate", "--model", "./none", "--asr_dirs", "jobs/data/digits/test_takes", "--output", "OUT.json"],
            "does not exist",
        ),
        (["evaluate", "--model", "x", "--output", "OUT.json"], "at least one directory"),
        (["export", "--checkpoint", "none", "--output", "OUT"], "never completed"),
        (["init-model", "--output", "OUT"], "exactly one"),
        (
            ["init-model", "--preset", "tinny", "--records", "jobs/data/digits/test_takes", "--output", "OUT"],
            "Did you mean 'tiny'",
        ),
        (["prepare", "tts", "--input_dir", "none", "--output_dir", "OUT", "--dataset_name", "d"], "does not exist"),
        (["prepare", "units", "--input", "none", "--output", "OUT"], "exactly one"),
        (["prepare", "units", "--input", "none", "--output", "OUT", "--fit_kmeans", "20"], "does not exist"),
        (["prepare", "units", "--input", "x", "--output", "OUT", "--fit_kmeans", "501"], "2..500"),
        (
            ["prepare", "units", "--input", "x", "--output", "OUT", "--fit_kmeans", "5", "--perturb", "0.9,9"],
            "between 0.5 and 2",
        ),
        (["plan", "--config", CONFIG, "--steps", "5", "--trace", "OUT"], "FROM:TO"),
        (["plan", "--config", CONFIG, "--steps", "1:1000001", "--trace", "OUT"], "more than 1,000,000 steps"),
        (["train", "--config", ""], "config = ''"),
        (["train", "--", "x"], "config = 'x': cannot be read"),
        (["train", "--", "x", "y"], "argument = 'y': belongs to no flag"),
        (["trian"], "is no command. Did you mean 'train'"),
    ],
)
def test_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert message in refused(capsys, *(word.replace("OUT", str(tmp_path / "out")) for word in words))


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["evaluate"], ["prepare"], ["prepare", "units"], ["prepare", "tts"], ["init-model"], ["export"], ["plan"]],
)
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0 and "usage: most-ray" in capsys.readouterr().out


def test_the_program_itself_says_it_on_stderr() -> None:
    done = subprocess.run([sys.executable, "-m", "most_ray.cli", "train", "--epsize", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and "Did you mean 'ep_size'" in done.stderr


def test_init_model_from_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "r", [asr(i) for i in range(5)])
    assert main(["init-model", "--preset", "tiny", "--records", str(tmp_path / "r"), "--output", str(tmp_path / "m")]) == 0
    assert "parameters" in capsys.readouterr().out and (tmp_path / "m" / "config.json").exists()


def test_a_damaged_shard_ends_a_run_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncated or with one bit turned: exit code 2, the shard named, no worker started; the next start makes it anew."""
    write_records(tmp_path / "asr", [asr(i) for i in range(50)])
    words = ["--train_asr_dirs", str(tmp_path / "asr"), "--output_dir", str(tmp_path / "runs"), "--max_seq_length", "512"]
    assert main(["prepare", "store", *words, "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "Token stores" in shown and "50 records in" in shown
    (shard,) = (tmp_path / "runs/store/parts").rglob("*.arrow")
    content = shard.read_bytes()
    for damaged in (content[:-1000], content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]):
        shard.write_bytes(damaged)
        said = refused(capsys, "train", *words)
        assert str(shard) in said and f"Delete {shard.parent}" in said
    shutil.rmtree(shard.parent)
    assert main(["prepare", "store", *words, "--verify"]) == 0 and shard.read_bytes() == content


def test_store_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "asr", [asr(i) for i in range(5)])
    words = ["plan", "--train_asr_dirs", str(tmp_path / "asr"), "--output_dir", str(tmp_path / "runs"), "--trace", str(tmp_path / "t")]
    assert "is no training source" in refused(capsys, *words, "--epochs_of", "nobody")
    assert "is no training source" in refused(capsys, *words, "--epochs_of", "nobody", "--max_steps", "3")
    assert "weight_unit" in refused(capsys, *words, "--weight_unit", "frames")
    assert "data_timeout_s" in refused(capsys, *words, "--data_timeout_s", "-1")
    assert "overlong" in refused(capsys, *words, "--overlong", "cut")
    assert "nowhere" in refused(capsys, *words, "--train_tts_dirs", "nowhere://x/y")
    for steps in ("²:3", "0:0", "5:4", "x", "1:2:3"):
        assert "is not a range FROM:TO" in refused(capsys, *words, "--steps", steps)
    assert "is a folder" in refused(capsys, *words[:-1], str(tmp_path))
    (tmp_path / "file").write_text("")
    for uri in (str(tmp_path / "file"), "nowhere://x/y"):
        assert "store_dir = " in refused(capsys, *words, "--store_dir", uri)
    for second in (f"{tmp_path}/asr/", f"{tmp_path}/./asr", f"{tmp_path}/runs/../asr"):
        assert "names a directory twice" in refused(capsys, *words, "--train_asr_dirs", str(tmp_path / "asr"), second)
    assert "secret" not in refused(capsys, *words, "--train_tts_dirs", "nowhere://key:secret@x/y")


def test_a_list_that_replaces_another_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = build_parser().parse_args(["train", "--seed", "1", "--val_asr_dirs", "a", "--train_asr_dirs", "a", "b", "--seed", "2"])
    assert parsed.train_asr_dirs == ["a", "b"] and parsed.seed == "2" and capsys.readouterr().out == ""
    parsed = build_parser().parse_args(["train", "--train_asr_dirs", "a", "b", "--train_asr_dirs", "c"])
    assert parsed.train_asr_dirs == ["c"]
    told = "most-ray: --train_asr_dirs is given twice: only the last list is used. One flag takes several values.\n"
    assert capsys.readouterr().out == told


def test_a_log_file_is_told_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of work must not look like a process that hangs; every item comes through."""
    monkeypatch.setattr("most_ray.cli.parser._REPORT_S", 0.0)
    sink = io.StringIO()
    assert list(tracked(range(3), "units", 3, Console(file=sink))) == [0, 1, 2]
    assert [line.split(",")[0] for line in sink.getvalue().splitlines()] == ["units: 1 of 3", "units: 2 of 3"]
