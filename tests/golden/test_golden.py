from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.golden.digits import GOLDEN, ROOT, STEPS


def test_the_first_losses_of_digits() -> None:
    """Equal to the last bit on the kinds of machines that digits.json knows, to 1e-4 elsewhere; expert counts exactly.

    In a process of its own, so that no other test's threads or settings have a part in it.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.digits"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))
    machine = found.pop("machine")
    if machine in known:
        assert found == known[machine], "if the change is meant: python -m tests.golden.digits --write, and say why"
    for golden in known.values():
        assert len(found["losses"]) == STEPS
        assert found["losses"] == pytest.approx(golden["losses"], rel=1e-4)
        assert found["norms"] == pytest.approx(golden["norms"], rel=1e-4)
        assert found["load"] == golden["load"]
