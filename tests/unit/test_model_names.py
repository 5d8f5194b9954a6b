"""What `--model` and its siblings mean: a run's folder is its export or its newest checkpoint; a name that is none is told at once."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from most_ray.cli import main
from most_ray.config import config_from
from most_ray.errors import CheckpointError, ConfigError
from most_ray.io import hub
from most_ray.io.run_folder import checkpoint_source, model_source
from most_ray.runs.evaluator_checks import check_evaluators, check_vocoder_is_found
from most_ray.runs.resolve import prepare_run
from tests.conftest import ROOT

STORED = ROOT / "tests" / "fixtures" / "run-0.1" / "stored"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with two complete checkpoints and one that is not, and without an export."""
    folder = tmp_path / "runs" / "digits"
    for step in (2, 10, 30):
        (folder / f"checkpoints/step-{step:09d}").mkdir(parents=True)
        (folder / f"checkpoints/step-{step:09d}/config.json").write_text("{}")
    for step in (2, 10):
        (folder / f"checkpoints/step-{step:09d}/commit.json").touch()
    (folder / "metrics.jsonl").touch()
    return folder


def exported(run: Path) -> Path:
    (run / "export").mkdir()
    (run / "export/config.json").write_text("{}")
    return run / "export"


def test_a_run_means_its_export(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = exported(run)
    monkeypatch.chdir(run.parent.parent)
    for name in (str(run), f"file://{run}", "runs/digits", "runs/digits/", "./runs/digits"):
        assert model_source(name) == model_source(name, checkpoints=True) == str(export), name
    assert model_source("runs/digits/export") == str(export)


def test_a_run_without_an_export_means_its_newest_checkpoint_where_that_can_be_opened(run: Path) -> None:
    newest = str(run / "checkpoints/step-000000010")
    assert model_source(str(run), checkpoints=True) == model_source(str(run / "checkpoints"), checkpoints=True) == newest
    for name in (run, run / "export"):
        with pytest.raises(
            CheckpointError, match=rf"is a run without an export, .*most-ray export --checkpoint {run} --output {run}/export"
        ):
            model_source(str(name))


def test_a_checkpoint_is_opened_or_says_how_to_export_it(run: Path) -> None:
    checkpoint = run / "checkpoints/step-000000002"
    assert model_source(str(checkpoint), checkpoints=True) == str(checkpoint)
    with pytest.raises(CheckpointError, match=rf"is a checkpoint, not a model's folder\. .*export --checkpoint {checkpoint} --output DIR"):
        model_source(str(checkpoint))


def test_a_run_that_has_saved_nothing_says_so(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for checkpoints in (False, True):
        with pytest.raises(CheckpointError, match=r"is a run without an export and without a complete checkpoint: it has no model yet"):
            model_source(str(run), checkpoints=checkpoints)
    with pytest.raises(CheckpointError, match="is a run without a complete checkpoint"):
        checkpoint_source(str(run))
    (run / "trials.jsonl").touch()
    with pytest.raises(CheckpointError, match="is the folder of a sweep"):
        model_source(str(run))


def test_a_checkpoint_by_its_run(run: Path) -> None:
    newest = str(run / "checkpoints/step-000000010")
    assert checkpoint_source(str(run)) == checkpoint_source(str(run / "checkpoints")) == checkpoint_source(newest) == newest
    older = str(run / "checkpoints/step-000000002")
    assert checkpoint_source(older) == older and checkpoint_source("/nowhere") == "/nowhere"
    with pytest.raises(CheckpointError, match="is a model's folder, not a checkpoint"):
        checkpoint_source(str(exported(run)))


def test_commands_take_a_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a whole run of an earlier version, which has no export: `export` takes its newest checkpoint, then the run means that."""
    run = tmp_path / "stored"
    shutil.copytree(STORED, run)
    data = tmp_path / "data"
    shutil.copytree(ROOT / "tests/fixtures/run-0.1/data", data)
    scored = ["--asr_dirs", str(data / "val_asr" if (data / "val_asr").exists() else next(data.iterdir())), "--max_new_tokens", "2"]
    assert main(["evaluate", "--model", str(run), *scored, "--output", str(tmp_path / "a.json")]) == 0
    assert main(["export", "--checkpoint", str(run), "--output", str(run / "export")]) == 0
    assert "step-000000003, the newest checkpoint" in capfd.readouterr().out
    assert main(["evaluate", "--model", str(run), *scored, "--output", str(tmp_path / "b.json")]) == 0
    recording = tmp_path / "a.wav"
    soundfile.write(recording, np.zeros(16000, np.float32), 16000)
    for command in (["transcribe", str(recording)], ["synthesize", "--text", "seven", "--output", str(tmp_path / "b.wav")]):
        assert main([*command, "--model", str(run)]) == 2
        assert f"model = '{run}/export': has no folder speech/" in capfd.readouterr().err


def test_a_run_is_a_starting_model(tmp_path: Path, digits: Path) -> None:
    shutil.copytree(STORED, tmp_path / "stored")
    values = {"train_asr_dirs": [str(digits / "train_asr")], "output_dir": str(tmp_path), "max_steps": 2, "max_seq_length": 256}
    config = config_from({**values, "model_name_or_path": str(tmp_path / "stored")})
    with pytest.raises(CheckpointError, match="is a run without an export"):
        prepare_run(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stored"]
    shutil.copytree(STORED / "init", tmp_path / "stored/export")
    assert prepare_run(config).job.model_path == str(tmp_path / "stored/export")


# Names that are nothing


def test_a_misspelt_path_is_no_name_on_the_hub(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    exported(run)
    for name, remedy in (
        ("runs/digts", "Did you mean 'runs/digits'?"),
        ("runs/digits/exprot", "Did you mean 'runs/digits/export'?"),
        ("runs/most", "Check the path."),
        ("./nowhere/at/all", "Check the path."),
        ("runs/none/export", "Check the path."),
        (str(run.parent / "digit"), f"Did you mean '{run}'?"),
    ):
        with pytest.raises(CheckpointError) as error:
            model_source(name)
        assert (error.value.rule, error.value.remedy) == ("does not exist.", remedy)
    with pytest.raises(CheckpointError, match="Did you mean 'tiny'"):
        model_source("tinny", known=["tiny"])


def test_what_is_made_of_deepseek_says_how() -> None:
    make = "most-ray init-model --from_deepseek hf:deepseek-ai/DeepSeek-V2-Lite --output"
    for name, rule, folder in (
        ("models/most-v2-lite", "does not exist", "models/most-v2-lite"),
        ("deepseek-ai/DeepSeek-V2-Lite", "is neither a folder nor in this machine's cache", "models/most"),
        ("hf:deepseek-ai/DeepSeek-V2-Lite", "knows no speech units", "models/most"),  # not after a download of 31 GB
    ):
        with pytest.raises(CheckpointError, match=rf"{rule}.*{make} {folder}\.$"):
            model_source(name)
    hub.check_model_name("hf:deepseek-ai/DeepSeek-V2-Lite", "from_deepseek")


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes connections and never answers, as behind a firewall that drops what is sent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
            monkeypatch.setattr(f"{module}.ENDPOINT" if module.endswith("constants") else f"{module}.constants.ENDPOINT", url(server))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield


def url(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_never_answers_is_given_up(silent_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ANSWER_S", 0.2)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        hub.model_folder("hf:foo/bar", "features")
    assert time.monotonic() - began < 10.0
    assert error.value.field == "features" and "does not answer" in error.value.rule and "cache does not hold it" in error.value.rule
    assert "hf download foo/bar --local-dir DIR" in error.value.remedy


def test_an_address_that_is_never_found_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name has no limit in any library."""
    forever = threading.Event()
    monkeypatch.setattr(hub, "_ANSWER_S", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: forever.wait(60))
    assert hub._why_silent("foo/bar") == "nothing came within 0.1 s"
    forever.set()


def test_a_hub_that_is_not_there_leaves_what_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_why_silent", lambda _: "no route")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, local_files_only, **__: str(tmp_path) if local_files_only else "")
    assert hub.model_folder("hf:foo/bar") == str(tmp_path)


# The models of evaluations


def test_a_recogniser_that_is_nothing_is_refused_before_hours_of_training(tmp_path: Path) -> None:
    for values, says in (
        ({"recogniser": "foo/bar"}, r"recogniser = 'foo/bar': is neither a folder"),
        ({"recogniser": str(tmp_path), "vocoder": "./nowhere"}, r"vocoder = './nowhere': does not exist"),
        ({"vocoder": str(tmp_path)}, r"vocoder = .*: is of use only with a recogniser"),
        ({"recogniser": "s3://u:p@b/k"}, r"recogniser = 's3://\*\*\*@b/k': is not on this machine"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=says):
            check_evaluators(config_from(values))
    (tmp_path / "vocoder.safetensors").touch()
    check_evaluators(config_from({"recogniser": str(tmp_path), "vocoder": str(tmp_path / "vocoder.safetensors")}))


def test_a_recogniser_needs_a_vocoder(tmp_path: Path) -> None:
    records = tmp_path / "train_asr"
    records.mkdir()
    config = config_from({"recogniser": "r", "train_asr_dirs": [str(records)], "val_asr_dirs": ["v"], "output_dir": str(tmp_path)})
    with pytest.raises(CheckpointError, match="recogniser = 'r': needs a vocoder, and none is beside the training records"):
        check_vocoder_is_found(config, "tiny")
    (records / "vocoder.safetensors").touch()
    check_vocoder_is_found(config, "tiny")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["transcribe", "a.wav", "--model", "foo/bar"], "model = 'foo/bar'"),
        (["evaluate", "--model", "foo/bar", "--asr_dirs", "d", "--output", "o.json"], "model = 'foo/bar'"),
        (
            ["prepare", "units", "--input", ".", "--output", "o", "--fit_kmeans", "2", "--features", "hubert:foo/bar:3"],
            "features = 'foo/bar'",
        ),
    ],
)
def test_commands_say_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    assert main(words) == 2
    said = capfd.readouterr().err
    assert f"{says}: is neither a folder nor in this machine's cache" in said and "hf:foo/bar" in said and not os.listdir(tmp_path)
