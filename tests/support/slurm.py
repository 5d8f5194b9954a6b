"""A Slurm of two nodes on this machine, on loopback, without munge or systemd: its daemons and its state go with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol")
_NODES, _CPUS, _STARTED_WITHIN_S = ("n1", "n2"), 8, 60.0

# FirstJobId: other Slurms on this machine number their jobs too.
# CPUs: more than there are, for the tests' processes wait more than they count. cred_expire: how long a requeued job is held back.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
FirstJobId={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def wait_until(what: Callable[[], bool], limit_s: float, tell: Callable[[], str]) -> None:
    """Look until `what` holds.

    Raises:
        AssertionError: it did not within `limit_s` seconds; with what `tell` says.
    """
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, tell()
        time.sleep(0.1)  # between two looks at other processes: nothing depends on how long


@dataclass(frozen=True)
class Slurm:
    """The commands of a user of this Slurm, whose home is `home`."""

    folder: Path
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        return Path(self.environment["HOME"])

    def call(self, *words: str) -> str:
        """A command's output, stderr included."""
        run = subprocess.run(
            words, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert run.returncode == 0, (words, run.stdout)
        return run.stdout

    def submit(self, *words: str) -> int:
        """A batch job's number; its output goes to `output(number)`."""
        return int(self.call("sbatch", "--parsable", f"--output={self.folder}/%j.out", *words))

    def output(self, job: int) -> str:
        uri = self.folder / f"{job}.out"
        return uri.read_text() if uri.exists() else ""

    def state(self, job: int) -> tuple[str, str, int]:
        """State, exit code as CODE:SIGNAL, and how often it was requeued."""
        said = dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", str(job))))
        return said["JobState"], said["ExitCode"], int(said["Restarts"])

    def wait(self, job: int, limit_s: float = 300.0) -> tuple[str, str, int]:
        """Until it has ended for good."""
        under_way = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        wait_until(lambda: self.state(job)[0] not in under_way, limit_s, lambda: f"{self.state(job)}\n{self.output(job)[-3000:]}")
        return self.state(job)

    def leftovers(self, job: int) -> list[str]:
        """What train.sbatch has left of a job: files on the shared and the local storage, and processes."""
        left = [str(path) for path in Path("/tmp").glob(f"most_ray-{job}-*")]
        left += [str(path) for path in self.home.glob(f".most_ray/slurm/*-{job}")]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"most_ray-{job}-" in " ".join(process.cmdline()):
                    left.append(str(process))
        return left


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start it, and end it with all its jobs."""
    for name in ("state", "home", *(f"spool-{node}" for node in _NODES)):
        (folder / name).mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    user, host = psutil.Process().username(), socket.gethostname().partition(".")[0]
    uri = folder / "slurm.conf"
    uri.write_text(_CONFIGURATION.format(folder=folder, ports=ports, user=user, host=host, cpus=_CPUS))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "RAY_", "OMP_"))}
    made = Slurm(folder, {**kept, "SLURM_CONF": str(uri), "HOME": str(folder / "home")})
    daemons = []
    try:
        for words in (["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in _NODES)):
            log = folder / f"{words[0]}-{words[-1]}.log"
            with log.open("wb") as out:
                daemons.append(subprocess.Popen(words, env=made.environment, stdout=out, stderr=subprocess.STDOUT))
        logs = lambda: "\n".join(log.read_text()[-1500:] for log in folder.glob("slurm*.log"))  # noqa: E731
        wait_until(lambda: _idle(made) == len(_NODES), _STARTED_WITHIN_S, logs)
        yield made
    finally:
        with contextlib.suppress(AssertionError):
            made.call("scancel", "--user", user)
            wait_until(lambda: not made.call("squeue", "--noheader").strip(), 60.0, lambda: made.call("squeue"))
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def _idle(made: Slurm) -> int:
    asked = ["sinfo", "--noheader", "--Node", "--format=%T"]
    said = subprocess.run(asked, env=made.environment, capture_output=True, text=True, check=False)
    return said.stdout.split().count("idle")


def require() -> None:
    """Skip the test where Slurm is not installed; CI always has it."""
    if lacking := ", ".join(name for name in PROGRAMS if not shutil.which(name)):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs Slurm, which has no {lacking} here: sh .ci/slurm.sh")
