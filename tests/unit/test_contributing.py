"""The changes that CONTRIBUTING.md shows step by step: each applies to the repository as it is, touches three files at most, passes the
linter, and does what its text says. Each is tried in a fresh process on a copy of the package. And the hooks and the hosted workflow run
what `make` runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import yaml

from tests.conftest import ROOT, tool
from tests.support.audio import tone, tones
from tests.support.builders import asr, tts, write_records
from tests.support.documents import blocks, commands
from tests.support.fresh import FreshPython

PAGE = ROOT / "CONTRIBUTING.md"
MOST_FILES = 3  # of a change, tests and generated pages apart


@dataclass(frozen=True)
class Change:
    """A change of the page: its patch, and the blocks after it."""

    patch: str
    commands: list[list[str]]

    @property
    def files(self) -> list[str]:
        return re.findall(r"^\+\+\+ b/(\S+)$", self.patch, re.MULTILINE)


def changes() -> dict[str, Change]:
    """By heading."""
    found: dict[str, Change] = {}
    for block in blocks(PAGE):
        name = block.heading
        if block.language == "diff":
            assert name not in found, f"{name} has two patches"
            found[name] = Change(block.text, [])
        elif name in found and block.language == "sh":
            found[name].commands.extend(commands(block.text))
    return found


# What is done with each change, in a folder that has data/asr, data/tts (records) and recordings (a corpus of FLACs).
TRAIN = """
import json
from most_ray.config import config_from
from most_ray.train.run import train

def lines_of_a_run(**values):
    values |= {"train_asr_dirs": ["data/asr"], "train_tts_dirs": ["data/tts"], "max_steps": 4, "logging_steps": 2, "use_gpu": False}
    summary = train(config_from({**values, "global_batch_size": 4, "threads_per_worker": 1, "learning_rate": 1e-2}))
    assert summary["step"] == 4
    return [json.loads(line) for line in open("runs/run/metrics.jsonl")]
"""
CORPUS = """
from pathlib import Path
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.corpora.corpus import CorpusOptions, Unusable, guess_layout, read_corpus

root = Path("TEDLIUM_release-3")
assert guess_layout(root) == "tedlium"
first, second, third = read_corpus(CorpusOptions("tedlium", root, splits=("dev",)))
assert (first.id, first.text) == ("tedlium_Talk_500", "so i tried <unk> it")
assert first.columns == {"speaker": "Speaker_1", "split": "dev"}
assert (first.start, first.duration, second.start) == (0.5, 0.75, 1.5)
assert isinstance(third, Unusable) and "is not of the form TALK CHANNEL" in third.reason and third.index == 4
wave = load_audio(first.path, 16000, start=first.start, duration=first.duration)
assert len(wave) == 12000
try:
    list(read_corpus(CorpusOptions("tedlium", Path("recordings"))))
except ValueError as error:
    assert "holds no SPLIT/stm. Give the folder of the release" in str(error)
"""
FEATURES = """
import gzip, json
from pathlib import Path
import numpy as np
from most_ray.cli import main
from most_ray.records.record import parse_units
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.units.assets import open_assets

words = "prepare units --input recordings --features logmel --fit_kmeans 8 --output units --num_actors 0 --keep_repeats".split()
assert main(words) == 0
records = [json.loads(line) for line in gzip.open("units/records.jsonl.gz", "rt")]
assert len(records) == 8 and "logmel" in json.dumps(json.load(open("units/units.json"))["identity"])
assets = open_assets("units")
waves = [load_audio(Path(f"recordings/{index}.flac"), 16000) for index in range(8)]
frames = assets.extractor(waves)
assert [len(each.values) for each in frames] == [(len(wave) + 160) // 320 for wave in waves] and frames[0].values.shape[1] == 40
assert np.array_equal(frames[3].values, assets.extractor(waves[3:4])[0].values)
assert len(set(parse_units(records[0]["input"]).tolist())) > 1
assert main([*words, "--features", "logmell"]) == 2
"""
METRIC = """
from most_ray.metrics.rows import row_of
from most_ray.metrics.schema import check_line

start, *lines = lines_of_a_run()
trained = [line for line in lines if line["kind"] == "train"]
assert [line["step"] for line in trained] == [2, 4] and not [problem for line in trained for problem in check_line(line)]
for line in trained:
    assert line["grad_norm_max"] >= line["grad_norm"] > 0
    assert row_of(line, start)["train/grad_norm_max"] == line["grad_norm_max"]
assert any(line["grad_norm_max"] > line["grad_norm"] for line in trained)
assert "fig-gradient-norm-max" in open("runs/run/report.html").read()
"""
KEY = """
import torch
from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.model.configuration import MostConfig
from most_ray.optim.train_state import make_state

def rates(**values):
    model = torch.nn.Linear(2, 2)
    model.config = MostConfig(num_experts_per_tok=2, aux_loss_alpha=0.0)
    state = make_state(model, config_from({"learning_rate": 0.5, **values}), total_steps=10)
    return [state.scheduler.lr_lambdas[0](step) for step in range(11)]

assert rates()[10] == 0 and rates(min_lr_ratio=0.0) == rates()
assert rates(min_lr_ratio=0.25)[0] == 1 and abs(rates(min_lr_ratio=0.25)[10] - 0.25) < 1e-9
for values, message in (
    ({"min_lr_ratio": 1.5}, "min_lr_ratio = 1.5: must be in 0..1."),
    ({"min_lr_ratio": "low"}, "min_lr_ratio = 'low': is not a number."),
    ({"min_lr_ratio": 0.1, "lr_scheduler": "linear"}, "min_lr_ratio = 0.1: is of lr_scheduler: cosine alone."),
    ({"min_lr_ration": 0.1}, "Did you mean 'min_lr_ratio'?"),
):
    try:
        config_from(values)
    except ConfigError as error:
        assert message in str(error), error
    else:
        raise AssertionError(values)
"""
TRACKER = """
import csv
from most_ray.metrics.rows import row_of
from most_ray.trackers.csv_file import CsvFile

lines = lines_of_a_run(csv=True)
trained = [line for line in lines if line["kind"] == "train"]
rows = list(csv.DictReader(open("runs/run/metrics.csv")))
assert [int(row["train/step"]) for row in rows] == [2, 4]
for row, line in zip(rows, trained, strict=True):
    for name, value in row_of(line, lines[0]).items():
        assert name not in row or float(row[name]) == value, name
assert {"train/loss", "train/grad_norm", "experts/leaked"} < rows[0].keys()
again = CsvFile("runs/run")  # a start after a kill: the file has lost a row
open("runs/run/metrics.csv", "w").close()
again.begin(2, lines[:2])
again.log(trained[1])
again.close()
assert list(csv.DictReader(open("runs/run/metrics.csv"))) == rows
"""
KERNEL = """
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from most_ray.model.configuration import MostConfig
from most_ray.model.modeling import MostForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
sizes |= dict(n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=8)
torch.manual_seed(0)
model = MostForCausalLM(MostConfig(**sizes, v_head_dim=16, first_audio_token=40, last_audio_token=63))
model.save_pretrained("model")
loaded = MostForCausalLM.from_pretrained("model", experts_implementation="looped")
assert (loaded.config._experts_implementation, model.config._experts_implementation) == ("looped", "most_ray")
tokens = torch.randint(0, 40, (1, 20))
with torch.no_grad():
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
experts = model.model.layers[1].mlp.experts
index = torch.stack([torch.randperm(9)[:2] for _ in range(50)])  # expert 8 is on another rank
answers = []
for name in ("looped", "most_ray"):
    model.zero_grad()
    x, weights = torch.ones(50, 32).cumsum(0).div(50).requires_grad_(), torch.full((50, 2), 0.5, requires_grad=True)
    output = ALL_EXPERTS_FUNCTIONS[name](experts, x, index, weights)
    output.square().sum().backward()
    answers.append([output, x.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad])
for found, expected in zip(*answers, strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert torch.equal(ALL_EXPERTS_FUNCTIONS["looped"](experts, x, index, weights), answers[0][0])  # float32, whatever the autocast
"""
TRIALS = {
    "A corpus": CORPUS,
    "Features or a speech encoder": FEATURES,
    "A metric": TRAIN + METRIC,
    "A configuration key": KEY,
    "A tracker": TRAIN + TRACKER,
    "An expert kernel": KERNEL,
}
# The changed package in front, and the commands of the text parsed by it.
BEFORE = """
import sys
sys.path.insert(0, sys.argv[1])
import os
os.chdir(sys.argv[1])
import most_ray
assert most_ray.__file__.startswith(sys.argv[1]), most_ray.__file__
import shlex
from most_ray.cli import build_parser
for command in sys.argv[2:]:
    build_parser().parse_args(shlex.split(command))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, with some records and recordings beside it."""
    shutil.copytree(ROOT / "most_ray", tmp_path / "most_ray")
    write_records(tmp_path / "data" / "asr", [asr(index) for index in range(12)])
    write_records(tmp_path / "data" / "tts", [tts(index) for index in range(12)])
    return tmp_path


def tedlium(root: Path) -> None:
    """A talk of two seconds in TED-LIUM's layout."""
    folder = root / "TEDLIUM_release-3" / "legacy" / "dev"
    for name in ("stm", "sph"):
        (folder / name).mkdir(parents=True)
    soundfile.write(folder / "sph" / "Talk.sph", tone(2.5, 300, 16000), 16000, format="NIST", subtype="PCM_16")
    (folder / "stm" / "Talk.stm").write_text(
        "Talk 1 Speaker_1 0.5 1.25 <o,f0,female> so i tried <unk> it\n"
        "Talk 1 inter_segment_gap 1.25 1.5 <o,,unknown> ignore_time_segment_in_scoring\n"
        "Talk 1 Speaker_1 1.5 2.25 <o,f0,female> and it worked\n"
        "Talk 1 Speaker_1 2.25 2.0 <o,f0,female> backwards\n"
    )


def test_the_page_shows_these_changes() -> None:
    assert list(changes()) == list(TRIALS)


@pytest.mark.parametrize("name", TRIALS)
def test_a_change_of_the_page_works(name: str, copy: Path, fresh_python: FreshPython) -> None:
    change = changes()[name]
    assert 1 <= len(change.files) <= MOST_FILES
    for file in change.files:
        if not file.startswith("most_ray/"):
            (copy / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    applied = subprocess.run([tool("git"), "apply", "-"], cwd=copy, input=change.patch, text=True, capture_output=True)
    assert applied.returncode == 0, f"{name} in CONTRIBUTING.md does not apply: {applied.stderr}"
    python = [file for file in change.files if file.endswith(".py")]
    for words in (["check"], ["format", "--check"]):
        command = [tool("ruff"), *words, "--no-cache", "--config", str(ROOT / "pyproject.toml"), *python]
        linted = subprocess.run(command, cwd=copy, text=True, capture_output=True)
        assert linted.returncode == 0, linted.stdout + linted.stderr
    tedlium(copy)
    tones(copy / "recordings")
    taken = [shlex.join(words[1:]) for words in change.commands]
    done = fresh_python.run(BEFORE + TRIALS[name], str(copy), *taken)
    assert done.returncode == 0, done.stderr[-3000:]


def recipe(target: str) -> str:
    """The commands of a target of the Makefile."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"make has no {target}"
    return found[1].replace("$(BIN)", ".venv/bin")


def test_the_hooks_are_the_checks_of_make_check() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"].removesuffix(" --fix") for hook in repo["hooks"]]
    checks = [line.strip().removesuffix(" .").replace(" format --check", " format") for line in recipe("check").splitlines()]
    assert [entry for entry in entries if entry not in checks] == []
    assert [check for check in checks if check not in entries] == [".venv/bin/python -m pip check"]
    subprocess.run([tool("pre-commit"), "validate-config"], cwd=ROOT, check=True)


def test_the_hosted_workflow_runs_targets_of_the_makefile() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["env"] == {"CI": ""}, "tests whose recordings are missing are skipped there"
    runs = [shlex.split(step["run"]) for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = [word for words in runs if words[0] == "make" for word in words[1:] if "=" not in word]
    assert {"check", "docs", "test", "coverage", "sbom", "audit"} == set(targets)
    assert "--cov-report=html" in recipe("coverage"), "htmlcov is what the workflow keeps"
    for target in targets:
        recipe(target)
