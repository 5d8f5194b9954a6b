"""What is refused before anything starts: more than this machine has room for, runs that have no model yet, names that are no model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bad_inputs.harness import Case
from tests.bad_inputs.inputs import FSDD, base, run_yaml
from tests.conftest import ROOT

Make = Callable[[Path], Sequence[str | Path]]
STORED = ROOT / "tests" / "fixtures" / "run-0.1" / "stored"  # a run without an export
ALONE: dict[str, str | None] = {"RAY_ADDRESS": None}
MANY = "4096"  # more than the cores of any machine that tests run on
NO_MODEL = r"is a run without an export and without a complete checkpoint: it has no model yet\."


def config(command: str, **changes: Any) -> Make:
    """A command with a good configuration in which keys are changed."""

    def make(folder: Path) -> Sequence[str]:
        validation = {"val_asr_dirs": [str(base() / "test_takes")], "eval_steps": 2}
        space = {"space": {"learning_rate": [0.1, 0.2]}} if command == "sweep" else {}
        (folder / "c.yaml").write_text(run_yaml(**validation, **space, **changes))
        return [command, "--config", "c.yaml"]

    return make


def on_a_run(*words: str, empty: bool = False) -> Make:
    """A command, with RECORDS for a directory, beside a run `r` without an export, and, if `empty`, without a checkpoint."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(STORED, folder / "r", ignore=shutil.ignore_patterns("checkpoints") if empty else None)
        return [str(base() / "test_takes") if word == "RECORDS" else word for word in words]

    return make


def plain(*words: str) -> Make:
    return lambda _: list(words)


def started(model: str) -> Make:
    """`train` from a model beside a run `r` without an export."""

    def make(folder: Path) -> Sequence[str]:
        shutil.copytree(STORED, folder / "r")
        return config("train", model_name_or_path=model, name="n")(folder)

    return make


UNITS = ("prepare", "units", "--input", str(FSDD), "--output", "u", "--fit_kmeans", "4")
EVALUATE = ("evaluate", "--asr_dirs", "RECORDS", "--output", "e.json")
CASES = [
    *(
        Case(f"{command}: {key} {value}", config(command, **{key: value}), [rf"{key} = {value}", "Use at most"], environment=ALONE)
        for command in ("train", "sweep")
        for key, value in (("num_workers", 4096), ("threads_per_worker", 4096), ("eval_workers", 4096))
    ),
    Case("train: a range that begins too high", config("train", num_workers=[4000, 4096]), "num_workers = 4000", environment=ALONE),
    Case("train: a worker of many CPUs", config("train", cpus_per_worker=4096), r"cpus_per_worker = 4096\.0", environment=ALONE),
    Case("train: GPUs for evaluations", config("train", eval_gpus=64, use_gpu=False), "eval_gpus = 64.*64 GPUs", environment=ALONE),
    Case("evaluate: workers", on_a_run(*EVALUATE, "--model", "r", "--num_workers", MANY), "num_workers = 4096", environment=ALONE),
    Case("prepare units: actors", plain(*UNITS, "--num_actors", MANY), "num_actors = 4096.*Use at most", environment=ALONE),
    Case("prepare units: GPUs", plain(*UNITS, "--gpus_per_actor", "64"), "gpus_per_actor = 64.*of this machine", environment=ALONE),
    Case(
        "train: from a run without an export",
        started("r"),
        "_path = 'r'.*most-ray export --checkpoint r --output r/export",
    ),
    Case("train: from an export that is not there yet", started("r/export"), "most-ray export --checkpoint r --output r/export"),
    Case("train: from a checkpoint", started("r/checkpoints/step-000000003"), "is a checkpoint, not a model's folder.*most-ray export"),
    Case("train: from a run, misspelt", started("./rr"), "model_name_or_path = './rr': does not exist. Did you mean './r'"),
    Case("train: from a preset, misspelt", started("tinny"), "Did you mean 'tiny'"),
    Case("train: from DeepSeek", started("hf:deepseek-ai/DeepSeek-V2-Lite"), ["no speech units", "most-ray init-model --from_deepseek"]),
    Case("train: a recogniser", config("train", recogniser="foo/bar"), "recogniser = 'foo/bar': is neither a folder"),
    Case("train: a vocoder alone", config("train", vocoder="foo/bar"), "vocoder = 'foo/bar': is of use only with a recogniser"),
    Case("evaluate: a recogniser", on_a_run(*EVALUATE, "--model", "r", "--recogniser", "foo/bar"), "recogniser = 'foo/bar'"),
    Case("evaluate: a run that has saved nothing", on_a_run(*EVALUATE, "--model", "r", empty=True), ["model = 'r'", NO_MODEL]),
    Case("transcribe: a run that has saved nothing", on_a_run("transcribe", "a.wav", "--model", "r", empty=True), NO_MODEL),
    Case("synthesize: no model", plain("synthesize", "--text", "a", "--model", "foo/bar", "--output", "a.wav"), "model = 'foo/bar'"),
    Case(
        "export: a run that has saved nothing", on_a_run("export", "--checkpoint", "r", "--output", "o", empty=True), "complete checkpoint"
    ),
    Case("export: a model", on_a_run("export", "--checkpoint", "r/init", "--output", "o"), "is a model's folder, not a checkpoint"),
    Case("prepare units: an encoder", plain(*UNITS, "--features", "hubert:foo/bar:3"), "features = 'foo/bar': is neither a folder"),
]
