from __future__ import annotations

from pathlib import Path
from typing import Any

from most_ray.io.journal import Journal, read_journal


def written(path: Path, resume: int, *lines: dict[str, Any]) -> None:
    journal = Journal(path, resume)
    for line in lines:
        journal.write(line)
    journal.close()


def train(first: int, last: int, attempt: int = 1) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "attempt": attempt} for step in range(first, last + 1)]


def evaluation(step: int) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "wer": {"a": step / 100}}


def test_a_restart_leaves_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 0, *train(1, 7))
    with path.open("ab") as stream:
        stream.write(b'{"step": 8, "att')  # the driver was killed here
    written(path, 5, *train(6, 9, 2))
    assert read_journal(path) == [*train(1, 5), *train(6, 9, 2)]


def test_evaluations_of_steps_that_stay_stay(tmp_path: Path) -> None:
    """They come when they end, behind lines of later steps; promise 34 of docs/promises.md: each once, in whatever order."""
    path = tmp_path / "m.jsonl"
    written(path, 0, *train(1, 4), evaluation(2), *train(5, 7), evaluation(4), evaluation(6), *train(8, 8))
    journal = Journal(path, 5)
    assert [line["step"] for line in journal.evaluations] == [2, 4]
    for line in train(6, 7, 2):
        journal.write(line)
    journal.close()
    assert read_journal(path, "train") == [*train(1, 5), *train(6, 7, 2)]
    assert read_journal(path, "evaluation") == [evaluation(2), evaluation(4)]
    assert [line["step"] for line in Journal(path, 1).evaluations] == []
    assert read_journal(path) == train(1, 1)


def test_a_torn_evaluation_is_none(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    written(path, 0, *train(1, 4))
    with path.open("ab") as stream:
        stream.write(b'{"kind": "evaluation", "step": 2, "we')
    assert Journal(path, 3).evaluations == [] and read_journal(path) == train(1, 3)


def test_a_torn_first_line_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    assert read_journal(path) == []
    path.write_bytes(b'{"step"')
    Journal(path, 3).close()
    assert path.read_bytes() == b""
