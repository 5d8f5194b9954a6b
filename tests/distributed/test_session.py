"""What ranks agree on before they train."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from most_ray.errors import CheckpointError, ConfigError
from most_ray.io.run_folder import RunFolder
from most_ray.train.attempt import Attempt, claim_run
from tests.support.gloo import run_ranks


def begin(root: str, shared: bool, newer: bool) -> str:
    rank = dist.get_rank()
    folder = RunFolder(root if shared else f"{root}/of-rank-{rank}")
    driver = claim_run(folder) if rank == 0 else ""
    if newer and rank == 0:
        claim_run(folder)
    try:
        return Attempt.claim(SimpleNamespace(run_uri=folder.uri, driver=driver)).id  # type: ignore[arg-type]
    except (ConfigError, CheckpointError) as error:
        return str(error)


def test_a_folder_that_is_not_shared_is_found_before_training(tmp_path: Path) -> None:
    """Promise 32 of docs/promises.md: every rank sees what rank 0 has written, or all of them say who does not."""
    answers = run_ranks(2, begin, str(tmp_path / "own"), False, False)
    assert all("ranks [1] do not see there what rank 0 has written" in answer for answer in answers)
    answers = run_ranks(2, begin, str(tmp_path / "one"), True, False)
    assert answers[0] == answers[1] and answers[0] == RunFolder(str(tmp_path / "one")).owner()


def test_a_newer_driver_keeps_the_run(tmp_path: Path) -> None:
    answers = run_ranks(2, begin, str(tmp_path), True, True)
    assert all("replaced by a newer start of the same run" in answer for answer in answers)
