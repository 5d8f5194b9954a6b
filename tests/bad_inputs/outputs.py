"""Outputs of every command that are no place for it, or hold what is not its own: refused before any work, nothing touched."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.bad_inputs.harness import Case
from tests.bad_inputs.inputs import FSDD, base, run_yaml

Words = list[str | Path]
_open: list[int] = []  # descriptors of pseudo-terminals, which exist as long as these do


class Command(NamedTuple):
    """A command with an output: its words, of which the last is the output; the flag that errors must name; and what the output is."""

    name: str
    words: Callable[[Path], Words]
    flag: str
    kind: str  # "file" or "folder"


def _yaml(folder: Path) -> Path:
    (folder / "c.yaml").write_text(run_yaml())
    return Path("c.yaml")


def _run(folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "time": 1.0}\n')
    return Path("run")


def _model() -> Words:
    return ["--model", base() / "model"]


def _speech() -> Words:
    return ["--speech", base() / "train_asr"]


UNITS = ["prepare", "units", "--input", FSDD, "--num_actors", "0", "--where", "speaker=lucas", "take=1", "--fit_kmeans", "4", "--output"]
KMEANS = ["prepare", "kmeans", "--input", FSDD, "--num_actors", "0", "--where", "speaker=lucas", "take=1", "--k", "4", "--output"]
COMMANDS = [
    Command("plan", lambda f: ["plan", "--config", _yaml(f), "--steps", "1:2", "--trace"], "trace", "file"),
    Command("train", lambda f: ["plan", "--config", _yaml(f), "--trace", "t.jsonl", "--trace_records"], "trace_records", "file"),
    Command("report", lambda f: ["report", _run(f), "--output"], "output", "file"),
    Command("evaluate", lambda f: ["evaluate", *_model(), "--asr_dirs", base() / "test_takes", "--output"], "output", "file"),
    Command("rescore", lambda f: ["evaluate", "--rescore", "h.jsonl", "--output"], "output", "file"),
    Command("transcribe", lambda f: ["transcribe", "a.wav", *_model(), *_speech(), "--output"], "output", "file"),
    Command("synthesize", lambda f: ["synthesize", "--units", "[Hu7][Hu9]", *_speech(), "--output"], "output", "file"),
    Command("kmeans", lambda f: list(KMEANS), "output", "file"),
    Command("speak-records", lambda f: ["synthesize", "--records", base() / "train_tts", *_speech(), "--output"], "output", "folder"),
    Command("init-model", lambda f: ["init-model", "--preset", "tiny", "--records", base() / "train_asr", "--output"], "output", "folder"),
    Command("export", lambda f: ["export", "--checkpoint", "checkpoint", "--output"], "output", "folder"),
    Command("units", lambda f: list(UNITS), "output", "folder"),
    Command("tts", lambda f: ["prepare", "tts", "--input_dir", base() / "train_asr", "--output_dir"], "output_dir", "folder"),
    Command("output_dir", lambda f: ["plan", "--config", _yaml(f), "--trace", "t.jsonl", "--output_dir"], "output_dir", "folder"),
    Command("store_dir", lambda f: ["prepare", "store", "--config", _yaml(f), "--store_dir"], "store_dir", "folder"),
]
SUFFIXES = {"synthesize": ".wav", "kmeans": ".npy", "evaluate": ".json", "rescore": ".json", "report": ".html"}


# What is at the path of an output: each function makes it and returns the words for the output.


def _text(folder: Path, name: str) -> str:
    (folder / name).write_text("mine\n" * 100)
    return name


def _folder(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def _pipe(folder: Path, name: str) -> str:
    os.mkfifo(folder / name)
    return name


def _socket(folder: Path, name: str) -> str:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{descriptor}/{name}")  # the folder's own path may be too long for a socket
    os.close(descriptor)
    return name


def _device(_folder: Path, _name: str) -> str:
    _open.extend(os.openpty())
    return os.ttyname(_open[-1])


def _device_by_link(folder: Path, name: str) -> str:
    (folder / name).symlink_to(_device(folder, name))
    return name


def _below_a_file(folder: Path, name: str) -> str:
    (folder / "text").write_text("mine")
    return f"text/{name}"


def _loop(folder: Path, name: str) -> str:
    (folder / name).symlink_to(name)
    return name


def _long(_folder: Path, name: str) -> str:
    return "x" * 300 + name


FILE_FAULTS: list[tuple[str, Callable[[Path, str], str], str]] = [
    ("text", _text, "exists and is no"),
    ("device", _device, "not a regular file"),
    ("folder", _folder, "is a folder"),
    ("pipe", _pipe, "not a regular file"),
    ("socket", _socket, "not a regular file"),
    ("link to a device", _device_by_link, "not a regular file"),
    ("loop of links", _loop, "cannot be written to"),
]
FOLDER_FAULTS: list[tuple[str, Callable[[Path, str], str], str]] = [
    ("text", _text, "is a file|Not a directory"),
    ("device", _device, "is not a folder|Not a directory"),
    ("pipe", _pipe, "is not a folder|Not a directory"),
    ("socket", _socket, "is not a folder|Not a directory"),
    ("loop of links", _loop, "cannot be written to|Not a directory"),
]
# Of any output. A Path has lost a slash of a URI.
NAME_FAULTS: list[tuple[str, Callable[[Path, str], str], str]] = [
    ("empty", lambda *_: "", "is empty"),
    ("blank", lambda *_: "  ", "is empty"),
    ("URI", lambda _, name: f"s3://user:sekret@bucket/{name}", "is not a local path"),
    ("URI of an unknown scheme", lambda _, name: f"Foo+x://bucket/{name}", "is not a local path"),
    ("below a file", _below_a_file, "cannot be written to"),
    ("NUL", lambda _, name: f"a\0{name}", "NUL"),
    ("variable", lambda _, name: f"$HOME/{name}", r"\$HOME.*not replaced"),
    ("variable in braces", lambda _, name: f"x/${{USER}}/{name}", "not replaced"),
    ("unknown user", lambda _, name: f"~nobody-here/{name}", "user who is not known"),
    ("long name", _long, "cannot be written to"),
]


def _case(command: Command, fault: tuple[str, Callable[[Path, str], str], str]) -> Case:
    what, make, says = fault
    name = f"out{SUFFIXES.get(command.name, '')}"

    def words(folder: Path) -> Sequence[str | Path]:
        return [*command.words(folder), make(folder, name)]

    return Case(f"{command.name}: {what}", words, [command.flag, says], never=["sekret"])


def _cases() -> list[Case]:
    """Faults of files and folders, and of names, spread over the commands: each has the first two, and some of the others."""
    found = []
    files, folders, names = (itertools.cycle(faults) for faults in (FILE_FAULTS[2:], FOLDER_FAULTS[2:], NAME_FAULTS))
    for command in COMMANDS:
        always, others = (FILE_FAULTS[:2], files) if command.kind == "file" else (FOLDER_FAULTS[:2], folders)
        found += [_case(command, fault) for fault in (*always, next(others), next(others))]
        if command.name not in ("output_dir", "store_dir"):  # which may be URIs
            found += [_case(command, next(names)) for _ in range(2)]
        else:
            found += [_case(command, fault) for fault in NAME_FAULTS if "URI" not in fault[0] and (command.name, fault[0]) not in OPTIONAL]
    return found


OPTIONAL = {("store_dir", "empty"), ("store_dir", "blank")}  # an empty value is none


# What is there already, and is not the command's own.


def _with(words: Callable[[Path], Words], output: str, *files: str, content: bytes = b"mine\n") -> Callable[[Path], Words]:
    """A command whose output is there, with files in it (or which is itself a file, where none are named)."""

    def make(folder: Path) -> Words:
        for name in files or ("",):
            path = folder / output / name if name else folder / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return [*words(folder), output]

    return make


def _of(name: str) -> Callable[[Path], Words]:
    return next(command.words for command in COMMANDS if command.name == name)


def _model_there(name: str) -> Callable[[Path], Words]:
    def make(folder: Path) -> Words:
        shutil.copytree(base() / "model", folder / "out")
        return [*_of(name)(folder), "out"]

    return make


def _noted_model(folder: Path) -> Words:
    shutil.copytree(base() / "model", folder / "out")
    (folder / "out" / "notes.txt").write_text("mine")
    return [*_of("export")(folder), "out"]


def _others_model(folder: Path) -> Words:
    for name in ("config.json", "generation_config.json"):
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_text('{"model_type": "deepseek_v2"}')
    return [*_of("export")(folder), "out"]


def _users_recording(folder: Path) -> bytes:
    import soundfile

    soundfile.write(folder / "w.wav", np.zeros(1600, np.float32), 16000)
    content = (folder / "w.wav").read_bytes()
    (folder / "w.wav").unlink()
    return content


def _over_recording(folder: Path) -> Words:
    (folder / "out.wav").write_bytes(_users_recording(folder))
    return [*_of("synthesize")(folder), "out.wav"]


def _over_recordings(folder: Path) -> Words:
    first = json.loads((base() / "train_tts" / "records.jsonl").read_text().splitlines()[0])
    (folder / "out").mkdir()
    (folder / "out" / f"{first['id']}.wav").write_bytes(_users_recording(folder))
    return [*_of("speak-records")(folder), "out", "--limit", "1"]


def _features_there(folder: Path) -> Words:
    np.save(folder / "out.npy", np.zeros((2000, 39), np.float32))
    return [*KMEANS, "out.npy"]


def _link_out(folder: Path) -> Words:
    """A conversion of before, with a subfolder that leads elsewhere by now."""
    for name in ("in/sub", "out", "elsewhere"):
        (folder / name).mkdir(parents=True)
    shutil.copy(base() / "train_asr" / "records.jsonl", folder / "in" / "sub")
    (folder / "elsewhere" / "records.jsonl.gz").write_bytes(b"mine")
    (folder / "out" / "sub").symlink_to(folder / "elsewhere")
    (folder / "out" / "converted.json").write_text('{"files": ["sub/records.jsonl.gz"]}')
    return ["prepare", "tts", "--input_dir", "in", "--output_dir", "out"]


def _delete_by_link(folder: Path) -> Words:
    _link_out(folder)
    shutil.move(folder / "in" / "sub" / "records.jsonl", folder / "in")
    return ["prepare", "tts", "--input_dir", "in", "--output_dir", "out"]


def _still_there(folder: Path, _: object) -> None:
    assert (folder / "elsewhere" / "records.jsonl.gz").read_bytes() == b"mine", "a file elsewhere was deleted"


def _tts_config(folder: Path) -> Words:
    (folder / "c.json").write_text('[{"input_dir": "in", "output_dir": "$HOME/out"}]')
    return ["prepare", "tts", "--config", "c.json"]


def _others_vocoder(folder: Path) -> Words:
    shutil.copytree(base() / "train_asr", folder / "asr")
    (folder / "asr" / "vocoder.safetensors").write_bytes(b"mine")
    return ["prepare", "vocoder", "--input", FSDD, "--records", "asr"]


def _hypotheses_there(folder: Path) -> Words:
    (folder / "o.hypotheses.jsonl").write_text("mine")
    return [*_of("evaluate")(folder), "o.json"]


def _run_metrics(folder: Path) -> Words:
    words = _of("report")(folder)
    return [*words, "run/metrics.jsonl"]


def _own_config(folder: Path) -> Words:
    return [*_of("plan")(folder), "c.yaml"]


def _others_metrics(folder: Path) -> Words:
    (folder / "runs" / "r").mkdir(parents=True)
    (folder / "runs" / "r" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return [*_of("plan")(folder), "t.jsonl"]


def _config_there(folder: Path) -> Words:
    (folder / "data").mkdir()
    return ["train", "--from_audio", "data", "--output_dir", ""]


def _transcripts_there(folder: Path) -> Words:
    (folder / "o.jsonl").write_text('{"file": "b.wav", "text": "mine", "units": "1", "ended": true}\n')
    return [*_of("transcribe")(folder), "o.jsonl"]


OWN = [
    Case("transcribe: no recording that can be read", _transcripts_there, [r"a\.wav", "nothing was written"]),
    Case("plan: its own configuration", _own_config, ["trace", "is no trace"]),
    Case("report: a run's metrics", _run_metrics, ["output", "is no report"]),
    Case("report: another page", _with(_of("report"), "o.html", content=b"<!DOCTYPE html><title>mine</title>"), ["output", "is no report"]),
    Case("evaluate: another JSON", _with(_of("evaluate"), "o.json", content=b'{"a": 1}'), ["output", "is no result"]),
    Case("evaluate: hypotheses that are none", _hypotheses_there, "hypotheses.*is no file of hyp"),
    Case(
        "transcribe: other lines", _with(_of("transcribe"), "o.jsonl", content=b'{"file": "a", "loss": 1}\n'), ["output", "is no file of"]
    ),
    Case("synthesize: a recording", _over_recording, ["output", "is no recording that"]),
    Case("synthesize: the recording of a record", _over_recordings, ["output", "is no recording that"]),
    Case("synthesize: other suffix", lambda f: [*_of("synthesize")(f), "a.mp3"], "neither a .wav nor"),
    Case("kmeans: features", _features_there, ["output", "is no file of centroids"]),
    Case("init-model: a model", _model_there("init-model"), ["output", "exists and holds"]),
    Case("init-model: any folder with files", _with(_of("init-model"), "o", "notes.txt"), ["output", "exists and holds notes.txt"]),
    Case("export: other files", _with(_of("export"), "o", "notes.txt"), ["output", "is no exported model"]),
    Case("export: an export with notes", _noted_model, ["output", "holds notes.txt"]),
    Case("export: another library's model", _others_model, ["output", "is no exported model"]),
    Case("units: records", _with(_of("units"), "o", "records.jsonl"), ["output", "holds records.jsonl"]),
    Case("units: numbered records", _with(_of("units"), "o", "records-00001.json"), ["output", "holds records-00001.json"]),
    Case("units: a manifest", _with(_of("units"), "o", "units.json"), ["output", "holds units.json"]),
    Case("units: centroids", _with(_of("units"), "o", "kmeans.npy"), ["output", "holds kmeans.npy"]),
    Case("units: a list of one's own", _with(_of("units"), "o", "rejected.jsonl"), ["output", "rejected.jsonl.*is no list"]),
    Case(
        "units: records beside an earlier command's",
        _with(_of("units"), "o", "records.jsonl", "prepared.json", content=b'{"files": {"records.jsonl.gz": 1}}'),
        ["output", "holds records.jsonl"],
    ),
    Case("tts: records of that name", _with(_of("tts"), "o", "records.jsonl.gz"), ["output_dir", "holds records.jsonl.gz"]),
    Case("tts: centroids", _with(_of("tts"), "o", "kmeans.npy"), ["output_dir", "holds kmeans.npy"]),
    Case("tts: a list of one's own", _with(_of("tts"), "o", "rejected.jsonl"), ["output_dir", "is no list of"]),
    Case("tts: a link to elsewhere", _link_out, ["output_dir", "has a link in it"]),
    Case("tts: old files by a link", _delete_by_link, "TTS records from 1 file", 0, may_change=["out", "out/*"], check=_still_there),
    Case("tts: a variable in the list", _tts_config, [r"output_dir", r"\$HOME"]),
    Case("vocoder: another vocoder", _others_vocoder, ["records", "is no vocoder"]),
    Case("train: another program's metrics", _others_metrics, ["output_dir", "is no run's metrics"]),
    Case("from_audio: nowhere", _config_there, ["output_dir", "is empty"]),
]


def _onto(name: str, output: str) -> Callable[[Path], Words]:
    """A command with an output that is in order."""
    return lambda folder: [*_of(name)(folder), output]


# A disk that is full within the output.
FULL = [
    Case("init-model: a full disk", _onto("init-model", "new/model"), ["output", "File too large"], file_bytes=200_000),
    Case("report: a full disk", _onto("report", "new/o.html"), ["output", "File too large"], file_bytes=2_000),
    Case("tts: a full disk", _onto("tts", "o"), ["output_dir", "File too large"], file_bytes=600, may_change=["o", "o/*"]),
]
CASES = [*_cases(), *OWN, *FULL]
