"""Records: a bad one costs itself alone, files of other forms are explained, copies and overlaps named, damaged stores refused."""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import base, plan, run_yaml

GOOD = {"id": "u", "instruction": "Transcribe.", "input": "".join(f"[Hu{i}]" for i in range(40, 60)), "output": "seven"}
MADE = ("st", "st/*", "out", "out/*")
Content = bytes | str | list[Any] | Callable[[Path], object]


def lines(records: Sequence[Any]) -> bytes:
    return "".join((raw if isinstance(raw, str) else json.dumps(raw)) + "\n" for raw in records).encode("utf-8", "surrogatepass")


@functools.cache
def digits(kind: str = "train_asr") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (base() / kind / "records.jsonl").read_text().splitlines()]


def put(folder: Path, files: Mapping[str, Content]) -> None:
    """Write files of records; what is no content makes its file itself."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
            continue
        data = (
            lines(content)
            if isinstance(content, list)
            else content.encode("utf-8", "surrogatepass")
            if isinstance(content, str)
            else content
        )
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") and not isinstance(content, bytes) else data)


def store(
    files: Mapping[str, Content] | Callable[[], Mapping[str, Content]], *flags: str, task: str = "asr"
) -> Callable[[Path], list[Any]]:
    """`prepare store` of a folder of files."""

    def make(folder: Path) -> list[Any]:
        (folder / "d").mkdir()
        put(folder / "d", files() if callable(files) else files)
        start = ["prepare", "store", "--model_name_or_path", base() / "model", f"--train_{task}_dirs", "d"]
        return [*start, "--store_dir", "st", "--output_dir", "out", "--max_seq_length", "256", *flags]

    return make


def rejected(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "out").glob("*/rejected.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def one_bad(name: str, raw: Any, reason: str, form: str = "r.jsonl") -> Case:
    """A bad record among good ones: it is rejected with its place, and the command goes on."""

    def files() -> dict[str, Content]:
        texts = [each if isinstance(each, str) else json.dumps(each) for each in (*digits()[:20], raw, *digits()[20:])]
        if form.endswith("l"):
            return {form: "\n".join(texts) + "\n"}
        return {form: f"[{', '.join(texts)}]"}

    def check(folder: Path, outcome: Outcome) -> None:
        found = rejected(folder)
        assert len(found) == 1 and found[0]["index"] == 20 and found[0]["file"].endswith(form), found
        assert reason in found[0]["reason"], found[0]["reason"][:300]

    return Case(f"{name} in {form}", store(files, "--max_rejected_fraction", "0.1"), "40 records in", 0, may_change=MADE, check=check)


def nested(depth: int, key: str) -> str:
    deep = "[" * depth + "]" * depth if key != "objects" else '{"a": ' * depth + "1" + "}" * depth
    target = {"id": '"u"', "objects": '"META"', "lists": '"META"', "output": '"seven"'}[key]
    return json.dumps({**GOOD, "metadata": "META"}).replace(target, deep, 1)


ONE_BAD = [
    *(
        one_bad(f"{key} nested {depth} deep", nested(depth, key), "nested", form)
        for key, depth, form in (
            ("id", 110, "r.jsonl"),
            ("id", 1000, "r.jsonl"),
            ("id", 1000, "r.json"),
            ("lists", 1000, "r.jsonl"),
            ("lists", 20_000, "r.jsonl"),
            ("objects", 1000, "r.json"),
            ("objects", 900, "r.jsonl"),
            ("output", 1000, "r.jsonl"),
        )
    ),
    one_bad("an id of 5,000 digits", json.dumps(GOOD).replace('"u"', "9" * 5000), "thousands of digits"),
    one_bad("an id of 5,000 digits", json.dumps(GOOD).replace('"u"', "9" * 5000), "thousands of digits", "r.json"),
    one_bad("metadata of 5,000 digits", json.dumps({**GOOD, "metadata": {"n": "N"}}).replace('"N"', "7" * 5000), "thousands of digits"),
    one_bad("half a surrogate in the id", {**GOOD, "id": "\ud83d"}, "surrogate"),
    one_bad("half a surrogate in the output", {**GOOD, "output": "a \udc00"}, "surrogate"),
    one_bad("half a surrogate in the instruction", {**GOOD, "instruction": "\ud83d"}, "surrogate", "r.json"),
    one_bad("a list of units", {**GOOD, "input": [7, 90]}, "one string, [Hu7][Hu90]"),
    one_bad("a number as output", {**GOOD, "output": 7}, "'output' is int"),
    one_bad("null as input", {**GOOD, "input": None}, "'input' is NoneType"),
    one_bad("a list as id", {**GOOD, "id": ["a"]}, "'id' is list"),
    one_bad("an object as id", {**GOOD, "id": {"a": 1}}, "'id' is dict"),
    one_bad("a list as metadata", {**GOOD, "metadata": [1]}, "'metadata' is list"),
    one_bad("a list", [1, 2], "is a JSON list"),
    one_bad("a number", 12, "is a JSON int"),
    one_bad("no output", {key: value for key, value in GOOD.items() if key != "output"}, "no field 'output'"),
    one_bad("an empty output", {**GOOD, "output": " \n"}, "empty output"),
    one_bad("unit 500", {**GOOD, "input": "[Hu1][Hu500]"}, "outside 0..499"),
    one_bad("a unit of 5,000 digits", {**GOOD, "input": f"[Hu{'9' * 5000}]"}, "outside 0..499"),
    one_bad("a cut line", '{"id": "a", "instruction": "T', "is not JSON at byte"),
    one_bad("speech in both", {**GOOD, "output": "[Hu1]"}, "speech in both"),
    one_bad("units in the instruction", {**GOOD, "instruction": "Say [Hu1][Hu2][Hu3]"}, "'instruction' holds speech units"),
    one_bad("units as <|unit_7|>", {**GOOD, "input": "<|unit_7|><|unit_90|>"}, "one string, [Hu7][Hu90]"),
    one_bad("units as <7>", {**GOOD, "input": "<sosp><7><90><eosp>"}, "one string, [Hu7][Hu90]"),
    one_bad("units as [hu7]", {**GOOD, "input": "[hu7][hu90]"}, "one string, [Hu7][Hu90]"),
    one_bad("units as [Hu 7]", {**GOOD, "input": "[Hu 7][Hu 90]"}, "one string, [Hu7][Hu90]"),
    one_bad("units as numbers", {**GOOD, "input": "7 90 481"}, "neither its input nor its output holds speech units"),
    one_bad("units with markers", {**GOOD, "input": "<|begin_of_audio|>[Hu7]<|end_of_audio|>"}, "mixes speech units with other text"),
]


def whole_file(name: str, files: Mapping[str, Content], says: str, task: str = "asr") -> Case:
    """A folder that cannot be used."""
    return Case(name, store(files, task=task), says, may_change=MADE)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


SOME = [{**GOOD, "id": f"u{i}", "input": "".join(f"[Hu{(7 * i + k) % 500}]" for k in range(20))} for i in range(4)]
FILES = [
    whole_file("a list in .jsonl", {"r.jsonl": json.dumps(SOME)}, "its name must end in .json"),
    whole_file("a list over lines in .jsonl", {"r.jsonl": json.dumps(SOME, indent=1)}, "its name must end in .json"),
    whole_file("a list in .jsonl.gz", {"r.jsonl.gz": json.dumps(SOME)}, "must end in .json"),
    whole_file("an object over lines in .jsonl", {"r.jsonl": json.dumps(SOME[0], indent=1)}, "name of its file must end in .json"),
    whole_file("gzip in .json", {"r.json": gzip.compress(lines(SOME))}, "its name must end in .gz"),
    whole_file("gzip in .jsonl", {"r.jsonl": gzip.compress(lines(SOME))}, "its name must end in .gz"),
    whole_file("no gzip in .gz", {"r.jsonl.gz": lines(SOME)}, "must not end in .gz"),
    whole_file("UTF-16", {"r.jsonl": lines(SOME).decode().encode("utf-16")}, "is UTF-16"),
    whole_file("columns", {"r.json": json.dumps({key: [raw[key] for raw in SOME] for key in GOOD})}, "no usable asr record"),
    whole_file("records by number", {"r.json": json.dumps(dict(enumerate(SOME)))}, "has no field 'id'"),
    whole_file("records under train", {"r.json": json.dumps({"train": SOME})}, "has no field 'id'"),
    whole_file("messages", {"r.jsonl": '{"messages": [{"role": "user", "content": "[Hu1]"}]}\n'}, "has no field 'id'"),
    whole_file("an empty file", {"r.jsonl": b""}, "no usable asr record"),
    whole_file("an empty list", {"r.json": b"[]"}, "no usable asr record"),
    whole_file("nothing", {}, "holds no records"),
    whole_file("only a manifest", {"units.json": b"{}"}, "holds no records"),
    whole_file("a folder called r.jsonl", {"r.jsonl": Path.mkdir}, "holds no records"),
    whole_file("a pipe", {"r.jsonl": fifo}, "is not a regular file"),
    whole_file("a pipe beside records", {"a.jsonl": lines(SOME), "r.jsonl": fifo}, "is not a regular file"),
    whole_file("a socket", {"r.json": unix_socket}, "is not a regular file"),
    whole_file("a link to itself", {"r.jsonl": lambda path: path.symlink_to("r.jsonl")}, "cannot be listed"),
    whole_file("a link to nothing", {"r.jsonl": lambda path: path.symlink_to("gone.jsonl")}, "cannot be listed|does not exist"),
    whole_file("a pipe as manifest", {"r.jsonl": lines(SOME), "units.json": fifo}, "units"),
    whole_file("a deep manifest", {"r.jsonl": lines(SOME), "units.json": "[" * 1000 + "]" * 1000}, "units"),
    whole_file(
        "TTS records among ASR",
        {"r.jsonl": [{**raw, "input": "x", "output": raw["input"]} for raw in SOME]},
        "is a tts record in a source of asr",
    ),
    whole_file(
        "units of another spelling as text",
        {"r.jsonl": [{**GOOD, "id": str(i), "input": f"<|unit_{i}|>" * 9} for i in range(9)]},
        "Hu7",
        "text",
    ),
    whole_file("ASR records among text", {"r.jsonl": lines(SOME)}, "is a asr record in a source of text|asr record", "text"),
    whole_file("a name of line ends and escapes", {"a\n\x1b[31mb.jsonl": b"x"}, r"a \\x1b\[31mb"),
    whole_file("a name that is not UTF-8", {os.fsdecode(b"\xff.jsonl"): b"x"}, "no usable asr record"),
    whole_file("all is rejected", {"r.jsonl": [{**raw, "output": ""} for raw in SOME]}, "the first one has an empty output"),
    whole_file("half is rejected", {"r.jsonl": [*SOME, *({**raw, "id": "v", "output": ""} for raw in SOME)]}, "max_rejected_fraction"),
]

COPIES = [
    whole_file("a copy by a browser", {"r.jsonl": SOME, "r (1).jsonl": SOME}, "holds the same records as"),
    whole_file("a packed copy", {"r.jsonl": SOME, "r.jsonl.gz": SOME}, "holds the same records as"),
    whole_file("a copy in another form", {"r.jsonl": SOME, "all.json": json.dumps({"data": SOME}, indent=1)}, "holds the same records as"),
    whole_file("a copy in a folder", {"r.jsonl": SOME, "old/r.jsonl": SOME}, "holds the same records as"),
    whole_file("a linked copy", {"r.jsonl": SOME, "x.jsonl": lambda path: path.symlink_to("r.jsonl")}, "holds the same records as"),
]


def told(
    name: str, files: Mapping[str, Content], says: str, *flags: str, more: Mapping[str, Content] | None = None, never: Sequence[str] = ()
) -> Case:
    """A folder that is used, with one warning. `more`: files of the folder `e`."""

    def make(folder: Path) -> list[Any]:
        put(folder / "e", more or {})
        return store(files, *flags)(folder)

    def check(_: Path, outcome: Outcome) -> None:
        assert outcome.stderr.count("WARNING") == (1 if says else 0), outcome.stderr

    return Case(name, make, says, 0, never=never, may_change=MADE, check=check)


OTHERS = [{**raw, "id": f"v{i}", "input": "".join(f"[Hu{(11 * i + 3 * k) % 500}]" for k in range(20))} for i, raw in enumerate(SOME)]
SPOKEN = [{**raw, "id": f"tts_{raw['id']}", "input": raw["output"], "output": raw["input"]} for raw in SOME]
TOLD = [
    told(
        "hidden files",
        {"r.jsonl": SOME, "._r.jsonl": b"x", ".ipynb_checkpoints/r-checkpoint.jsonl": SOME, "__MACOSX/._r.jsonl": b"\0"},
        "",
        never=["WARNING"],
    ),
    told("ids twice", {"r.jsonl": SOME, "x.jsonl": [{**SOME[0], "output": "eight"}, *OTHERS]}, "1 record of .* has an id that an earlier"),
    told("a file with its records twice", {"r.jsonl": SOME + SOME}, "4 records of .* have an id that an earlier"),
    told("a subset", {"r.jsonl": SOME, "x.jsonl": SOME[:2]}, "2 records of .* have an id that an earlier"),
    told(
        "the same records in validation",
        {"r.jsonl": SOME},
        "4 of the 4 asr records .* also in training",
        "--val_asr_dirs",
        "e",
        more={"r.json": json.dumps(SOME)},
    ),
    told(
        "one record in validation",
        {"r.jsonl": SOME},
        "1 of the 5 asr .* also in training",
        "--val_asr_dirs",
        "e",
        more={"r.jsonl": [*OTHERS, SOME[1]]},
    ),
    told(
        "the same speech in validation",
        {"r.jsonl": SOME},
        "1 of the 1 asr .* in training",
        "--val_asr_dirs",
        "e",
        more={"r.jsonl": [{**SOME[1], "id": "z", "output": "b"}]},
    ),
    told(
        "the same recordings to be spoken",
        {"r.jsonl": SOME},
        "4 of the 4 tts .* also in training",
        "--val_tts_dirs",
        "e",
        more={"r.jsonl": SPOKEN},
    ),
    told(
        "the same ids in validation",
        {"r.jsonl": SOME},
        "have ids that records in training have",
        "--val_asr_dirs",
        "e",
        more={"r.jsonl": [{**OTHERS[0], "id": "u0"}]},
    ),
    told(
        "two sources of the same records",
        {"r.jsonl": SOME},
        "2 of the 2 asr .* another source",
        "--train_asr_dirs",
        "d",
        "e",
        more={"r.jsonl": SOME[:2]},
    ),
    told("other records in validation", {"r.jsonl": SOME}, "", "--val_asr_dirs", "e", more={"r.jsonl": OTHERS}, never=["WARNING"]),
]


@functools.cache
def built() -> Path:
    """A folder with records `d` and their token store `st`, which cases copy and spoil."""
    from most_ray.cli import main

    folder, here = base() / "built", os.getcwd()
    folder.mkdir()
    os.chdir(folder)
    try:
        assert main([str(word) for word in store({"r.jsonl": digits()})(folder)]) == 0
    finally:
        os.chdir(here)
    return folder


def spoiled(name: str, spoil: Callable[[Path], object], says: str, code: int = 2) -> Case:
    """A token store that is damaged."""

    def make(folder: Path) -> list[Any]:
        shutil.copytree(built() / "st", folder / "st")
        shutil.copytree(built() / "d", folder / "d")
        spoil(folder / "st")
        start = ["prepare", "store", "--model_name_or_path", base() / "model", "--train_asr_dirs", "d"]
        return [*start, "--store_dir", "st", "--output_dir", "out", "--max_seq_length", "256"]

    return Case(name, make, says, code, may_change=MADE)


def the(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the content of the one file of a pattern."""

    def spoil(folder: Path) -> None:
        (path,) = folder.glob(pattern)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def without(*patterns: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for pattern in patterns:
            (path,) = folder.glob(pattern)
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DEEP = b"[" * 1000 + b"]" * 1000
STORES = [
    spoiled("a manifest that is cut", the("d-*/manifest.json", lambda data: data[:-9]), "token store = .*cannot be read"),
    spoiled("a deep manifest", the("d-*/manifest.json", lambda data: DEEP), "token store = .*nested"),
    spoiled("a list as manifest", the("d-*/manifest.json", lambda data: b"[1]"), "token store = .*no JSON object"),
    spoiled("a number as manifest", the("d-*/manifest.json", lambda data: b"1"), "token store = .*no JSON object"),
    spoiled(
        "a changed manifest",
        the("d-*/manifest.json", lambda data: data.replace(b'"n_records": 40', b'"n_records": 41')),
        "does not match its checksum",
    ),
    spoiled(
        "a manifest of another version",
        the("d-*/manifest.json", lambda data: data.replace(b'"version": 2', b'"version": "x"')),
        "is of version x",
    ),
    spoiled("lengths that are cut", the("d-*/lengths.npy", lambda data: data[:-3]), "lengths.npy.*checksum"),
    spoiled("prompt lengths that are changed", the("d-*/prompt_lengths.npy", flipped), "prompt_lengths.npy.*checksum"),
    spoiled("no lengths", without("d-*/lengths.npy"), "lengths.npy"),
    spoiled("a shard that is cut", the("parts/*/shard-0000.arrow", lambda data: data[:-8]), "shard = .*bytes instead of"),
    spoiled("a shard with a changed byte", the("parts/*/shard-0000.arrow", flipped), "shard = .*checksum"),
    spoiled("no shard", without("parts/*/shard-0000.arrow"), "shard = .*cannot be read"),
    spoiled("no list of rejected records", without("d-*/rejected.jsonl"), "rejected.jsonl"),
    spoiled("a deep part", both(without("d-*"), the("parts/*/part.json", lambda data: DEEP)), "part = .*nested"),
    spoiled(
        "a changed part",
        both(without("d-*"), the("parts/*/part.json", lambda data: data.replace(b'"n_seen": 40', b'"n_seen": 99'))),
        "checksum",
    ),
    spoiled(
        "an index of a part that is cut", both(without("d-*"), the("parts/*/index.npy", lambda data: data[:-3])), "index.npy.*checksum"
    ),
    spoiled("keys that are cut", the("d-*/keys.bin", lambda data: data[:-3]), "40 records", 0),
    spoiled("no keys of a part", both(without("d-*"), without("parts/*/keys.bin")), "40 records", 0),
    spoiled("parts that are gone are made again", without("parts/*"), "40 records", 0),
]


def to_tts(config: Any, *flags: str) -> Callable[[Path], list[Any]]:
    """`prepare tts` with a configuration."""

    def make(folder: Path) -> list[Any]:
        put(folder / "asr", {"r.jsonl": SOME})
        put(folder, {"c.json": config if callable(config) or isinstance(config, bytes) else json.dumps(config)})
        return ["prepare", "tts", "--config", "c.json", *flags]

    return make


ENTRY = {"input_dir": "asr", "output_dir": "o"}
TTS = [
    Case("tts: a pipe as configuration", to_tts(fifo), "is not a regular file"),
    Case("tts: a deep configuration", to_tts(DEEP), "config = .*nested"),
    Case("tts: 5,000 digits", to_tts(b"9" * 5000), "config = .*thousands of digits"),
    Case("tts: a number", to_tts(5), "entry 0 is a JSON int"),
    Case("tts: a list of lists", to_tts([[]]), "entry 0 is a JSON list"),
    Case("tts: nothing", to_tts([]), "names no data set"),
    Case("tts: a number as folder", to_tts([{**ENTRY, "input_dir": 5}]), "input_dir = 5: of entry 0"),
    Case("tts: NUL in a folder", to_tts([{**ENTRY, "input_dir": "a\0b"}]), r"input_dir|path|directory"),
    Case("tts: half a surrogate in a folder", to_tts([{**ENTRY, "output_dir": "a\ud800"}]), r"output_dir|path"),
    Case("tts: an unknown key", to_tts([{**ENTRY, "inputdir": "x"}]), "Did you mean 'input_dir'"),
    Case("tts: a folder twice", to_tts([ENTRY, ENTRY]), "is named by two entries"),
    Case("tts: a folder in itself", to_tts([{**ENTRY, "output_dir": "asr/o"}]), "is inside the input_dir"),
    Case("tts: bytes that are no text", to_tts(b"\xff\xfe\xff"), "config"),
    Case("tts: no folder", to_tts([{**ENTRY, "input_dir": "none"}]), "does not exist"),
    Case("tts: no pattern fits", to_tts([{**ENTRY, "file_pattern": "x*"}]), "holds no records"),
]


def converted(name: str, files: Mapping[str, Content], count: str, more: Mapping[str, Content] | None = None) -> Case:
    """`prepare tts` that goes on."""

    def make(folder: Path) -> list[Any]:
        put(folder / "asr", files)
        put(folder / "o", more or {})
        return ["prepare", "tts", "--input_dir", "asr", "--output_dir", "o"]

    return Case(name, make, f"^{count} TTS records", 0, may_change=("o", "o/*"))


CONVERTED = [
    converted("tts: half a surrogate in metadata", {"r.jsonl": [*SOME, {**GOOD, "metadata": {"a": "\ud83d"}}]}, "5"),
    converted("tts: deep metadata", {"r.jsonl": [*SOME, nested(1000, "objects")]}, "4"),
    converted("tts: an earlier list of wrong types", {"r.jsonl": SOME}, "4", {"converted.json": json.dumps({"files": 5})}),
    converted("tts: an earlier list that is deep", {"r.jsonl": SOME}, "4", {"converted.json": DEEP}),
    converted("tts: an earlier list as a list", {"r.jsonl": SOME}, "4", {"converted.json": "[1]"}),
]

STEPS = ["--trace", "t", "--steps", "1:1"]
FLAGS = [
    Case(
        "a pipe as configuration",
        lambda folder: (fifo(folder / "p"), ["plan", "--config", "p", *STEPS])[1],
        "config = .*not a regular file",
    ),
    Case("/dev/zero as configuration", lambda folder: ["plan", "--config", "/dev/zero", *STEPS], "config = .*not a regular file"),
    Case("a device as records", plan(lambda: run_yaml(), "--train_asr_dirs", "/dev/null"), "cannot be listed"),
    Case("a folder of bytes", plan(lambda: run_yaml(), "--train_asr_dirs", os.fsdecode(b"\xff")), "UTF-8"),
]

CASES = [*ONE_BAD, *FILES, *COPIES, *TOLD, *STORES, *TTS, *CONVERTED, *FLAGS]
