"""The actor around a trial's run, without Ray: what it tells of the run, how it ends it, and the checkpoints that it keeps."""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from most_ray.io import storage
from most_ray.service.tune import trial_actor as module
from most_ray.service.tune.trial_actor import Slots, TrialActor
from tests.conftest import ROOT
from tests.support.fake_run import wer_of

FAKE = ("-m", "tests.support.fake_run")
MakeActor = Callable[..., TrialActor]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeActor]:
    """Actors of runs that look for news without waiting; a run that is left over is ended."""
    monkeypatch.setattr(module, "_POLL_S", 0.002)
    monkeypatch.setenv("FAKE_STEP_S", "0.003")
    actors = []

    def make(
        train: tuple[str, ...] = FAKE, output: str = "", sweep: str = "", values: dict[str, Any] | None = None, **spec: Any
    ) -> TrialActor:
        actors.append(actor_of(output or str(tmp_path / "trials"), sweep or str(tmp_path), train, values or {}, spec))
        return actors[-1]

    yield make
    for actor in actors:
        if isinstance(actor._process, subprocess.Popen):
            actor._process.kill()
            actor._process.wait()


def actor_of(output: str, sweep: str, train: tuple[str, ...], values: dict[str, Any], spec: dict[str, Any]) -> TrialActor:
    actor = TrialActor.__new__(TrialActor)  # without what Tune adds: a folder for its logs
    common = {
        "values": {"learning_rate": 0.5, "max_steps": 8, "eval_steps": 2, "output_dir": output, "name": "other", **values},
        "sweep_uri": sweep,
        "directory": str(ROOT),
        "train": train,
        "objectives": ["wer/test_takes", "train/loss"],
        "environment": {},
        "slots": None,
    }
    actor.setup({"spec": {"trial": 1, "run": "001", "settings": {"learning_rate": 0.02}, "parent": None, **spec}}, common)
    return actor


def news(actor: TrialActor) -> list[dict[str, Any]]:
    """All results of a run to its end; without those that tell nothing new."""
    found = []
    while not found or not found[-1].get("done"):
        result = actor.step()
        if len(result) > 1:
            found.append(result)
    return found


def silent(actor: TrialActor, until: Callable[[], bool]) -> None:
    """Steps without news, until something is so."""
    while not until():
        assert actor.step() == {"step": actor._last}


# What it tells of a run


def test_a_run_from_its_start_to_its_end(make: MakeActor, tmp_path: Path) -> None:
    """One result an evaluation, with its figures and those of its step; in between nothing but the step, so that nobody waits for it. The
    trial's settings stand over those of all trials."""
    actor = make()
    results = []
    while not results or not results[-1].get("done"):
        results.append(actor.step())
    told = [result for result in results if "details" in result]
    assert [result["step"] for result in told] == [2, 4, 6, 8]
    for result in told:
        wer = wer_of(0.02, result["step"])
        assert json.loads(result["details"]) == {
            "metrics": {"wer/test_takes": wer, "wer": wer, "loss/asr/test_takes": 0.02, "loss": 0.02, "train/loss": 0.02},
            "intervals": {"wer/test_takes": [0.0, 1.0]},
        }
        assert (result["objective_0"], result["objective_1"], set(result)) == (wer, 0.02, {"step", "details", "objective_0", "objective_1"})
    between = [result for result in results if result not in told]
    assert between[-1] == {"step": 8, "done": True} and between[0] == {"step": 0}
    assert all(set(result) == {"step"} for result in between[:-1])
    assert [result["step"] for result in results] == sorted(result["step"] for result in results)
    assert len((tmp_path / "trials" / "001" / "starts").read_text().split()) == 1
    actor.cleanup()


def test_a_run_that_has_been_told_of(make: MakeActor, tmp_path: Path) -> None:
    """What stands there already is told from `after` on; a run whose goal was reached ends at once."""
    folder = tmp_path / "trials" / "001"
    assert [result["step"] for result in news(make())] == [2, 4, 6, 8, 8]
    assert [result["step"] for result in news(make(after=4))] == [6, 8, 8]
    assert news(make(after=8)) == [{"step": 8, "done": True}]
    assert len((folder / "starts").read_text().split()) == 3


def test_a_run_that_begins_with_anothers_checkpoint(make: MakeActor, tmp_path: Path) -> None:
    """As it was kept in the sweep's folder."""
    kept = tmp_path / "kept" / "002-1" / "step-000000004"
    kept.mkdir(parents=True)
    (kept / "state.json").write_text('{"step": 4}')
    actor = make(parent={"trial": 2, "run": "002-1", "step": 4}, run="001-1")
    assert [result["step"] for result in news(actor)] == [6, 8, 8]
    assert actor._values["resume_from_checkpoint"] == str(kept) and actor._values["accept_data_change"] is True
    assert json.loads((tmp_path / "trials" / "001-1" / "metrics.jsonl").read_text().splitlines()[0]) == {"kind": "start", "step": 4}


ECHO = (
    "import json, os, pathlib, sys, yaml; given = yaml.safe_load(sys.stdin); "
    "place = pathlib.Path(given['output_dir'], given['name'], 'seen'); "
    "place.write_text(json.dumps([given, dict(os.environ), os.getcwd(), sys.argv, os.getsid(0) == os.getpid()]))"
)


def test_what_a_run_gets(make: MakeActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration by standard input, where nobody sees it; the sweep's directory; a driver's environment; a session of its own."""
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID", "RAY_RAYLET_PID", "OWN"):
        monkeypatch.setenv(name, "7")
    actor = make(("-c", ECHO), values={"store_dir": "s3://key:hunter2@b/x"})
    actor._directory = str(tmp_path)
    assert news(actor) == [{"step": 0, "done": True}]
    given, environment, directory, words, leader = json.loads((tmp_path / "trials" / "001" / "seen").read_text())
    assert given == {**actor._values, "name": "001", "learning_rate": 0.02} and given["store_dir"] == "s3://key:hunter2@b/x"
    assert "hunter2" not in json.dumps([environment, words]) + "".join(p.name for p in tmp_path.rglob("*.yaml"))
    assert environment["OWN"] == "7"
    assert not {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_JOB_ID", "RAY_RAYLET_PID"} & set(environment)
    assert directory == str(tmp_path) and leader
    elsewhere = make(("-c", ECHO), run="002")
    elsewhere._directory = str(tmp_path / "of another node")
    assert news(elsewhere) == [{"step": 0, "done": True}]


SAID = [
    (
        "print('most-ray: data error: train_asr_dirs: holds nothing.'); print('bye'); sys.exit(2)",
        "data error: train_asr_dirs: holds nothing.",
    ),
    ("print('most-ray: a'); print('most-ray: b'); sys.exit(3)", "b"),
    ("raise KeyError('x')", "KeyError: 'x'"),
    ("sys.exit(3)", "exit code 3"),
    ("print('most-ray: s3://key:hunter2@bucket/x is gone'); sys.exit(1)", "s3://***@bucket/x is gone"),
    ("os.kill(os.getpid(), 9)", "its process was ended by SIGKILL, as the kernel does where memory runs out"),
    ("os.kill(os.getpid(), 15)", "its process was ended by SIGTERM"),
]


@pytest.mark.parametrize(("code", "reason"), SAID, ids=[reason for _, reason in SAID])
def test_why_a_run_failed(make: MakeActor, code: str, reason: str) -> None:
    """In a line: what it said itself, else its last words, else its exit code."""
    actor = make(("-c", f"import os, sys; sys.stdin.read(); {code}"))
    assert news(actor) == [{"step": 0, "done": True, "failed": reason}]
    actor.cleanup()


def test_a_run_that_somebody_else_stops_is_started_again(make: MakeActor) -> None:
    """As where its node is taken away: by Tune, for which the actor fails."""
    with pytest.raises(RuntimeError, match="not by the sweep"):
        news(make(("-c", "import sys; sys.stdin.read(); sys.exit(75)")))


def test_why_a_run_failed_is_not_what_an_earlier_start_said(make: MakeActor, tmp_path: Path) -> None:
    """A start that was stopped has said so in the same log."""
    actor = make(("-c", "import sys; sys.stdin.read(); raise KeyError('x')"))
    (tmp_path / "trials" / "001" / "train.log").write_text("most-ray: stopped: the same command goes on.\n")
    assert news(actor)[-1]["failed"] == "KeyError: 'x'"


# How it ends it


def test_letting_a_trial_go_stops_its_run_behind_a_checkpoint(make: MakeActor, tmp_path: Path) -> None:
    actor = make(values={"max_steps": 100_000})
    assert len(next(result for result in iter(actor.step, None) if len(result) > 1)) == 4
    actor.cleanup()
    assert actor._process is not None and actor._process.returncode == 75
    folder = tmp_path / "trials" / "001"
    trained = [line["step"] for raw in (folder / "metrics.jsonl").read_text().splitlines() if (line := json.loads(raw))["kind"] == "train"]
    assert trained == list(range(1, len(trained) + 1))
    assert sorted((folder / "checkpoints").iterdir())[-1].name == f"step-{trained[-1]:09d}"


def test_a_run_that_does_not_stop_is_killed(
    make: MakeActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the time that a checkpoint may take."""
    monkeypatch.setattr(module, "_STOP_S", 0.05)
    ready = tmp_path / "ready"
    code = f"import pathlib, signal; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(ready)!r}).touch(); signal.pause()"
    actor = make(("-c", code))
    silent(actor, ready.exists)
    with caplog.at_level(logging.WARNING):
        actor.cleanup()
    assert actor._process is not None and actor._process.returncode == -9
    assert "run 001 did not stop within 0.05 s and was killed" in caplog.text


def test_an_actor_that_is_killed_takes_its_run_with_it(tmp_path: Path) -> None:
    """The run is asked to stop, as by whoever lets it go."""
    os.mkfifo(tmp_path / "said")
    said = os.open(tmp_path / "said", os.O_RDONLY | os.O_NONBLOCK)
    run = (  # by os.write: a signal may come while print is at work
        f"import os, signal; out = os.open({str(tmp_path / 'said')!r}, os.O_WRONLY); "
        "signal.signal(15, lambda *_: (os.write(out, b'asked\\n'), os._exit(0))); os.write(out, b'%d\\n' % os.getpid()); signal.pause()"
    )
    made = f"actor_of({str(tmp_path)!r}, {str(tmp_path)!r}, ('-c', {run!r}), {{}}, {{}})"
    holder = f"import signal; from {__name__} import actor_of; {made}.step(); signal.pause()"
    actor = subprocess.Popen([sys.executable, "-c", holder], cwd=ROOT)
    try:
        assert select.select([said], [], [], 60)[0]
        run_id = int(os.read(said, 100))
    finally:
        actor.kill()
        actor.wait()
    try:
        assert select.select([said], [], [], 30)[0] and os.read(said, 100) == b"asked\n"
    except AssertionError:
        os.kill(run_id, 9)
        raise
    finally:
        os.close(said)


def test_a_trial_that_never_began_is_let_go(make: MakeActor) -> None:
    make().cleanup()


# Taking turns


def test_room_for_so_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has room keeps it while it is heard of; who leaves, or is not heard of, makes room."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    slots = Slots(2)
    assert [slots.acquire(run) for run in ("a", "b", "c", "a")] == [True, True, False, True]
    slots.release("b")
    slots.release("unknown")
    assert [slots.acquire(run) for run in ("c", "b")] == [True, False]
    now[0] = module._LEASE_S - 1
    assert [slots.acquire(run) for run in ("b", "c")] == [False, True]
    now[0] = module._LEASE_S
    assert [slots.acquire(run) for run in ("b", "a", "c")] == [True, False, True]


def test_a_trial_waits_for_its_turn(make: MakeActor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run is not started before; when it is let go, there is room for another's."""
    slots = Slots(1)
    assert slots.acquire("other")
    as_actor = SimpleNamespace(acquire=SimpleNamespace(remote=slots.acquire), release=SimpleNamespace(remote=slots.release))
    monkeypatch.setattr(module.ray, "get", lambda found: found)
    actor = make(after=4)
    actor._slots = as_actor
    assert [actor.step() for _ in range(3)] == [{"step": 4}] * 3 and actor._process is None
    slots.release("other")
    assert [result["step"] for result in news(actor)] == [6, 8, 8]
    assert not slots.acquire("other")
    actor.cleanup()
    assert slots.acquire("other")


# Checkpoints


def a_checkpoint(uri: str, step: int) -> str:
    checkpoint = f"{uri}/checkpoints/step-{step:09d}"
    storage.write_bytes(f"{checkpoint}/model/weights", b"w" * 10)
    storage.write_bytes(f"{checkpoint}/commit.json", b"{}")
    return checkpoint


def test_a_checkpoint_is_kept_for_others(make: MakeActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the last result, without a copy of its files; it stays when the run forgets its own."""
    actor = make()
    uri = str(tmp_path / "trials" / "001")
    for step in (4, 6):
        a_checkpoint(uri, step)
    actor._last = 4
    (tmp_path / "pointer").mkdir()
    actor.save_checkpoint(str(tmp_path / "pointer"))
    kept = tmp_path / "kept" / "001" / "step-000000004"
    assert sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*")) == ["commit.json", "model", "model/weights"]
    own = Path(uri, "checkpoints", "step-000000004")
    assert os.path.samefile(kept / "model" / "weights", own / "model" / "weights")
    assert [path.name for path in kept.parent.iterdir()] == ["step-000000004"]
    monkeypatch.delattr(module, "_copy_checkpoint")  # what is kept is not copied again
    actor.save_checkpoint(str(tmp_path / "pointer"))
    storage.remove(str(own))
    actor.save_checkpoint(str(tmp_path / "pointer"))
    assert (kept / "model" / "weights").read_bytes() == b"w" * 10
    assert json.loads((tmp_path / "pointer" / "checkpoint.json").read_text()) == {"run": "001", "step": 4}


def test_a_file_system_without_links_gets_copies(make: MakeActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr(module.os, "link", refuse)
    actor = make()
    own = a_checkpoint(str(tmp_path / "trials" / "001"), 4)
    actor._last = 4
    actor.save_checkpoint(str(tmp_path))
    kept = tmp_path / "kept" / "001" / "step-000000004" / "model" / "weights"
    assert kept.read_bytes() == b"w" * 10 and not os.path.samefile(kept, f"{own}/model/weights")


def test_a_half_kept_checkpoint_is_kept_anew(make: MakeActor, tmp_path: Path) -> None:
    """What a kill has left of an earlier try is no checkpoint."""
    left = tmp_path / "kept" / "001" / ".step-000000004.tmp"
    left.mkdir(parents=True)
    (left / "stale").touch()
    actor = make()
    a_checkpoint(str(tmp_path / "trials" / "001"), 4)
    actor._last = 4
    actor.save_checkpoint(str(tmp_path))
    assert not left.exists()
    assert sorted(path.name for path in (tmp_path / "kept" / "001" / "step-000000004").iterdir()) == ["commit.json", "model"]


@pytest.mark.parametrize("step", [0, 4])
def test_without_a_checkpoint_nothing_is_kept(make: MakeActor, tmp_path: Path, step: int) -> None:
    """Before the first result, or where the run has forgotten it."""
    actor = make()
    a_checkpoint(str(tmp_path / "trials" / "001"), 0)
    actor._last = step
    actor.save_checkpoint(str(tmp_path))
    assert not (tmp_path / "kept").exists()
    assert json.loads((tmp_path / "checkpoint.json").read_text()) == {"run": "001", "step": step}


def test_a_checkpoint_behind_a_uri_is_kept_there(make: MakeActor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / "cache"))
    uri = f"memory://{uuid.uuid4().hex}"
    actor = make(output=f"{uri}/trials", sweep=uri)
    a_checkpoint(f"{uri}/trials/001", 4)
    actor._last = 4
    actor.save_checkpoint(str(tmp_path))
    kept = [entry.name for entry in storage.list_files(f"{uri}/kept/001/step-000000004", ("",))]
    assert kept == ["commit.json", "model/weights"]
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize(
    ("run", "step", "last"),
    [("001", 6, 6), ("001", 2, 4), ("002", 6, 4)],
    ids=["its own goes on there", "never back", "another's tells nothing of its own run"],
)
def test_where_a_trial_goes_on_that_was_set_aside(make: MakeActor, tmp_path: Path, run: str, step: int, last: int) -> None:
    actor = make(after=4)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"run": run, "step": step}))
    actor.load_checkpoint(str(tmp_path))
    assert actor._last == last
