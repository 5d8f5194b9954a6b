from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SCRIPT = """
import sys
from tests.gpu.check import main
assert main([]) == 0, "skipped"
assert main(["--device", "cpu", "--output", sys.argv[1]]) == 0
assert "ray" not in sys.modules and "pytest" not in sys.modules
"""


def test_the_gpu_check_skips_without_a_gpu_and_its_code_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(output)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, last = (done.stdout.splitlines()[place] for place in (0, -1))
    assert first.startswith("tests.gpu.check: skipped, there is no GPU here")
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report == json.loads(last) and report["ok"]
    assert set(report["one_device"]) == {"float32", "bfloat16", "float16", "recomputed", "checkpoint", "deterministic"}
