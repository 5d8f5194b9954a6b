"""Trackers hold every line once, whatever was killed when; they never hold up or end a run; keys are written nowhere."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.journal import Journal, journal_lines
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import row_of
from most_ray.trackers.base import Background, Line, Secret
from most_ray.trackers.select import tracker_notes, trackers_of, uses_wandb, wandb_key, with_environment
from most_ray.trackers.tensorboard import TensorBoard
from most_ray.trackers.wandb import Wandb
from tests.conftest import ROOT
from tests.support.tracking import WandbServer, shown_by_tensorboard, wandb_rows

KEY = "0123456789abcdef" * 2 + "01234567"
START = {"kind": "start", "step": 0, "workers": 2, "first_expert_layer": 1, "experts": {"text": [0, 1], "audio": [2, 3]}}
Make = Callable[[Path], Any]


def train(step: int) -> dict[str, Any]:
    figures = {"loss": 5.0 / step, "samples": 64, "asr_loss": None, "skipped_steps": 0, "leaked": 0, "expert_max_over_mean": {"text": 1.5}}
    load = {"expert_load": {"text": [3, 1, 0, 0], "audio": [0, 0, 2, 2]}}
    mix = {"mix": {"asr/a": {"records": step, "tokens": 9 * step, "share": 0.5, "target": 0.5}}}
    return {"kind": "train", "step": step, "time": 1e9 + step, **figures, **load, **mix, "layers": {"busiest_expert": {"text": [0]}}}


def experts(step: int) -> dict[str, Any]:
    return {"kind": "experts", "step": step, "steps": 100, "load": {"text": [[3, 1, 0, 0]] * 2, "audio": [[0, 0, 2, 2]] * 2}}


def evaluation(step: int) -> dict[str, Any]:
    figures = {"task": "asr", "loss": 1.0, "words": {"rate": 0.02, "interval": [0.01, 0.04]}, "characters": {"rate": 0.01}}
    sample = {"set": "asr/val", "id": "a|1", "reference": "one", "hypothesis": "two"}
    return {
        "kind": "evaluation",
        "step": step,
        "seconds": 2.0,
        "sets": {"asr/val": figures},
        "overall": {"asr": figures},
        "samples": [sample],
    }


def lines(first: int, last: int) -> Iterator[dict[str, Any]]:
    """What a run writes: evaluations come when ten more steps are made."""
    yield {**START, "step": first - 1}
    for step in range(first, last + 1):
        yield train(step)
        if step % 100 == 0:
            yield experts(step)
        if step % 100 == 10 and step > 100:
            yield evaluation(step - 10)


def drive(tracker: Any, metrics: Path, first: int, last: int, pause_at: int | None = None) -> None:
    """A start of a run: the journal is cut back, and lines go to it and then to the tracker."""
    journal = Journal(metrics, first - 1)
    tracker.begin(first - 1, journal_lines(metrics, size=metrics.stat().st_size))
    known = {line["step"] for line in journal.evaluations}
    for line in lines(first, last):
        if line["kind"] == "evaluation" and line["step"] in known:
            continue  # a run makes no evaluation twice
        journal.write(line)
        tracker.log(line)
        if line["step"] == pause_at:
            sys.stdout.write("paused\n")
            sys.stdout.flush()
            sys.stdin.readline()  # to be killed here
    journal.close()
    tracker.close()


def make_wandb(run: Path) -> Wandb:
    return Wandb(
        config_from({"output_dir": str(run.parent), "name": run.name, "wandb_project": "p", "wandb_mode": "offline"}), str(run), Secret(KEY)
    )


def make_tensorboard(run: Path) -> TensorBoard:
    return TensorBoard(str(run))


def killed(run: Path, make: str, last: int) -> None:
    """A start that logs steps 1 to `last` and is then killed by SIGKILL, in the middle."""
    code = f"from pathlib import Path; from tests.unit.test_telemetry import drive, {make}; run = Path({str(run)!r})\n"
    code += f"drive({make}(run), run / 'metrics.jsonl', 1, {last + 10}, pause_at={last})"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdin
    assert process.stdout.readline() == "paused\n"
    process.kill()
    process.communicate()


def check_once(counts: Counter[tuple[str, int]], last: int) -> None:
    expected = {("train/loss", step): 1 for step in range(1, last + 1)}
    expected |= {("layers/text/worst_max_over_mean", step): 1 for step in range(100, last + 1, 100)}
    expected |= {("eval/asr/val/wer", step): 1 for step in range(100, last - 9, 100)}
    assert dict(counts) == expected


def counted(rows: list[dict[str, Any]]) -> Counter[tuple[str, int]]:
    probes = {"train/loss": "train/step", "layers/text/worst_max_over_mean": "layers/step", "eval/asr/val/wer": "eval/step"}
    return Counter((name, row[axis]) for row in rows for name, axis in probes.items() if name in row)


@pytest.mark.parametrize("resume", [15, -15], ids=["lines never reached it", "lines beyond the resume reached it"])
def test_wandb_holds_every_line_once_after_a_kill_and_a_resume(tmp_path: Path, resume: int, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 34 of docs/promises.md."""
    run = tmp_path / "run"
    killed(run, "make_wandb", 230)
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    path.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2]
    )  # torn, and short of what was logged, as a kill of a slow writer leaves it
    reached = max(step for name, step in counted(wandb_rows(run)) if name == "train/loss")
    assert 20 < reached < 215
    drive(make_wandb(run), run / "metrics.jsonl", reached + resume + 1, 270)
    drive(make_wandb(run), run / "metrics.jsonl", 251, 320)
    rows = wandb_rows(run)
    check_once(counted(rows), 320)
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers)) and len(list(run.glob("wandb/offline-run-*"))) == 1, "one file, which replaces the run in W&B"
    row = next(row for row in rows if row.get("train/step") == 7)
    assert row["experts/load/text/0"] == 3 and row["mix/asr/a"] == 0.5 and "train/asr_loss" not in row
    assert not any("tokens" in name or "busiest" in name for name in row)
    held = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not held and KEY not in caplog.text
    own = [process for process in psutil.Process().children(recursive=True) if "wandb" in process.name()]
    assert not psutil.wait_procs(own, timeout=30)[1], "nor does a process of its own stay"


def online(run: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> Wandb:
    """A tracker of a start that resumes the run on a server."""
    config = config_from({"output_dir": str(run.parent), "name": run.name, "wandb_project": "p", "wandb_mode": "online"})
    tracker = Wandb(config, str(run), Secret(KEY))
    monkeypatch.setattr(tracker, "_init", lambda root: server.begin(root / "run"))
    monkeypatch.setattr(tracker, "close", lambda: None)
    return tracker


def held_by(server: WandbServer) -> Counter[tuple[str, int]]:
    return counted([row for _, row in server.rows])


@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_online_every_row_arrives_once_wherever_starts_are_killed(data: st.DataObject) -> None:
    """Each start sends what the server may lack; some of that arrives before the start is killed. The next resumes from a checkpoint."""
    server = WandbServer()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        run = Path(folder) / "run"
        (run / "wandb").mkdir(parents=True)
        first = 1
        for _ in range(data.draw(st.integers(0, 4))):
            last = min(300, first + data.draw(st.integers(0, 150)))
            drive(online(run, server, patch), run / "metrics.jsonl", first, last)
            server.arrive(data.draw(st.integers(0, 200)))
            first = max(1, last + 1 - data.draw(st.integers(0, 120)))
        drive(online(run, server, patch), run / "metrics.jsonl", first, 320)
        server.arrive()
    check_once(held_by(server), 320)


def test_online_a_run_of_version_0_1_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has numbered its rows one after the other; what W&B has of them follows from the newest steps that it knows."""
    run, server = tmp_path / "run", WandbServer()
    drive(online(run, server, monkeypatch), run / "metrics.jsonl", 1, 230)
    server.arrive()
    server.rows = [(number, row) for number, (_, row) in enumerate(server.rows)]
    (run / "wandb" / "evaluations.jsonl").unlink()
    assert held_by(server)["eval/asr/val/wer", 200] == 1
    for first, last in ((221, 240), (231, 320)):
        drive(online(run, server, monkeypatch), run / "metrics.jsonl", first, last)
        server.arrive()
    check_once(held_by(server), 320)


def test_online_another_machine_needs_only_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, uri = WandbServer(), f"memory://{tmp_path.name}/run"
    for machine, first, last in (("one", 1, 120), ("two", 101, 220), ("one", 201, 320)):
        monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / machine))
        folder = RunFolder(uri)
        folder.pull("metrics.jsonl")
        tracker = Wandb(config_from({"name": "run", "wandb_project": "p", "wandb_mode": "online"}), uri, Secret(KEY))
        monkeypatch.setattr(tracker, "_init", lambda root: server.begin(root / "run"))
        monkeypatch.setattr(tracker, "close", lambda: None)
        drive(tracker, folder.local / "metrics.jsonl", first, last)
        server.arrive()
        folder.push("metrics.jsonl")
    check_once(held_by(server), 320)


def test_offline_behind_a_uri_the_newest_start_replaces_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{tmp_path.name}/run"
    for machine in ("one", "two"):
        monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / machine))
        tracker = Wandb(config_from({"name": "run", "wandb_project": "p", "wandb_mode": "offline"}), uri, None)
        tracker.begin(0, [train(1)])
        own = Path(tracker._run.dir).parent.name
        tracker.close()
        found = {entry.name.split("/")[0] for entry in storage.list_files(f"{uri}/wandb", ("",))}
        assert {name for name in found if name.startswith("offline-run-")} == {own}


def test_the_trials_of_a_sweep_are_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **keywords: given.update(keywords))
    config = config_from({"name": "001", "wandb_project": "p", "wandb_mode": "offline", "wandb_group": "splits"})
    Wandb(config, str(tmp_path), None)._init(tmp_path)
    assert (given["name"], given["group"]) == ("001", "splits")


@pytest.mark.parametrize("resume", [15, -15], ids=["lines never reached it", "lines beyond the resume reached it"])
def test_tensorboard_shows_every_line_once_after_a_kill_and_a_resume(tmp_path: Path, resume: int) -> None:
    run = tmp_path / "run"
    killed(run, "make_tensorboard", 230)
    (path,) = run.glob("tensorboard/events.*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    reached = max(step for tag, step in shown_by_tensorboard(run) if tag == "train/loss")
    assert 20 < reached < 215
    drive(make_tensorboard(run), run / "metrics.jsonl", reached + resume + 1, 270)
    drive(make_tensorboard(run), run / "metrics.jsonl", 251, 320)
    shown = shown_by_tensorboard(run)
    probes = ("train/loss", "layers/text/worst_max_over_mean", "eval/asr/val/wer")
    check_once(Counter({key: count for key, count in shown.items() if key[0] in probes}), 320)
    assert set(shown.values()) == {1} and shown["eval/samples/text_summary", 200] == 1
    sizes = [path.stat().st_size for path in sorted(run.glob("tensorboard/events.*"))]
    assert len(sizes) == 2 and sizes[0] == 0, "the newest file holds all; the one before is empty"


def test_behind_a_uri_another_machine_goes_on_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"memory://{tmp_path.name}/run"
    folders = []
    for machine, first, last in (("one", 1, 120), ("two", 101, 220), ("one", 201, 320)):
        monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / machine))
        folders.append(RunFolder(uri))
        folders[-1].pull("metrics.jsonl")
        drive(TensorBoard(uri), folders[-1].local / "metrics.jsonl", first, last)
        folders[-1].push("metrics.jsonl")
    assert folders[0].local == folders[2].local != folders[1].local
    there = [entry for entry in storage.list_files(f"{uri}/tensorboard", ("",)) if entry.size]
    assert [Path(entry.name).name for entry in there] == [max(path.name for path in folders[2].local.glob("tensorboard/*"))]
    shown = shown_by_tensorboard(folders[2].local)
    assert set(shown.values()) == {1} and {step for tag, step in shown if tag == "train/loss"} == set(range(1, 321))


def test_scalars_of_a_line_are_compact() -> None:
    many = {"expert_load": {"text": [1] * 64}, "loss": 1.0, "layers": {}}
    assert row_of({"kind": "train", "step": 1, **many}, {}) == {"train/loss": 1.0}
    row = row_of(experts(100), START)
    assert row == {
        **{f"layers/{name}": ratio for name, ratio in (("text/worst_max_over_mean", 1.5), ("audio/worst_max_over_mean", 1.0))},
        **{f"layers/text/max_over_mean/0{layer}": 1.5 for layer in (1, 2)},
        **{f"layers/audio/max_over_mean/0{layer}": 1.0 for layer in (1, 2)},
    }
    row = row_of(evaluation(100), START)
    assert row["eval/asr/val/wer"] == 0.02 and row["eval/overall/asr/wer_high"] == 0.04 and row["eval/asr/val/cer"] == 0.01
    old = {"kind": "evaluation", "step": 1, "wer": {"val": 0.5, "empty": None}, "validation_loss": {"asr/val": 2.0}}
    assert row_of(old, {}) == {"eval/asr/val/wer": 0.5, "eval/asr/val/loss": 2.0}


class Fake:
    """A tracker that does as it is told at its first line."""

    def __init__(self, at_first_line: Callable[[], None]) -> None:
        self.at_first_line, self.logged, self.closed = at_first_line, 0, False

    def begin(self, step: int, lines: Iterable[Line]) -> None:
        pass

    def log(self, line: dict[str, Any]) -> None:
        self.logged += 1
        self.at_first_line()

    def checkpoint(self, step: int, uri: str) -> None:
        self.logged += 1

    def close(self) -> None:
        self.closed = True


def test_a_tracker_that_fails_is_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(f"no network for {KEY} at https://user:word@host")

    fake = Fake(fail)
    tracker = Background("Fake", fake, Secret(KEY))
    tracker.begin(0, [])
    for step in range(3):
        tracker.log(train(step + 1))
        tracker.checkpoint(step + 1, "somewhere")
    tracker.close()
    tracker.close()
    assert fake.logged == 1 and fake.closed
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "training continues: no network for *** at https://***@host" in caplog.text and KEY not in caplog.text


def test_a_tracker_that_hangs_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    tracker = Background("Fake", Fake(lambda: release.wait(60) and None), patience=0.01)
    tracker.begin(0, [])
    for step in range(50):
        tracker.log(train(step + 1))
    tracker.close()
    assert "does not wait for it any longer" in caplog.text
    release.set()


def test_the_end_of_a_run_waits_for_the_lines_of_earlier_starts() -> None:
    """Offline files that hold only part of the run would replace it in W&B."""
    logged: list[Line] = []

    class Slow(Fake):
        def begin(self, step: int, lines: Iterable[Line]) -> None:
            threading.Event().wait(0.3)
            logged.extend(lines)

    tracker = Background("Slow", Slow(lambda: None), patience=0.01)
    tracker.begin(1, [train(1)])
    tracker.close()
    assert logged == [train(1)]


def test_a_key_shows_nowhere_but_travels() -> None:
    secret = Secret(KEY)
    assert KEY not in f"{secret} {secret!r} {[secret]} {vars(Background('x', Fake(lambda: None), secret))}"
    with pytest.raises(TypeError):
        json.dumps({"key": secret})
    assert pickle.loads(pickle.dumps(secret)).reveal() == KEY


def test_the_key_is_looked_up_only_where_the_run_can_use_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    used: dict[str, Any] = {"wandb_project": "p"}
    key = wandb_key(config_from(used))
    assert key and key.reveal() == KEY
    for unused in ({}, {**used, "wandb_mode": "disabled"}, {**used, "wandb_mode": "offline"}):
        assert wandb_key(config_from(unused)) is None
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_key(config_from(used)) is None
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    key = wandb_key(config_from(used))
    assert key and key.reveal() == KEY


@pytest.mark.parametrize(
    ("environment", "stated", "mode", "used", "online"),
    [
        ("offline", None, "offline", True, False),
        ("dryrun", None, "offline", True, False),
        ("disabled", None, "disabled", False, False),
        ("DISABLED", None, "disabled", False, False),
        ("online", None, None, True, True),
        ("", None, None, True, True),
        ("offline", "online", "online", True, True),
        ("disabled", "offline", "offline", True, False),
        ("online", "disabled", "disabled", False, False),
    ],
)
def test_the_mode_of_the_environment_holds_where_the_run_states_none(
    monkeypatch: pytest.MonkeyPatch, environment: str, stated: str | None, mode: str | None, used: bool, online: bool
) -> None:
    """`used`: W&B gets the run, `online`: with a key, which there is."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", environment)
    config = config_from({"wandb_project": "p", "wandb_mode": stated})
    assert with_environment(config).wandb_mode == mode
    assert (uses_wandb(config), wandb_key(config) is not None) == (used, online)
    sent = with_environment(config)
    monkeypatch.delenv("WANDB_MODE")  # as where the workers are
    assert uses_wandb(sent) == used


def test_a_mode_that_overrules_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    notes = tracker_notes(config_from({"wandb_project": "p", "wandb_mode": "online"}))
    assert notes == ["Weights & Biases, project p (online: wandb_mode overrules WANDB_MODE=offline)"]
    assert tracker_notes(config_from({"wandb_project": "p"})) == ["Weights & Biases, project p (offline, in wandb/)"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracker_notes(config_from({"wandb_project": "p"})) == ["Weights & Biases, project p (disabled)"]
    monkeypatch.setenv("WANDB_MODE", "ofline")
    assert tracker_notes(config_from({})) == []
    with pytest.raises(ConfigError, match=r"^WANDB_MODE = .ofline.: is no mode of Weights & Biases\. Did you mean 'offline'"):
        tracker_notes(config_from({"wandb_project": "p"}))


def test_trackers_that_are_not_asked_for_are_not_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from most_ray.config import config_from
from most_ray.trackers.select import trackers_of, wandb_key
for mode in ({{}}, {{"wandb_project": "p", "wandb_mode": "disabled"}}):
    assert trackers_of(config_from(mode), {str(tmp_path)!r}, wandb_key(config_from(mode))) == []
assert not {{"wandb", "tensorboardX"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    asked = {"output_dir": str(tmp_path), "wandb_project": "p", "tensorboard": True}
    assert len(trackers_of(config_from(asked), str(tmp_path / "run"), None)) == 2


def test_checkpoints_are_named_to_wandb_not_uploaded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    uri = run / "checkpoints" / "step-000000100"
    uri.mkdir(parents=True)
    (uri / "rank-0.safetensors").write_bytes(b"weights" * 100)
    tracker = make_wandb(run)
    tracker.begin(0, [])
    tracker.checkpoint(100, str(uri))
    tracker.checkpoint(200, "s3://user:word@bucket/run/step-000000200?region=x")
    tracker.checkpoint(300, str(run / "pruned meanwhile"))
    tracker.close()
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    held = path.read_bytes()
    assert uri.as_uri().encode() in held and b"s3://***@bucket/run/step-000000200?***" in held and b"word" not in held
    assert b"step-100" in held and b"step-200" in held and f"model-{tracker.id}".encode() in held
    assert not [path for path in run.glob("wandb/**/*") if path.is_file() and b"weightsweights" in path.read_bytes()]
