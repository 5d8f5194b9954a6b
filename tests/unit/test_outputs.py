"""Where commands write: checked before any work, whole or not at all, and nothing of anybody else's lost."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from most_ray.checkpoint.export import check_export
from most_ray.cli import main
from most_ray.cli.parser import flag_of
from most_ray.cli.speech_commands import RECORDING, TRANSCRIPTS, _is_own_recording, _write_recording
from most_ray.config import config_from
from most_ray.errors import ConfigError, DataError, explain_os_error
from most_ray.evaluation.hypotheses import HYPOTHESES, RESULT
from most_ray.io import storage
from most_ray.io.journal import METRICS, TRACE, Journal
from most_ray.io.outputs import (
    Kind,
    begins_with,
    check_file,
    check_folder,
    check_new_folder,
    named,
    replacing,
    replacing_folder,
)
from most_ray.io.uris import expand
from most_ray.records.files import REJECTED_LIST
from most_ray.report import REPORT
from most_ray.runs.output_checks import check_outputs
from most_ray.speech.units.clustering import CENTROIDS, save_kmeans
from most_ray.speech.units.output import check_records_folder

LINES = Kind("list", begins_with(rb'\{"a"'))


# Checks


def test_a_new_file_in_new_folders_may_be_written_and_nothing_is_made(tmp_path: Path) -> None:
    check_file("output", tmp_path / "a/b/c.jsonl", LINES)
    check_folder("output", tmp_path / "a/b")
    check_new_folder("output", tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"a": 1}\n'])
def test_what_is_empty_or_of_the_kind_may_be_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "o").write_bytes(content)
    check_file("output", tmp_path / "o", LINES)
    (tmp_path / "link").symlink_to("o")
    check_file("output", tmp_path / "link", LINES)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [("s3://u:secret@bucket/x", r"s3://\*\*\*@bucket/x"), ("GS://bucket/x", "GS://bucket/x"), ("file:///tmp/x", "file://tmp/x")],
)
def test_a_uri_is_no_path_and_shows_no_credentials(uri: str, shown: str) -> None:
    for check in (check_new_folder, lambda field, path: check_file(field, path, LINES)):
        with pytest.raises(ConfigError, match=f"^output = '{shown}': is not a local path") as caught:
            check("output", Path(uri))
        assert "secret" not in str(caught.value)


def _centroids(suffix: str) -> Callable[[Path], object]:
    return lambda path: save_kmeans(path.rename(path.with_suffix(suffix)), np.zeros((40, 39), np.float32), {"features": "mfcc"})


def _trace(path: Path) -> None:
    journal = Journal(path, 0)
    journal.write({"step": 1, "records": ["a"]})
    journal.close()


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (TRACE, b'{"step": 1, "records": ["a", "b"]}\n'),
        (METRICS, b'{"kind": "start", "step": 0, "time": 1.0}\n'),
        (METRICS, b'{"step": 5, "kind": "train"}\n'),
        (REPORT, b'\n\n<!DOCTYPE html>\n<html lang="en">\n<head>\n<title>a, b: run report</title>'),
        (REPORT, b"<!DOCTYPE html>\n<title>s: sweep report</title>"),
        (RESULT, b'{\n "wer": {\n  "takes": 0.5\n },\n "sets": {}}'),
        (HYPOTHESES, b'{"kind": "settings", "format": 1, "sets": {}}\n'),
        (TRANSCRIPTS, b'{"file": "a.wav", "text": "x", "units": "1 2", "ended": true}\n'),
        (REJECTED_LIST, b'{"file": "a", "index": 0, "reason": "is empty"}\n'),
        (CENTROIDS, _centroids),
        (RECORDING, lambda path: _write_recording(path, np.zeros(800, np.float32), 16000)),
    ],
)
def test_each_kind_knows_its_own_files_and_no_others(tmp_path: Path, kind: Kind, own: object) -> None:
    """Those that this package writes (and has written in earlier versions); not each other's, nor anything else."""
    path = tmp_path / "o.wav"
    if isinstance(own, bytes):
        path.write_bytes(own)
        assert kind.is_own(path)
    elif own is _centroids:
        for suffix in (".npy", ".safetensors"):
            path.write_bytes(b"")
            _centroids(suffix)(path)
            assert kind.is_own(path.with_suffix(suffix))
    else:
        own(path)  # type: ignore[operator]
        assert kind.is_own(path)
    for other in (b"text\n", b'{"step": 1, "loss": 2}\n', b'{"file": "x"}\n', b"<!DOCTYPE html><title>mine</title>", b"RIFF....WAVEfmt "):
        path.write_bytes(other)
        with pytest.raises(ConfigError, match=f"exists and is no {kind.what}"):
            check_file("output", path, kind)


def test_features_are_no_centroids(tmp_path: Path) -> None:
    for name, array in (("many", np.zeros((4000, 39), np.float32)), ("wide", np.zeros((4, 39)))):
        np.save(tmp_path / f"{name}.npy", array)
        assert not CENTROIDS.is_own(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_recording_is_known_by_its_mark_alone(tmp_path: Path, suffix: str) -> None:
    """The samples and their form are those that soundfile writes by itself."""
    wave = np.sin(np.arange(3200, dtype=np.float32) / 9)
    _write_recording(tmp_path / f"own{suffix}", wave, 16000)
    soundfile.write(tmp_path / f"mine{suffix}", wave, 16000)
    own, mine = (soundfile.info(tmp_path / f"{name}{suffix}") for name in ("own", "mine"))
    assert (own.format, own.subtype, own.samplerate, own.frames) == (mine.format, mine.subtype, mine.samplerate, mine.frames)
    assert np.array_equal(*(soundfile.read(tmp_path / f"{name}{suffix}")[0] for name in ("own", "mine")))
    assert _is_own_recording(tmp_path / f"own{suffix}") and not _is_own_recording(tmp_path / f"mine{suffix}")


# Writing


def test_a_file_is_replaced_when_it_is_whole_also_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.txt").symlink_to("there/file.txt")
    with replacing("output", tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "there/file.txt").exists() and temporary.suffix == ".txt"
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "there/file.txt").read_text() == "new"
    assert os.listdir(tmp_path / "there") == ["file.txt"]


def test_after_an_error_everything_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("old")
    for name in ("o", "a/b/o"):
        with pytest.raises(FileNotFoundError), replacing("output", tmp_path / name) as temporary:
            temporary.write_bytes((tmp_path / "../nowhere").read_bytes())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/kept").touch()
    with pytest.raises(FileNotFoundError), replacing_folder("output", tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir(parents=(tmp_path / "../nowhere").read_bytes() == b"")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "kept", "o"] and (tmp_path / "o").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o/old").touch()
    with replacing_folder("output", tmp_path / "o") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["o", "new"]


def test_a_full_disk_names_the_output(tmp_path: Path) -> None:
    rule = r"^trace = .*cannot be written to \(No space left on device\)\. Free some space"
    with pytest.raises(ConfigError, match=rule), replacing("trace", tmp_path / "o"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), replacing("trace", tmp_path / "o"):  # an input's error is not the output's
        (tmp_path / "../nowhere/input").read_bytes()


def test_no_device_is_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        storage.write_bytes(tmp_path / "pipe", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and not (tmp_path / "pipe").is_file()


# Errors of the system


def test_an_error_of_the_system_names_the_flag_the_file_and_a_remedy(tmp_path: Path) -> None:
    args = argparse.Namespace(command="train", output=tmp_path / "o", recordings=[tmp_path / "a.wav"], config=None)
    assert flag_of(args, str(tmp_path / "o/sub/file")) == "output" and flag_of(args, str(tmp_path / "a.wav")) == "recordings"
    assert flag_of(args, str(tmp_path / "other")) == flag_of(None, None) == "file"
    with pytest.raises(OSError) as caught, named(tmp_path / "o/x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    told = explain_os_error(caught.value, "output")
    assert (
        str(told) == f"output = '{tmp_path}/o/x': cannot be used (No space left on device). Free some space there, or name another place."
    )
    assert str(explain_os_error(OSError("the hub is away"))) == "file: cannot be used (the hub is away). Check it."


def test_a_command_ends_with_a_line_where_the_system_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "time": 1.0}\n')

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "report.html"))

    monkeypatch.setattr("most_ray.report.write_report", full)
    assert main(["report", str(run)]) == 2
    assert capsys.readouterr().err.startswith(
        f"most-ray: data error: runs = '{run}/report.html': cannot be used (No space left on device)."
    )


# Paths as users write them


def test_a_path_begins_at_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [expand("f", text) for text in ("~/x", "~", "a~b", "x/~")] == ["/home/me/x", "/home/me", "a~b", "x/~"]
    config = config_from({"output_dir": "~/runs", "train_asr_dirs": "~/a,b", "model_name_or_path": "~/m"})
    assert (config.output_dir, config.train_asr_dirs, config.model_name_or_path) == ("/home/me/runs", ("/home/me/a", "b"), "/home/me/m")


@pytest.mark.parametrize("text", ["$HOME/x", "/data/${USER}/x", "s3://$BUCKET/x", "s3://bucket/$USER", " ", "a\0b", "~no-such-user-here/x"])
def test_what_nobody_would_replace_is_refused(text: str) -> None:
    for key in ("output_dir", "train_asr_dirs", "model_name_or_path", "trace_records"):
        with pytest.raises(ConfigError, match=f"^{key}"):
            config_from({key: text})


def test_a_name_with_a_dollar_that_exists_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "$x").mkdir()
    monkeypatch.chdir(tmp_path)
    assert expand("f", "$x") == "$x" and expand("f", "s3://u:pa$word@b/k") == "s3://u:pa$word@b/k"


# Folders of records and of runs


def test_records_that_the_command_has_not_written_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds records\.jsonl, which no earlier command"):
        check_records_folder(tmp_path, None)
    (tmp_path / "prepared.json").write_text(json.dumps({"files": {"records.jsonl": 4}}))
    check_records_folder(tmp_path, None)
    (tmp_path / "kmeans.npy").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds kmeans\.npy"):
        check_records_folder(tmp_path, None)
    check_records_folder(tmp_path, tmp_path / "kmeans.npy")  # they are used, and written again as they are
    (tmp_path / ".unfinished").touch()
    check_records_folder(tmp_path, None)


@pytest.mark.parametrize("name", ["config.yaml", "report.html", "export"])
def test_a_folder_that_is_no_runs_is_not_made_one(tmp_path: Path, name: str) -> None:
    config = config_from({"output_dir": str(tmp_path), "name": "r"})
    check_outputs(config)
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    check_outputs(config)
    (tmp_path / "r" / name).touch()
    with pytest.raises(ConfigError, match=f"holds {name}, which no start of a run has written"):
        check_outputs(config)
    (tmp_path / "r" / "environment.json").touch()
    check_outputs(config)
    (tmp_path / "r" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl': exists and is no run's"):
        check_outputs(config)


def test_an_export_with_notes_is_told_before_the_run_that_would_replace_it(tmp_path: Path) -> None:
    export = tmp_path / "export"
    check_export("output_dir", export)
    export.mkdir()
    for name in ("config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (export / name).write_text('{"model_type": "most"}')
    (export / "speech").mkdir()
    check_export("output_dir", export)
    (export / "README.md").touch()
    with pytest.raises(ConfigError, match=r"^output_dir = .*holds README\.md, which is of no export"):
        check_export("output_dir", export)
