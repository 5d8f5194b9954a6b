"""Every case of every table in this folder: `make bad-inputs`."""

from __future__ import annotations

import importlib
import os
import pkgutil
from pathlib import Path

import pytest

from tests import bad_inputs
from tests.bad_inputs.harness import Case, faults, run

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0")
OTHERS = ("conftest", "harness", "inputs", "test_")  # modules that are no tables
TABLES = [name for _, name, _ in pkgutil.iter_modules(bad_inputs.__path__) if not name.startswith(OTHERS)]
CASES = [(table, case) for table in TABLES for case in importlib.import_module(f"tests.bad_inputs.{table}").CASES]


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{table}-{case.name}") for table, case in CASES])
def test_refused(case: Case, imported: None, tmp_path: Path) -> None:
    outcome = run(case, tmp_path)
    assert faults(case, tmp_path, outcome) == [], outcome
