from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu import run
from tests.support.fresh import FreshPython

SCRIPT = """
import sys
from tests.gpu.run import main
assert main([]) == 0, "skipped"
assert main(["--device", "cpu", "--length", "96", "--output", sys.argv[1]]) == 0
assert "ray" not in sys.modules and "pytest" not in sys.modules
"""


@pytest.mark.slow
def test_the_gpu_run_skips_without_a_gpu_and_its_code_runs_on_a_cpu(fresh_python: FreshPython, tmp_path: Path) -> None:
    """Our paths and the plain ones agree within their bounds, and every contender is timed, without Ray and without pytest."""
    output = tmp_path / "gpu_run.json"
    done = fresh_python.run(SCRIPT, str(output), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tests.gpu.run: skipped, there is no GPU here")
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["ok"] and set(report["right"]) == {"float32", "bfloat16"}
    speed = report["speed"]
    assert speed["layers"] == 2 and speed["rows"] == [2, 96] and next(iter(speed["ratios"].values())) == 1.0
    for name, entry in speed["contenders"].items():
        assert "error" not in entry and entry["tokens_per_second"] > 0 and 0 < entry["mfu"] < 1, name
        assert f"{entry['tokens_per_second']:,.0f}" in done.stdout


def test_as_many_layers_as_fit_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the free memory of a GPU, which is played here: more of it, more layers, from two to all."""
    work = run.Work(torch.device("cuda"), {}, packs=1, length=512, rounds=1, warmup=1, timed=1)
    found = []
    for free in (1 << 20, 16 << 20, 1 << 40):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        found.append(run.layers_that_fit(work))
    assert found[0] == 2 < found[1] < found[2] == run.MOST_LAYERS
