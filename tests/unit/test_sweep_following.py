"""A trial's actor follows its run's metrics: read on from where they were read, also where a restart has cut them back."""

from __future__ import annotations

import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from most_ray.io import storage
from most_ray.io.journal import Journal
from most_ray.service.tune import trial_actor as module
from most_ray.service.tune.trial_actor import TrialActor
from tests.unit.test_sweep_trial import actor_of


class Running:
    """Stands for a process."""

    code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def wait(self) -> int:
        return self.code or 0


def attended(folder: str) -> tuple[TrialActor, Running, Path]:
    """An actor whose run a test plays, and the run's metrics."""
    actor, process = actor_of(folder, folder, (), {"max_steps": 12}, {}), Running()
    actor._process = process  # type: ignore[assignment]
    actor._lines = actor._evaluations()
    return actor, process, Path(folder) / "001" / "metrics.jsonl"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0)


def line(kind: str, step: int, length: int = 0, **more: Any) -> dict[str, Any]:
    """A line of metrics; `length`: bytes that it has with its end."""
    made = {"kind": kind, "step": step, "pad": "", **more}
    made["pad"] = "x" * (length - 1 - len(json.dumps(made)))
    return made


def judged(step: int, length: int = 0) -> dict[str, Any]:
    return line("evaluation", step, length, sets={"asr/test_takes": {"words": {"rate": 1 / step}}})


def told(actor: TrialActor, polls: int = 1) -> list[int]:
    """Steps of the results that so many looks bring."""
    found = []
    while polls:
        result = actor.step()
        polls -= "details" not in result
        found += [result["step"]] if "details" in result else []
    return found


def test_half_a_line_is_read_when_it_is_whole(quick: None, tmp_path: Path) -> None:
    actor, _, metrics = attended(str(tmp_path))
    assert told(actor) == []
    whole = "".join(json.dumps(each) + "\n" for each in (line("train", 1), line("train", 2, loss=7.0), judged(2)))
    for end in (5, len(whole) - 60, len(whole) - 1):
        metrics.write_text(whole[:end])
        assert told(actor) == []
    metrics.write_text(whole)
    result = actor.step()
    assert result["step"] == 2 and result["objective_1"] == 7.0
    assert told(actor, 3) == []


def test_an_evaluation_may_come_late(quick: None, tmp_path: Path) -> None:
    """Behind lines of later steps; its figures of training are those of its own step. Several at once are told one by one, in order."""
    actor, process, metrics = attended(str(tmp_path))
    journal = Journal(metrics, 0)
    for step in range(1, 7):
        journal.write(line("train", step, loss=float(step)))
    assert told(actor, 2) == []
    for step in (4, 2):
        journal.write(judged(step))
    assert [(result["step"], result["objective_1"]) for result in (actor.step(), actor.step())] == [(2, 2.0), (4, 4.0)]
    assert told(actor) == []
    journal.write({"kind": "train", "step": 12, "loss": 12.0})
    journal.write(judged(12))
    process.code = 0
    assert actor.step()["objective_1"] == 12.0
    assert actor.step() == {"step": 12, "done": True}


def test_the_last_step_counts_though_it_is_no_multiple(quick: None, tmp_path: Path) -> None:
    """Also where a run is evaluated at its end alone."""
    for every in (5, None):
        actor, _, metrics = attended(str(tmp_path / str(every)))
        actor._values["eval_steps"] = every
        journal = Journal(metrics, 0)
        for step in range(1, 13):
            journal.write(line("train", step, loss=float(step)))
        journal.write(judged(12))
        assert actor.step()["objective_1"] == 12.0
        assert len(actor._trained) == (3 if every else 1)  # not of every step


def test_damaged_lines_are_passed_over(quick: None, tmp_path: Path) -> None:
    actor, _, metrics = attended(str(tmp_path))
    metrics.write_bytes(b'{"kind": "evaluation", "st\n\xff\n[1]\n{"kind": "evaluation"}\n' + json.dumps(judged(2)).encode() + b"\n")
    assert told(actor) == [2]


def test_what_was_read_is_not_read_again(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the end by which the place is known again, and for half a line that was there."""
    actor, _, metrics = attended(str(tmp_path))
    read: list[int] = []

    class Counting(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            read.append(len(found))
            return found

    monkeypatch.setattr(storage, "open_read", lambda uri: Counting(Path(uri).read_bytes()))
    written = b""
    for step in range(1, 9):
        whole = json.dumps(judged(step, 300)).encode() + b"\n"
        for end in (100, 300):
            metrics.write_bytes(written + whole[:end])
            assert told(actor) == ([step] if end == 300 else [])
        written += whole
    assert sum(read) <= len(written) + 8 * 100 + 16 * 200


@settings(max_examples=80, derandomize=True)
@given(data=st.data())
def test_a_restart_of_the_run_tells_each_step_once(data: st.DataObject) -> None:
    """The run's process outlives its restarts, each of which cuts the metrics back to a checkpoint and writes on, with lines of other
    lengths. Evaluations come some lines late; whenever somebody looks, each is told, once, in its order."""
    looks = data.draw(st.lists(st.booleans(), min_size=60, max_size=60))
    restarts = data.draw(st.lists(st.tuples(st.integers(2, 11), st.integers(0, 2)), max_size=4))
    late = data.draw(st.integers(0, 2))
    lengths = random.Random(data.draw(st.integers(0, 1000)))
    found: list[int] = []
    pending: list[int] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_POLL_S", 0)
        actor, process, metrics = attended(folder)
        done, evaluated = 0, 0
        for stop, back in [*restarts, (12, 0)]:
            journal = Journal(metrics, done)
            evaluated = max((each["step"] for each in journal.evaluations), default=0)
            pending = list(range(evaluated + 2, done + 1, 2))
            journal.write(line("start", done, lengths.randrange(100, 900)))
            for step in range(done + 1, max(done, stop) + 1):
                journal.write(line("train", step, lengths.randrange(100, 900)))
                pending += [step] if step % 2 == 0 else []
                while pending and (pending[0] + late <= step or step == 12):
                    journal.write(judged(pending.pop(0), lengths.randrange(100, 900)))
                if looks and looks.pop():
                    found += told(actor)
            journal.close()
            done = max(0, max(done, stop) // 2 * 2 - 2 * back)
        process.code = 0
        while not (result := actor.step()).get("done"):
            found += [result["step"]] if "details" in result else []
    assert found == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("length", [170, 250, 300, 200])
def test_a_restart_before_an_evaluation_has_come(quick: None, tmp_path: Path, length: int) -> None:
    """It comes first of all behind the restart, among lines that stand where others were read: shorter, longer or as long as those."""
    actor, _, metrics = attended(str(tmp_path))
    journal = Journal(metrics, 0)
    for each in (line("start", 0, 200), *(line("train", step, 200) for step in (1, 2, 3, 4))):
        journal.write(each)
    assert told(actor) == []
    journal.close()
    journal = Journal(metrics, 2)
    for each in (judged(2, length), line("start", 2, length), line("train", 3, length)):
        journal.write(each)
    assert told(actor) == [2]
