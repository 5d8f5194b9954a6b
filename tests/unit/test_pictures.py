"""The command that makes the pictures of reports in docs/ (without a browser: tests/browser looks at the reports themselves)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_folders_that_are_no_runs_are_refused_and_no_picture_is_written(tmp_path: Path) -> None:
    command = [sys.executable, ".ci/pictures.py", "--output", str(tmp_path)]
    for arguments in ([], ["--run", str(tmp_path / "nothing")], ["--run", "x", "--output", str(tmp_path / "nowhere")]):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


def test_pictures_of_runs_are_small() -> None:
    found = {path.name: path.stat().st_size for path in (ROOT / "docs").glob("report*.png")}
    assert set(found) == {"report.png", "report-phone.png", "report-three-runs.png"}
    assert max(found.values()) <= 300_000
