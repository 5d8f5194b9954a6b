"""What the start of a command loads, and how long that takes: mistakes and complete runs are answered without torch."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from most_ray.config import RunConfig, config_from, to_yaml
from most_ray.errors import ConfigError, UserError
from most_ray.large_imports import at_once
from most_ray.options import to_plain
from most_ray.runs.first_checks import first_checks, inputs_digest, unchanged_summary
from most_ray.runs.lifecycle import begin_run, finish_run
from most_ray.service.cluster import connection
from most_ray.service.cluster.connection import start_beside
from most_ray.service.training import attempts
from tests.support.runs import go, prepare_small

LARGE = ("torch", "transformers", "ray", "scipy", "sympy", "pandas", "torchao", "sklearn")
DIGITS = Path(__file__).resolve().parents[2] / "jobs/data/digits"


def loaded_by(code: str, *arguments: str) -> tuple[list[str], float]:
    """The large libraries that a process has loaded after `code`, and the processor time that it took in seconds."""
    ending = (
        f"import sys, json, time; print(json.dumps([[n for n in {LARGE!r} if n in sys.modules], time.process_time()]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}\n{ending}", *arguments], capture_output=True, text=True, check=True)
    names, seconds = json.loads(done.stderr.splitlines()[-1])
    return names, seconds


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("most_ray.cli", ()),
        ("most_ray.cli.parser", ()),
        ("most_ray.console.run_screens", ()),
        ("most_ray.service.training.start", ()),
        ("most_ray.service.cluster.connection", ("ray",)),
        ("most_ray.data.batch", ()),
        ("most_ray.service.tasks.batch_stream", ("ray", "pandas")),
    ],
)
def test_a_module_that_a_start_needs_early_loads_no_large_library(module: str, allowed: tuple[str, ...]) -> None:
    names, _ = loaded_by(f"import {module}")
    assert set(names) <= set(allowed)


def test_the_model_loads_nothing_that_transformers_model_does_not() -> None:
    """Nor does it take much longer: no library of ours comes on top."""
    library = "import torch, transformers.models.deepseek_v2.modeling_deepseek_v2"
    ours, theirs = (
        min((loaded_by(code) for _ in range(2)), key=lambda found: found[1]) for code in ("import most_ray.model.modeling", library)
    )
    assert set(ours[0]) <= set(theirs[0])
    assert ours[1] < 1.4 * theirs[1]  # 1.2 when idle


MISTAKES = {
    "no data": ("train_asr_dirs", {"train_asr_dirs": []}),
    "a missing folder": ("train_asr_dirs", {"train_asr_dirs": ["missing"]}),
    "sizes that do not fit": ("ep_size", {"ep_size": 3}),
    "rows that are too long": ("max_seq_length", {"max_seq_length": 9999}),
    "an unknown model": ("model_name_or_path", {"model_name_or_path": "models/mine"}),
    "a missing checkpoint": ("checkpoint", {"resume_from_checkpoint": "runs/x/checkpoints/step-000000001"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_without_torch(mistake: str, tmp_path: Path) -> None:
    field, changes = MISTAKES[mistake]
    values = {
        "model_name_or_path": "tiny",
        "train_asr_dirs": [str(DIGITS / "train_asr")],
        "max_steps": 2,
        "output_dir": str(tmp_path),
        **changes,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    code = "import sys\nfrom most_ray.cli import main\nassert main(['train', '--config', sys.argv[1]]) == 2"
    names, seconds = loaded_by(code, str(tmp_path / "run.yaml"))
    assert not names
    assert seconds < 2
    with pytest.raises(UserError) as raised:
        first_checks(config_from(values))
    assert raised.value.field == field


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a run that is complete."""
    root = tmp_path_factory.mktemp("runs")
    prepared = prepare_small(root, max_steps=2)
    assert go(prepared)
    begin_run(prepared, prepared.job.config)
    finish_run(prepared, prepared.job.config, lambda *_: None)
    return prepared.job.config


def test_a_complete_run_says_so_without_torch(complete: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(complete), encoding="utf-8")
    code = "import sys\nfrom most_ray.cli import main\nassert main(['train', '--config', sys.argv[1]]) == 0"
    names, seconds = loaded_by(code, str(tmp_path / "run.yaml"))
    assert not names
    assert seconds < 3
    assert unchanged_summary(complete)


def test_what_has_changed_since_is_looked_at_closely(complete: RunConfig, tmp_path: Path) -> None:
    """Then the whole preparation of a run finds out what is left to do, and says what has no effect."""
    assert unchanged_summary(replace(complete, learning_rate=1e-4)) is None
    root = shutil.copytree(Path(complete.output_dir), tmp_path / "moved")
    old = str(complete.output_dir)
    moved = config_from({name: _moved(value, old, str(root)) for name, value in to_plain(vars(complete)).items()})
    summary = json.loads((root / "small/summary.json").read_text(encoding="utf-8"))
    (root / "small/summary.json").write_text(json.dumps({**summary, "inputs": inputs_digest(moved)}), encoding="utf-8")
    assert unchanged_summary(moved)
    weights = next((root / "small/checkpoints/step-000000002").glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert unchanged_summary(moved) is None, "its last checkpoint is damaged"
    weights.write_bytes(content)
    records = next((root / "data/heard").iterdir())
    records.write_bytes(records.read_bytes() + records.read_bytes().splitlines(keepends=True)[-1].replace(b'"id"', b'"id" '))
    assert unchanged_summary(moved) is None, "its records are others"


def _moved(value: Any, old: str, new: str) -> Any:
    return json.loads(json.dumps(value).replace(old, new))


def test_a_run_of_an_earlier_version_is_looked_at_closely(complete: RunConfig) -> None:
    path = Path(complete.run_uri) / "summary.json"
    before = path.read_text(encoding="utf-8")
    for text in (json.dumps({k: v for k, v in json.loads(before).items() if k != "inputs"}), "[]", '{"step": "2"', ""):
        path.write_text(text, encoding="utf-8")
        assert unchanged_summary(complete) is None
    path.write_text(before, encoding="utf-8")


def test_on_a_ray_of_this_process_the_controller_has_no_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else none of the processes that Ray holds ready could be used."""
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(attempts.ray, "remote", lambda **given: options.append(given) or (lambda actor: MagicMock()))
    monkeypatch.setattr(attempts.ray, "get", lambda reference: reference)
    trainer = attempts._Trainer.__new__(attempts._Trainer)
    trainer.own_ray = True
    trainer._initialize_and_run_controller()
    assert options == [{"num_cpus": 0}]


def test_imports_at_once_leave_the_collector_as_it_was() -> None:
    before = gc.get_freeze_count()
    with at_once():
        assert not gc.isenabled()
        made = [[] for _ in range(100)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > before + len(made)
    gc.disable()
    try:
        with at_once():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_ray_starts_beside_and_its_error_comes_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread lives on: Linux would end Ray's processes together with the thread that has started them."""
    threads: list[threading.Thread] = []
    monkeypatch.setattr(connection, "connect", lambda config, cpus: threads.append(threading.current_thread()))
    start_beside(RunConfig(), 2)()
    assert threads[0] is not threading.main_thread()
    assert threads[0].is_alive()

    def refuse(config: RunConfig, cpus: int) -> None:
        raise ConfigError("ray_address", None, f"needs {cpus} CPUs.")

    monkeypatch.setattr(connection, "connect", refuse)
    wait = start_beside(RunConfig(), 2)
    with pytest.raises(ConfigError, match="needs 4 CPUs"):
        wait()
