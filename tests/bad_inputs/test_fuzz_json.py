"""Thousands of mutations of every kind of YAML and JSON that is read: each gives a value, or an error that a user can fix, in little time
and memory."""

from __future__ import annotations

import copy
import gzip
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from most_ray.checkpoint import catalog, reader
from most_ray.checkpoint.files import DamagedFileError
from most_ray.config import load_config
from most_ray.data.store import read_checksummed_json
from most_ray.errors import RecordError, UserError
from most_ray.evaluation.hypotheses import read_hypotheses
from most_ray.io.journal import read_journal
from most_ray.model.build import read_config
from most_ray.records.files import read_raw
from most_ray.records.record import parse_records, units_hash
from most_ray.records.tts_records import read_conversions
from most_ray.records.units_manifest import NEEDED_FOR_SPEECH, load_units_manifest
from tests.bad_inputs.inputs import base

_SECONDS = 5.0  # that one reading may take
_BYTES = 1 << 30  # by which the process may grow
_HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1e300, float("inf"), float("nan")),
    *(
        "",
        " ",
        "x",
        "5",
        "nan",
        "1e3",
        "\0",
        "\ud800",
        "é" * 40,
        "[Hu7]",
        "[Hu500]",
        "../x",
        "s3://u:p@b/x",
        "$HOME",
        "~",
        "[/b]",
        "\x1b[31m",
        "9" * 5000,
    ),
    *([], [[]], [None], ["x"], list(range(30)), {}, {"": 0}, {"a": {"b": [1]}}),
)


def _deep(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each list or object in a value, with one of its indices or keys."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def change_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one value in it replaced, moved, doubled or removed, or a key renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places or draw.random() < 0.02:
        return draw.choice(_HOSTILE)
    holder, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice([key + "x", "", "id", "data", "__class__"])] = holder.pop(key)
    elif kind == 2:
        holder[key] = [holder[key]] * draw.choice([1, 2, 50])
    elif kind == 3:
        holder[key] = _deep(draw.choice([5, 90, 101, 400]))
    elif kind == 4:
        holder[key] = copy.deepcopy(draw.choice(places)[0])
    else:
        holder[key] = draw.choice(_HOSTILE)
    return value


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """A file's content with some bytes changed, put in, doubled or taken out at one place, or all behind it cut off."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice([0, 1, 1, 2, 8, 60]))
    new = [
        b"",
        bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))),
        bytes(draw.choice(b"{}[]\",:\\\n0u-&*!|>%@'#? \t") for _ in range(draw.randrange(1, 6))),
        content[start:stop] * draw.choice([2, 40]),
        draw.choice(
            [b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 9, b"1e999", b"NaN", b"\xef\xbb\xbf", b"\r\n"]
        ),
    ][draw.randrange(5)]
    return content[:start] + new + (b"" if draw.random() < 0.05 else content[stop:])


def mutated(value: Any, write: Callable[[Any], str], draw: random.Random) -> bytes:
    """A file's content, broken in what it says, in its bytes, or both."""
    kind = draw.randrange(3)
    try:
        text = write(change_value(value, draw) if kind else value)
    except (ValueError, RecursionError, yaml.YAMLError):  # a value that this form cannot spell
        text = write(value)
    content = text.encode("utf-8", "surrogatepass")
    return change_bytes(content, draw) if kind != 1 and content else content


def as_lines(values: Any) -> str:
    return "".join(json.dumps(each) + "\n" for each in (values if isinstance(values, list) else [values]))


def read_records(path: Path) -> None:
    raws = [raw for _, raw in read_raw(path)]
    for record, raw in zip(parse_records(raws), raws, strict=True):
        json.dumps(raw if not isinstance(raw, RecordError) else str(raw))  # what passes is written again by several commands
        str(record)


def read_marker(path: Path) -> None:
    try:
        catalog.read_marker(str(path.parent))
    except DamagedFileError:
        return
    catalog.find_corruption(str(path.parent))


def read_manifest(path: Path) -> None:
    if manifest := load_units_manifest(str(path.parent)):
        units_hash(manifest)
    load_units_manifest(str(path.parent), NEEDED_FOR_SPEECH)


CONFIG = {
    "name": "r",
    "model_name_or_path": "tiny",
    "train_asr_dirs": ["a", "b"],
    "train_asr_weights": [1, 2.5],
    "max_steps": 10,
    "learning_rate": 1e-3,
}
CONFIG |= {
    "bf16": True,
    "num_workers": [1, 2],
    "lr_scheduler": "cosine",
    "wandb_tags": ["x"],
    "output_dir": "runs",
    "seed": 7,
    "val_asr_dirs": [],
}
RECORDS = [
    {"id": f"u{i}", "instruction": "Say.", "input": f"[Hu{i}][Hu7]", "output": "one", "metadata": {"speaker": i, "t": [0.5]}}
    for i in range(4)
]
CONVERSIONS = [{"dataset_name": "d", "input_dir": "in", "output_dir": f"out{i}", "file_pattern": "*"} for i in range(2)]
MARKER = {"format": 2, "step": 3, "files": {"state.json": [2, "ab"], "rank-00000.safetensors": [10, "cd"]}}
ABOUT = {"task": "asr", "records": 2, "rejected": 0, "rejected_file": "r"}
METRICS = [{"kind": kind, "step": step, "time": 1.5, "loss": 2.0} for step, kind in ((1, "train"), (2, "evaluation"), (3, "start"))]


def model_config() -> Any:
    return json.loads((base() / "model" / "config.json").read_text())


def units() -> Any:
    manifest = json.loads((base() / "train_asr" / "units.json").read_text())
    return {key: value[:4] if isinstance(value, list) else value for key, value in manifest.items()}


def hypotheses() -> Any:
    path = next(Path(__file__).parents[1].joinpath("fixtures").rglob("*hypotheses.jsonl"), None)
    if path is not None:
        return [json.loads(line) for line in path.read_text().splitlines()[:5]]
    routing, settings = {"leaked": 0}, {"normaliser": "basic", "model": "m"}
    header = {"kind": "settings", "format": 3, "settings": settings, "sets": {"asr/a": ABOUT}, "routing": routing}
    return [
        header,
        *(
            {"kind": "hypothesis", "task": "asr", "set": "asr/a", "row": i, "id": f"u{i}", "reference": "a", "hypothesis": "b"}
            for i in range(2)
        ),
    ]


# File name, its good content, how it is written, what reads it, and the number of mutations.
KINDS: list[tuple[str, Any, Callable[[Any], str], Callable[[Path], object], int]] = [
    ("c.yaml", CONFIG, yaml.safe_dump, load_config, 3000),
    ("r.json", RECORDS, json.dumps, read_records, 2000),
    ("r-wrapped.json", {"version": 1, "data": RECORDS}, lambda value: json.dumps(value, indent=1), read_records, 2000),
    ("r.jsonl", RECORDS, as_lines, read_records, 3000),
    ("r.jsonl.gz", RECORDS, as_lines, read_records, 1500),
    ("units.json", units, json.dumps, read_manifest, 1500),
    ("config.json", model_config, json.dumps, lambda path: read_config(str(path.parent)), 300),
    ("hypotheses.jsonl", hypotheses, as_lines, lambda path: read_hypotheses(str(path)), 2000),
    ("conversions.json", CONVERSIONS, json.dumps, read_conversions, 1000),
    (catalog.COMMIT, MARKER, json.dumps, read_marker, 1000),
    (reader.STATE, {"format": 2, "step": 3}, json.dumps, lambda path: reader.read_state(path.parent), 400),
    (
        "manifest.json",
        {"version": 2, "shards": [], "digest": "x"},
        json.dumps,
        lambda path: read_checksummed_json(str(path), "token store"),
        500,
    ),
    ("metrics.jsonl", METRICS, as_lines, read_journal, 1000),
]


@contextmanager
def in_time(what: str) -> Iterator[None]:
    """Fails where the block takes longer than `_SECONDS`."""

    def late(*_: object) -> None:
        raise AssertionError(f"{what} took longer than {_SECONDS:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def memory() -> Iterator[None]:
    """What takes `_BYTES` more than is in use fails, instead of taking the machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(("name", "good", "write", "read", "count"), [pytest.param(*kind, id=kind[0]) for kind in KINDS])
def test_mutations(tmp_path: Path, name: str, good: Any, write: Callable[[Any], str], read: Callable[[Path], object], count: int) -> None:
    draw, value, path = random.Random(name), good() if callable(good) else good, tmp_path / name
    if name == reader.STATE:
        (tmp_path / catalog.COMMIT).write_text(json.dumps(MARKER))
    wrong: dict[str, bytes] = {}  # one example of each
    for _ in range(count):
        content = mutated(value, write, draw)
        if name.endswith(".gz"):
            content = gzip.compress(content, 1) if draw.random() < 0.7 else change_bytes(gzip.compress(content, 1), draw)
        path.write_bytes(content)
        try:
            with in_time(name):
                read(path)
        except (UserError, RecordError):
            pass
        except (Exception, AssertionError) as error:  # noqa: BLE001 - each is a fault
            wrong.setdefault(f"{type(error).__name__}: {str(error)[:80]}", content)
    assert not wrong, {what: content[:600] for what, content in list(wrong.items())[:8]}
