"""The lock on a run: one process at a time, told at once; free when its holder has ended, however it ended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from most_ray.config import config_from
from most_ray.errors import ConfigError, DataError
from most_ray.io import storage
from most_ray.runs import run_lock
from most_ray.runs.run_lock import LEASE, LOCK, RunLock, is_held
from most_ray.train import run as engine

HOLD = "import sys; from most_ray.runs.run_lock import RunLock; lock = RunLock(sys.argv[1], 'trained'); print('held', flush=True); input()"


@contextlib.contextmanager
def held_elsewhere(uri: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds a run; killed at the end."""
    with subprocess.Popen([sys.executable, "-c", HOLD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LEASE_S", 0.5)
    monkeypatch.setattr(run_lock, "RENEW_S", 0.02)


def test_another_process_is_refused_at_once_until_the_holder_has_gone(tmp_path: Path) -> None:
    """And a killed holder leaves nothing that keeps others out."""
    uri = str(tmp_path / "runs" / "r")
    with held_elsewhere(uri) as process:
        assert is_held(uri)
        with pytest.raises(
            ConfigError, match=rf"^name = '{uri}': is being trained by another process\. Wait for it \(process {process.pid} on "
        ):
            RunLock(uri, "trained")
    assert not is_held(uri)
    RunLock(uri, "trained").close()


def test_a_free_run_keeps_nothing_of_its_lock(tmp_path: Path) -> None:
    """Of a folder that was made for it, not even the folder."""
    with RunLock(str(tmp_path / "runs" / "r"), "trained"):
        assert (tmp_path / "runs" / "r" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with RunLock(str(tmp_path / "runs" / "r"), "trained"):
        (tmp_path / "runs" / "r" / "metrics.jsonl").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "r", "metrics.jsonl"]


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    taken: list[RunLock] = []

    def take() -> None:
        with contextlib.suppress(ConfigError):
            taken.append(RunLock(str(tmp_path), "trained"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].close()


def test_a_lock_file_that_its_holder_has_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the file just before it is removed must not hold a lock that nobody else sees."""
    first, flock, stolen = RunLock(str(tmp_path), "trained"), run_lock.fcntl.flock, []

    def close_first(file: Any, how: int) -> None:
        if not stolen:
            stolen.append(file.fileno())
            first.close()
        flock(file, how)

    monkeypatch.setattr(
        run_lock, "fcntl", SimpleNamespace(flock=close_first, LOCK_EX=run_lock.fcntl.LOCK_EX, LOCK_NB=run_lock.fcntl.LOCK_NB)
    )
    second = RunLock(str(tmp_path), "trained")
    assert (tmp_path / LOCK).exists()
    with pytest.raises(ConfigError, match="another process"):
        RunLock(str(tmp_path), "trained")
    second.close()


def test_the_lock_of_another_machine_is_waited_for(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """It may be lost, and then its file system frees its locks by and by; a living one keeps the run."""
    monkeypatch.setattr(run_lock, "LOST_S", 0.2)
    lock = RunLock(str(tmp_path), "trained")
    (tmp_path / LOCK).write_text("process 7 on elsewhere\nmark\n")
    with pytest.raises(ConfigError, match="process 7 on elsewhere"):
        RunLock(str(tmp_path), "trained")
    assert caplog.text.count("in case that machine is lost") == 1
    timer = threading.Timer(0.1, lock.close)
    timer.start()
    RunLock(str(tmp_path), "trained").close()
    timer.join()


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^output_dir = .*cannot be locked"):
        RunLock(str(tmp_path / "file" / "r"), "trained")


# Behind a URI


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Go to another machine: its files are others, and so are the locks of its file system."""
    return lambda name: monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / name))


def test_another_machine_is_refused_while_the_holder_renews(quick: None, machine: Any) -> None:
    uri = "memory://leases/living"
    machine("one")
    with RunLock(uri, "trained"):
        machine("two")
        assert is_held(uri)
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"is being trained by another process\. Wait for it \(process \d+ on "):
            RunLock(uri, "trained")
        assert time.monotonic() - began < run_lock.LEASE_S  # at the first renewal
    assert not storage.exists(f"{uri}/{LEASE}") and not is_held(uri)
    RunLock(uri, "trained").close()


def test_on_the_holders_machine_the_lock_of_its_file_system_says_so(machine: Any) -> None:
    """Without waiting for a renewal, which comes every few seconds."""
    uri = "memory://leases/same"
    machine("one")
    with RunLock(uri, "trained"), pytest.raises(ConfigError, match="another process"):
        RunLock(uri, "trained")


def killed(uri: str, machine: Any, name: str) -> None:
    """Leave the lease of a holder on a machine that was killed."""
    machine(name)
    lock = RunLock(uri, "trained")
    assert lock._lease is not None
    lock._lease._ended.set()
    lock._lease._thread.join()
    lock._file.close()
    assert storage.exists(f"{uri}/{LEASE}")


def test_a_killed_holder_is_waited_for_and_then_followed(quick: None, machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    uri = "memory://leases/dead"
    killed(uri, machine, "one")
    machine("two")
    began = time.monotonic()
    with RunLock(uri, "trained"):
        assert time.monotonic() - began >= run_lock.LEASE_S
    assert "waiting up to" in caplog.text and caplog.text.count("\n") == 1


def test_on_its_own_machine_a_killed_holder_is_known_to_have_gone(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As where torchrun starts its ranks again: at once, although leases last a minute."""
    uri = "memory://leases/restarted"
    killed(uri, machine, "one")
    RunLock(uri, "trained").close()
    assert caplog.text == ""


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id": "x"}', b"[" * 1000, b'{"id": 1, "holder": 2, "mark": 3, "count": 4, "time": 5}'])
def test_a_lease_that_is_damaged_or_hours_old_is_nobodys(machine: Any, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    machine("one")
    uri = "memory://leases/damaged"
    storage.write_bytes(f"{uri}/{LEASE}", content)
    RunLock(uri, "trained").close()
    assert caplog.text == ""


def test_a_holder_whose_lease_was_taken_says_so_and_leaves_it(quick: None, machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine("one")
    uri = "memory://leases/lost"
    lock = RunLock(uri, "trained")
    assert lock._lease is not None
    other = {"id": "other", "holder": "process 7 on two", "mark": "m", "time": time.time(), "count": 1}
    for _ in range(100):  # a renewal that was under way may write its own once more
        storage.write_bytes(f"{uri}/{LEASE}", json.dumps(other).encode())
        lock._lease._thread.join(0.05)
        if not lock._lease._thread.is_alive():
            break
    lock.close()
    assert "has taken the run over (process 7 on two)" in caplog.text
    assert json.loads(storage.read_bytes(f"{uri}/{LEASE}"))["id"] == "other"


def test_a_renewal_that_fails_is_tried_again(
    quick: None, machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine("one")
    lock, write, failed = RunLock("memory://leases/shaky", "trained"), storage.write_bytes, threading.Event()
    renewed = threading.Event()

    def shaky(uri: str, data: bytes) -> None:
        if not failed.is_set():
            failed.set()
            raise DataError("storage", uri, "failed after 5 tries.")
        write(uri, data)
        renewed.set()

    monkeypatch.setattr(storage, "write_bytes", shaky)
    assert renewed.wait(30)
    lock.close()
    assert "could not be renewed" in caplog.text


def test_where_the_file_system_has_no_locks_a_lease_is_kept_beside_the_run(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock, "fcntl", SimpleNamespace(flock=unsupported, LOCK_EX=0, LOCK_NB=0))
    with RunLock(str(tmp_path), "trained"):
        assert (tmp_path / LEASE).exists()
        with pytest.raises(ConfigError, match="another process"):
            RunLock(str(tmp_path), "trained")
    assert not (tmp_path / LEASE).exists()


# Engines


def test_a_second_engine_is_refused_before_it_reads_anything(tmp_path: Path) -> None:
    """In one process, as torchrun's rank 0; `most-ray train` and a sweep take the same lock."""
    config = config_from({"output_dir": str(tmp_path), "name": "r", "train_asr_dirs": ["nowhere"], "use_gpu": False})
    with held_elsewhere(config.run_uri), pytest.raises(ConfigError, match="is being trained by another process"):
        engine.train(config, Console(quiet=True))
    with pytest.raises(ConfigError, match="nowhere"):
        engine.train(config, Console(quiet=True))
    assert not is_held(config.run_uri)


def test_a_full_disk_ends_an_engine_without_ray_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/runs/r/metrics.jsonl")

    monkeypatch.setattr(engine, "_run", full)
    monkeypatch.setattr(engine.signal, "signal", lambda *_: None)
    assert engine.main([]) == 2
    rule = "file = '/runs/r/metrics.jsonl': cannot be used (No space left on device). Free some space there, or name another place."
    assert capsys.readouterr().err == f"most-ray: data error: {rule}\n"
