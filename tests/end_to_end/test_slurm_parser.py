"""Slurm's own parser on the batch file; tests/cluster/test_slurm.py runs it."""

from __future__ import annotations

from pathlib import Path

from tests.support.slurm import require, slurm


def test_slurm_would_take_the_job_as_it_is(tmp_path: Path) -> None:
    """All directives are known to Slurm; options on the command line overrule them."""
    require()
    with slurm(tmp_path) as made:
        words = ["sbatch", "--test-only", "--nodes=2", "--cpus-per-task=4", "cluster/slurm/train.sbatch", "--config", "FILE"]
        assert "to start at" in made.call(*words)
