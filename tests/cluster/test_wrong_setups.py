"""Set-ups that cannot work: each ends in one sentence with its remedy, within 30 s, without a traceback. The table of
docs/cluster/what-breaks.md names the test of each."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import LocalCluster
from tests.conftest import ROOT

CONFIG = ["--config", "jobs/configs/digits.yaml"]
WITHIN_S = 30.0
Run = Callable[..., str]


@pytest.fixture
def refused(local_cluster: LocalCluster, tmp_path: Path) -> Run:
    """Runs a command of most-ray on the cluster; what it says as it ends, which is one paragraph."""

    def run(*words: str, **env: str) -> str:
        environ = {name: value for name, value in {**local_cluster.env, **env}.items() if value}
        began = time.monotonic()
        command = [sys.executable, "-m", "most_ray.cli", *words]
        done = subprocess.run(command, cwd=ROOT, env=environ, text=True, capture_output=True, timeout=120, check=False)
        took = time.monotonic() - began
        assert done.returncode == 2, done.stdout + done.stderr
        assert took < WITHIN_S
        assert "Traceback" not in done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("most-ray: ")]
        assert len(lines) == 1, done.stderr
        return lines[0]

    return run


@pytest.fixture
def train(refused: Run, tmp_path: Path) -> Run:
    return lambda *words, **env: refused("train", *CONFIG, "--output_dir", str(tmp_path), *words, **env)


@pytest.mark.parametrize("command", ["train", "submit train"])
def test_no_token(refused: Run, tmp_path: Path, command: str) -> None:
    said = refused(*command.split(), *CONFIG, RAY_AUTH_MODE="", RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert "requires a token, and none is set here. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file" in said


@pytest.mark.parametrize("command", ["train", "submit train"])
def test_wrong_token(refused: Run, tmp_path: Path, command: str) -> None:
    wrong = tmp_path / "token"
    wrong.touch(0o600)
    wrong.write_text("0" * 64)
    said = refused(*command.split(), *CONFIG, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert "does not accept this token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file" in said


@pytest.mark.parametrize("command", ["train", "submit train"])
def test_a_token_that_others_can_read(refused: Run, local_cluster: LocalCluster, tmp_path: Path, command: str) -> None:
    copy = tmp_path / "token"
    copy.write_text(local_cluster.token)
    copy.chmod(0o644)
    said = refused(*command.split(), *CONFIG, RAY_AUTH_TOKEN_PATH=str(copy))
    assert f"can be read or changed by other users of this machine (mode 644). chmod 600 {copy}" in said


@pytest.mark.parametrize("command", ["train", "submit train"])
def test_nothing_listens(refused: Run, command: str) -> None:
    said = refused(*command.split(), *CONFIG, RAY_ADDRESS="127.0.0.1:1", RAY_API_SERVER_ADDRESS="")
    assert "does not answer: nothing listens there. Check it, and that Ray runs there." in said


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system with the given options, at a folder; needs root."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted-{len(folders)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(refused: Run, mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=64k")
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 4096)
    said = refused("train", *CONFIG, "--output_dir", str(folder))
    assert "cannot be written to (No space left on device). Name a folder or URI that can be written to." in said


def test_read_only_storage(refused: Run, mounted: Callable[[str], Path]) -> None:
    said = refused("train", *CONFIG, "--output_dir", str(mounted("size=1m,ro")))
    assert "cannot be written to (Read-only file system). Name a folder or URI that can be written to." in said


def test_too_few_gpus(train: Run) -> None:
    assert "num_workers = 2: needs 2 GPU, the cluster has 0. Use fewer workers, or add nodes." in train(
        "--use_gpu", "true", "--num_workers", "2"
    )


def test_expert_parallel_size_that_does_not_divide(train: Run) -> None:
    said = train("--num_workers", "2", "--ep_size", "3")
    assert "ep_size = 3: must divide both the workers (2) and the routed experts (8). Use one of [1, 2]." in said


def test_missing_data(train: Run) -> None:
    assert "train_asr_dirs = 'nothing': does not exist. Check the path" in train("--train_asr_dirs", "nothing")


def test_unknown_key(train: Run) -> None:
    assert "is no known flag. Did you mean 'learning_rate'?" in train("--learning_rat", "1")


def test_what_only_the_cluster_knows_comes_back_to_who_submitted(local_cluster: LocalCluster) -> None:
    """The job's sentence and its exit code are the command's."""
    words = ["submit", "train", *CONFIG, "--name", "wrong", "--output_dir", "/proc/runs"]
    command = [sys.executable, "-m", "most_ray.cli", *words]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=local_cluster.env, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert time.monotonic() - began < WITHIN_S
    assert "most-ray: configuration error: output_dir = '/proc/runs/wrong': cannot be written to" in done.stdout


def test_a_port_that_is_taken(local_cluster: LocalCluster, tmp_path: Path) -> None:
    port = local_cluster.gcs_address.split(":")[1]
    environ = {**local_cluster.env, "MOST_RAY_CLUSTER_DIR": str(tmp_path / "other"), "RAY_PORT": port}
    began = time.monotonic()
    done = subprocess.run(["sh", "cluster/local/up.sh"], cwd=ROOT, env=environ, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 2
    assert time.monotonic() - began < WITHIN_S
    assert done.stderr == f"cluster: port {port} of 127.0.0.1 is taken: set RAY_PORT to a free one, or stop what listens there.\n"
