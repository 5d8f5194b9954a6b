"""Every notebook of examples/ runs from its first cell to its last, on a few records and for a few steps, and shows what its text says."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.support.digits import few_digits

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_BYTES = 300_000  # of a notebook with its outputs


@pytest.fixture
def forty_of_each(digits: Path, tmp_path: Path) -> Path:
    """Some forty records of each folder of the digits, of all words and speakers."""
    for source in (path.parent for path in digits.glob("*/records.jsonl.gz")):
        few_digits(source, tmp_path / "digits" / source.name)
    return tmp_path / "digits"


def outputs(notebook: Any) -> dict[str, list[str]]:
    """Texts and data of all outputs by MIME type; what is printed under text/plain."""
    found: dict[str, list[str]] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data") or {"text/plain": output.get("text", "")}
            for kind, value in data.items():
                found.setdefault(kind, []).append(value)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, forty_of_each: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    for name, value in {"STEPS": "6", "DIGITS": forty_of_each, "IPYTHONDIR": tmp_path, "JUPYTER_RUNTIME_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of the file by which the kernel is found
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = outputs(notebook)
    assert "selections across the modality border in the whole run: 0" in "".join(found["text/plain"])
    assert any("<polyline" in figure for figure in found["image/svg+xml"])
    assert any("data:audio/wav" in text for text in found["text/html"])
    assert len(found["text/markdown"]) == 4 and "asr/test_speaker" in found["text/markdown"][2]
    assert json.loads((tmp_path / "runs/notebook/summary.json").read_bytes())["step"] == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_in_the_repository_are_whole_and_small(path: Path) -> None:
    """Of one run from top to bottom, or none at all; without an error and without paths of the machine that it ran on."""
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert len(text.encode()) <= MOST_BYTES and "/home/" not in text and "/tmp/" not in text
    assert [cell.execution_count for cell in cells] in (list(range(1, len(cells) + 1)), [None] * len(cells))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
