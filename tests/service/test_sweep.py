"""Sweeps through Ray Tune, on the tests' one cluster. Most trials are stand-ins for runs (tests/support/fake_run.py): what is tested is
which of them are made, stopped, gone on with and counted. The last tests make real ones."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.util.state import list_actors, list_placement_groups
from rich.console import Console

from most_ray.cli import main
from most_ray.config import load_config
from most_ray.errors import ConfigError
from most_ray.service.training.attempts import RunIncompleteError
from most_ray.service.tune import runner as driver
from most_ray.service.tune.runner import run_sweep
from most_ray.sweep.ledger import Ledger, read_ledger
from most_ray.sweep.options import Sweep, load_sweep
from tests.conftest import ROOT
from tests.support.digits import few_digits
from tests.support.fake_run import wer_of

CONFIG = ROOT / "jobs" / "configs" / "sweep-digits.yaml"
# One of each for a whole cluster, which Ray Data and, for the dashboard, Ray Train leave there by design.
OF_RAY = ("_StatsActor", "_AutoscalingCoordinatorActor", "TrainStateActor")
_before: set[str] = set()  # actors that were there when the test began
FAKE = ("-m", "tests.support.fake_run")


def living() -> dict[str, str]:
    """The actors of the tests' Ray, names of classes by id."""
    here = ray.get_runtime_context().gcs_address  # another Ray may run on this machine
    actors = list_actors(address=here, limit=10_000)
    return {actor.actor_id: actor.class_name for actor in actors if actor.state != "DEAD" and actor.class_name not in OF_RAY}


@pytest.fixture(autouse=True)
def actors_before(ray_cluster: str) -> None:
    """What other files' tests have left is not this sweep's: behind a driver that was killed, Ray Train's detached PlacementGroupCleaner
    stays (Ray 2.60: its thread cannot end the actor)."""
    _before.clear()
    _before.update(living())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, ray_cluster: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(driver, "TRAIN", FAKE)


def sweep_of(folder: Path, name: str, space: dict[str, Any], **changes: Any) -> Sweep:
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": str(ROOT / "jobs/configs/digits.yaml"),
                "name": name,
                "output_dir": str(folder),
                "space": space,
                "max_steps": 8,
                "eval_steps": 2,
                "save_steps": 2,
                "val_asr_dirs": ["jobs/data/digits/test_takes"],
                "val_tts_dirs": [],
                **changes,
            }
        )
    )
    return load_sweep(path, {})


def make(folder: Path, name: str, space: dict[str, Any], **changes: Any) -> Ledger:
    run_sweep(sweep_of(folder, name, space, **changes), Console(quiet=True))
    return ledger_of(folder, name)


def ledger_of(folder: Path, name: str) -> Ledger:
    ledger = read_ledger(str(folder / name))
    assert ledger is not None
    return ledger


def starts(folder: Path, name: str) -> dict[str, int]:
    """How often each run was started."""
    return {path.parent.name: len(path.read_text().split()) for path in (folder / name / "trials").glob("*/starts")}


def nothing_left(folder: Path) -> dict[str, Any]:
    """What there is in the cluster, by Ray's state API, and of the processes of trials below a folder."""
    here = ray.get_runtime_context().gcs_address
    actors = [name for identity, name in living().items() if identity not in _before]
    groups = [(g.placement_group_id, g.state) for g in list_placement_groups(address=here, limit=10_000) if g.state != "REMOVED"]
    runs = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "most_ray.cli train --config /dev/stdin" in words or "tests.support.fake_run" in words:
            with contextlib.suppress(psutil.Error):
                runs += [words for file in process.open_files() if file.path.startswith(str(folder))][:1]
    return {"actors": actors, "groups": groups, "processes": runs}


def assert_nothing_left(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while any(nothing_left(folder).values()) and time.monotonic() < deadline:
        os.sched_yield()  # Ray tells of an actor's end a moment behind it
    assert nothing_left(folder) == {"actors": [], "groups": [], "processes": []}


def test_four_trials_on_room_for_one(fake: None, tmp_path: Path) -> None:
    """Promise 30 of docs/promises.md: all end, one after the other, and nothing is left. Each is a run in its own folder,
    stores are shared."""
    ledger = make(tmp_path, "four", {"learning_rate": {"grid": [0.03, 0.01, 0.02, 0.05]}}, search="grid", cpus_per_worker=4.0)
    assert ledger.sweep["concurrent"] == 1
    assert [trial.state for trial in ledger.trials.values()] == ["finished"] * 4
    for trial in ledger.trials.values():
        steps = {result.step: result.metrics["wer/test_takes"] for result in trial.results}
        assert steps == {step: wer_of(trial.values["learning_rate"], step) for step in (2, 4, 6, 8)}
    times = sorted((trial.began, trial.ended or 0.0) for trial in ledger.trials.values())
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    assert starts(tmp_path, "four") == {"001": 1, "002": 1, "003": 1, "004": 1}
    left = " ".join(sorted(path.name for path in (tmp_path / "four").iterdir()))
    assert left == "best.yaml report.html start summary.json sweep.yaml trials trials.jsonl"
    best = load_config(str(tmp_path / "four" / "best.yaml"))
    assert (best.learning_rate, best.name, os.path.realpath(best.output_dir)) == (0.01, "four-best-002", os.path.realpath(tmp_path))
    assert json.loads((tmp_path / "four" / "summary.json").read_text())["best"]["trial"] == 2
    assert_nothing_left(tmp_path)


def test_a_complete_sweep_is_left_alone(fake: None, tmp_path: Path) -> None:
    """The same command again makes no trial anew; more trials may be asked for, other trials may not."""
    space = {"learning_rate": {"uniform": [0.001, 0.05]}}
    first = make(tmp_path, "again", space, max_trials=2)
    before = (tmp_path / "again" / "trials.jsonl").read_bytes()
    make(tmp_path, "again", space, max_trials=2)
    assert (tmp_path / "again" / "trials.jsonl").read_bytes() == before
    third = make(tmp_path, "again", space, max_trials=3)
    assert list(third.trials) == [1, 2, 3] and starts(tmp_path, "again") == {"001": 1, "002": 1, "003": 1}
    assert [third.trials[n].values for n in (1, 2)] == [first.trials[n].values for n in (1, 2)]
    with pytest.raises(ConfigError, match=r"name = 'again'.*another value of space"):
        make(tmp_path, "again", {"learning_rate": {"uniform": [0.001, 0.06]}}, max_trials=3)
    with pytest.raises(ConfigError, match="weight_decay"):
        make(tmp_path, "again", space, max_trials=3, weight_decay=0.5)


def test_trials_that_fail_are_told_and_the_others_go_on(fake: None, tmp_path: Path) -> None:
    """One that cannot be (a split that leaves text no expert), one that ends with an error, one that is killed as by the kernel."""
    space = {"audio_experts": {"choice": [4]}, "learning_rate": {"grid": [0.666, 0.01, 0.999]}}
    ledger = make(tmp_path, "failing", space, max_trials=3)
    reasons = {trial.values["learning_rate"]: (trial.state, trial.reason) for trial in ledger.trials.values()}
    assert reasons[0.01] == ("finished", None)
    assert reasons[0.666] == ("failed", "data error: train_asr_dirs: holds nothing.")
    assert reasons[0.999] == ("failed", "its process was ended by SIGKILL, as the kernel does where memory runs out")
    split = make(tmp_path, "splits", {"audio_experts": {"grid": [8, 4, 7]}}, search="grid", num_experts_per_tok=2, learning_rate=0.01)
    states = {trial.values["audio_experts"]: trial.state for trial in split.trials.values()}
    assert states == {8: "failed", 4: "finished", 7: "failed"}
    assert "must be in 1..7" in str(split.trials[1].reason) and "num_experts_per_tok" in str(split.trials[3].reason)
    assert starts(tmp_path, "splits") == {"002": 1}
    with pytest.raises(RunIncompleteError, match="all 2 of them"):
        make(tmp_path, "none", {"learning_rate": {"grid": [0.666, 0.999]}}, search="grid")


def test_a_space_without_a_valid_trial_is_refused(fake: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"space.*holds no trial that can be trained: 2 were checked.*1\.\.7"):
        make(tmp_path, "impossible", {"audio_experts": {"grid": [8, 9]}}, search="grid")
    assert not (tmp_path / "impossible" / "trials").exists()


def test_a_trial_whose_actor_is_lost_goes_on(fake: None, tmp_path: Path) -> None:
    """As with its node: Tune starts it again, the run goes on behind its checkpoint, and no result is told twice. (Twelve seconds of
    steps: on a busy machine it takes some to see the first result.)"""
    sweep = sweep_of(tmp_path, "lost", {"learning_rate": [0.01]}, max_trials=1, max_steps=240)
    killed: list[int] = []

    def kill_it() -> None:
        while not killed:
            ledger = read_ledger(str(tmp_path / "lost"))
            if ledger and ledger.trials and ledger.trials[1].results:
                killed.extend(p.pid for p in psutil.process_iter(["cmdline"]) if "TrialActor" in " ".join(p.info["cmdline"] or []))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill_it)
    thread.start()
    run_sweep(sweep, Console(quiet=True))
    thread.join()
    ledger = ledger_of(tmp_path, "lost")
    assert killed and ledger.trials[1].state == "finished" and starts(tmp_path, "lost") == {"001": 2}
    lines = [json.loads(line) for line in (tmp_path / "lost" / "trials.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "result"] == list(range(2, 241, 2))
    assert_nothing_left(tmp_path)


def test_asha_stops_the_worse_and_its_state_outlives_a_kill(fake: None, tmp_path: Path) -> None:
    """The best is never stopped; of the others those go on that are in the better half of all that came to their step (0.03 at step 2, not
    at step 4); what was stopped is told with its step."""
    rates = [0.01, 0.05, 0.04, 0.03]
    space = {"learning_rate": {"grid": rates}}
    changes = {"search": "grid", "scheduler": "asha", "reduction_factor": 2.0, "max_concurrent_trials": 1}
    ledger = make(tmp_path, "asha", space, **changes)
    found = {trial.values["learning_rate"]: (trial.state, trial.step) for trial in ledger.trials.values()}
    assert found == {0.01: ("finished", 8), 0.05: ("stopped", 2), 0.04: ("stopped", 2), 0.03: ("stopped", 4)}
    assert ledger.trials[2].reason == "asha, at step 2"
    # The first trials' results alone, as a kill leaves them: what comes behind is decided as before.
    lines = (tmp_path / "asha" / "trials.jsonl").read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"trial": 3' in line)
    (tmp_path / "asha" / "trials.jsonl").write_text("".join(lines[:cut]))
    again = make(tmp_path, "asha", space, **changes)
    assert {trial.values["learning_rate"]: (trial.state, trial.step) for trial in again.trials.values()} == found
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("room", [4, 2])
def test_population_based_training_goes_on_from_the_better(fake: None, tmp_path: Path, room: int) -> None:
    """The worst trial's later runs begin with a better one's checkpoint and its settings, changed within the range; the checkpoint that
    the last run began with is kept. Where there is room for half of the trials they take turns, and are compared all the same."""
    space = {"learning_rate": {"uniform": [0.001, 0.05]}}
    ledger = make(tmp_path, "pbt", space, scheduler="pbt", max_trials=4, max_concurrent_trials=room, max_steps=6)
    assert [trial.state for trial in ledger.trials.values()] == ["finished"] * 4
    replaced = [trial for trial in ledger.trials.values() if len(trial.runs) > 1]
    assert replaced
    for trial in replaced:
        for run, parent in zip(trial.runs[1:], trial.parents[1:], strict=True):
            assert parent is not None and parent["trial"] != trial.number
            lines = [json.loads(line) for line in (tmp_path / "pbt" / "trials" / run / "metrics.jsonl").read_text().splitlines()]
            assert lines[0] == {"kind": "start", "step": parent["step"]}
        assert 0.001 <= trial.values["learning_rate"] <= 0.05
    kept = {(path.parent.parent.name, int(path.parent.name[5:])) for path in (tmp_path / "pbt" / "kept").glob("*/step-*/commit.json")}
    assert kept == {(parent["run"], parent["step"]) for trial in replaced if (parent := trial.parents[-1])}
    spans = [tuple(map(float, line.split())) for path in tmp_path.glob("pbt/trials/*/spans") for line in path.read_text().splitlines()]
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) <= room
    if room < 4:  # every trial was compared with all others at step 2: the worst of the first rates is among those replaced
        first = {number: read_values(tmp_path / "pbt", number) for number in ledger.trials}
        worst = max(first, key=lambda number: abs(first[number] - 0.01))
        assert len(ledger.trials[worst].runs) > 1
    assert_nothing_left(tmp_path)


def read_values(sweep: Path, number: int) -> float:
    """The learning rate that a trial began with."""
    lines = map(json.loads, (sweep / "trials.jsonl").read_text().splitlines())
    return next(line["values"]["learning_rate"] for line in lines if line["kind"] == "trial" and line["trial"] == number)


@pytest.mark.parametrize("several", [False, True])
def test_tpe_learns_and_goes_on(fake: None, tmp_path: Path, several: bool) -> None:
    """Optuna's proposals through Ray, with one objective and with two; a second start knows what the first has found and repeats no
    proposal of its."""
    space = {"learning_rate": {"loguniform": [0.001, 0.1]}, "lr_scheduler": ["linear", "cosine"], "num_experts_per_tok": "1..2"}
    changes: dict[str, Any] = {"search": "tpe", "scheduler": "none" if several else "asha"}
    if several:
        changes["objectives"] = ["wer/test_takes", "max:loss/asr/test_takes"]
    make(tmp_path, "tpe", space, max_trials=3, **changes)
    ledger = make(tmp_path, "tpe", space, max_trials=6, **changes)
    points = Counter(json.dumps(trial.values) for trial in ledger.trials.values())
    assert len(points) == 6 and set(ledger.trials) == set(range(1, 7))
    assert all(trial.state in ("finished", "stopped") for trial in ledger.trials.values())
    assert all(0.001 <= t.values["learning_rate"] <= 0.1 and t.values["num_experts_per_tok"] in (1, 2) for t in ledger.trials.values())


def test_the_time_that_is_allowed_ends_a_sweep(fake: None, tmp_path: Path) -> None:
    """Trials under way stop behind a checkpoint and are open: with more time the same command goes on there."""
    space = {"learning_rate": {"grid": [0.01, 0.02]}}
    endless = {"search": "grid", "max_steps": 4000, "eval_steps": 20, "save_steps": 20}
    cut = make(tmp_path, "late", space, max_hours=12 / 3600, **endless)
    assert {trial.state for trial in cut.trials.values()} == {"open"} and all(trial.step for trial in cut.trials.values())
    assert_nothing_left(tmp_path)
    for trial in cut.trials.values():
        lines = (tmp_path / "late" / "trials" / trial.runs[0] / "metrics.jsonl").read_text().splitlines()
        trained = [json.loads(line)["step"] for line in lines if json.loads(line)["kind"] == "train"]
        assert trained == list(range(1, len(trained) + 1))
        checkpoints = sorted((tmp_path / "late" / "trials" / trial.runs[0] / "checkpoints").iterdir())
        assert int(checkpoints[-1].name[5:]) == trained[-1]


def test_a_killed_driver(ray_cluster: str, tmp_path: Path) -> None:
    """SIGKILL in the middle: the same command ends the sweep, every trial counted once, no finished trial run again; SIGTERM likewise, with
    exit code 75."""
    sweep_of(
        tmp_path, "killed", {"learning_rate": {"grid": [0.01, 0.02, 0.03, 0.04]}}, search="grid", max_steps=40, max_concurrent_trials=1
    )
    script = (
        "import sys; from most_ray.service.tune import runner; "
        f"runner.TRAIN = {FAKE!r}; from most_ray.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "sweep", "--config", str(tmp_path / "killed.yaml"), "--ray_address", ray_cluster]

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for(process: subprocess.Popen[bytes], trial: int) -> None:
        while process.poll() is None:
            ledger = read_ledger(str(tmp_path / "killed"))
            if ledger and trial in ledger.trials and ledger.trials[trial].results:
                return
            os.sched_yield()
        raise AssertionError(process.stderr and process.stderr.read().decode())

    first = started()
    wait_for(first, 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = started()
    wait_for(second, 3)
    second.send_signal(signal.SIGTERM)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 75, said.decode()
    assert "Run the same command again to resume" in said.decode()
    third = started()
    _, said = third.communicate(timeout=180)
    assert third.returncode == 0, said.decode()
    ledger = ledger_of(tmp_path, "killed")
    assert [(trial.number, trial.state, trial.runs) for trial in ledger.trials.values()] == [
        (number, "finished", [f"{number:03d}"]) for number in (1, 2, 3, 4)
    ]
    counts = starts(tmp_path, "killed")
    assert counts["001"] == counts["004"] == 1 and counts["002"] == counts["003"] == 2
    lines = [json.loads(line) for line in (tmp_path / "killed" / "trials.jsonl").read_text().splitlines()]
    assert Counter(line["trial"] for line in lines if line["kind"] == "end") == {1: 1, 2: 1, 3: 1, 4: 1}
    results = Counter((line["run"], line["step"]) for line in lines if line["kind"] == "result")
    assert set(results.values()) == {1} and len(results) == 4 * 20
    assert_nothing_left(tmp_path)


def test_two_drivers_of_one_sweep(fake: None, tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "taken", {"learning_rate": [0.01, 0.02]})
    from most_ray.io.run_folder import RunFolder
    from most_ray.sweep.ledger import LedgerFile

    held = LedgerFile(RunFolder(str(tmp_path / "taken")))
    with pytest.raises(ConfigError, match="being swept by another process"):
        run_sweep(sweep, Console(quiet=True))
    held.close()


def test_the_winner_by_itself_has_the_trials_word_error_rate(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs: two trials, and best.yaml trained alone, to the last digit; and the report of it all."""
    monkeypatch.chdir(ROOT)
    space = {"expert_split": "affinity | interleaved", "audio_experts": "4..5"}
    validation = {"val_asr_dirs": [str(few_digits(ROOT / "jobs/data/digits/test_takes", tmp_path / "test_takes"))]}
    sweep = sweep_of(tmp_path, "real", space, search="grid", max_trials=2, max_steps=6, **validation)
    run_sweep(sweep, Console(quiet=True))
    ledger = ledger_of(tmp_path, "real")
    assert [trial.state for trial in ledger.trials.values()] == ["finished"] * 2
    assert_nothing_left(tmp_path)
    summary = json.loads((tmp_path / "real" / "summary.json").read_text())
    assert main(["train", "--config", str(tmp_path / "real" / "best.yaml")]) == 0
    alone = json.loads((tmp_path / f"real-best-{summary['best']['run']}" / "summary.json").read_text())
    assert alone["wer"]["test_takes"] == summary["best"]["metrics"]["wer/test_takes"]
    assert alone["loss"] == summary["best"]["metrics"]["train/loss"]
    assert main(["report", str(tmp_path / "real")]) == 0
    affinity = json.loads((tmp_path / "real" / "affinity.json").read_text())
    of_affinity = next(trial for trial in ledger.trials.values() if trial.values["expert_split"] == "affinity")
    assert of_affinity.settings["audio_expert_indices"] == sorted(affinity["order"][-4:])
