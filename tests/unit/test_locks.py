"""What is installed: the locks hold what pyproject.toml asks for, and .ci/venv.sh takes from them what fits the machine."""

from __future__ import annotations

import ensurepip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import tomllib
import venv
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
RUN = [*PROJECT["project"]["dependencies"], *EXTRAS["int8"], *PROJECT["build-system"]["requires"]]
DEV = [line for line in EXTRAS["dev"] if not line.startswith("most_ray")]


def script(name: str) -> ModuleType:
    """A program of .ci, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    return script("lock")


@pytest.fixture
def materials(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds its own folder
    return script("materials")


def entries(lock: ModuleType, *names: str) -> dict[str, list[str]]:
    """Package -> its entries in these files: several where several Pythons have a version each."""
    found: dict[str, list[str]] = {}
    for name in names:
        for block in lock.blocks(lock.read(name)):
            found.setdefault(lock.name_of(block), []).append(block)
    return found


@pytest.mark.parametrize(("files", "requirements"), [(("run", "torch-cuda"), RUN), (("run", "torch-cpu"), RUN), (("dev", "run"), DEV)])
def test_every_requirement_is_locked_inside_its_range(lock: ModuleType, files: tuple[str, ...], requirements: list[str]) -> None:
    locked = entries(lock, *files)
    for requirement in map(Requirement, requirements):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in locked, f"{requirement} is in none of {files}: make lock KEEP=1"
        for block in locked[name]:
            assert requirement.specifier.contains(lock.version_of(block)), f"{requirement} and {block.splitlines()[0]}: make lock KEEP=1"


def test_every_entry_has_an_exact_version_and_hashes(lock: ModuleType) -> None:
    for name in (path.stem for path in lock.LOCKS.glob("*.txt")):
        assert lock.blocks(lock.read(name)), name
        for block in lock.blocks(lock.read(name)):
            first, *hashes = block.splitlines()
            assert re.match(r"[a-z0-9][a-z0-9-]*={2,3}\d[^\s;]*( ; .+)? \\$", first), first
            assert hashes and all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in hashes), first


def test_the_files_divide_the_packages(lock: ModuleType) -> None:
    """None is in two files of one installation, and what only CUDA's build needs is in that build's alone."""
    run, dev, cuda, cpu = (entries(lock, name) for name in ("run", "dev", "torch-cuda", "torch-cpu"))
    assert not set(run) & set(dev) and not set(cuda) & {*run, *dev}
    assert set(cpu) == {"torch"} and {"torch", "triton", "nvidia-nccl-cu13"} <= set(cuda)
    assert not [name for name in {*run, *dev} if re.match(r"nvidia-|cuda-|triton|torch$", name)]


def test_both_builds_of_torch_are_of_one_version_and_no_one_elses(lock: ModuleType) -> None:
    """The CPU build of Linux has a local version, so that PyPI's cannot pass for it; PyPI's is asked for as that very string."""
    linux, mac = entries(lock, "torch-cpu")["torch"]
    (cuda,) = entries(lock, "torch-cuda")["torch"]
    version = lock.version_of(cuda)
    assert linux.startswith(f"torch=={version}+cpu ; sys_platform == 'linux' ") and mac.startswith(
        f"torch=={version} ; sys_platform == 'darwin' "
    )
    assert cuda.startswith(f"torch==={version} ")
    hashes = [set(re.findall(r"[0-9a-f]{64}", block)) for block in (linux, cuda)]
    assert not hashes[0] & hashes[1] and len(hashes[0]) >= 6  # 3 Pythons, 2 kinds of processor


def test_a_clouds_packages_move_none_of_the_others(lock: ModuleType) -> None:
    run, dev = entries(lock, "run"), entries(lock, "dev")
    for cloud, packages in lock.CLOUDS.items():
        own = entries(lock, cloud)
        assert set(packages) <= {*own, *run} and not set(own) & set(run)
        assert all(
            sorted(map(lock.version_of, blocks)) == sorted(map(lock.version_of, dev[name])) for name, blocks in own.items() if name in dev
        )


INSTALL = re.compile(r"(?:\bpip|\buv pip) install(?P<rest>(?:[^&|;\n]|\\\n)*)")
# What is no part of an installation: without a lock on purpose, or words for a reader.
UNLOCKED = ("--resolution lowest-direct", "-q --no-input", "pip install .)")


def test_nothing_is_installed_but_from_a_lock_with_hashes() -> None:
    files = [
        path
        for folder in (".ci", "cluster", "jobs", ".github")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".sh", ".yaml", ".yml", ".sbatch")
    ]
    found = []
    for path in [*files, ROOT / "cluster" / "Dockerfile", ROOT / "Makefile", ROOT / ".ci" / "run"]:
        for match in INSTALL.finditer(path.read_text(encoding="utf-8")):
            rest = " ".join(match["rest"].split())
            if not any(words in match[0] for words in UNLOCKED):
                found.append((path.name, "--require-hashes" in rest or (rest.endswith(" .") and "--no-deps --no-build-isolation" in rest)))
    assert len(found) >= 7 and all(locked for _, locked in found), found


def test_actions_are_named_by_commit() -> None:
    used = re.findall(r"uses: *(.*)", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert used and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in used), used


# What an installation consists of


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_bill_of_materials_is_the_lock(materials: ModuleType, lock: ModuleType, tmp_path: Path, torch: str) -> None:
    """By uv, without a network."""
    assert materials.write_sbom(tmp_path / "sbom.json", torch) == 0
    sbom = json.loads((tmp_path / "sbom.json").read_text())
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.5") and sbom["metadata"]["component"]["name"] == "most-ray"
    locked = {(name, lock.version_of(block)) for name, blocks in entries(lock, "run", f"torch-{torch}").items() for block in blocks}
    assert {(each["name"], each["version"]) for each in sbom["components"]} == locked
    assert all(each["purl"].startswith("pkg:pypi/") for each in sbom["components"])


def test_an_audit_of_nothing_says_so_in_one_line(
    materials: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(materials, "run_uv", None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert materials.audit("cpu", f"http://127.0.0.1:{port}") == 0
    assert re.fullmatch(rf"Nothing was audited: http://127\.0\.0\.1:{port} cannot be reached \(.+\)\.\n", capsys.readouterr().out)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_an_audit_ends_with_what_it_found(
    materials: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(torch: str, *command: str) -> subprocess.CompletedProcess[str]:
        asked.append((torch, *command))
        return subprocess.CompletedProcess(command, code, "six 1.17.0 has 1 known vulnerability\n", "")

    monkeypatch.setattr(materials, "run_uv", run)
    monkeypatch.setattr(materials, "unreachable", lambda url: "")
    assert materials.audit("cuda", "http://database") == code
    assert asked[0][:2] == ("cuda", "audit") and asked[0][-1] == "http://database" and "six" in capsys.readouterr().out


def test_the_floor_is_the_oldest_that_is_allowed(lock: ModuleType) -> None:
    (block,) = lock.blocks(lock.read("floor"))
    (asked,) = (line for line in RUN if line.startswith("transformers"))
    assert asked.startswith(f"transformers>={lock.version_of(block).removesuffix('.0')},")


def test_the_cpu_builds_stay_where_their_index_cannot_be_reached(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(2, "uv")

    monkeypatch.setattr(lock, "compile_lock", unreachable)
    known = lock.blocks(lock.read("torch-cpu"))
    version = lock.version_of(known[1])
    assert lock.cpu_builds(version) == known
    with pytest.raises(SystemExit, match=r"torch 9\.9\.9: the hashes of its CPU builds cannot be had .* make lock KEEP=1"):
        lock.cpu_builds("9.9.9")


class Installation(NamedTuple):
    code: int
    out: str
    err: str
    calls: list[str]  # of pip install, their arguments


STUB = """#!/bin/sh
case "$*" in
    *"sys.exit(not"*) exit $OLD ;;
    *realpath*) echo "$BASE" ;;
    *version_info*) cat "$(dirname "$0")/version" 2>/dev/null || echo "$VERSION" ;;
    --version) echo "Python $VERSION.1" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$VERSION" > "$3/bin/version" ;;
    "-m pip install "*)
        echo "$*" >> "$CALLS"
        case "$*" in *"$FAILS"*) echo "WARNING: Location 'x' is ignored" >&2 && echo "$SAYS" >&2 && exit 1 ;; esac ;;
esac
"""


def install(
    folder: Path,
    what: str = "run",
    gpu: bool = False,
    old: bool = False,
    version: str = "3.12",
    fails: str = "nothing",
    says: str = "",
    **settings: str,
) -> Installation:
    """.ci/venv.sh on a machine whose Python only writes down what it is asked to install. `fails`: at what pip fails; `says`: how."""
    bins, calls = folder / "bin", folder / "calls"
    bins.mkdir(exist_ok=True)
    for name, content in (("python3", STUB), ("nvidia-smi", f"#!/bin/sh\nexit {int(not gpu)}\n")):
        (bins / name).write_text(content)
        (bins / name).chmod(stat.S_IRWXU)
    base = folder / "base" / "python3"  # what the environment is made from
    if not base.exists():
        base.parent.mkdir()
        shutil.copy(bins / "python3", base)
        (base.parent / "version").write_text(f"{version}\n")
    calls.unlink(missing_ok=True)
    environment = {"PATH": f"{bins}:{os.environ['PATH']}", "VENV": str(folder / "venv"), "CALLS": str(calls), "BASE": str(base)}
    environment |= {"FAILS": fails, "SAYS": says, "OLD": str(int(old)), "VERSION": version, **settings}
    done = subprocess.run(["sh", str(ROOT / ".ci/venv.sh"), what], env=environment, capture_output=True, text=True, check=False, cwd=folder)
    found = calls.read_text().splitlines() if calls.exists() else []
    out = re.sub(r"after \d+ s", "after N s", done.stdout).replace(str(folder / "venv"), "venv")
    return Installation(done.returncode, out, done.stderr, [call.removeprefix("-m pip install ") for call in found])


def files_of(done: Installation) -> list[list[str]]:
    """The lock files of each call."""
    return [re.findall(r"locks/([a-z-]+)\.txt", call) for call in done.calls]


def build_of(done: Installation) -> list[str]:
    """The builds of torch that were asked for."""
    return [file for files in files_of(done) for file in files if file.startswith("torch")]


def test_it_says_a_line_a_phase_and_takes_nothing_that_is_not_locked(tmp_path: Path) -> None:
    done = install(tmp_path)
    version = re.search(r"^torch===(\S+)", (ROOT / ".ci/locks/torch-cuda.txt").read_text(), re.MULTILINE)
    assert version and (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines == [
        "venv: a new environment of Python 3.12.1",
        f"venv: torch {version[1]} for CPUs (1 of 3)",
        f"venv: {int(lines[2].split()[1])} packages (2 of 3)",
        "venv: most_ray, editable (3 of 3)",
        "venv: ready after N s",
    ]
    assert files_of(done) == [["pip"], ["torch-cpu"], ["run"], []] and "--editable ." in done.calls[-1]
    assert all(call.startswith("-q --no-input --no-user ") and "--no-deps" in call for call in done.calls)
    assert all("--require-hashes --only-binary :all:" in call for call in done.calls[:-1]) and "--no-build-isolation" in done.calls[-1]
    assert {(tmp_path / "venv" / name).exists() for name in (".installed", ".installed-run")} == {True}


MISSING = "ERROR: No matching distribution found for torch==2.13.0+cpu"
CPU = "https://download.pytorch.org/whl/cpu"
ROCM = "https://download.pytorch.org/whl/rocm7.2"


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"gpu": True}, ["torch-cuda"]),
        ({"gpu": True, "TORCH": "cpu"}, ["torch-cpu"]),
        ({"TORCH": "cuda"}, ["torch-cuda"]),
        ({"TORCH_INDEX": f"{CPU}/", "gpu": True}, ["torch-cpu"]),
        ({"fails": "torch-cpu", "says": MISSING}, ["torch-cpu", "torch-cuda"]),
        ({"fails": "torch-cpu", "says": "ERROR: ResolutionImpossible: for help visit"}, ["torch-cpu", "torch-cuda"]),
    ],
)
def test_torchs_build_fits_the_machine(tmp_path: Path, machine: dict[str, Any], expected: list[str]) -> None:
    done = install(tmp_path, "dev", **machine)
    assert done.code == 0 and build_of(done) == expected and files_of(done)[-2] == ["run", "dev"]
    assert (f"it is not to be had from {CPU}: PyPI's instead" in done.out) == ("fails" in machine)
    again = install(tmp_path, "dev")
    assert again.code == 0 and build_of(again) == expected[-1:] and "a new environment" not in again.out, "the build was not remembered"


@pytest.mark.parametrize(
    ("before", "after", "remade"),
    [
        ({}, {}, False),
        ({}, {"TORCH": "cpu"}, False),
        ({}, {"TORCH": "cuda"}, True),
        ({"TORCH_INDEX": ROCM}, {}, False),
        ({"TORCH_INDEX": ROCM}, {"TORCH": "cpu"}, True),
        ({"TORCH": "cuda"}, {"TORCH_INDEX": ROCM}, True),
        ({}, {"gpu": True}, False),
        ({}, {"PYTHON": "python3"}, False),
        ({}, {"PYTHON": "python3", "version": "3.13"}, True),
        ({"version": "3.13"}, {"version": "3.12"}, False),
    ],
)
def test_an_environment_stays_unless_another_build_or_python_is_asked_for(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], remade: bool
) -> None:
    """`make train TORCH=...` and then `make test`: what was asked for once stays; a build never lies over another."""
    assert install(tmp_path, **before).code == 0
    (tmp_path / "venv" / "left").touch()
    done = install(tmp_path, "dev", **after)
    assert done.code == 0 and (tmp_path / "venv" / "left").exists() != remade
    assert ("a new environment of Python" in done.out) == remade == ("than before" in done.out)
    assert ("for this machine's GPU: TORCH=cuda" in done.out) == ("gpu" in after)


@pytest.mark.parametrize(
    "machine",
    [
        {"says": "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."},
        {"says": "ERROR: [Errno 28] No space left on device"},
        {"says": MISSING, "TORCH": "cpu"},
    ],
)
def test_a_wrong_build_or_a_full_disk_is_no_reason_to_take_another(tmp_path: Path, machine: dict[str, str]) -> None:
    done = install(tmp_path, fails="torch-cpu", **machine)
    assert done.code == 1 and build_of(done) == ["torch-cpu"] and not (tmp_path / "venv" / ".installed").exists()
    assert machine["says"] in done.err and "not complete, for the reason above; the same command goes on" in done.err


def test_what_pip_warns_of_is_told_where_it_fails(tmp_path: Path) -> None:
    """A network that is not there; and not that one of several indexes lacks a package, which it says of each."""
    words = "WARNING: Retrying after connection broken by 'NameResolutionError'\nERROR: No matching distribution found for pip"
    done = install(tmp_path, fails="pip.txt", says=words)
    assert done.code == 1 and words in done.err and "Location" not in done.err
    again = install(tmp_path)
    assert again.code == 0 and "a new environment" not in again.out


def test_another_index_gives_the_locked_version_by_no_hash(tmp_path: Path) -> None:
    done = install(tmp_path, TORCH_INDEX=ROCM)
    assert done.code == 0 and files_of(done) == [["pip"], [], ["run"], []]
    assert re.search(rf"--index-url {ROCM} torch==\d[\d.]+$", done.calls[1])
    assert f"from {ROCM}, by no lock's hashes" in done.out


@pytest.mark.parametrize(("machine", "options"), [({}, f"--extra-index-url {CPU}"), ({"TORCH_INDEX": ROCM}, f"--index-url {ROCM}")])
def test_the_newest_are_taken_from_the_ranges_into_an_empty_environment(tmp_path: Path, machine: dict[str, str], options: str) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "left").touch()
    done = install(tmp_path, "newest", **machine)
    (torch,) = (line for line in RUN if line.startswith("torch>"))
    assert done.code == 0 and not (tmp_path / "venv" / "left").exists()
    assert files_of(done) == [["pip"], [], []]
    assert done.calls[1].endswith(f" {torch}") and options in done.calls[1]
    assert done.calls[2].endswith("--editable .[dev]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"old": True}, r"Python 3\.11 to 3\.14 is needed; .* is Python 3\.10\.1\. Name another one: make PYTHON="),
        ({"TORCH": "rocm"}, r"TORCH=rocm is no build of torch\. Use cpu, cuda or auto, or name an index: TORCH_INDEX=URL\."),
        ({"what": "prod"}, r"'prod' is no environment\. Use run, dev or newest\."),
    ],
)
def test_wrong_uses(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    done = install(tmp_path, **{"version": "3.10", **arguments})
    assert done.code == 2 and re.search(message, done.err) and done.err.count("\n") == 1 and not done.calls


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An index with one wheel of pip, the one that Python brings; and a copy of get_pip.py beside a lock of that wheel."""
    (wheel,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    served = tmp_path / "index" / "pip"
    served.mkdir(parents=True)
    shutil.copy(wheel, served)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (served / "index.html").write_text(f'<a href="old.whl">old</a><a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "pip.txt").write_text(f"pip=={wheel.name.split('-')[1]} \\\n    --hash=sha256:{digest}\n")
    shutil.copy(ROOT / ".ci" / "get_pip.py", tmp_path)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "get_pip.py"
        server.shutdown()


def get_pip(python: Path, script: Path, url: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PIP_INDEX_URL": url, "NO_PROXY": "127.0.0.1", "PIP_USER": "1"}
    return subprocess.run([str(python), str(script)], env=environment, capture_output=True, text=True, check=False)


def test_pip_is_fetched_where_python_brings_none(tmp_path: Path, index: tuple[str, Path]) -> None:
    """Debian's Python without python3-venv: by its hash alone."""
    url, script = index
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    lock = script.parent / "locks" / "pip.txt"
    right = lock.read_text()
    lock.write_text(right.replace("sha256:", "sha256:0"))
    done = get_pip(python, script, url)
    assert done.returncode == 1 and "does not match the hash in .ci/locks/pip.txt" in done.stderr
    lock.write_text(right.replace("pip==", "pip==99"))
    done = get_pip(python, script, url)
    assert done.returncode == 1 and f"{url}/pip/ has no pip-99" in done.stderr
    lock.write_text(right)
    assert get_pip(python, script, url).returncode == 0
    assert subprocess.run([str(python), "-m", "pip", "--version"], check=False, capture_output=True).returncode == 0


def test_this_python_is_one_that_is_locked_for() -> None:
    assert (3, 11) <= sys.version_info[:2] < (3, 15)
