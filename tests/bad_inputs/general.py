"""The command line itself, configuration files, names, missing inputs of every command, sweeps and their spaces, doctor, submit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import base, plan, run_yaml

INIT = ("init-model", "--preset", "tiny", "--output", "o")
UNITS = ("prepare", "units", "--input", ".", "--output", "o", "--fit_kmeans", "4")
Make = Callable[[Path], Sequence[str | Path]]


def words(*arguments: str) -> Make:
    """A command whose input is its words alone."""
    return lambda folder: arguments


def in_folder(*arguments: str) -> Make:
    """A command beside an empty folder, c."""
    return lambda folder: ((folder / "c").mkdir(), arguments)[1]


def similar(folder: Path) -> Sequence[str]:
    (folder / "digits.yaml").write_text(run_yaml())
    return ("plan", "digit.yaml", "--trace", "t.jsonl")


def evaluated() -> list[str]:
    return ["evaluate", "--model", str(base() / "model"), "--output", "o.json"]


def vocoder() -> Path:
    return base() / "train_asr" / "vocoder.safetensors"


def with_config(*command: str, **changes: Any) -> Make:
    """A command with a good configuration, but for some changes, as c.yaml."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text(run_yaml(**changes))
        return [command[0], "--config", "c.yaml", *command[1:]]

    return make


def sweep(space: Any, *flags: str, **changes: Any) -> Make:
    """A sweep over a space, which never comes so far that it starts."""

    def make(folder: Path) -> Sequence[str]:
        good = yaml.safe_load(run_yaml(val_asr_dirs=[str(base() / "test_takes")], eval_steps=2))
        text = space if isinstance(space, str) else yaml.safe_dump({"space": space})
        (folder / "c.yaml").write_text(yaml.safe_dump({**good, "max_trials": 1, **changes}) + text)
        return ["sweep", "--config", "c.yaml", *flags]

    return make


def file_named(name: bytes, content: Callable[[], bytes]) -> Make:
    """`plan` with a configuration in a file of this name."""

    def make(folder: Path) -> Sequence[str]:
        text = name.decode("utf-8", "surrogateescape")
        (folder / text).write_bytes(content())
        return ["plan", "--config", text, "--trace", "t.jsonl", "--steps", "1:2"]

    return make


def traced(folder: Path, outcome: Outcome) -> None:
    assert (folder / "t.jsonl").exists(), outcome
    lines = (folder / "t.jsonl").read_text().splitlines()
    assert len(lines) == 3, lines


def submitted(*command: str) -> Make:
    """`submit` of a command to an address at which nothing answers."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text(run_yaml())
        return ["submit", "--address", "http://127.0.0.1:9", *command]

    return make


WORDS = [
    Case("no command", words(), "usage: most-ray COMMAND", code=0),
    Case("a misspelt command", words("trian"), "train"),
    Case("an empty command", words(""), "command = .*is no command"),
    Case("a command with an escape", words("\x1b]0;x\x07train"), "command = .*is no command"),
    Case("a command of 100,000 characters", words("x" * 100_000), "command = .*is no command"),
    Case("a command that is half a surrogate pair", words("\udcff"), "command = .*is no command"),
    Case("an abbreviated command", words("trai"), "train"),
    Case("a configuration without a command", words("c.yaml"), "most-ray train c.yaml"),
    Case("a word after --help that is not all", words("train", "--help", "everything"), "help = 'everything': is not all"),
    Case("a configuration twice", words("train", "c.yaml", "--config", "d.yaml"), "'c.yaml': belongs to no flag, and --config = 'd.yaml'"),
    Case("two configurations", words("plan", "c.yaml", "d.yaml", "--trace", "t"), "'d.yaml': belongs to no flag"),
    Case("a flag without its dashes", words("train", "num-workers"), "Did you mean --num_workers"),
    Case("a configuration of a similar name", similar, "Did you mean 'digits.yaml'"),
    Case(
        "a configuration after a flag whose value may be left out",
        words("train", "--dry_run", "c.yaml"),
        "config = 'c.yaml': cannot be read",
    ),
    Case("a sweep without its file", words("sweep"), "config: is needed"),
    Case("a job's configuration that does not exist", words("submit", "train", "c.yaml"), "config = 'c.yaml': cannot be read"),
    Case("a job that prepares nothing", words("submit", "prepare"), "command = 'prepare': needs the word"),
    Case("a flag before the command", words("--config", "c.yaml", "train"), "config"),
    Case("prepare without what", words("prepare"), "usage: most-ray prepare WHAT", code=0),
    Case("prepare with a misspelt what", words("prepare", "unit"), "units"),
    Case("a misspelt flag", words("train", "--learning_rat", "1"), "learning_rate"),
    Case("a flag with dashes", words("train", "--learning-rate", "1"), "learning_rate"),
    Case("an abbreviated flag", words("train", "--learning", "1"), "learning"),
    Case("an abbreviated flag of prepare", words("prepare", "units", "--inp", "x", "--input", "x", "--output", "o"), "inp"),
    Case("a flag without its value", words("train", "--max_steps"), "max_steps"),
    Case("a flag whose value is a flag", words("train", "--max_steps", "--seed", "1"), "max_steps"),
    Case("a list without elements", words("train", "--train_asr_dirs"), "train_asr_dirs"),
    Case("a single dash", words("train", "-x"), "-x"),
    Case("an argument of no flag", words("train", "c.yaml"), "c.yaml"),
    Case("an argument behind two dashes", words("train", "--", "c.yaml"), "c.yaml"),
    Case("a switch with a value", words("prepare", "units", "--input", "x", "--output", "o", "--keep_repeats=no"), "keep_repeats"),
    Case("a truth that is none", words("train", "--bf16", "maybe"), "bf16"),
    Case("a list given twice", words("train", "--train_asr_dirs", "a", "--train_asr_dirs", "b"), "train_asr_dirs.*twice"),
    Case("validation sets given twice", words("train", "--val_asr_dirs", "a", "--val_asr_dirs", "b"), "val_asr_dirs.*twice"),
    Case(
        "directories of evaluate given twice", words("evaluate", "--asr_dirs", "a", "--asr_dirs", "b", "--output", "o"), "asr_dirs.*twice"
    ),
    Case(
        "conditions given twice",
        words("prepare", "units", "--input", "x", "--output", "o", "--where", "a=1", "--where", "b=1"),
        "where.*twice",
    ),
    Case("records given twice", words("init-model", "--records", "a", "--records", "b", "--output", "o"), "records.*twice"),
    Case(
        "a number given twice",
        plan(run_yaml, "--seed", "1", "--seed", "2"),
        "steps 1 to 3",
        code=0,
        may_change=["t.jsonl", "runs*"],
        check=traced,
    ),
]

CONFIGURATIONS = [
    *(Case(f"{command} of a missing file", words(*command.split(), "--config", "none.yaml"), ["config", "none.yaml"]) for command in
      ("train", "sweep", "doctor", "prepare store", "prepare tts", "plan --trace t.jsonl")),
    *(Case(f"{command} of a folder", words(*command.split(), "--config", "."), "config") for command in
      ("train", "sweep", "doctor", "prepare store", "prepare tts", "plan --trace t.jsonl")),
    Case("an empty name", words("plan", "--config", "", "--trace", "t.jsonl"), "config"),
    Case("a name with NUL", words("train", "--config", "a\0b"), "config"),
    Case("a name of 5,000 characters", words("train", "--config", "x" * 5000), "config"),
    Case("a file that links to itself", lambda f: ((f / "c.yaml").symlink_to("c.yaml"), ["train", "--config", "c.yaml"])[1], "config"),
    Case("a scheme that nobody knows", words("train", "--config", "foo://x/c.yaml"), "config"),
    Case("UTF-16", plan(lambda: run_yaml().encode("utf-16")), "config"),
    Case("Latin-1", plan(lambda: run_yaml().encode() + b"# caf\xe9\n"), "config"),
    Case("a byte order mark", plan(lambda: b"\xef\xbb\xbf" + run_yaml().encode()), code=0, may_change=["t.jsonl", "runs*"], check=traced),
    Case("line ends of Windows", plan(lambda: run_yaml().replace("\n", "\r\n")), code=0, may_change=["t.jsonl", "runs*"], check=traced),
    Case("a name that is not UTF-8", file_named(b"c\xff.yaml", lambda: b"seed: x\n"), "seed"),
    Case("a missing name that is not UTF-8", words("train", "--config", "c\udcff.yaml"), "config"),
    Case("a name with a line end", file_named(b"c\nd.yaml", lambda: b"- a\n"), r"config = 'c\\nd.yaml'"),
    Case("a name with markup", file_named(b"[b]c[red].yaml", lambda: b"- a\n"), r"\[b\]c\[red\]\.yaml"),
    Case("nothing in the file", plan(""), "train_asr_dirs|directories|records"),
    Case("a file that is empty, of a sweep", lambda folder: ((folder / "c.yaml").touch(), ["sweep", "--config", "c.yaml"])[1], "space"),
    Case("a list in the file", plan("- a\n"), "config"),
    Case("JSON instead of YAML, broken", plan('{"seed": 1,, }'), "config"),
]  # fmt: skip

NAMES = {
    "a slash": "a/b",
    "two dots": "..",
    "a dot": ".",
    "nothing": "",
    "NUL": "a\0b",
    "300 characters": "x" * 300,
    "200 characters of 2 bytes": "é" * 200,
    "a slash at the end": "a/",
    "half a surrogate pair": "\udcff",
    "a line end": "a\nb",
    "an escape": "\x1b[31mred",
    "a mark that turns the direction around": "\u202egnp.exe",
}
GOOD_NAMES = {"markup": "a[red]b[b]", "an emoji": "\U0001f600", "quotes and spaces": "a 'b' \"c\"", "Chinese": "数据"}
NAMED = [
    *(Case(f"a run's name with {what}", plan(run_yaml, f"--name={name}"), "name", never=["\x1b"]) for what, name in NAMES.items()),
    *(
        Case(f"a run's name with {what}", plan(run_yaml, f"--name={name}"), code=0, may_change=["t.jsonl", "runs*"], check=traced)
        for what, name in GOOD_NAMES.items()
    ),
    Case("a sweep's name with a slash", sweep({"seed": "1..3"}, "--name", "a/b"), "name"),
    Case("a sweep's name of 300 characters", sweep({"seed": "1..3"}, "--name", "x" * 300), "name"),
]

STEPS = [
    *(
        Case(f"steps {text!r}", plan(run_yaml, f"--steps={text}"), "steps")
        for text in ("5:1", "a:b", "", "1", "1:", ":1", "-1:3", "1:2:3", "0:0", "1.5:2", "1e1:2e1", "٣:٤", "1 : 3", "9" * 5000 + ":1")
    ),
    Case("steps to a trillion", plan(run_yaml, "--steps", "1:999999999999"), "steps"),
]

MISSING = [
    Case("init-model without a start", words("init-model", "--output", "o"), "preset"),
    Case("init-model with two starts", words("init-model", "--preset", "tiny", "--from_deepseek", "x", "--output", "o"), "preset"),
    Case("an unknown preset", lambda f: ["init-model", "--preset", "tini", "--records", base() / "train_asr", "--output", "o"], "preset"),
    Case("init-model without records", words("init-model", "--preset", "tiny", "--output", "o"), "records"),
    Case("init-model of missing records", words(*INIT, "--records", "none"), ["records", "none"]),
    Case("init-model without an output", words("init-model", "--preset", "tiny"), "output"),
    Case("train on nothing", words("train"), "train_asr_dirs|directories"),
    Case("train on missing records", with_config("train", train_asr_dirs=["none"]), ["train_asr_dirs", "none"]),
    Case("train from missing recordings", words("train", "--from_audio", "none"), "from_audio"),
    Case("train with a corpus of nothing", words("train", "--corpus", "an4"), "corpus"),
    Case("plan without a trace", words("plan"), "trace"),
    Case("plan of missing records", plan(lambda: run_yaml(train_asr_dirs=["none"])), ["train_asr_dirs", "none"]),
    Case("epochs of nobody, beside max_steps", plan(run_yaml, "--epochs_of", "nobody"), "epochs_of", may_change=["runs*"]),
    Case("a model at a missing URI", plan(run_yaml, "--model_name_or_path", "http://127.0.0.1:1/x"), "model_name", may_change=["runs*"]),
    Case("a set's name with an escape", words(*UNITS, "--name", "\x1b[1m"), "name"),
    Case("a set's name that is no text", words(*UNITS, "--name", "\udcff"), "name"),
    *(
        Case(f"a URI as {flag} of {command}", words(*command.split(), flag, "s3://u:sekret@b/x"), flag[2:], never=["sekret"])
        for command, flag in (
            ("prepare units --output o --fit_kmeans 4", "--input"),
            ("prepare units --input . --output o", "--kmeans"),
            ("prepare kmeans --output k.npy", "--input"),
            ("prepare vocoder --input .", "--records"),
            ("prepare tts --output_dir o", "--input_dir"),
            ("train", "--from_audio"),
            ("export --checkpoint x", "--output"),
        )
    ),
    Case("records of init-model at no place", words(*INIT, "--records", "foo://u:sekret@b/x"), "foo://", never=["sekret"]),
    Case("a missing checkpoint to start from", plan(run_yaml, "--resume_from_checkpoint", "./nowhere"), "checkpoint.*nowhere"),
    Case("an empty checkpoint to start from", plan(run_yaml, "--resume_from_checkpoint", "."), "checkpoint"),
    Case("an output over http", plan(run_yaml, "--output_dir", "http://127.0.0.1:9/x"), ["output_dir", "http://"]),
    Case("a store over http", plan(run_yaml, "--store_dir", "http://127.0.0.1:9/x"), ["store_dir", "http://"]),
    Case("report without a run", words("report"), "RUN|runs"),
    Case("report of a missing run", words("report", "none"), "none"),
    Case("report of a file", lambda f: ((f / "x").touch(), ["report", "x"])[1], "x"),
    Case("report of an empty folder", in_folder("report", "c"), "c"),
    Case("export without a checkpoint", words("export", "--output", "o"), "checkpoint"),
    Case("export of a missing checkpoint", words("export", "--checkpoint", "none", "--output", "o"), "none"),
    Case("export of an empty folder", in_folder("export", "--checkpoint", "c", "--output", "o"), "checkpoint"),
    Case("sweep without a configuration", words("sweep"), "config"),
    Case("evaluate nothing", words("evaluate", "--output", "o.json"), "model|rescore"),
    Case("evaluate a missing model", words("evaluate", "--model", "./none", "--asr_dirs", "none", "--output", "o.json"), "model"),
    *(
        Case(f"evaluate on missing {flag}", lambda f, flag=flag: [*evaluated(), f"--{flag}", "none"], [flag, "none"])
        for flag in ("asr_dirs", "tts_dirs", "text_dirs")
    ),
    Case("evaluate on nothing", lambda f: ["evaluate", "--model", base() / "model", "--output", "o.json"], "asr_dirs|directories"),
    Case("rescore a missing file", words("evaluate", "--rescore", "none", "--output", "o.json"), "rescore|none"),
    Case("transcribe nothing", words("transcribe", "--model", "m"), "RECORDING"),
    Case("transcribe without a model", words("transcribe", "x.wav"), "model"),
    Case("transcribe by a missing model", words("transcribe", "--model", "./none", "x.wav"), "model"),
    Case("synthesize nothing", words("synthesize", "--output", "o.wav"), "--text|text"),
    Case("synthesize a text without a model", words("synthesize", "--text", "x", "--output", "o.wav"), "model"),
    Case("synthesize two things", words("synthesize", "--text", "x", "--units", "[Hu1]", "--output", "o.wav"), "units"),
    Case("synthesize no records", lambda f: ["synthesize", "--records", "no", "--vocoder", vocoder(), "--output", "o"], ["records", "no"]),
    Case("units without an input", words("prepare", "units", "--output", "o"), "input"),
    Case("units of a missing folder", words("prepare", "units", "--input", "none", "--output", "o", "--fit_kmeans", "4"), "input"),
    Case("units without centroids", in_folder("prepare", "units", "--input", "c", "--output", "o"), "kmeans"),
    Case("kmeans of a missing folder", words("prepare", "kmeans", "--input", "none", "--output", "k.npy"), "input"),
    Case("a vocoder of missing records", in_folder("prepare", "vocoder", "--input", "c", "--records", "none"), "records"),
    Case("tts of nothing", words("prepare", "tts"), "input_dir"),
    Case("tts of a missing folder", words("prepare", "tts", "--input_dir", "none", "--output_dir", "o"), "none"),
    Case("a store of missing records", with_config("prepare", train_asr_dirs=["none"]), "WHAT|config"),
    Case("a store of nothing", words("prepare", "store", "--output_dir", "o"), "train_asr_dirs|directories"),
    Case("a dry run for an unknown device", with_config("train", "--dry_run", "quantum"), ["dry_run", "quantum"]),
    Case("a dry run for a device of 5,000 characters", with_config("train", "--dry_run", "x" * 5000), "dry_run"),
    Case("a dry run for an escape", with_config("train", "--dry_run", "\x1b[31mH100"), "dry_run"),
    Case("a dry run from recordings", words("train", "--from_audio", ".", "--dry_run", "cpu"), "dry_run"),
]  # fmt: skip

SPACES = [
    Case("no space", sweep(""), "space"),
    Case("an empty space", sweep({}), "space"),
    Case("a space that is a list", sweep([1, 2]), "space"),
    Case("a space of an unknown key", sweep({"learnin_rate": [1, 2]}), "learning_rate"),
    Case("a space of a nested key", sweep({"optimizer": {"learning_rate": [1, 2]}}), "space.optimizer"),
    Case("a space of an unknown kind", sweep({"learning_rate": {"quniform": [0, 1, 0.1]}}), "space.learning_rate"),
    Case("a space in W&B's words", sweep({"learning_rate": {"min": 1e-4, "max": 1e-2}}), "space.learning_rate"),
    Case("a range upside down", sweep({"learning_rate": {"uniform": [1, 0.1]}}), "space.learning_rate"),
    Case("a logarithm from 0", sweep({"learning_rate": {"loguniform": [0, 1]}}), "space.learning_rate"),
    Case("a range of texts", sweep({"learning_rate": {"uniform": ["a", "b"]}}), "space.learning_rate"),
    Case("a range of one number", sweep({"learning_rate": {"uniform": [1]}}), "space.learning_rate"),
    Case("a range to infinity", sweep("space: {learning_rate: {uniform: [0.1, .inf]}}\n"), "space.learning_rate"),
    Case("a range from no number", sweep("space: {learning_rate: {uniform: [.nan, 1]}}\n"), "space.learning_rate"),
    Case("a range of 400 digits", sweep("space: {seed: {randint: [1, " + "9" * 400 + "]}}\n"), "seed|config"),
    Case("fractions of a whole number", sweep({"train_batch_size": {"uniform": [1, 8]}}), "space.train_batch_size"),
    Case("a trillion whole numbers", sweep({"train_batch_size": "1..1000000000000"}), "space.train_batch_size"),
    Case("a value twice", sweep({"learning_rate": {"grid": [0.001, "1e-3"]}}), "space.learning_rate"),
    Case("a choice of nothing", sweep({"learning_rate": {"choice": []}}), "space.learning_rate"),
    Case("a choice of none of the choices", sweep({"lr_scheduler": ["linear", "polynomial"]}), "space.lr_scheduler"),
    Case("a negative learning rate", sweep({"learning_rate": {"uniform": [-1, 1]}}), "space.learning_rate"),
    Case("a choice of a negative learning rate", sweep({"learning_rate": [-1, 1]}), "space.learning_rate"),
    Case("a space over what trials share", sweep({"output_dir": ["a", "b"]}), "space.output_dir"),
    Case("no audio expert", sweep({"audio_experts": [0, 1]}), "space.audio_experts"),
    Case("an unknown split of experts", sweep({"expert_split": ["random"]}), "space.expert_split"),
    Case("experts that are set twice", sweep({"audio_experts": [1, 2], "text_expert_indices": [[0], [1]]}), "space"),
    Case("a grid without an end", sweep({"learning_rate": {"uniform": [0.1, 1]}}, "--search", "grid"), "space.learning_rate"),
    Case("a search that is none", sweep({"seed": "1..3"}, "--search", "magic"), "search"),
    Case("an objective that is none", sweep({"seed": "1..3"}, "--objectives", "luck"), "objectives"),
    Case("no trial", sweep({"seed": "1..3"}, "--max_trials", "0"), "max_trials"),
    Case("no number of hours", sweep({"seed": "1..3"}, "--max_hours", "nan"), "max_hours"),
    Case("no validation set", sweep({"seed": "1..3"}, val_asr_dirs=[]), "val_asr_dirs"),
    Case("a base that is missing", sweep({"seed": "1..3"}, "--base", "none.yaml"), "none.yaml"),
    Case("a base that is its own", sweep({"seed": "1..3"}, "--base", "c.yaml"), "max_trials"),
]  # fmt: skip

CLUSTERS = [
    Case("submit nothing", words("submit"), "command"),
    Case("submit what cannot be a job", submitted("plan", "--config", "c.yaml", "--trace", "t"), "plan"),
    Case("submit a misspelt command", submitted("trian", "--config", "c.yaml"), "train"),
    Case("submit a misspelt flag", submitted("train", "--config", "c.yaml", "--sed", "1"), "seed"),
    Case("submit a missing configuration", submitted("train", "--config", "none.yaml"), "none.yaml"),
    Case("submit a configuration of elsewhere", submitted("train", "--config", "/etc/hostname"), "config"),
    Case("submit from a missing folder", submitted("train", "--config", "c.yaml", "--working_dir", "none"), "working_dir|config"),
    Case("submit from a file", submitted("train", "--config", "c.yaml", "--working_dir", "c.yaml"), "working_dir|config"),
    Case(
        "submit credentials", submitted("train", "--config", "c.yaml", "--store_dir", "s3://u:sekret@b/x"), "credentials", never=["sekret"]
    ),
    Case("submit to nobody", submitted("train", "--config", "c.yaml"), "address"),
    Case("submit to a port that is none", words("submit", "--address", "http://127.0.0.1:99999", "doctor"), "address"),
    Case("submit to a scheme that is none", words("submit", "--address", "foo://x", "doctor"), "address"),
    Case("submit to an escape", words("submit", "--address", "\x1b[31mx", "doctor"), "address"),
    Case("submit to credentials", words("submit", "--address", "http://u:sekret@127.0.0.1:9", "doctor"), "address", never=["sekret"]),
    Case("stop and start", words("submit", "--stop", "job", "train"), "stop"),
    Case("stop at nobody", words("submit", "--address", "http://127.0.0.1:9", "--stop", "job"), "address"),
    Case("doctor of a wrong flag", words("doctor", "--sed", "1"), "seed"),
    Case("doctor of a wrong value", words("doctor", "--seed", "x"), "seed"),
]

ENVIRONMENT = [
    *(
        Case(
            f"MOST_RAY_CACHE_GB={text[:20]!r}",
            plan(run_yaml, "--store_dir", "memory://x/store"),
            "MOST_RAY_CACHE_GB",
            environment={"MOST_RAY_CACHE_GB": text},
            may_change=["runs*"],
        )
        for text in ("many", "nan", "-1", "0", "9" * 400)
    ),
    Case(
        "a cache in a file",
        plan(run_yaml, "--store_dir", "memory://x/store"),
        "MOST_RAY_CACHE_DIR",
        environment={"MOST_RAY_CACHE_DIR": "c.yaml"},
        may_change=["runs*"],
    ),
    Case("an address of colons", words("submit", "doctor"), "address", environment={"RAY_ADDRESS": "::::"}),
    *(
        Case(
            f"no job's environment: {text[:10]}",
            plan(run_yaml),
            code=0,
            may_change=["t.jsonl", "runs*"],
            check=traced,
            environment=variables,
        )
        for text in ("[" * 5000, "[1]", "{", "null")
        for variables in ({"RAY_JOB_CONFIG_JSON_ENV_VAR": text},)
    ),
]

CASES = [*ENVIRONMENT, *WORDS, *CONFIGURATIONS, *NAMED, *STEPS, *MISSING, *SPACES, *CLUSTERS]
