"""Every configuration in jobs/configs is a run that can start, once its data and model are where it names them; run_training.sh."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from most_ray.cli import main
from most_ray.config import load_config
from most_ray.planner import calibration
from most_ray.planner.dry_run import DryRun, dry_run
from most_ray.records.files import read_raw
from tests.conftest import ROOT
from tests.support.builders import text, write_records

CONFIGS = ROOT / "jobs" / "configs"
RUNS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "base" not in yaml.safe_load(path.read_text(encoding="utf-8")))
GPUS = {"deepseek-v2-lite-dp": (1, 8, 1), "deepseek-v2-lite-ep": (1, 8, 8), "deepseek-v2-lite-dp-ep": (1, 8, 4)}
GPUS |= {"large": (8, 8, 8), "stage1": (1, 8, 8), "stage2": (1, 8, 8)}
MIXES = {
    "stage1": {"asr/": 0.4, "tts/": 0.4, "text/": 0.2},
    # Instructions by speech are heard or spoken, half and half: 0.4 in all.
    "stage2": {"asr/heard": 0.2, "tts/spoken": 0.2, "text/": 0.4, "asr/train_asr": 0.1, "tts/train_tts": 0.1},
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A folder with other records of digits, forty each, wherever any configuration looks for records."""
    folder = tmp_path_factory.mktemp("stand-ins") / "checkout"
    records = {
        task: [raw for _, raw in read_raw(digits / f"test_{name}/records.jsonl.gz")] for task, name in (("asr", "takes"), ("tts", "tts"))
    }
    records["text"] = [text(index) for index in range(200)]
    count = 0
    for name in RUNS:
        config = load_config(CONFIGS / f"{name}.yaml")
        for task, some in records.items():
            for directory in (*getattr(config, f"train_{task}_dirs"), *getattr(config, f"val_{task}_dirs")):
                if not (folder / directory).exists():
                    write_records(folder / directory, some[count % 100 :][:40])
                    shutil.copy(digits / "test_takes/units.json", folder / directory)
                    count += 1
    return folder


@pytest.fixture
def checkout(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(stand_ins)
    monkeypatch.setattr(calibration, "_TIME_LIMIT_S", 0.0)  # as few steps as can be measured: no test needs the speed of this machine
    return stand_ins


def dried(name: str) -> DryRun:
    return dry_run(load_config(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_configuration_can_start(checkout: Path, name: str) -> None:
    """Its name is its file's; it has the layout and the mix that it says and fits into 80 GB; nothing is written where it would run."""
    before = sorted(checkout.rglob("*"))
    run = dried(name)
    assert run.config.name == name and run.total_steps >= 1 and run.rejected == 0
    assert sorted(checkout.rglob("*")) == before
    found = {source.name: source.share for source in run.sources}
    for key, share in MIXES.get(name, {}).items():
        assert sum(value for source, value in found.items() if source.startswith(key)) == pytest.approx(share, abs=2e-9), (key, found)
    topology = run.layout.topology
    assert (topology.dp_replicate, topology.fsdp, topology.ep) == GPUS.get(name, (1, 2, 2) if name == "small-cpu" else (1, 1, 1))
    if name in GPUS:
        assert run.config.use_gpu and run.config.bf16 and run.device.name == "H100 SXM" and run.parameters == 15_706_484_224
        assert run.device.memory and run.layout.memory.total("full") < 0.9 * run.device.memory
    else:
        assert not run.notes and run.parameters < 2_000_000


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_configuration_is_estimated_without_data_and_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """It says what it assumes; `train` itself refuses, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "_TIME_LIMIT_S", 0.0)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    words = ["train", "--config", str(CONFIGS / f"{name}.yaml")]
    config = load_config(CONFIGS / f"{name}.yaml")
    assert main([*words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    trained = [*config.train_asr_dirs, *config.train_tts_dirs, *config.train_text_dirs]
    tokens = min(440, config.max_seq_length // 2)
    assert f"no records at {', '.join(trained)}: assumes 100,000 in each, of {tokens} tokens each on average" in shown
    assert "nothing is started" in shown
    assert ("published sizes of deepseek-ai/DeepSeek-V2-Lite" in shown) == (name in GPUS)
    assert main([*words, "--use_gpu", "false", "--num_workers", "1"]) == 2 and "does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_assumed_records_have_the_length_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a hundredth, for each task; where rows are short, records are; those of validation are fewer."""
    monkeypatch.chdir(tmp_path)
    run = dried("stage1")
    for source in run.sources:
        assert source.records == 100_000 and source.tokens / source.records == pytest.approx(440, rel=0.01), source
    short = dry_run(replace(load_config(CONFIGS / "small-cpu.yaml"), max_seq_length=64, max_steps=2))
    assert [source.tokens / source.records for source in short.sources] == pytest.approx([32, 32], rel=0.15) and short.rejected == 0


def test_every_kind_of_run_is_there() -> None:
    """Those that the documents name."""
    assert {"digits", "small-cpu", "an4", "librispeech_units", *GPUS} == set(RUNS)


# run_training.sh


def script(tmp_path: Path, *words: str, config: str | None = None) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script with a most-ray on PATH that writes its arguments down; and those."""
    jobs = tmp_path / "it's here" / "jobs"
    if not jobs.exists():
        shutil.copytree(CONFIGS, jobs / "configs")
        shutil.copy(ROOT / "jobs" / "run_training.sh", jobs)
        stub = tmp_path / "bin" / "most-ray"
        stub.parent.mkdir()
        stub.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word" >> "$SEEN"; done\nexit 75\n', encoding="utf-8")
        stub.chmod(0o755)
    seen = tmp_path / "seen"
    seen.unlink(missing_ok=True)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SEEN": str(seen)} | ({"CONFIG": config} if config else {})
    done = subprocess.run(["sh", str(jobs / "run_training.sh"), *words], capture_output=True, text=True, env=environment)
    return done, seen.read_text(encoding="utf-8").splitlines() if seen.exists() else []


@pytest.mark.parametrize(
    ("kind", "file"),
    [("single", "digits"), ("dp", "deepseek-v2-lite-dp"), ("ep", "deepseek-v2-lite-ep"), ("large", "large")],
)
def test_the_script_runs_its_configuration(tmp_path: Path, kind: str, file: str) -> None:
    """With all flags, quoted or not; its exit code is the command's; what it prints can be pasted."""
    flags = ["--dry_run", "--name", "a b$c'd", "--wandb_tags", ""]
    done, seen = script(tmp_path, kind, *flags)
    uri = str(tmp_path / "it's here" / "jobs" / "configs" / f"{file}.yaml")
    assert done.returncode == 75 and seen == ["train", "--config", uri, *(["--num_workers", "1"] if kind == "single" else []), *flags]
    command = done.stdout.strip()
    again = subprocess.run(["sh", "-c", f'set -- {command}; printf "%s\\n" "$@"'], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[1:] == seen


def test_the_script_takes_another_configuration(tmp_path: Path) -> None:
    done, seen = script(tmp_path, "ep", config="my run.yaml")
    assert done.returncode == 75 and seen == ["train", "--config", "my run.yaml"]


@pytest.mark.parametrize("words", [[], ["double"], ["--dry_run"]])
def test_the_script_says_how_it_is_used(tmp_path: Path, words: list[str]) -> None:
    done, seen = script(tmp_path, *words)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not done.stdout and not seen


def test_the_script_without_the_program(tmp_path: Path) -> None:
    script(tmp_path)
    (tmp_path / "bin" / "most-ray").unlink()
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    jobs = tmp_path / "it's here" / "jobs"
    done = subprocess.run(["sh", str(jobs / "run_training.sh"), "dp"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "neither in .venv/bin nor on PATH" in done.stderr


def test_the_command_shows_it(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--dry_run` with a device, on a configuration for GPUs, where there is none: what it says it rests on is said."""
    assert main(["train", "--config", str(CONFIGS / "deepseek-v2-lite-ep.yaml"), "--dry_run", "H200"]) == 0
    shown = capsys.readouterr().out
    for part in ("nothing is started", "published sizes of deepseek-ai/DeepSeek-V2-Lite", "init-model --from_deepseek", "about"):
        assert part in shown, part
    for part in ("1 replica x 8 shards, expert parallel 8", "H200", "50% of that in matrix products", "Fits: ", "checkpoints 175.5"):
        assert part in shown, part
