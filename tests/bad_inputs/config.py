"""Configurations and numbers: YAML files, keys and flags of `plan`, `train`, `sweep`, `evaluate`, `prepare`, `transcribe`, `synthesize`."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import FSDD, base, plan, run_yaml
from tests.conftest import ROOT

Make = Callable[[Path], Sequence[str | Path]]
BOMB = (
    "[&a [x,x,x,x,x,x,x,x,x,x]" + "".join(f", &{c} [{','.join([f'*{p}'] * 10)}]" for p, c in zip("abcdefgh", "bcdefghi", strict=True)) + "]"
)


def more(text: str, *flags: str) -> Make:
    """`plan` with a good configuration and lines after it."""
    return plan(lambda: run_yaml() + text, *flags)


def changed(*flags: str, **values: Any) -> Make:
    """`plan` with a good configuration in which keys are changed, and flags."""
    return plan(lambda: run_yaml(**values), *flags)


def without(key: str, line: str) -> Make:
    """`plan` with a good configuration in which a key has another line, as text."""
    return plan(lambda: run_yaml(**{key: ...}) + line)


def dry(*flags: str, **values: Any) -> Make:
    """`train --dry_run` with a good configuration."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text(run_yaml(**values))
        return ["train", "--config", "c.yaml", "--dry_run", "cpu", *flags]

    return make


def sweep(text: str, **values: Any) -> Make:
    """`sweep` with a good configuration, with lines after it."""

    def make(folder: Path) -> Sequence[str]:
        good = {"val_asr_dirs": [str(base() / "test_takes")], "eval_steps": 2, **values}
        (folder / "c.yaml").write_text(run_yaml(**good) + text)
        return ["sweep", "--config", "c.yaml"]

    return make


def command(*words: str) -> Make:
    """A command that fails before it opens what its words name."""
    return lambda _: words


def units(*flags: str) -> Make:
    return command("prepare", "units", "--input", str(FSDD), "--output", "out", "--fit_kmeans", "8", *flags)


def _nothing_is_run(folder: Path, _: Outcome) -> None:
    assert not (folder / "pwned").exists()


STORES = ("runs", "runs/*")  # what `plan` makes before it can check what depends on records

YAML = [
    Case("a key twice", more("max_steps: 3\n"), [r"config = 'c\.yaml'", r"has the key 'max_steps' twice \(line \d+\)"]),
    Case("a key twice with other quotes", more("'max_steps': 3\n"), r"has the key 'max_steps' twice"),
    Case("keys twice in a space", sweep("space: {learning_rate: [1], learning_rate: [2]}\n"), r"has the key 'learning_rate' twice"),
    Case("a bomb of aliases in an unknown key", more(f"_a: {BOMB}\n"), r"config.*more than 20,000 values"),
    Case("a bomb of aliases in a number", more(f"seed: {BOMB}\n"), r"config.*more than 20,000 values"),
    Case("a bomb of aliases in a text", without("name", f"name: {BOMB}\n"), r"config.*more than 20,000 values"),
    Case("a bomb of aliases in folders", without("train_asr_dirs", f"train_asr_dirs: {BOMB}\n"), r"config.*more than 20,000 values"),
    Case(
        "a small nest of lists in folders",
        without("train_asr_dirs", "train_asr_dirs: [&a [x], [*a]]\n"),
        r"train_asr_dirs.*is not a string",
    ),
    Case("a list in itself", more("seed: &a [*a]\n"), r"config.*alias \*a"),
    Case("an alias of nothing", more("seed: *a\n"), r"config.*alias \*a"),
    Case("lists 3,000 deep", plan("seed: " + "[" * 3000 + "]" * 3000 + "\n"), r"config.*nested more than 100 deep"),
    Case("mappings 2,000 deep", plan("seed: " + "{a: " * 2000 + "1" + "}" * 2000 + "\n"), r"config.*nested more than 100 deep"),
    Case("an impossible date", more("seed: 2020-02-30\n"), r"seed = '2020-02-30': is not a whole number"),
    Case("a date", more("seed: 2020-02-20\n"), r"seed = '2020-02-20': is not a whole number"),
    Case("minutes", without("max_steps", "max_steps: 12:30\n"), r"max_steps = '12:30': is not a whole number"),
    Case("a set", without("name", "name: !!set {a, b}\n"), r"config.*the tag 'tag:yaml\.org,2002:set'"),
    Case("bytes", without("name", "name: !!binary aGVsbG8=\n"), r"config.*2002:binary"),
    Case("bytes that are none", more("seed: !!binary '='\n"), r"config.*2002:binary"),
    Case("an impossible timestamp", more("seed: !!timestamp 2020-02-30\n"), r"config.*2002:timestamp"),
    Case("an object of Python", more("seed: !!python/object/apply:os.system ['touch pwned']\n"), r"config.*python", check=_nothing_is_run),
    Case("a tag of one's own", more("seed: !one 1\n"), r"config.*!one"),
    Case("merged mappings", more("<<: {seed: 1}\n"), r"config.*merges mappings by `<<`"),
    Case("two documents", more("---\nseed: 1\n"), r"config.*second document"),
    Case("a list as a key", more("? [a]\n: 1\n"), r"config.*a list or a mapping as a key"),
    Case("a null as a key", more("null: 2\n"), r"null: is no known flag"),
    Case("a number as a key", more("1: 2\n"), r"1: is no known flag"),
    Case("a list of keys", plan("- a\n- b\n"), r"config.*no `key: value` lines"),
    Case("a word", plan("hello"), r"config.*no `key: value` lines"),
    Case("a tab", more("\tseed: 1\n"), r"config.*is not YAML"),
    Case("a NUL", more('seed: "\0"\n'), r"config.*is not YAML"),
    Case("UTF-16", plan(lambda: run_yaml().encode("utf-16")), r"config.*cannot be read"),
    Case("Latin-1", plan(lambda: run_yaml().encode() + b"# \xe9"), r"config.*cannot be read"),
    Case("half a character", without("name", 'name: "\\ud800"\n'), r"name.*no text"),
    Case("a file of 2 MB", more("# " + "x" * (2 << 20)), r"config.*more than 1 MiB"),
    Case("a key of 5,000 letters", more("? " + "x" * 5000 + "\n: 2\n"), r"is no known flag"),
    Case("a text of 200,000 letters", more("seed: " + "x" * 200_000 + "\n"), r"seed.*is not a whole number"),
    Case("a null in a list", without("train_asr_dirs", "train_asr_dirs: [~]\n"), r"train_asr_dirs.*is not a string"),
    Case("a mapping for a list", without("train_asr_dirs", "train_asr_dirs: {a: b}\n"), r"train_asr_dirs.*is not a list"),
    Case("a mapping for a choice", more("lr_scheduler: {linear: 1}\n"), r"lr_scheduler.*is not one of its choices"),
    Case("a mapping for a truth", more("fp16: {}\n"), r"fp16.*is neither true nor false"),
    Case("keys in a group", more("training:\n  seed: 3\n"), r"training: is no known flag"),
    Case(
        "a base with a key twice",
        lambda f: ((f / "b.yaml").write_text("seed: 1\nseed: 2\n"), sweep("base: b.yaml\n")(f))[1],
        r"key 'seed' twice",
    ),
]

_400 = "9" * 400
_5000 = "9" * 5000
NUMBERS = [
    *(
        Case(f"{name} of {len(value)} digits", more(f"{name}: {value}\n"), rf"{name} = .*(too large|at most|not finite|not a)", code=2)
        for name, value in [("seed", _400), ("seed", _5000), ("learning_rate", _400), ("learning_rate", _5000), ("eval_batch_size", _400)]
    ),
    *(
        Case(f"{name} {value}", changed(f"--{name}", value), rf"{name} = .*{says}")
        for name, value, says in [
            ("seed", str(1 << 64), "too large"),
            ("seed", "-1", "must not be negative"),
            ("max_steps", "99999999999999999999", "too large"),
            ("max_steps", "9" * 15, "at most"),
            ("max_steps", "1.5", "whole number"),
            ("max_steps", "0x10", "whole number"),
            ("max_steps", "nan", "whole number"),
            ("max_steps", _5000, "whole number"),
            ("global_batch_size", "100000000000000000000", "too large"),
            ("global_batch_size", "1000000000", "at most 1,000,000"),
            ("train_batch_size", "1e12", "at most 1,000,000"),
            ("max_seq_length", "9999999999", "at most 16,777,216"),
            ("max_seq_length", "999999999", "at most 16,777,216"),
            ("num_workers", "1000000000", "at most 100,000"),
            ("num_workers", "1,1000000000", "at most 100,000"),
            ("eval_workers", "1000000000", "at most 100,000"),
            ("threads_per_worker", "1000000000", "at most 10,000"),
            ("num_beams", "1000000000", "at most 10,000"),
            ("text_expert_indices", "99999999999999999999", "too large"),
            ("data_timeout_s", "1e300", "at most"),
            ("cpus_per_worker", "inf", "not finite"),
            ("learning_rate", "nan", "not finite"),
            ("learning_rate", "1e400", "not finite"),
            ("learning_rate", "1e12", "at most"),
            ("epochs", "inf", "not finite"),
            ("train_asr_weights", "nan", "not finite"),
            ("max_rejected_fraction", "nan", "not finite"),
            ("max_rejected_fraction", "-0.1", "must be in 0..1"),
            ("asr_tts_mix_ratio", "2", "must be in 0..1"),
            ("name", "a\udcff", "no text"),
        ]
    ),
    Case(
        "a product of sizes",
        changed("--train_batch_size", "1000000", global_batch_size=...),
        r"global_batch_size.*at most",
        may_change=STORES,
    ),
    Case("a number of workers in a dry run", dry("--num_workers", "1000000000"), r"num_workers.*at most"),
    Case("steps of a plan", changed("--steps", "1:999999999999"), r"steps.*more than 1,000,000 steps"),
]

FLAGS = [
    Case(
        "init-model: a seed of 31 digits",
        command("init-model", "--preset", "tiny", "--output", "m", "--seed", "1" + "0" * 30),
        r"seed = .*too large",
    ),
    Case(
        "init-model: a seed below 0", command("init-model", "--preset", "tiny", "--output", "m", "--seed", "-1"), r"seed = -1: must not be"
    ),
    Case(
        "init-model: a seed that is no number",
        command("init-model", "--preset", "tiny", "--output", "m", "--seed", "x"),
        r"seed = 'x': is not",
    ),
    Case("prepare units: a seed beyond 32 bits", units("--seed", str(1 << 32)), r"seed.*at most 4,294,967,295"),
    Case("prepare units: seconds nan", units("--max_seconds", "nan"), r"max_seconds.*not finite"),
    Case("prepare units: seconds 0", units("--max_seconds", "0"), r"max_seconds.*above 0"),
    Case("prepare units: 10^9 actors", units("--num_actors", "1000000000"), r"num_actors.*at most 100,000"),
    Case("prepare units: part of an actor", units("--num_actors", "0.5"), r"num_actors.*whole number"),
    Case("prepare units: GPUs inf", units("--gpus_per_actor", "inf"), r"gpus_per_actor.*not finite"),
    Case("prepare units: frames of 400 digits", units("--fit_frames", _400), r"fit_frames.*too large"),
    Case("prepare units: frames 0", units("--fit_frames", "0"), r"fit_frames.*at least 1"),
    Case("prepare units: K of 5,000 digits", units("--fit_kmeans", _5000), r"fit_kmeans.*neither a number"),
    Case("prepare units: K of 400 digits", units("--fit_kmeans", _400), r"fit_kmeans"),
    Case("prepare units: a layer of 5,000 digits", units("--features", f"hubert:x:{_5000}"), r"features.*KIND:NAME_OR_PATH:LAYER"),
    Case("prepare units: speeds nan", units("--perturb", "nan"), r"perturb"),
    Case("prepare units: speeds 1e999", units("--perturb", "1.0,1e999"), r"perturb"),
    Case(
        "prepare kmeans: k 501",
        command("prepare", "kmeans", "--input", str(FSDD), "--output", "k.npy", "--k", "501"),
        r"k = 501: must be in 2..500",
    ),
    Case("prepare kmeans: k 1e99", command("prepare", "kmeans", "--input", str(FSDD), "--output", "k.npy", "--k", "1e99"), r"k = "),
    *(
        Case(
            f"prepare vocoder: {flag} {value[:9]}",
            command("prepare", "vocoder", "--input", str(FSDD), "--records", "none", f"--{flag}", value),
            rf"{flag} = .*{says}",
        )
        for flag, value, says in [
            ("seconds", "nan", "not finite"),
            ("seconds", "inf", "not finite"),
            ("seconds", "-1", "above 0"),
            ("seed", "1" + "0" * 30, "too large"),
            ("max_seconds", "1e300", "at most"),
        ]
    ),
    Case("transcribe: seconds nan", command("transcribe", "a.wav", "--model", "m", "--max_seconds", "nan"), r"max_seconds.*not finite"),
    Case("transcribe: beams", command("transcribe", "a.wav", "--model", "m", "--num_beams", _400), r"num_beams.*too large"),
    Case("synthesize: a limit of 0", command("synthesize", "--records", "r", "--output", "o", "--limit", "0"), r"limit.*at least 1"),
    Case(
        "synthesize: a limit of 400 digits", command("synthesize", "--records", "r", "--output", "o", "--limit", _400), r"limit.*too large"
    ),
    Case(
        "synthesize: units",
        command("synthesize", "--text", "a", "--model", "m", "--output", "o.wav", "--max_new_units", "nan"),
        r"max_new_units",
    ),
    Case(
        "evaluate: a fraction nan, of stored hypotheses",
        command("evaluate", "--rescore", "h.jsonl", "--output", "o.json", "--max_rejected_fraction", "nan"),
        r"max_rejected_fraction.*not finite",
    ),
    Case(
        "evaluate: 10^9 workers",
        command("evaluate", "--model", "m", "--asr_dirs", "x", "--output", "o.json", "--num_workers", "1000000000"),
        r"num_workers.*at most",
    ),
]

SWEEPS = [
    Case("trials of 20 digits", sweep("max_trials: 99999999999999999999\nspace: {learning_rate: [1]}\n"), r"max_trials.*too large"),
    Case("10^9 trials", sweep("max_trials: 1000000000\nspace: {learning_rate: [1]}\n"), r"max_trials.*at most 100,000"),
    Case("a seed of 20 digits", sweep("search_seed: 99999999999999999999\nspace: {learning_rate: [1]}\n"), r"search_seed.*too large"),
    Case("a factor nan", sweep("reduction_factor: nan\nspace: {learning_rate: [1]}\n"), r"reduction_factor.*not finite"),
    Case("hours inf", sweep("max_hours: .inf\nspace: {learning_rate: [1]}\n"), r"max_hours"),
    Case("a range to 400 digits", sweep(f"space: {{learning_rate: {{uniform: [0.1, {_400}]}}}}\n"), r"space\.learning_rate.*two numbers"),
    Case("a range to nan", sweep("space: {learning_rate: {uniform: [0.1, nan]}}\n"), r"space\.learning_rate.*two numbers"),
    Case("a choice of 400 digits", sweep(f"space: {{train_batch_size: [1, {_400}]}}\n"), r"space\.train_batch_size.*too large"),
    Case("10^15 values", sweep("space: {train_batch_size: 1..1000000000000000}\n"), r"space\.train_batch_size.*10000 values"),
    Case("experts by date", sweep("space: {audio_experts: [2020-02-30]}\n"), r"space\.audio_experts.*number of experts"),
    Case(
        "a grid of 10^12 points",
        sweep("search: grid\nspace: {warmup_steps: 1..10000, num_beams: 1..10000, eval_batch_size: 1..10000}\n"),
        r"space.*grid of 1,000,000,000,000 points",
    ),
]


@functools.cache
def trained() -> Path:
    """A folder `runs` with a run of four steps; made in a process of its own, since cases are forks of this one."""
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-run-"))
    (folder / "c.yaml").write_text(run_yaml(output_dir=str(folder / "runs"), use_gpu=False, threads_per_worker=1))
    words = [sys.executable, "-m", "most_ray.train.run", "--config", str(folder / "c.yaml")]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    return folder / "runs"


def resumed(**values: Any) -> Make:
    """`plan` of a run that has a checkpoint, with other values."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(trained(), folder / "runs")
        (folder / "c.yaml").write_text(run_yaml(**values))
        return ["plan", "--config", "c.yaml", "--trace", "t.jsonl"]

    return make


def another_model(**values: Any) -> Make:
    """`plan` of a run that has a checkpoint, with a model of the same shapes and other values in config.json."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(base() / "model", folder / "model")
        config = json.loads((folder / "model" / "config.json").read_text())
        (folder / "model" / "config.json").write_text(json.dumps({**config, **values}))
        return resumed(model_name_or_path="model")(folder)

    return make


def train(**values: Any) -> Make:
    """`train` with a good configuration."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c.yaml").write_text(run_yaml(**values))
        return ["train", "--config", "c.yaml"]

    return make


RUNS = [
    Case(
        "an unknown mode of the environment",
        train(wandb_project="p"),
        r"WANDB_MODE = 'ofline'.*Did you mean 'offline'",
        environment={"WANDB_MODE": "ofline", "RAY_ADDRESS": None},
        may_change=STORES,
    ),
    Case(
        "groups of experts are swapped",
        resumed(text_expert_indices=[4, 5, 6, 7]),
        r"text_expert_indices.*no expert that",
    ),
    Case("a group of experts is another", resumed(audio_expert_indices=[0, 1]), r"audio_expert_indices.*no expert that"),
    Case("experts weigh otherwise", another_model(norm_topk_prob=False), r"checkpoint.*norm_topk_prob = True.*False"),
    Case("experts are scaled otherwise", another_model(routed_scaling_factor=3.0), r"checkpoint.*routed_scaling_factor"),
    Case("positions are others", another_model(rope_parameters={"rope_type": "default", "rope_theta": 5.0}), r"rope_parameters"),
    Case("norms are others", another_model(rms_norm_eps=0.1), r"checkpoint.*rms_norm_eps"),
]

CASES = [*YAML, *NUMBERS, *FLAGS, *SWEEPS, *RUNS]
