"""Hosts on one machine, each with a Ray node of its own, that can be cut off in the middle, come back, and see other files than the rest.

Where the kernel allows it (root on Linux) a host is a set of namespaces: network, host name, processes, mounts. The hosts hang on a
bridge that is in a namespace too: nothing is named on the machine, nothing leads out of it, and the kernel takes all of it back once
the process that asked for it has ended, however it ends. Elsewhere a host is a loopback address, and being cut off is being killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.conftest import ROOT

DEADLINE_S = 240.0  # for whatever is waited for; only a hang reaches it
_TRAINING = re.compile(r"ray::\S*TrainWorker")

# Process 1 of a host. All of the host's processes end with it, and it ends with the one who holds its standard input, even if that one
# is killed. Orphans are reaped by the kernel.
_INIT = """
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("up", flush=True)
sys.stdin.read()
"""

# Which addresses Ray takes for alive, a line each time it has looked.
_WATCH = """
import json, sys, time
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
client = GcsClient(address=sys.argv[1])
while True:
    try:
        nodes = client.get_all_node_info(timeout=5).values()
        print(json.dumps([n.node_manager_address for n in nodes if n.state == GcsNodeInfo.ALIVE]), flush=True)
    except Exception as error:
        print(f"no answer: {error}", file=sys.stderr, flush=True)
    time.sleep(0.2)
"""


@dataclass(frozen=True)
class View:
    """What one host sees at a path instead of what the others see: an empty disk of `size` (as mount takes it: 64m, 4k), or, `read_only`,
    what is there without the right to write."""

    path: Path
    size: str = "64m"
    read_only: bool = False


@cache
def why_no_namespaces() -> str | None:
    """None where hosts can be namespaces, else what stands against it."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount") if not shutil.which(tool)]
    if missing:
        return f"not on this machine: {', '.join(missing)}"
    there = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    commands = "ip link add name sw type bridge && ip link add name v0 type veth peer name v1"
    tried = subprocess.run([*there, "sh", "-c", commands], capture_output=True, text=True, timeout=30, check=False)
    return None if tried.returncode == 0 else f"the kernel refuses: {tried.stderr.strip()}"


def require_namespaces() -> None:
    """Skip the test where hosts cannot have networks and disks of their own; CI always can."""
    if (reason := why_no_namespaces()) is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"hosts cannot be apart here: {reason}")


def wait_for(what: Callable[[], object], told: Callable[[], str], process: subprocess.Popen[bytes] | None = None) -> float:
    """Wait until `what` holds, while `process` runs; `told` is shown where it does not come. Returns seconds waited."""
    began = time.monotonic()
    while not what():
        assert process is None or process.poll() is None, f"ended with {process.poll()}:\n{told()[-4000:]}"
        assert time.monotonic() < began + DEADLINE_S, f"did not come in {DEADLINE_S:g} s:\n{told()[-4000:]}"
        time.sleep(0.05)  # between two looks at other processes: nothing depends on how long
    return time.monotonic() - began


class _Namespaces:
    """A process 1 with namespaces of its own; ended, all that runs in them is."""

    def __init__(self) -> None:
        words = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            "-S",
            "-c",
            _INIT,
        ]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._process.stdout and self._process.stdout.readline() == b"up\n", "no namespaces"
        self.pid = psutil.Process(self._process.pid).children()[0].pid
        self.enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wdns={ROOT}", "--"]
        self.do("ip link set lo up")

    def do(self, *commands: str, what: str = "--net") -> None:
        """Commands that set the namespace `what` up; seen from it, processes have the numbers that they have here."""
        for command in commands:
            words = ["nsenter", f"--target={self.pid}", what, "--", *command.split()]
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 0, f"{command}: {done.stderr}"

    def processes(self) -> list[psutil.Process]:
        own, found = _network_of(self.pid), []
        for process in psutil.process_iter():
            if _network_of(process.pid) == own:
                found.append(process)
        return found

    def end(self) -> None:
        self._process.kill()  # --kill-child: process 1 goes with it, and everything else with process 1
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()


def _network_of(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


class Host:
    """One machine of several: its address, what runs on it, its cable."""

    def __init__(self, hosts: Hosts, number: int, views: Sequence[View]) -> None:
        self.number, self.name, self.address = number, f"host{number}", hosts.address_of(number)
        self._hosts, self._views = hosts, views
        self._inside: _Namespaces | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def switch_on(self) -> None:
        """As after a reboot: the same address, no process."""
        if not self._hosts.switch:
            return
        self._inside = inside = _Namespaces()
        cable, switch = f"cable{self.number}", self._hosts.switch
        switch.do(
            f"ip link add name {cable} type veth peer name eth0 netns {inside.pid}",
            f"ip link set dev {cable} master sw up",
        )
        inside.do(
            f"ip link set dev eth0 address {_hardware(self.number)} up",
            f"ip addr add {self.address}/24 dev eth0",
            # Of a machine that is gone nobody says so: without this the kernel would, for it finds the neighbour missing.
            *(f"ip neigh add {o} lladdr {_hardware(n)} dev eth0 nud permanent" for n, o in self._hosts.others(self.number)),
        )
        inside.do(f"hostname {self.name}", what="--uts")
        names = self._hosts.folder / f"{self.name}.hosts"
        # As Debian has it: the own name stands for a loopback address, which no other machine can reach.
        others = "".join(f"{address} host{number}\n" for number, address in self._hosts.others(self.number))
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n{others}")
        inside.do(f"mount --bind {names} /etc/hosts", what="--mount")
        for view in self._views:
            view.path.mkdir(parents=True, exist_ok=True)
            commands = [f"mount -t tmpfs -o size={view.size},mode=0777 tmpfs {view.path}"]
            if view.read_only:
                commands = [f"mount --bind {view.path} {view.path}", f"mount -o remount,bind,ro {view.path}"]
            inside.do(*commands, what="--mount")

    def start(self, words: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """A command on this host, in the checkout; what it says goes to the end of `log`. It ends with the host at the latest."""
        with log.open("ab") as output:
            return self._start(words, output, environment)

    def _start(self, words: Sequence[str], output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        enter = self._inside.enter if self._inside else []
        process = subprocess.Popen(
            [*enter, *words],
            cwd=ROOT,
            env={**self._hosts.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def start_ray(self, num_cpus: int, **environment: str) -> None:
        """A Ray node, the head on the first host; returns once Ray counts it in. `environment`: of all that will run in it."""
        hosts = self._hosts
        words = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        words += [f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}", f"--object-store-memory={100 << 20}"]
        if self.number == 0:
            words += ["--head", f"--port={hosts.gcs.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={hosts.folder / 'ray'}"]
        else:
            words += [f"--address={hosts.gcs}"]
        log = hosts.folder / f"{self.name}.log"
        process = self.start(words, log, **environment)
        if self.number == 0:
            hosts.watch(self)
        wait_for(lambda: self.address in hosts.alive(), log.read_text, process)

    def workers(self) -> list[psutil.Process]:
        """The training workers on this host."""
        if self._inside:
            processes = self._inside.processes()
        else:
            roots = [psutil.Process(process.pid) for process in self._started if process.poll() is None]
            processes = [child for root in roots for child in root.children(recursive=True)]
        return [process for process in processes if _TRAINING.match(_command(process))]

    def cut_off(self) -> None:
        """No packet in or out any more, and no word of it to anyone; what runs here runs on. Without namespaces: `switch_off`."""
        if self._hosts.switch:
            self._hosts.switch.do(f"ip link set dev cable{self.number} down")
        else:
            self.switch_off()

    def switch_off(self) -> None:
        """Every process ends at once; nothing is left of the host but its place on the bridge."""
        if self._inside:
            self._inside.end()
            self._inside = None
            assert self._hosts.switch
            try:
                self._hosts.switch.do(f"ip link delete dev cable{self.number}")
            except AssertionError as error:
                if "Cannot find device" not in str(error):  # the kernel takes it away too, at its leisure, or has already
                    raise
        while self._started:
            process = self._started.pop()
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _hardware(number: int) -> str:
    return f"02:00:0a:4d:00:{number + 1:02x}"


class Hosts:
    """`with Hosts(2) as (head, other):`, or by number. Ray is not yet started on them.

    Args:
        count: of hosts.
        private: what single hosts see differently, by their numbers.
        environment: for every process on every host, e.g. Ray's settings.

    Raises:
        RuntimeError: `private` was asked for where there are no namespaces.
    """

    def __init__(self, count: int, private: dict[int, Sequence[View]] | None = None, **environment: str) -> None:
        self.kind = "network namespaces"
        if (reason := why_no_namespaces()) is not None:
            self.kind = f"loopback addresses and SIGKILL ({reason})"
            if private:
                raise RuntimeError(f"a host cannot have files of its own here: {reason}")
        self._count = count
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))  # short: Ray's sockets lie in it
        self.switch = _Namespaces() if reason is None else None
        self.gcs = f"{self.address_of(0)}:{6379 if self.switch else _free_port()}"
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text(os.urandom(32).hex())
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "OMP_NUM_THREADS"}
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = {**kept, **own, "RAY_ADDRESS": self.gcs, **environment}
        self._list: list[Host] = []
        try:
            if self.switch:
                self.switch.do("ip link add name sw type bridge", "ip link set dev sw up")
            for number in range(count):
                self._list.append(Host(self, number, (private or {}).get(number, ())))
                self._list[-1].switch_on()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, number: int) -> Host:
        return self._list[number]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._list)

    def address_of(self, number: int) -> str:
        return f"10.77.0.{number + 1}" if self.switch else f"127.0.0.{number + 2}"

    def others(self, number: int) -> list[tuple[int, str]]:
        return [(other, self.address_of(other)) for other in range(self._count) if other != number]

    def watch(self, head: Host) -> None:
        head.start([sys.executable, "-c", _WATCH, self.gcs], self.folder / "alive")

    def alive(self) -> list[str]:
        """The addresses that Ray takes for alive; none as long as it has not said."""
        try:
            lines = (self.folder / "alive").read_text().rpartition("\n")[0].splitlines()
        except FileNotFoundError:
            return []
        told = [line for line in lines if line.startswith("[")]
        return list(json.loads(told[-1])) if told else []

    def close(self) -> None:
        """End all that runs on them, and them."""
        for host in self._list:
            host.switch_off()
        self._list.clear()
        if self.switch:
            self.switch.end()
            self.switch = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
