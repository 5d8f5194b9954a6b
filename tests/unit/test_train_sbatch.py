"""cluster/slurm/train.sbatch with small programs in place of Ray, the run and Slurm; with the real ones: tests/cluster/test_slurm.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "cluster" / "slurm" / "train.sbatch"

# `ray start --head --block`: says where it is, then waits for its end.
_RAY = """
import json, os, pathlib, signal, stat, sys
here = pathlib.Path(os.environ["TEST_FOLDER"])
(here / "ray.json").write_text(json.dumps([os.getpid(), sys.argv[1:]]))
if os.environ.get("TEST_HEAD") == "fails":
    sys.exit("no port is free")
folder = next(word.split("=", 1)[1] for word in sys.argv if word.startswith("--temp-dir="))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(here / "above.json").write_text(json.dumps([folder, stat.S_IMODE(pathlib.Path(folder).parent.stat().st_mode)]))
pathlib.Path(folder).mkdir(0o777)
if os.environ.get("TEST_HEAD") == "silent":
    signal.pause()
pathlib.Path(folder, "ray_current_cluster").write_text("127.0.0.1:4321")
signal.pause()
"""

# `python jobs/train.py`: says what it was given, then ends as the test asks.
_TRAIN = """
import json, os, pathlib, signal, stat, sys
here = pathlib.Path(os.environ["TEST_FOLDER"])
token = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
seen = {"words": sys.argv[1:], "mode": stat.S_IMODE(token.stat().st_mode), "token": token.read_text(), "state": str(token.parent)}
seen |= {name: os.environ[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
ending = os.environ.get("TEST_ENDING", "0")
if ending == "not when asked":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if ending == "75 when asked":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(here / "train.json").write_text(json.dumps(seen))
print("the run is up", flush=True)
if ending.isdigit():
    sys.exit(int(ending))
signal.pause()
"""


@dataclass
class Job:
    """A job's surroundings; `start` runs the script as Slurm would."""

    folder: Path
    number: int
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": str(self.number), "SLURM_SUBMIT_DIR": str(self.folder / "repo"), "SLURM_CLUSTER_NAME": "test"}
        slurm |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "4", "SLURMD_NODENAME": "n1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY_"))}
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HOME": str(self.folder / "home"), "TEST_FOLDER": str(self.folder)}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            env={**kept, **path, **slurm, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def seen(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def requeued(self) -> list[str]:
        uri = self.folder / "scontrol"
        return uri.read_text().splitlines() if uri.exists() else []

    def leftovers(self) -> list[str]:
        """What the job has left: files, folders and processes."""
        left = [str(path) for path in Path("/tmp").glob(f"most_ray-{self.number}-*")]
        left += [str(path) for path in (self.folder / "home").glob(".most_ray/slurm/*")]
        if (self.folder / "ray.json").exists():
            left += [str(path) for path in [Path("/proc") / str(self.seen("ray")[0])] if path.exists()]
        return left


@pytest.fixture
def job(tmp_path: Path) -> Job:
    binaries = tmp_path / "repo" / ".venv" / "bin"
    for folder in (binaries, tmp_path / "repo" / "jobs", tmp_path / "bin", tmp_path / "home"):
        folder.mkdir(parents=True)
    (tmp_path / "repo" / "jobs" / "train.py").write_text(_TRAIN)
    for uri, text in {
        binaries / "ray": f"#!{sys.executable} -IS\n{_RAY}",
        binaries / "python": f'#!/bin/sh\nexec {sys.executable} -IS "$@"\n',
        tmp_path / "bin" / "scontrol": f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n',
    }.items():
        uri.write_text(text)
        uri.chmod(0o755)
    return Job(tmp_path, 900_000_000 + os.getpid())


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_runs_exit_code_is_the_jobs(job: Job, code: int) -> None:
    assert job.run("--config", "a b.yaml", TEST_ENDING=str(code))[0] == code
    assert job.seen("train")["words"] == ["--config", "a b.yaml"]
    assert job.requeued() == [] and job.leftovers() == []


def test_a_run_that_was_stopped_goes_back_into_the_queue(job: Job) -> None:
    code, out, _ = job.run(TEST_ENDING="75")
    assert code == 75 and "Back into the queue" in out
    assert job.requeued() == [f"requeue {job.number}"] and job.leftovers() == []


@pytest.mark.parametrize(("ending", "within"), [("75 when asked", "60"), ("as Python does", "60"), ("not when asked", "1")])
def test_sigterm_goes_to_the_run(job: Job, ending: str, within: str) -> None:
    """It stops behind a checkpoint; or at once, where it had not come so far; or is killed before the time limit would end the job
    Whichever it was, the job is requeued once Ray has ended."""
    process = job.start(TEST_ENDING=ending, MOST_RAY_STOPPED_WITHIN_S=within)
    assert process.stdout and "the run is up\n" in process.stdout
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    assert job.requeued() == [f"requeue {job.number}"] and job.leftovers() == []


def test_the_token_is_the_jobs_own_and_its_owners_alone(job: Job) -> None:
    tokens = set()
    for _ in range(2):
        assert job.run()[0] == 0
        seen = job.seen("train")
        assert seen["mode"] == 0o600 and re.fullmatch(r"[0-9a-f]{64}", seen["token"])
        assert seen["RAY_AUTH_MODE"] == "token" and seen["RAY_ADDRESS"] == "127.0.0.1:4321"
        assert str(job.number) in seen["state"]
        tokens.add(seen["token"])
        assert seen["token"] not in " ".join(job.seen("ray")[1])  # others on the node see command lines
    assert len(tokens) == 2


def test_rays_folder_is_in_one_that_no_one_else_can_enter(job: Job) -> None:
    """Ray opens its own folder to everyone, without the sticky bit."""
    assert job.run()[0] == 0
    folder, above = job.seen("above")
    assert above == 0o700 and folder.startswith(f"/tmp/most_ray-{job.number}-") and len(folder) <= 43


def test_ports_are_free_ones_and_one_node_stays_on_loopback(job: Job) -> None:
    ports = set()
    for _ in range(2):
        assert job.run()[0] == 0
        words = job.seen("ray")[1]
        assert {"--head", "--block", "--port=0", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=4"} <= set(words)
        ports |= {word for word in words if word.startswith(("--dashboard-port=", "--ray-client-server-port="))}
    assert len(ports) == 4 and all(int(port.split("=")[1]) > 1024 for port in ports)


def test_a_head_that_is_waited_for_is_said_and_given_up(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.sbatch"
    script.write_text(SCRIPT.read_text().replace("due=3", "due=0").replace("READY_WITHIN=180", "READY_WITHIN=1"))
    monkeypatch.setitem(globals(), "SCRIPT", script)
    code, out, err = job.run(TEST_HEAD="silent")
    assert code == 2 and re.search("train.sbatch: waiting for Ray's head node: [01] s, until 1 s", out)
    assert "Ray's head node was not up within 1 s." in err and job.leftovers() == []


def test_a_head_that_does_not_come_up_is_told(job: Job) -> None:
    code, _, err = job.run(TEST_HEAD="fails")
    assert code == 2 and "no port is free" in err and "head node has ended" in err
    assert job.requeued() == [] and job.leftovers() == []


def test_tasks_of_an_array_are_runs_of_their_own(job: Job) -> None:
    code, _, err = job.run("--config", "x.yaml", SLURM_ARRAY_TASK_ID="3")
    assert code == 2 and "--name NAME-%a" in err and not (job.folder / "train.json").exists()
    assert job.run("--name", "digits-%a", "--seed", "%a", SLURM_ARRAY_TASK_ID="3")[0] == 0
    assert job.seen("train")["words"] == ["--name", "digits-3", "--seed", "3"] and job.leftovers() == []


@pytest.mark.parametrize(
    ("change", "says"), [({"SLURM_JOB_ID": ""}, "is for sbatch"), ({"SLURM_SUBMIT_DIR": "/"}, "submit from the repository")]
)
def test_a_wrong_start_is_one_sentence(job: Job, change: dict[str, str], says: str) -> None:
    code, _, err = job.run(**change)
    assert code == 2 and err.startswith("train.sbatch: ") and says in err and len(err.splitlines()) == 1


def directive(name: str) -> str | None:
    found: Callable[[str], re.Match[str] | None] = re.compile(rf"#SBATCH --{name}(?:=(\S+))?$").match
    return next((match[1] or "" for line in SCRIPT.read_text().splitlines() if (match := found(line))), None)


def test_slurm_is_asked_for_a_signal_in_time_and_a_requeue() -> None:
    """To the script alone (`B:`): Ray under it must live until the checkpoint is written."""
    signalled = directive("signal")
    assert signalled is not None and signalled.startswith("B:TERM@") and int(signalled.rpartition("@")[2]) >= 120
    allowed = re.search(r"STOPPED_WITHIN_S:-(\d+)", SCRIPT.read_text())
    assert allowed and int(allowed[1]) < int(signalled.rpartition("@")[2])
    assert directive("requeue") == "" and directive("open-mode") == "append" and directive("ntasks-per-node") == "1"
