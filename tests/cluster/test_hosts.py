"""Runs over two hosts: one is cut off in the middle and comes back; one cannot talk to the other.

What the hosts are made of on this machine is printed with the figures of each test: network namespaces, or loopback addresses.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from most_ray.io.journal import read_journal
from tests.conftest import ROOT
from tests.end_to_end.faults.harness import Report, by_itself, compare, end_all, finish, flags_of, newest_commit, steps_done
from tests.support import hosts as hosts_module
from tests.support.hosts import DEADLINE_S, Host, Hosts, View, require_namespaces, wait_for

# At the digits run's own rate, 3e-3, rounding grows: runs of one and of two workers part. At this one they differ by 3e-7 for the first 70
# steps, until the first token is that close to the border between two experts. Few and large steps, so that all lie before that.
CHANGES: dict[str, Any] = {"max_steps": 40, "global_batch_size": 192, "save_steps": 2, "learning_rate": 5e-4}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two, with room for one worker each, and for the data tasks on the first."""
    with Hosts(2) as made:
        made[0].start_ray(num_cpus=3)
        yield made
        end_all()


def answer(host: Host, log: Path, script: str) -> str:
    """What a shell script on a host says."""
    log.unlink(missing_ok=True)
    host.start(["sh", "-c", script], log).wait(timeout=DEADLINE_S)
    return log.read_text()


def test_hosts_are_apart(tmp_path: Path) -> None:
    """Names, files and the network: a host's own disk, one that is full, one that cannot be written to; and a cable that can be pulled."""
    require_namespaces()
    shared, own, full, fixed = (tmp_path / name for name in ("shared", "own", "full", "fixed"))
    for folder in (shared, fixed):
        folder.mkdir()
        (folder / "note").write_text("seen by all")
    views = [View(own), View(full, size="4k"), View(fixed, read_only=True)]
    with Hosts(2, private={1: views}) as hosts:
        head, other = hosts
        log = tmp_path / "log"
        assert answer(head, log, "hostname; ip route") == f"host0\n10.77.0.0/24 dev eth0 proto kernel scope link src {head.address} \n"
        assert answer(other, log, f"echo x > {own}/mine; cat {own}/mine {shared}/note {fixed}/note") == "x\nseen by allseen by all"
        assert list(own.iterdir()) == []
        assert "No space left" in answer(other, log, f"head -c 8192 /dev/zero > {full}/x")
        assert "Read-only" in answer(other, log, f"touch {fixed}/x")
        assert answer(head, log, f"touch {full}/x {fixed}/x") == ""

        serve = f"import socket; s = socket.create_server(('{other.address}', 7)); print('up', flush=True); s.accept()[0].recv(1)"
        other.start([sys.executable, "-c", serve], tmp_path / "served")
        wait_for(lambda: (tmp_path / "served").exists() and (tmp_path / "served").read_text(), str)
        connect = f"import socket; s = socket.create_connection(('{other.address}', 7), 5); print(s.getpeername()[0])"
        assert answer(head, log, f'{sys.executable} -c "{connect}"').strip() == other.address
        other.cut_off()
        assert "TimeoutError: timed out" in answer(head, log, f'{sys.executable} -c "{connect}"')  # not refused, not unreachable: silence


def test_hosts_end_with_the_one_who_made_them(tmp_path: Path) -> None:
    """Killed in the middle, a test leaves no process and no namespace."""
    require_namespaces()
    script = "import time, tests.support.hosts as h\nx = h.Hosts(1)\n"
    script += "x[0].start(['sleep', '987654'], x.folder / 'log')\nprint(x.folder, flush=True)\ntime.sleep(1000)"
    maker = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert maker.stdout
    folder = maker.stdout.readline().strip()

    def left() -> list[str]:
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return [line for line in lines if line == "sleep 987654"]

    wait_for(left, str, None)
    maker.kill()
    maker.communicate()
    wait_for(lambda: not left(), str)
    shutil.rmtree(folder)


def test_without_namespaces_a_host_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests run on where the kernel allows no more: nodes on loopback addresses of their own, lost by SIGKILL."""
    monkeypatch.setattr(hosts_module, "why_no_namespaces", lambda: "tried without")
    with pytest.raises(RuntimeError, match="files of its own here: tried without"):
        Hosts(2, private={1: [View(Path("/nowhere"))]})
    with Hosts(2) as hosts:
        assert hosts.kind == "loopback addresses and SIGKILL (tried without)"
        for host in hosts:
            host.start_ray(num_cpus=1)
        assert sorted(hosts.alive()) == [host.address for host in hosts]
        hosts[1].cut_off()
        wait_for(lambda: hosts.alive() == [hosts[0].address], str)
        hosts[1].switch_on()
        hosts[1].start_ray(num_cpus=1)


class Run:
    """`most-ray train` on the first host, a worker to a host, and when what happened to it (seconds since it was started)."""

    def __init__(self, hosts: Hosts, folder: Path, **changes: Any) -> None:
        self.folder, self.log = folder, folder / "run.log"
        words = flags_of(folder, "run", **{**CHANGES, "cpus_per_worker": 2, **changes})
        self._began = time.monotonic()
        self.process = hosts[0].start([sys.executable, "-m", "most_ray.cli", "train", *words], self.log)

    def now(self) -> float:
        return time.monotonic() - self._began

    def until(self, what: Callable[[], object]) -> float:
        """Wait for it; when it came."""
        wait_for(what, self.log.read_text, self.process)
        return self.now()

    def end(self) -> int:
        try:
            return self.process.wait(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(self.log.read_text()[-4000:])

    def told(self) -> str:
        """What it has said, in one line: it breaks lines where they are too long for a terminal."""
        return " ".join(self.log.read_text().split())

    def starts(self) -> list[int]:
        """The workers of each attempt that has come to train."""
        journal = self.folder / "run" / "metrics.jsonl"
        return [line["workers"] for line in read_journal(journal, "start")] if journal.exists() else []

    def steps(self) -> int:
        return steps_done(self.folder, "run")


def worker_begun_after(host: Host, moment: float) -> bool:
    return any(worker.create_time() > moment for worker in host.workers())


def test_a_host_is_cut_off_and_comes_back(hosts: Hosts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 workers, then 1 as a host is lost in silence, then 2 again: the same trace, losses to 1e-4, every step once, nobody is asked."""
    head, other = hosts
    other.start_ray(num_cpus=2)
    run = Run(hosts, tmp_path, num_workers="1,2")
    run.until(lambda: newest_commit(tmp_path, "run") >= 2)
    assert [len(host.workers()) for host in hosts] == [1, 1] and head.address != other.address

    kept, moment = newest_commit(tmp_path, "run"), time.time()
    other.cut_off()
    cut, made = run.now(), run.steps()
    straight = by_itself(tmp_path, "straight", 1, **CHANGES)  # while nothing else is to be done: Ray has not noticed yet
    noticed = run.until(lambda: other.address not in hosts.alive()) - cut
    run.until(lambda: worker_begun_after(head, moment))

    other.switch_off()  # until now what was cut off has lived on, with the run's folder in its reach
    other.switch_on()
    back = run.now()
    other.start_ray(num_cpus=2)
    joined = run.now() - back
    began = run.until(lambda: run.starts() == [2, 1]) - cut
    on = run.until(lambda: run.steps() > made) - cut
    asked = run.until(lambda: "stopped after a checkpoint (resized)" in run.told())
    grown = run.until(lambda: run.starts() == [2, 1, 2])
    grown_at = newest_commit(tmp_path, "run")
    assert [len(host.workers()) for host in hosts] == [1, 1]

    assert run.end() == 0, run.told()
    assert f"The workers were lost (rank 1: its node {other.address} is gone); resuming from the checkpoint of step" in run.told()
    finish(straight, tmp_path, "straight")
    report = compare(Report(), tmp_path, "straight", "run")
    assert report.passed, (report, run.told())
    with capsys.disabled():
        print(
            f"\n{hosts.kind}: cut off behind step {made}, checkpoint {kept}. Ray notices after {noticed:.0f} s, the other host's worker ",
            end="",
        )
        print(
            f"begins after {began:.0f} s and makes a new step after {on:.0f} s. The host's Ray is up {joined:.0f} s after its return, the ",
            end="",
        )
        print(f"run stops for it after {asked - back:.0f} s and trains on both after {grown - back:.0f} s, at step {grown_at}. ", end="")
        print(f"Losses differ by {report.loss_difference:.1e}; {run.now():.0f} s in all.")


def test_a_group_that_cannot_be_made_says_why_and_leaves_its_room(hosts: Hosts, tmp_path: Path) -> None:
    """A network by which the workers cannot reach each other: told by its own words, and each attempt finds the room of the one before."""
    hosts[1].start_ray(num_cpus=2, GLOO_SOCKET_IFNAME="none0")
    run = Run(hosts, tmp_path, num_workers=2, max_failures=1, room_timeout_s=60)
    assert run.end() == 1
    assert "failed 2 times within 3600 s, the last time: " in run.told() and "Unable to find address for: none0" in run.told(), run.told()
