"""Stored hypotheses, folders of runs and sweeps, recordings, texts and units for a model: damaged, hostile, or with credentials."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import base, run_yaml

ESCAPES = "\x1b]52;c;cm0=\x07\x9b31m[/b]\u202e"  # fills the clipboard, colours, ends markup, turns the line around
SHOWN = r"\\x1b\]52;c;cm0=\\x07\\x9b31m\[/b\]\\u202e"
SECRET = "s3://user:sekret@bucket/x"
ENDS_SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
Words = Sequence[str | Path]
Make = Callable[[Path], Words]


def header(**changes: Any) -> dict[str, Any]:
    sets = {"asr/a": {"task": "asr", "records": 2, "rejected": 0, "rejected_file": "store/rejected.jsonl"}}
    settings = {"normaliser": "basic", "normaliser_version": 2, "model": "m"}
    return {"kind": "settings", "format": 1, "settings": settings, "sets": sets, "routing": {"leaked": 0}, **changes}


def row(number: int, **changes: Any) -> dict[str, Any]:
    common = {"kind": "hypothesis", "set": "asr/a", "task": "asr", "row": number, "id": f"id{number}", "loss": 1.0, "supervised_tokens": 3}
    return {**common, "reference": "one two", "hypothesis": "one too", "ended": True, "looping": False, "foreign": 0, **changes}


def about(**changes: Any) -> dict[str, Any]:
    """A first line whose set is described with changes."""
    return header(sets={"asr/a": {**header()["sets"]["asr/a"], **changes}})


def rescore(*lines: Any, flags: Words = ()) -> Make:
    """Makes the scoring of a file with these lines: texts as they are, bytes too, other values as JSON."""

    def make(folder: Path) -> Words:
        content = (each if isinstance(each, bytes) else (each if isinstance(each, str) else json.dumps(each)).encode() for each in lines)
        (folder / "h.jsonl").write_bytes(b"".join(line + b"\n" for line in content))
        return ["evaluate", "--rescore", "h.jsonl", "--output", "e.json", *flags]

    return make


def from_file(name: str, create: Callable[[Path], Any] = lambda path: None) -> Make:
    """Makes the scoring of a file of this name, which `create` makes."""
    return lambda folder: (create(folder / name), ["evaluate", "--rescore", name, "--output", "e.json"])[1]


def bad_line(name: str, rule: str, *lines: Any) -> Case:
    return Case(f"rescore: {name}", rescore(*lines), [r"data error: rescore = 'h\.jsonl", rule])


FIELDS_OF_SETS = {
    "task": ["speech", ["asr"], None],
    "records": [10**12, 10**400, True, -1, "2", 2.0],
    "rejected": [0.5, math.nan],
    "rejected_file": [7, None],
}
FIELDS_OF_ROWS = {
    "loss": [math.inf, math.nan, 1e308, 10**400, "1", True],
    "supervised_tokens": [-5, 10**30, 1.5],
    "row": [-1, 1.0, "1", False],
    "id": [7],
    "set": [["asr/a"], "asr/b", ESCAPES],
    "reference": [None, 12],
    "hypothesis": [["one"]],
    "ended": [1],
    "looping": ["no"],
    "foreign": [True],
    "metadata": [["a"], {"a": [1]}, {"a": math.nan}, "b"],
    "spoken": [[1], {"units": None}],
}
RULES = {"rejected": "field 'rejected'|not finite", "records": r"field 'records'|records of asr/a", "set": r"field 'set'|belongs to no set"}

RESCORED = [
    *(bad_line(f"{field} = {value!r:.20} in a set", RULES.get(field, field), about(**{field: value}), row(0), row(1))
      for field, values in FIELDS_OF_SETS.items() for value in values),
    *(bad_line(f"{field} = {value!a:.20} in a row", RULES.get(field, field), header(), row(0), row(1, **{field: value}))
      for field, values in FIELDS_OF_ROWS.items() for value in values),
    bad_line("a set without a slash", "'words' of the task asr", header(sets={"words": about()["sets"]["asr/a"]}), row(0)),
    bad_line("a set of another task", "is not asr/NAME", header(sets={"tts/a": about()["sets"]["asr/a"]}), row(0)),
    bad_line("sets in a list", "field 'sets'", header(sets=["asr/a"]), row(0)),
    bad_line("no routing", "field 'leaked'", header(routing={}), row(0)),
    bad_line("routing in words", "field 'leaked'", header(routing={"leaked": "none"}), row(0)),
    bad_line("infinity in settings", "not finite", header(settings={"normaliser": "basic", "length_penalty": math.inf}), row(0)),
    bad_line("format of tomorrow", "has format 2", header(format=2), row(0)),
    bad_line("format in thousands of digits", "thousands of digits", '{"kind": "settings", "format": ' + "9" * 5000 + "}"),
    bad_line("nested 100,000 deep", "nested", "[" * 100_000),
    bad_line("no settings", "is not a settings line", row(0)),
    bad_line("a list", "is not a settings line", "[]"),
    bad_line("nothing", "is empty"),
    bad_line("cut off", "is not JSON", header(), row(0), '{"kind": "hypo'),
    bad_line("UTF-16", "h.jsonl", json.dumps(header()).encode("utf-16")),
    bad_line("a picture", "is not JSON", b"\x89PNG\x00\x1a" + bytes(range(256))),
    bad_line("a record twice", "holds 2 records of asr/a, 1 different", header(), row(0), row(0)),
    bad_line("a record too few", "holds 1 record of asr/a", header(), row(1)),
    bad_line("a gap", "2 were evaluated", header(), row(0), row(2)),
    bad_line("heard in a list", "field .heard.", header(), row(0), row(1, heard=["one"])),
    Case("rescore: unknown normaliser", rescore(header(settings={"normaliser": ESCAPES}), row(0), row(1)), ["normaliser", SHOWN]),
    Case("rescore: normaliser in a list", rescore(header(settings={"normaliser": ["basic"]}), row(0), row(1)), "normaliser"),
    Case("rescore: no file", from_file(f"{ESCAPES}.jsonl"), ["rescore", SHOWN, "does not exist"]),
    Case("rescore: a folder", from_file("."), "rescore = '.': does not exist, or is a folder"),
    Case("rescore: below a file", from_file("f/x", lambda path: path.parent.touch()), "rescore.*cannot be read"),
    Case("rescore: a long name", from_file("a" * 300), "rescore.*cannot be read"),
    Case("rescore: a pipe", from_file("p", os.mkfifo), "is not a regular file"),
    Case("rescore: a link to itself", from_file("p", lambda path: path.symlink_to("p")), "rescore.*cannot be read"),
    Case("rescore: credentials", from_file("foo://user:sekret@x/h.jsonl"), "foo://", never=["sekret"]),
    Case("rescore: with a model", rescore(header(), row(0), row(1), flags=["--model", "m"]), "takes neither a model"),
    Case("rescore: into itself", lambda f: [*rescore(header(), row(0), row(1))(f)[:-1], "h.jsonl"], "output"),
]  # fmt: skip


def strict(folder: Path, outcome: Outcome) -> None:
    """The result is JSON, as others read it."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((folder / "e.json").read_bytes().decode(), parse_constant=refuse)


def scored(name: str, make: Make, says: str | Sequence[str] = "records 2", **more: Any) -> Case:
    return Case(f"rescored: {name}", make, says, code=0, may_change=["e.json"], check=strict, never=["sekret"], **more)


HOSTILE_SET = {f"asr/{ESCAPES}": {"task": "asr", "records": 1, "rejected": 2, "rejected_file": SECRET}}
LONG = [("brackets", "([<" * 60_000), ("marks", "a" + "\u0300\u0316" * 60_000), ("digits", "7" * 5000), ("blanks", " " * 99_999 + "'")]
SCORED = [
    scored("escapes, markup and credentials", rescore(header(sets=HOSTILE_SET), row(0, set=f"asr/{ESCAPES}")), [SHOWN, r"s3://\*\*\*@bucket"]),
    scored("half surrogate pairs", rescore(header(), row(0, reference="\ud800", id="\udfff"), row(1))),
    scored("a version before", rescore(header(settings={"normaliser": "basic"}), row(0), row(1)), "WARNING.*h.jsonl.*version 1.*version 2"),
    scored("by nothing", rescore(header(settings={"normaliser": "none"}), row(0), row(1))),
    scored("in an ASCII locale", rescore(header(), row(0), row(1)), environment={"LC_ALL": "C", "PYTHONUTF8": "0"}),
    *(scored(f"{what} by {name}", rescore(header(), row(0, reference=text), row(1), flags=["--normaliser", name]), seconds=20.0)
      for what, text in LONG for name in ("basic", "whisper-english")),
]  # fmt: skip

START = {"kind": "start", "step": 0, "time": 1.0, "total_steps": 4, "device": "cpu", "workers": 1, "topology": {"fsdp": 1}}
TRAIN = {"kind": "train", "step": 2, "time": 2.0, "loss": 1.0, "tokens": 10, "tokens_per_second": 5.0, "step_time": 1.0, "epoch": 0.1}
SETS = {"asr/a": {"task": "asr", "records": 1, "loss": 1.0, "words": {"rate": 0.5, "interval": [0.1, 0.9], "reference": 2}}}
SAMPLE = {"set": "asr/a", "id": "x", "reference": "a", "hypothesis": "b"}
EVALUATION = {"kind": "evaluation", "step": 2, "time": 3.0, "wer": {"a": 0.5}, "sets": SETS, "samples": [SAMPLE]}


def run_folder(folder: Path, name: str = "run", lines: Sequence[Any] = (START, TRAIN, EVALUATION), **files: Any) -> Path:
    """A run's folder with these lines of metrics and files, as `config_yaml="..."`."""
    (folder / name).mkdir()
    for file, content in {"metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines), **files}.items():
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        path = folder / name / file.replace("__", "/").replace("_", ".", 1) if "." not in file else folder / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return Path(name)


def page_is_clean(folder: Path, outcome: Outcome) -> None:
    """The page is whole, and what it shows of data is text."""
    page = (folder / "o.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>"), "a page that is cut off"
    assert "<script>alert(1)" not in page and "<img src=x" not in page, "data as markup"
    assert "sekret" not in page, "credentials"
    assert "javascript:" not in page.split("</style>")[1].split("<script>")[0] or 'href="javascript:' not in page, "a link that acts"


def reported(name: str, says: str | Sequence[str] = "o.html", /, **run: Any) -> Case:
    """A report about a run that is damaged or hostile: a page all the same."""
    make: Make = lambda folder: ["report", run_folder(folder, **run), "--output", "o.html"]  # noqa: E731
    return Case(f"report: {name}", make, says, code=0, may_change=["o.html"], check=page_is_clean, never=["sekret"])


def lines(**changes: Any) -> list[Any]:
    """Lines of a run; `train`, `evaluation` and `start` change those."""
    return [{**START, **changes.get("start", {})}, {**TRAIN, **changes.get("train", {})}, {**EVALUATION, **changes.get("evaluation", {})}]


WRONG = [10**400, math.inf, "\ud800", [], {"a": [1]}, "1e9", -(10**12), None]  # where a number, a text or a mapping is expected
HYPOTHESES = "evaluations/step-000000002.hypotheses.jsonl"
SPOKEN = {**row(0), "set": "asr/a", "reference": ENDS_SCRIPT, "hypothesis": f"{ENDS_SCRIPT} {SECRET}", "id": ENDS_SCRIPT}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts", "num_experts_per_tok", "first_audio_token")
CONFUSED = [["a", {"x": 1}, 1], ["a", "b", 10**400], ["a"], 7]
ALIASES = "b0: &b0 [x, x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 30))
REPORTED = [
    *(reported(f"loss and step_time = {value!r:.12}", lines=lines(train={"loss": value, "step_time": value})) for value in WRONG),
    *(reported(f"sets = {value!r:.12}", lines=lines(evaluation={"sets": value, "wer": value, "samples": value})) for value in WRONG),
    *(reported(f"words = {value!r:.12}", lines=lines(evaluation={"sets": {"asr/a": {"words": value, "loss": value}}})) for value in WRONG),
    *(reported(f"total_steps = {value!r:.12}", lines=lines(start={"total_steps": value, "topology": value})) for value in WRONG),
    reported("markup in names and samples", lines=lines(evaluation={"sets": {f"asr/{ENDS_SCRIPT}": SETS["asr/a"]}, "samples": [SPOKEN]})),
    reported("markup in hypotheses", **{HYPOTHESES: json.dumps(SPOKEN) + "\n"}),
    *(
        reported(f"cards.json = {value!a:.30}", **{"cards.json": json.dumps(value), "speech/units.json": json.dumps(value)})
        for value in [*({"model": wrong, "data": wrong} for wrong in WRONG), {"data": {"training": [{"name": ENDS_SCRIPT}]}}]
    ),
    *(reported(f"sizes = {value!a:.12}", **{"export/config.json": json.dumps(dict.fromkeys(SIZES, value))}) for value in WRONG),
    *(
        reported(f"metadata and spoken = {value!a:.12}", **{HYPOTHESES: json.dumps({**SPOKEN, "metadata": value, "spoken": value}) + "\n"})
        for value in [*WRONG, {ENDS_SCRIPT: ENDS_SCRIPT}, {"recording": ESCAPES, "start": math.nan, "units": "1 x"}]
    ),
    reported("a pipe as a recording", **{HYPOTHESES: json.dumps({**SPOKEN, "spoken": {"recording": "/dev/zero"}}) + "\n"}),
    reported("markup in a command", lines=lines(start={"command": f"most-ray {ENDS_SCRIPT} {SECRET}", "time": 10**400})),
    Case("report: no folder of recordings", lambda f: ["report", run_folder(f), "--audio", "none", "--output", "o.html"],
         "audio = 'none': is no folder"),
    reported("a set without a slash", lines=lines(evaluation={"sets": {"a": SETS["asr/a"]}, "samples": [{**SAMPLE, "set": "a"}]})),
    reported("credentials in the configuration", **{"config.yaml": f"name: r\nval_asr_dirs: [{SECRET}]\nray_address: http://u:sekret@h\n"}),
    reported("a link in the configuration", **{"config.yaml": "name: 'javascript:alert(1)'\n"}),
    reported("files that are cut off", **{"config.yaml": b"\xff[", "summary.json": "[1", "evaluation.json": b"\0"}),
    reported("half a surrogate pair", **{"environment.json": '{"host": "\\ud800"}', "summary.json": '{"sets": "\\udfff"}'}),
    reported("deep JSON", **{"evaluation.json": "[" * 100_000, "summary.json": '{"a":' * 5000}),
    reported("steps of 10^15 and below 0", lines=lines(train={"step": 10**15}, evaluation={"step": -5})),
    reported("confusions of anything", lines=lines(evaluation={"sets": {"asr/a": {"confusions": CONFUSED}}})),
    reported("aliases of aliases", **{"config.yaml": ALIASES}),
    reported("5,000 digits and no date", **{"config.yaml": f"seed: {'9' * 5000}\nname: 2020-13-45\n"}),
    reported("a name that ends markup", name="r[b]x[∕b]"),
    Case("report: escapes in a name", lambda f: ["report", run_folder(f, ESCAPES.replace("/", "")), "--output", "o.html"], "o.html", code=0,
         may_change=["o.html"], check=page_is_clean),
    Case("report: no folder", lambda f: ["report", ESCAPES], [r"run = ", r"\\x1b\]52", "metrics.jsonl"]),
    Case("report: an empty folder", lambda f: ((f / "run").mkdir(), ["report", "run"])[1], "run = 'run': holds no metrics"),
    Case("report: a file", lambda f: ((f / "run").touch(), ["report", "run"])[1], "run"),
    Case("report: credentials", lambda f: ["report", "foo://user:sekret@x/run"], "foo://", never=["sekret"]),
    Case("report: a pipe as metrics", lambda f: ((f / "r").mkdir(), os.mkfifo(f / "r/metrics.jsonl"), ["report", "r"])[2], "regular file"),
    Case("report: a folder as metrics", lambda f: ((f / "r" / "metrics.jsonl").mkdir(parents=True), ["report", "r"])[1], "metrics"),
]  # fmt: skip


def sweep(*changed: dict[str, Any], **files: str) -> Make:
    """Makes the report about a sweep of two trials, followed by these lines."""
    space = [{"name": "learning_rate", "kind": "uniform", "low": 0.1, "high": 1.0}]
    first = {"kind": "sweep", "time": 1.0, "name": "s", "objectives": ["wer/a"], "dimensions": space, "max_trials": 2, "max_steps": 4}
    ledger: list[dict[str, Any]] = [first]
    for trial in (1, 2):
        run = {"trial": trial, "run": f"00{trial}", "time": 2.0}
        ledger.append({"kind": "trial", **run, "values": {"learning_rate": 0.1 * trial}, "settings": {}, "parent": None})
        ledger.append({"kind": "result", **run, "step": 4, "metrics": {"wer/a": 0.5}, "intervals": {}})
        ledger.append({"kind": "end", **run, "step": 4, "state": "finished", "reason": None})

    def make(folder: Path) -> Words:
        (folder / "s").mkdir()
        (folder / "s" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*ledger, *changed]))
        for name, content in files.items():
            (folder / "s" / name).write_text(content)
        return ["report", "s", "--output", "o.html"]

    return make


def swept(name: str, make: Make) -> Case:
    return Case(f"report: {name}", make, "o.html", code=0, may_change=["o.html"], check=page_is_clean, never=["sekret"])


TRIAL = {"kind": "trial", "time": 2.0, "trial": 3, "run": "003", "values": {"learning_rate": 0.3}, "settings": {}, "parent": None}
RESULT = {"kind": "result", "time": 3.0, "trial": 3, "run": "003", "step": 4, "metrics": {"wer/a": 0.1}}
WIDE = {"name": "x", "kind": "uniform", "low": 0, "high": 10**400}
SWEPT = [
    swept("trial 10^400", sweep({**TRIAL, "trial": 10**400})),
    swept("step 10^400", sweep({"kind": "result", "time": 3.0, "trial": 1, "run": "001", "step": 10**400, "metrics": {}})),
    swept("values 10^400", sweep({**TRIAL, "values": {"learning_rate": 10**400}}, RESULT)),
    swept("markup in a reason", sweep(TRIAL, {**RESULT, "kind": "end", "state": "failed", "reason": ENDS_SCRIPT + SECRET})),
    swept("objectives in words", sweep({"kind": "sweep", "time": 5.0, "name": ENDS_SCRIPT, "objectives": "wer", "dimensions": 7})),
    swept("a dimension up to 10^400", sweep({"kind": "sweep", "time": 5.0, "objectives": ["wer/a"], "dimensions": [WIDE]})),
    swept("credentials in the best", sweep(**{"best.yaml": f"# s-best-001\nval_asr_dirs: [{SECRET}]\n"})),
    Case("report: a sweep beside a run", lambda f: [*sweep()(f)[:2], run_folder(f), "--output", "o.html"], "run = 's'"),
]  # fmt: skip


def recording(folder: Path, name: str = "a.wav", rate: int = 16000, seconds: float = 0.3) -> str:
    wave = 0.1 * np.sin(np.arange(int(rate * seconds)) / 9.0)
    soundfile.write(folder / "plain.wav", wave, rate)
    (folder / "plain.wav").rename(folder / name)
    return name


def heard(*words: str | Callable[[Path], str], model: bool = True) -> Make:
    """Makes `transcribe` of these recordings (or flags)."""

    def make(folder: Path) -> Words:
        given = [each if isinstance(each, str) else each(folder) for each in words]
        own: Words = ["--model", base() / "model", "--speech", base() / "train_asr"] if model else []
        return ["transcribe", *given, *own, "--max_new_tokens", "3"]

    return make


def spoken(*words: str, model: bool = False, output: str = "o.wav") -> Make:
    """Makes `synthesize` with these flags."""

    def make(_: Path) -> Words:
        own: Words = ["--model", base() / "model"] if model else []
        return ["synthesize", *words, *own, "--speech", base() / "train_asr", "--output", output]

    return make


SPEECH = [
    Case("transcribe: no recording", heard("nowhere.wav"), "recording = 'nowhere.wav'"),
    Case("transcribe: a folder", heard(lambda f: ((f / "d").mkdir(), "d")[1]), "recording = 'd'"),
    Case("transcribe: a page", heard(lambda f: ((f / "a.wav").write_text("<html>404</html>"), "a.wav")[1]), "recording = 'a.wav'"),
    Case("transcribe: nothing", heard(lambda f: ((f / "a.wav").touch(), "a.wav")[1]), "recording = 'a.wav'"),
    Case("transcribe: too long", heard(recording, "--max_seconds", "0.1"), "recording"),
    Case("transcribe: max_seconds nan", heard(recording, "--max_seconds", "nan"), "max_seconds"),
    Case("transcribe: max_seconds -1", heard(recording, "--max_seconds", "-1"), "max_seconds"),
    Case("transcribe: 0 beams", heard(recording, "--num_beams", "0"), "num_beams"),
    Case("transcribe: no model", lambda f: ["transcribe", recording(f), "--model", "./nowhere"], "model = './nowhere': does not exist"),
    Case("transcribe: no units", lambda f: ["transcribe", recording(f), "--model", base() / "model"], "speech"),
    Case("transcribe: speech elsewhere", lambda f: ["transcribe", recording(f), "--model", base() / "model", "--speech", "x"], "units"),
    Case("transcribe: escapes in a name", heard(lambda f: recording(f, "[b]x\x1b[31m[∕b].wav"), recording), r"\[b\]x\\x1b\[31m", code=0),
    Case("transcribe: escapes in a missing name", heard(f"{ESCAPES}.wav"), SHOWN),
    Case("synthesize: an empty text", spoken("--text", " ", model=True), "text = ' ': is empty"),
    Case("synthesize: a text without a model", spoken("--text", "one"), "model: is needed"),
    Case("synthesize: bytes that are no text", spoken("--text", "a\udcffb", model=True), [r"text = 'a\\udcffb'", "UTF-8"]),
    Case("synthesize: units as a text", spoken("--text", "[Hu7][Hu8]", model=True), ["text = ", "--units"]),
    Case("synthesize: units in a text", spoken("--text", "one [Hu7]", model=True), "text = "),
    Case("synthesize: a long text", spoken("--text", "one " * 9000, model=True), ["request = 1: makes", "4,?096 positions"]),
    Case("synthesize: text and units", spoken("--text", "one", "--units", "[Hu7]"), "not allowed"),
    Case("synthesize: unit 9999", spoken("--units", "[Hu9999]"), "units = "),
    Case("synthesize: no units", spoken("--units", "seven"), "units = 'seven'"),
    Case("synthesize: escapes as units", spoken("--units", ESCAPES), ["units = ", SHOWN]),
    Case("synthesize: units of 5,000 digits", spoken("--units", f"[Hu{'7' * 5000}]"), "units = "),
    Case("synthesize: an MP3", spoken("--units", "[Hu7][Hu8]", output="o.mp3"), "output = 'o.mp3'"),
    Case("synthesize: no records", spoken("--records", "nowhere", output="o"), "nowhere"),
    Case("synthesize: limit 0", spoken("--records", "nowhere", "--limit", "0", output="o"), "limit = 0"),
    Case("synthesize: no vocoder", spoken("--units", "[Hu7]", "--vocoder", "./nowhere"), "vocoder"),
    Case("synthesize: credentials of a vocoder", spoken("--units", "[Hu7]", "--vocoder", "foo://u:sekret@h/v"), "foo://", never=["sekret"]),
]  # fmt: skip


def evaluate(*words: str | Path) -> Make:
    return lambda folder: ["evaluate", "--model", base() / "model", *words, "--output", "e.json"]


def configured(*words: str) -> Make:
    """Makes a command on a good configuration."""

    def make(folder: Path) -> Words:
        (folder / "c.yaml").write_text(run_yaml())
        return [*words[:1], "--config", "c.yaml", *words[1:]]

    return make


def named_folder(name: str) -> Make:
    """Makes token stores of records in a folder of this name."""

    def make(folder: Path) -> Words:
        (folder / name).mkdir()
        (folder / name / "records.jsonl").write_bytes((base() / "train_asr" / "records.jsonl").read_bytes())
        (folder / "c.yaml").write_text(run_yaml(train_asr_dirs=[name]))
        return ["prepare", "store", "--config", "c.yaml"]

    return make


def in_store(name: str) -> Make:
    """Makes token stores in a folder of this name."""

    def make(folder: Path) -> Words:
        (folder / "c.yaml").write_text(run_yaml(store_dir=name))
        return ["prepare", "store", "--config", "c.yaml"]

    return make


ADDRESS = "http://user:sekret@127.0.0.1:1"
WORKERS = ("--num_workers", "2", "--ray_address", ADDRESS)
CREDENTIALS = [
    Case("evaluate: no model", lambda f: ["evaluate", "--asr_dirs", "x", "--output", "e.json"], "model: is needed"),
    Case("evaluate: no records", evaluate(), "asr_dirs"),
    Case("evaluate: no such records", evaluate("--asr_dirs", ESCAPES), SHOWN),
    Case("evaluate: a vocoder alone", evaluate("--asr_dirs", "x", "--vocoder", "v"), "vocoder = 'v'"),
    Case("evaluate: GPUs of one", evaluate("--asr_dirs", "x", "--gpus", "1"), "gpus"),
    Case("evaluate: beams in words", evaluate("--asr_dirs", "x", "--num_beams", "two"), "num_beams"),
    Case("evaluate: a penalty that is none", evaluate("--asr_dirs", "x", "--length_penalty", "nan"), "length_penalty"),
    Case("evaluate: credentials of records", evaluate("--asr_dirs", "foo://user:sekret@x"), "foo://", never=["sekret"]),
    Case("evaluate: credentials of a cluster", lambda f: evaluate("--asr_dirs", base() / "test_takes", *WORKERS)(f), "ray_address",
         never=["sekret"]),
    Case("train: credentials of a cluster", configured("train", "--ray_address", ADDRESS), "ray_address", never=["sekret"]),
    Case("plan: credentials of a store", configured("plan", "--trace", "t", "--store_dir", SECRET.replace("s3", "foo")), "store_dir",
         never=["sekret"]),
    Case("submit: credentials in a flag", lambda f: ["submit", "train", "--ray_address", ADDRESS], "credentials", never=["sekret"]),
    Case("store: a folder that ends markup", named_folder("x[b] [∕b] [red]"), [r"x\[b\] \[∕b\] \[red\]"], code=0, may_change=["runs*"]),
    Case("store: a path that ends markup", configured("plan", "--trace", "a[/b]c", "--store_dir", "x[/b]y"), r"a\[/b\]c", code=0,
         may_change=["runs*", "a*", "x*"]),
    Case("store: a store that ends markup", in_store("a[/b]c"), r"a\[/b\]c", code=0, may_change=["runs*", "a*"]),
    Case("store: escapes in a folder", named_folder("x\x1b[31m\x9b"), [r"x\\x1b\[31m\\x9b"], code=0, may_change=["runs*"]),
]  # fmt: skip

CASES = [*RESCORED, *SCORED, *REPORTED, *SWEPT, *SPEECH, *CREDENTIALS]
