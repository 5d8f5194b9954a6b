from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fresh import FreshPython

SCRIPT = """
import sys
from tests.gpu.check import main
assert main([]) == 0, "skipped"
assert main(["--device", "cpu", "--output", sys.argv[1]]) == 0
assert "ray" not in sys.modules and "pytest" not in sys.modules
"""


@pytest.mark.slow
def test_the_gpu_check_skips_without_a_gpu_and_its_code_runs_on_a_cpu(fresh_python: FreshPython, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = fresh_python.run(SCRIPT, str(output), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    first, last = (done.stdout.splitlines()[uri] for uri in (0, -1))
    assert first.startswith("tests.gpu.check: skipped, there is no GPU here")
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report == json.loads(last) and report["ok"]
    assert set(report["one_device"]) == {"float32", "bfloat16", "float16", "recomputed", "checkpoint", "deterministic"}
