"""A run that was moved, copied or renamed: what is in its folder names files by their way from there, and every command its own place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from most_ray.cli import main
from most_ray.config import RunConfig, config_from, load_config
from most_ray.config import portable_yaml as portable
from most_ray.config_files import portable_yaml, read_yaml
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.run_folder import LEDGER
from most_ray.options import options_of
from most_ray.runs.first_checks import placed, unchanged_summary
from most_ray.runs.lifecycle import finished_summary
from most_ray.runs.resolve import prepare_run
from most_ray.sweep.ledger import BEST, Trial
from most_ray.sweep.options import load_sweep
from most_ray.sweep.trials import TrialBase
from most_ray.train.run import main as train_without_ray
from most_ray.train.run import train
from tests.support.builders import asr, text, tts, write_records
from tests.support.runs import MEASURED
from tests.unit.test_stored_run import LAST, STORED, config_of
from tests.unit.test_sweep_options import sweep_of

OPTIONS = options_of(RunConfig)


def values(root: Path) -> dict[str, Any]:
    """A run of two steps that is evaluated, with everything named by absolute paths."""
    return {
        "output_dir": str(root / "old"),
        "name": "first",
        "train_asr_dirs": [str(root / "data" / "heard")],
        "val_asr_dirs": [str(root / "data" / "val")],
        "val_tts_dirs": [str(root / "data" / "spoken")],
        "val_text_dirs": [str(root / "data" / "written")],
        "trace_records": str(root / "old" / "first.trace"),
        "max_seq_length": 128,
        "global_batch_size": 4,
        "max_steps": 2,
        "save_steps": 1,
        "eval_steps": 1,
        "max_new_tokens": 4,
        "max_new_units": 4,
        "max_rejected_fraction": 0.5,
        "use_gpu": False,
        "threads_per_worker": 1,
        "bf16": False,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the records and, in `old`, the run `first` and its stores; one record of its validation set is bad."""
    root = tmp_path_factory.mktemp("made")
    write_records(root / "data" / "heard", [asr(i, 3 + i % 5) for i in range(12)])
    write_records(root / "data" / "val", [*(asr(i, 4) for i in range(20, 22)), {"id": "bad"}])
    write_records(root / "data" / "spoken", [tts(i, 4) for i in range(2)])
    write_records(root / "data" / "written", [text(i) for i in range(2)])
    summary = train(config_from(values(root)))
    first = root / "old" / "first"
    assert summary == placed(json.loads((first / "summary.json").read_bytes()), str(first))
    return root


@pytest.fixture
def moved(made: Path, tmp_path: Path) -> Path:
    """A copy of the run and its stores at another place, where the run is called `second`."""
    shutil.copytree(made / "old", tmp_path / "new")
    return (tmp_path / "new" / "first").rename(tmp_path / "new" / "second")


def naming(folder: Path, place: Path) -> list[str]:
    """The files below a folder that name a place."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files if str(place).encode() in path.read_bytes())


def test_no_file_in_a_runs_folder_names_the_place_of_the_folder(made: Path) -> None:
    assert naming(made / "old" / "first", made / "old") == []
    summary = json.loads((made / "old" / "first" / "summary.json").read_bytes())
    assert [summary[key] for key in ("checkpoint", "export", "report")] == ["checkpoints/step-000000002", "export", "report.html"]
    for name in ("evaluation.json", "evaluations/step-000000001.json"):
        found = json.loads((made / "old" / "first" / name).read_bytes())
        assert found["settings"]["model"] == f"checkpoints/step-00000000{1 if '1' in name else 2}"
        assert storage.exists(storage.located(str(made / "old" / "first"), found["sets"]["asr/val"]["rejected_file"]))


def test_a_moved_run_is_complete_at_its_own_place(made: Path, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(moved / "config.yaml")
    assert (config.output_dir, config.name, config.trace_records) == (str(moved.parent), "second", str(moved.parent / "first.trace"))
    assert config.train_asr_dirs == (str(made / "data" / "heard"),)
    summary = finished_summary(prepare_run(config))
    assert summary is not None and unchanged_summary(config) == summary
    shown = placed(summary, config.run_uri)
    assert shown["checkpoint"] == str(moved / "checkpoints" / "step-000000002")
    assert (shown["export"], shown["report"]) == (str(moved / "export"), str(moved / "report.html"))


def test_a_start_of_a_moved_run_shows_its_own_place(made: Path, moved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for start in (lambda words: main(["train", *words]), train_without_ray):
        assert start(["--config", str(moved / "config.yaml")]) == 0
        said = "".join(capfd.readouterr())
        assert "The run 'second' is complete (2 steps)" in said and str(made / "old") not in said
        for name, way in (("Checkpoint: ", "checkpoints/step-000000002"), ("Export:     ", "export"), ("Report:     ", "report.html")):
            assert f"{name}{moved / way}\n" in said


def test_every_command_on_a_moved_run_names_its_own_place(made: Path, moved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    last, out = str(moved / "checkpoints" / "step-000000002"), moved.parent
    assert main(["report", str(moved)]) == 0
    assert main(["export", "--checkpoint", last, "--output", str(out / "export")]) == 0
    flags = ["--asr_dirs", str(made / "data" / "val"), "--max_rejected_fraction", "0.5", "--max_new_tokens", "4"]
    assert main(["evaluate", "--model", last, *flags, "--store_dir", str(out / "store"), "--output", str(out / "e.json")]) == 0
    assert main(["evaluate", "--rescore", str(moved / "hypotheses.jsonl"), "--output", str(out / "r.json")]) == 0
    of_evaluation = moved / "evaluations" / "step-000000001.hypotheses.jsonl"
    assert main(["evaluate", "--rescore", str(of_evaluation), "--output", str(out / "r1.json")]) == 0
    said = "".join(capfd.readouterr())
    assert said.count(str(out / "store")) == 3 and str(made / "old") not in said
    assert naming(out, made / "old") == []
    assert json.loads((out / "r.json").read_bytes())["settings"]["model"] == last


def test_a_moved_run_that_was_stopped_resumes_at_its_own_place(made: Path, moved: Path) -> None:
    for path in (moved / "checkpoints" / "step-000000002", moved / "export"):
        shutil.rmtree(path)
    for name in ("summary.json", "evaluations/step-000000002.json"):
        (moved / name).unlink()
    lines = (made / "old" / "first" / "metrics.jsonl").read_text().splitlines()
    (moved / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] < 2))
    untouched = {path: path.stat().st_mtime_ns for path in (made / "old").rglob("*")}
    summary = train(load_config(moved / "config.yaml"))
    assert summary is not None and Path(summary["export"]) == moved / "export" and (moved / "export" / "config.json").exists()
    expected = placed(json.loads((made / "old" / "first" / "summary.json").read_bytes()), str(moved))
    same = expected.keys() - MEASURED - {"training_seconds", "start_seconds", "starts", "name"}
    assert {key: summary[key] for key in same} == {key: expected[key] for key in same} and summary["name"] == "second"
    assert untouched == {path: path.stat().st_mtime_ns for path in (made / "old").rglob("*")}
    assert naming(moved.parent, made / "old") == []


def test_the_configuration_of_a_run_without_absolute_paths_is_as_it_was_given(tmp_path: Path) -> None:
    text = portable_yaml({"output_dir": "runs", "train_asr_dirs": ("../x", "y")}, OPTIONS, str(tmp_path / "runs" / "r"), str(tmp_path))
    assert text == "output_dir: runs\ntrain_asr_dirs:\n- ../x\n- y\n"


def test_what_a_dot_has_meant_is_written_out_where_it_means_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    given = {"output_dir": str(tmp_path / "out"), "train_asr_dirs": ("../x", "y"), "wandb_tags": ("./no", "path")}
    folder = tmp_path / "out" / "r"
    text = portable_yaml(given, OPTIONS, str(folder), str(tmp_path / "out"))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)
    (folder / "environment.json").write_text("{}")
    read = read_yaml(folder / "config.yaml", OPTIONS)
    assert read == {**given, "train_asr_dirs": [f"{tmp_path}/work/../x", "y"], "wandb_tags": ["./no", "path"]}


def test_the_files_of_a_sweep_move_with_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    sweep = sweep_of(tmp_path / "old", store_dir=str(tmp_path / "old" / "store"))
    best = Trial(2, ["002"], settings={"learning_rate": 0.5}, parents=[{"trial": 1, "run": "001", "step": 8}])
    folder = tmp_path / "new" / "renamed"
    folder.mkdir(parents=True)
    (folder / LEDGER).touch()
    (folder / BEST).write_text(TrialBase(sweep, {}, {}).best_yaml(best, "why", moves=True))
    (folder / "sweep.yaml").write_text(sweep.to_yaml(moves=True))
    config = load_config(folder / BEST)
    assert config.resume_from_checkpoint == str(folder / "kept" / "001" / "step-000000008")
    assert (config.output_dir, config.store_dir) == (str(tmp_path / "new"), str(tmp_path / "new" / "store"))
    assert load_sweep(folder / "sweep.yaml", {}).run.run_uri == str(folder)
    run = TrialBase(sweep, {}, {}).config({}, "002")
    (folder / "trials" / "002").mkdir(parents=True)
    for name, content in {"config.yaml": portable(run, run.run_uri), "environment.json": "{}", "metrics.jsonl": ""}.items():
        (folder / "trials" / "002" / name).write_text(content)
    trial = load_config(folder / "trials" / "002" / "config.yaml")
    assert (trial.run_uri, trial.store_dir) == (str(folder / "trials" / "002"), str(tmp_path / "new" / "store"))


def test_a_copy_of_a_runs_configuration_is_refused_where_its_paths_would_mean_others(moved: Path, tmp_path: Path) -> None:
    shutil.copy(moved / "config.yaml", tmp_path / "copy.yaml")
    with pytest.raises(ConfigError, match=r"config = '.*copy.yaml': is a copy of a run's configuration.* Name the file in that folder"):
        load_config(tmp_path / "copy.yaml")


def test_a_run_of_an_earlier_version_is_found_where_its_configuration_is(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "elsewhere")
    run = (tmp_path / "elsewhere" / "stored").rename(tmp_path / "elsewhere" / "renamed")
    config = load_config(run / "config.yaml", {"store_dir": str(tmp_path / "elsewhere" / "store")})
    assert config.run_uri == str(run)
    shutil.copytree(run / "checkpoints" / "step-000000003", run / "checkpoints" / f"step-{LAST:09d}")
    summary = json.loads((run / "summary.json").read_bytes())
    for key, way in (("checkpoint", f"checkpoints/step-{LAST:09d}"), ("export", "export"), ("report", "report.html")):
        summary[key] = f"/tmp/most_ray/stored/{way}"
    (run / "summary.json").write_text(json.dumps(summary))
    prepared = prepare_run(config_of(run))
    found = finished_summary(prepared.__class__(**{**vars(prepared), "done_steps": LAST}))
    assert found is not None
    shown = placed(found, str(run))
    assert [shown[key] for key in ("checkpoint", "export")] == [str(run / "checkpoints" / f"step-{LAST:09d}"), str(run / "export")]


@pytest.mark.parametrize(
    ("folder", "uri", "way"),
    [
        ("/a/runs/r", "/a/runs/r/export", "./export"),
        ("/a/runs/r", "/a/runs/store/s", "../store/s"),
        ("/a/runs/r", "/a/runs", ".."),
        ("/a/runs/r", "/a/other", None),
        ("/a/runs/r", "/a/runs2/store", None),
        ("/a/runs/r", "runs/x", None),
        ("s3://b/runs/r?region=x", "s3://b/runs/r/export?region=x", "./export"),
        ("s3://b/runs/r", "s3://c/runs/r/export", None),
        ("s3://b/runs/r", "/a/runs/r/export", None),
    ],
)
def test_ways_between_places(folder: str, uri: str, way: str | None) -> None:
    assert storage.relative_to(folder, uri, storage.parent(folder)) == way
    if way:
        assert storage.located(folder, way) == uri
    assert storage.located(folder, uri) == (uri if uri[0] == "/" or storage.is_remote(uri) else f"{folder}/{uri}")
