"""Make the lock files in .ci/locks anew: `make lock` takes the newest releases that pyproject.toml's ranges allow, `make lock KEEP=1`
changes what it must alone.

    run.txt         what the package needs, torch excepted
    dev.txt         what its tests and checks need beside that
    torch-cpu.txt   torch without CUDA: PyTorch's own index on Linux, PyPI on macOS
    torch-cuda.txt  torch from PyPI with CUDA and all that only this build needs
    floor.txt       the oldest transformers that pyproject.toml allows, on which tests run too
    pip.txt         what installs all this
    aws.txt         what `ray up` needs on the head of cluster/vm/aws.yaml beside run.txt
    gcp.txt         and on that of cluster/vm/gcp.yaml

Each holds exact versions and hashes for Linux and macOS, CPython 3.11 to 3.14; uv resolves them. Where PyTorch's index cannot be reached,
the hashes of its builds stay as they are, as long as the version does. Where the locks themselves are broken, any Python with uv makes new
ones: pip install uv && python3 .ci/lock.py
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / ".ci" / "locks"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What only torch's CUDA build asks for, and torch itself.
TORCH = re.compile(r"(torch|triton|cuda-.*|nvidia-.*)$")
# What Ray's autoscaler imports to start and end machines of a cloud.
CLOUDS = {"aws": ("boto3",), "gcp": ("google-api-python-client", "google-auth", "cryptography")}
# uv's marker of what is needed on each of pyproject.toml's [tool.uv] environments.
EVERYWHERE = " ; python_full_version < '3.15' and (sys_platform == 'darwin' or sys_platform == 'linux')"
HEADER = "# Made by `make lock`: exact versions with hashes. What each file is for: .ci/lock.py\n"


def compile_lock(requirements: str, *options: str, preferred: str = "") -> list[str]:
    """What uv resolves: one block a package, its version, hashes and who wants it.

    Raises:
        subprocess.CalledProcessError: uv has found nothing that fits, or no index.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "requirements.in"), Path(folder, "requirements.txt")
        source.write_text(requirements, encoding="utf-8")
        output.write_text(preferred, encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", str(source), "--output-file", str(output), "--quiet", *options]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--only-binary", ":all:"]
        subprocess.run([*command, "--no-header", "--no-annotate", *([] if preferred else ["--upgrade"])], check=True, cwd=ROOT)
        return blocks(output.read_text(encoding="utf-8").replace(EVERYWHERE, ""))


def blocks(text: str) -> list[str]:
    """The entries of a lock file, without its comments."""
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    starts = [number for number, line in enumerate(lines) if not line[0].isspace()]
    return ["\n".join(lines[start:end]) for start, end in pairwise([*starts, len(lines)])]


def name_of(block: str) -> str:
    """The package that an entry is about."""
    return re.split(r"[=\s]", block, maxsplit=1)[0]


def version_of(block: str) -> str:
    found = re.match(r"[^=\s]+={2,3}([^\s;\\]+)", block)
    assert found, f"no version in {block.splitlines()[0]}"
    return found[1]


def read(name: str) -> str:
    path = LOCKS / f"{name}.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def cpu_builds(version: str) -> list[str]:
    """torch without CUDA, as entries of a lock file.

    Raises:
        SystemExit: another version than before, and PyTorch's index cannot be reached.
    """
    wanted = f"torch=={version}+cpu ; sys_platform == 'linux'\ntorch=={version} ; sys_platform == 'darwin'\n"
    try:
        return compile_lock(wanted, "--no-deps", "--index", CPU_INDEX, "--index-strategy", "unsafe-best-match")
    except subprocess.CalledProcessError:
        known = blocks(read("torch-cpu"))
        if {version_of(entry).partition("+")[0] for entry in known} != {version}:
            raise SystemExit(
                f"torch {version}: the hashes of its CPU builds cannot be had from {CPU_INDEX}. Run `make lock` where it can be "
                "reached, or keep the version: make lock KEEP=1"
            ) from None
        print(f"{CPU_INDEX} cannot be reached: the hashes of torch {version}'s CPU builds stay as they were", file=sys.stderr)
        return known


def lock(keep: bool) -> None:
    """All files anew; with `keep` the versions that they have, where these still fit."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["int8"]]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    dev = [line for line in (*extras["docs"], *extras["dev"]) if not line.startswith(project["name"])]
    preferred = "".join(read(name) for name in ("run", "dev", "torch-cuda")).replace("===", "==") if keep else ""
    everything = compile_lock("\n".join([*needed, *build, *dev]), preferred=preferred)
    pins = "\n".join(entry.partition(" \\")[0] for entry in everything)
    used = {name_of(entry) for entry in compile_lock("\n".join([*needed, *build]), preferred=pins)}
    plain = [entry for entry in everything if not TORCH.match(name_of(entry))]
    # PyPI's torch and no local version of it, such as 2.13.0+cpu: `==` would take both.
    cuda = [re.sub(r"^torch==", "torch===", entry) for entry in everything if TORCH.match(name_of(entry))]
    (version,) = {version_of(entry) for entry in cuda if name_of(entry) == "torch"}
    cpu = cpu_builds(version)
    (floor,) = [re.sub(r">=([\d.]+).*", r"==\1", line) for line in needed if line.startswith("transformers")]
    clouds = {cloud: compile_lock("\n".join(packages), preferred=pins) for cloud, packages in CLOUDS.items()}
    made = {
        "run": [entry for entry in plain if name_of(entry) in used],
        "dev": [entry for entry in plain if name_of(entry) not in used],
        "torch-cuda": cuda,
        "torch-cpu": cpu,
        "floor": compile_lock(floor, "--no-deps"),
        "pip": compile_lock("pip", "--no-deps", preferred=read("pip") if keep else ""),
        **{cloud: [entry for entry in entries if name_of(entry) not in used] for cloud, entries in clouds.items()},
    }
    for name, entries in made.items():  # all or none: what cannot be resolved ends before
        (LOCKS / f"{name}.txt").write_text(HEADER + "".join(f"{entry}\n" for entry in entries), encoding="utf-8")


def newer() -> str:
    """What is installed in this environment in another version than the lock's."""
    locked: dict[str, set[str]] = {}
    for name in ("run", "dev", "torch-cpu", "torch-cuda"):  # some packages have a version for each of several Pythons
        for entry in blocks(read(name)):
            locked.setdefault(name_of(entry), set()).add(version_of(entry))
    installed = {re.sub(r"[-_.]+", "-", found.name).lower(): found.version for found in metadata.distributions()}
    changed = [name for name in sorted(installed) if name in locked and installed[name] not in locked[name]]
    return ", ".join(f"{name} {installed[name]} (locked: {', '.join(sorted(locked[name]))})" for name in changed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep each version that still fits")
    parser.add_argument("--compare", action="store_true", help="make nothing; print what is installed here in another version than locked")
    options = parser.parse_args()
    if options.compare:
        print(f"other versions than the lock's: {newer() or 'none'}")
    else:
        try:
            lock(options.keep)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
