from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from most_ray.checkpoint import catalog, reader, shards, writer
from most_ray.checkpoint.shards import Staging
from most_ray.checkpoint.writer import CheckpointWriter
from most_ray.errors import CheckpointError
from most_ray.io import retries
from tests.support.checkpoints import save, saved_at, small, weight_in
from tests.support.gloo import run_ranks


def test_an_attempt_that_was_replaced_cannot_commit(tmp_path: Path) -> None:
    for answers in ([False], [True, False]):  # asked before anything is touched, and again before the marker
        with pytest.raises(CheckpointError, match="replaced by a newer one"):
            save(tmp_path / "c", small(), may_commit=lambda answers=answers: answers.pop(0) if answers else False)
        assert not answers and not (tmp_path / "c" / catalog.COMMIT).exists()


def test_a_replaced_attempt_leaves_the_newer_ones_checkpoint_alone(tmp_path: Path) -> None:
    save(tmp_path / "c", small())
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    for may_commit in (lambda: False, lambda: True):
        with pytest.raises(CheckpointError, match="replaced by a newer one"):
            save(tmp_path / "c", small(), may_commit=may_commit)
        assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The copy is that of the call's moment, from the first save on; the next save waits for the one before."""
    going, state = threading.Event(), small(1.0)
    made = CheckpointWriter()
    content = {"seen": [1]}
    for step in (1, 2):
        state.step = step
        made.save(str(tmp_path / f"step-00000000{step}"), state, content, lambda _: going.wait(10) and None, lambda: True)
        content["seen"].append(2)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1.0)
        if step == 1:
            assert made.poll() == [] and not (tmp_path / "step-000000001" / catalog.COMMIT).exists()
            threading.Timer(0.3, going.set).start()
    made.wait()
    assert [(saved.step, saved.uri) for saved in made.poll()] == [(step, str(tmp_path / f"step-00000000{step}")) for step in (1, 2)]
    assert made.poll() == []
    assert 0.2 < made.stall_seconds < 5.0, "the second save waited for the first"
    made.close()
    assert [weight_in(tmp_path / f"step-00000000{step}") for step in (1, 2)] == [1.0, 2.0]
    assert reader.read_state(tmp_path / "step-000000001")["seen"] == [1]


def test_with_overlap_the_next_optimizer_step_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, gate = shards._copy, threading.Event()
    monkeypatch.setattr(shards, "_copy", lambda *arguments: gate.wait(10) and copy(*arguments))
    state, made = small(1.0), CheckpointWriter(overlap=True)
    for step in (1, 2):
        gate.clear()
        expected = state.model.weight.detach().clone()
        made.save(str(tmp_path / str(step)), state, {}, lambda _: None, lambda: True)
        stalled = made.stall_seconds
        state.model(torch.ones(3, 40)).sum().backward()
        threading.Timer(0.3, gate.set).start()
        state.optimizer.step()
        assert made.stall_seconds - stalled > 0.2 and not torch.equal(state.model.weight, expected)
        made.wait()
        again = small()
        reader.load(tmp_path / str(step), again)
        assert torch.equal(again.model.weight, expected)
    made.close()
    state.optimizer.step()


def test_an_error_in_the_background_comes_with_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, made = small(), CheckpointWriter()

    def broken(_: Path) -> None:
        raise RuntimeError("no tokenizer")

    calls: list[Callable[[], Any]] = [made.wait, lambda: made.save(str(tmp_path / "d"), state, {}, lambda _: None, lambda: True)]
    for number, call in enumerate(calls):
        made.save(str(tmp_path / f"c{number}"), state, {}, broken, lambda: True)
        with pytest.raises(RuntimeError, match=r"could not be written on rank 0 \(no tokenizer\)"):
            call()
        assert made.poll() == [] and not (tmp_path / f"c{number}").exists()
    made.save(str(tmp_path / "c"), state, {}, broken, lambda: True)
    while made._thread is not None and made._thread.is_alive():
        threading.Event().wait(0.01)
    with pytest.raises(RuntimeError, match="no tokenizer"):
        made.poll()
    monkeypatch.setattr(writer, "all_gather_or_raise", lambda work, group: 1 / 0)  # as when a rank is lost in a collective
    made.save(str(tmp_path / "c"), state, {}, lambda _: None, lambda: True)
    with pytest.raises(RuntimeError, match="was not completed"):
        made.wait()
    made.close()


def test_the_first_save_needs_no_new_memory_after_prepare(tmp_path: Path) -> None:
    state, staging = small(), Staging()
    made = CheckpointWriter()
    made.prepare(state)
    buffer = made._staging._buffer
    made.save(str(tmp_path / "c"), state, {}, lambda _: None, lambda: True)
    assert made._staging._buffer is buffer and len(buffer) > len(staging._buffer) == 0
    made.close()


def test_storage_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    write = Staging.write

    def failing(self: Staging, path: Path) -> tuple[int, str]:
        written = write(self, path)
        if failures:
            raise failures.pop()
        return written

    monkeypatch.setattr(retries, "sleep", lambda _: None)
    monkeypatch.setattr(Staging, "write", failing)
    saved_at(tmp_path, 4)
    assert not failures and weight_in(catalog.committed(str(tmp_path))[0]) == 4.0


def test_a_half_written_file_goes_where_the_folder_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a newer attempt's by then."""
    answers = [True, False]

    def full(self: Staging, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Staging, "write", full)
    with pytest.raises(CheckpointError, match="no room left"):
        save(tmp_path / "c", small(), may_commit=lambda: answers.pop(0))
    assert list((tmp_path / "c").iterdir()) == []


def fill_the_disk(folder: str) -> list[str]:
    """With a limit on the size of files, as a quota has it: what the errors say."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    messages = []
    for number, room in enumerate((20_000, 20_000, hard)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        made = CheckpointWriter(background=number == 1)
        try:
            made.save(catalog.step_uri(folder, 7), small(7.0), {}, lambda _: None, lambda: True)
            made.wait()
        except CheckpointError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if number < 2:
            assert not Path(catalog.step_uri(folder, 7)).exists()
        made.close()
    return messages


def test_a_full_disk_is_told_and_hurts_nothing(tmp_path: Path) -> None:
    uri = saved_at(tmp_path, 3)[0]
    (messages,) = run_ranks(1, fill_the_disk, str(tmp_path))
    assert len(messages) == 2, "with room again, it goes on"
    for message in messages:
        assert message.startswith(f"output_dir = '{tmp_path}/step-000000007': has no room left for a checkpoint of 0 MB (File too large).")
        assert message.endswith(f"The last checkpoint is intact: {uri}.")
    assert [weight_in(at) for at in catalog.committed(str(tmp_path))] == [3.0, 7.0]


def die_in(phase: str, uri: str) -> None:
    """Save, and be killed on the way."""

    def die(*_: Any) -> Any:
        os._exit(9)

    asked: list[int] = []
    if phase == "before any file":
        Staging.write = die  # type: ignore[method-assign]
    elif phase == "in a file":
        shards.os.fsync = die
    elif phase == "between files":
        writer._SaveTask._commit = die  # type: ignore[method-assign]
    elif phase == "in the marker":
        Path.replace = die  # type: ignore[method-assign]

    def may_commit() -> bool:
        asked.append(1)
        return len(asked) == 1 or phase != "before the marker" or die()

    save(uri, small(2.0), may_commit=may_commit)


@pytest.mark.parametrize(
    ("phase", "left"),
    [
        ("before any file", []),
        ("in a file", ["rank-00000.safetensors"]),
        ("between files", ["rank-00000.safetensors"]),
        ("before the marker", ["rank-00000.safetensors", "state.json"]),
        ("in the marker", ["rank-00000.safetensors", "state.json"]),
    ],
)
def test_a_kill_in_any_phase_leaves_the_last_one_the_newest(tmp_path: Path, phase: str, left: list[str]) -> None:
    saved_at(tmp_path, 1)
    corrupt = catalog.step_uri(str(tmp_path), 2)
    process = multiprocessing.get_context("forkserver").Process(target=die_in, args=(phase, corrupt))
    process.start()
    process.join(120)
    assert process.exitcode == 9
    assert sorted(path.name for path in Path(corrupt).iterdir() if not path.name.startswith(".")) == left, "it died where it was meant to"
    uri, damaged = catalog.latest_valid(str(tmp_path))
    assert uri is not None and weight_in(uri) == 1.0 and damaged == []
    saved_at(tmp_path, 2)
    assert weight_in(corrupt) == 2.0


def test_a_checkpoint_that_would_not_be_whole_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 16 of docs/promises.md: the ranks' files are counted against every tensor's size before the marker."""
    uri = catalog.step_uri(str(tmp_path), 1)
    plan = Staging.plan

    def forgetful(self: Staging, parts: Any) -> None:
        plan(self, parts[1:])

    monkeypatch.setattr(Staging, "plan", forgetful)
    with pytest.raises(RuntimeError, match=r"would hold 0 of [\d,]+ values of model\.\S+ \(not whole: 1 tensor\)"):
        save(uri, small())
    assert catalog.committed(str(tmp_path)) == [] and not Path(uri).exists()
