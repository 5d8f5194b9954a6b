"""Trackers hold every line once, whatever was killed when; they never hold up or end a run; keys are written nowhere."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from most_ray.config import config_from
from most_ray.io.journal import Journal, read_journal
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import AXES, event_records, key_of, lines_in_event_files, row_of
from most_ray.trackers.base import Background, Secret
from most_ray.trackers.select import trackers_of, wandb_key
from most_ray.trackers.tensorboard import TensorBoard
from most_ray.trackers.wandb import Wandb
from tests.conftest import ROOT
from tests.support.tracking import wandb_rows

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
    tracker.begin(first - 1, metrics)
    for line in lines(first, last):
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
    assert [row["_step"] for row in rows] == list(range(len(rows))), "synchronised one after the other, the files go on in one run"
    row = next(row for row in rows if row.get("train/step") == 7)
    assert row["experts/load/text/0"] == 3 and row["mix/asr/a"] == 0.5 and "train/asr_loss" not in row
    assert not any("tokens" in name or "busiest" in name for name in row)
    held = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not held and KEY not in caplog.text
    own = [process for process in psutil.Process().children(recursive=True) if "wandb" in process.name()]
    assert not psutil.wait_procs(own, timeout=30)[1], "nor does a process of its own stay"


def test_online_a_line_counts_as_logged_where_it_has_reached_the_server(tmp_path: Path) -> None:
    tracker = make_wandb(tmp_path / "run")
    tracker._mode = "online"
    rows = {0: ("train", 1), 1: ("train", 2), 2: None, 3: ("evaluation", 1), 4: ("train", 3)}
    tracker._run = SimpleNamespace(step=4, summary={})
    tracker._take_stock(rows)
    assert tracker._logged == {("train", 1), ("train", 2), ("evaluation", 1)} and tracker._next == 4 and not tracker._marks
    elsewhere = make_wandb(tmp_path / "elsewhere")  # its local files lie on another machine
    elsewhere._mode = "online"
    elsewhere._run = SimpleNamespace(step=50, summary={"train/step": 45, "eval/step": 40, "train/loss": 1.0})
    elsewhere._take_stock({})
    assert not elsewhere._logged and elsewhere._next == 50 and elsewhere._marks == {"train": 45, "evaluation": 40}


def test_the_trials_of_a_sweep_are_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    given: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **keywords: given.update(keywords))
    config = config_from({"name": "001", "wandb_project": "p", "wandb_mode": "offline", "wandb_group": "splits"})
    Wandb(config, str(tmp_path), None)._init(tmp_path)
    assert (given["name"], given["group"]) == ("001", "splits")


def shown_by_tensorboard(run: Path) -> Counter[tuple[str, int]]:
    """Tags and steps that TensorBoard would show: a start at a step hides what came before it, from there on."""
    from tensorboardX.proto import event_pb2

    shown: list[tuple[str, int]] = []
    for path in sorted(run.glob("tensorboard/events.*")):
        for data in event_records(path.read_bytes()):
            event = event_pb2.Event.FromString(data)
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [(tag, step) for tag, step in shown if step < event.step]
            shown += [(value.tag, event.step) for value in event.summary.value]
    return Counter(shown)


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
    assert lines_in_event_files(run / "tensorboard") == {
        key_of(line) for line in read_journal(run / "metrics.jsonl") if key_of(line)[0] in AXES
    }


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

    def begin(self, step: int, metrics: Path) -> None:
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
    tracker.begin(0, Path("none"))
    for step in range(3):
        tracker.log(train(step + 1))
        tracker.checkpoint(step + 1, "somewhere")
    tracker.close()
    tracker.close()
    assert fake.logged == 1 and fake.closed
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "training goes on: no network for *** at https://***@host" in caplog.text and KEY not in caplog.text


def test_a_tracker_that_hangs_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    tracker = Background("Fake", Fake(lambda: release.wait(60) and None), patience=0.01)
    tracker.begin(0, Path("none"))
    for step in range(50):
        tracker.log(train(step + 1))
    tracker.close()
    assert "is left behind" in caplog.text
    release.set()


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
    tracker.begin(0, run / "metrics.jsonl")
    tracker.checkpoint(100, str(uri))
    tracker.checkpoint(200, "s3://user:word@bucket/run/step-000000200?region=x")
    tracker.checkpoint(300, str(run / "pruned meanwhile"))
    tracker.close()
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    held = path.read_bytes()
    assert uri.as_uri().encode() in held and b"s3://***@bucket/run/step-000000200?***" in held and b"word" not in held
    assert b"step-100" in held and b"step-200" in held and f"model-{tracker.id}".encode() in held
    assert not [path for path in run.glob("wandb/**/*") if path.is_file() and b"weightsweights" in path.read_bytes()]
