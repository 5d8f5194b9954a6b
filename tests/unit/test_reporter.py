"""What rank 0 writes down, and when it is on storage."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from most_ray.data.plan import Plan
from most_ray.errors import DataError
from most_ray.io.journal import evaluated_steps, read_journal
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.schema import check_line
from most_ray.trackers.base import Line
from most_ray.train.reporter import RunReporter

ABOUT = {"exact": True, "changed": []}
LINE = {"kind": "evaluation", "step": 3, "wer": {}}


class Place(RunFolder):
    """A run's folder whose pushes are watched, and can fail."""

    def __init__(self, uri: Path) -> None:
        super().__init__(str(uri))
        self.pushes: list[int] = []
        self.broken, self.busy = False, threading.Lock()

    def push(self, *names: str) -> None:
        assert self.busy.acquire(blocking=False), "two pushes side by side: the older content may win"
        try:
            if self.broken:
                raise DataError("place", "s3://there", "does not answer.")
            self.pushes.append(len(read_journal(self.local / "metrics.jsonl")))
        finally:
            self.busy.release()


def reporter_of(plan: Plan, folder: RunFolder, step: int = 0) -> RunReporter:
    return RunReporter(None, plan, folder, step, 0, [], ABOUT)


def test_an_evaluation_is_pushed_and_until_then_its_checkpoint_is_held(plan: Plan, tmp_path: Path) -> None:
    folder = Place(tmp_path)
    reporter = reporter_of(plan, folder)
    folder.broken = True
    reporter.evaluation(dict(LINE))  # storage does not answer: training goes on
    assert reporter.unpushed == {3} and folder.pushes == [] and reporter.evaluations[3]["wer"] == {}
    folder.broken = False
    reporter.push()  # the next save's
    assert reporter.unpushed == set() and folder.pushes == [2]
    reporter.close(push=False)
    assert evaluated_steps(folder) == {3}


def test_pushes_of_two_threads_come_one_after_the_other(plan: Plan, tmp_path: Path) -> None:
    folder = Place(tmp_path)
    reporter, failures = reporter_of(plan, folder), []

    def push() -> None:
        try:
            for _ in range(50):
                reporter.push()
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(folder.pushes) == 200


def test_each_start_leaves_a_line_and_trackers_hear_all(plan: Plan, tmp_path: Path) -> None:
    heard: list[Any] = []

    class Ear:
        failure: str | None = None

        def begin(self, step: int, lines: Iterable[Line]) -> None:
            heard.append(("begin", step, list(lines)))

        def log(self, line: dict[str, Any]) -> None:
            heard.append((line["kind"], line["step"]))

        def checkpoint(self, step: int, uri: str) -> None:
            heard.append(("checkpoint", step, uri))

        def close(self) -> None:
            heard.append("close")

    ear = Ear()
    reporter = RunReporter(None, plan, RunFolder(str(tmp_path)), 0, 0, [ear], ABOUT)
    reporter.log({"kind": "train", "step": 1, "loss": 1.0})
    reporter.checkpoint(1, "there")
    ear.failure = "the ear is deaf"
    reporter.close(push=False)
    assert heard == [("begin", 0, []), ("start", 0), ("train", 1), ("checkpoint", 1, "there"), "close"]
    line = read_journal(tmp_path / "metrics.jsonl", "train")[0]
    assert {"time", "epoch", "mix"} <= set(line)
    (told,) = read_journal(tmp_path / "metrics.jsonl", "failure")  # nobody reads a worker's log
    assert (told["what"], told["reason"], check_line(told)) == ("tracking", "the ear is deaf", [])
    reporter_of(plan, RunFolder(str(tmp_path)), 1).close(push=False)
    assert [(line["kind"], line["step"]) for line in read_journal(tmp_path / "metrics.jsonl")] == [
        ("start", 0),
        ("train", 1),
        ("failure", 1),
        ("start", 1),
    ]


def test_a_key_that_is_not_declared_is_logged_once_and_written(plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = reporter_of(plan, RunFolder(str(tmp_path)))
    for step in (1, 2):
        reporter.log({"kind": "train", "step": step, "loss": 1.0, "novel": 2.0})
    reporter.evaluation({**LINE, "sets": {"asr/a": {"task": "asr", "odd": 1}}})
    reporter.close(push=False)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [message.rpartition(": ")[2] for message in logged] == ["train.novel", "evaluation.sets.asr/a.odd"]
    assert all("most_ray/metrics/schema.py" in message for message in logged)
    assert [line["novel"] for line in read_journal(tmp_path / "metrics.jsonl", "train")] == [2.0, 2.0]


def test_other_ranks_write_nothing(plan: Plan, tmp_path: Path) -> None:
    reporter = RunReporter(None, plan, RunFolder(str(tmp_path)), 0, 1, [], ABOUT)
    reporter.log({"kind": "train", "step": 1, "loss": 1.0})
    reporter.close(push=True)
    assert not (tmp_path / "metrics.jsonl").exists()
