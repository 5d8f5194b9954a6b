"""What an installation from .ci/locks consists of, by uv, which the lock holds: `make sbom` writes it as CycloneDX, `make audit` asks
OSV's database whether any of it has a known vulnerability.

    python .ci/materials.py sbom FILE [--torch cpu|cuda]    needs no network
    python .ci/materials.py audit [--torch cpu|cuda]        exit code 1: there are some; 0: none, or the database cannot be reached

uv reads uv.lock only, so the entries of the locks are put into one, in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from lock import ROOT, blocks, name_of, read, version_of

DATABASE = "https://api.osv.dev"
_WAIT_S = 20.0  # for the database's first answer


def uv_lock(entries: list[str], name: str, version: str, python: str) -> str:
    """A uv.lock of a project that needs each of these entries of the locks, under the entry's own condition."""
    source = '{ registry = "https://pypi.org/simple" }'
    lines = ["version = 1", "revision = 3", f'requires-python = "{python}"']
    needed, packages = [], []
    for entry in entries:
        first = entry.splitlines()[0].removesuffix(" \\")
        what = f"name = {json.dumps(name_of(entry))}", f"version = {json.dumps(version_of(entry))}", f"source = {source}"
        marker = first.partition(" ; ")[2]
        needed.append(f"    {{ {', '.join([*what, *([f'marker = {json.dumps(marker)}'] if marker else [])])} }},")
        packages += ["", "[[package]]", *what]
    root = ["", "[[package]]", f'name = "{name}"', f'version = "{version}"', 'source = { virtual = "." }', "dependencies = [", *needed, "]"]
    return "\n".join([*lines, *root, *packages, ""])


def run_uv(torch: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of uv on what `sh .ci/venv.sh run` installs with a build of torch, "cpu" or "cuda"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = project["name"].replace("_", "-")
    entries = [entry for file in ("run", f"torch-{torch}") for entry in blocks(read(file))]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "uv.lock").write_text(uv_lock(entries, name, project["version"], project["requires-python"]), encoding="utf-8")
        about = f'[project]\nname = "{name}"\nversion = "{project["version"]}"\nrequires-python = "{project["requires-python"]}"\n'
        Path(folder, "pyproject.toml").write_text(about, encoding="utf-8")
        arguments = [sys.executable, "-m", "uv", *command, "--frozen", "--project", folder, "--no-config"]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder)


def unreachable(url: str) -> str:
    """Why nothing answers at a URL; "" where something does."""
    try:
        urllib.request.urlopen(url, timeout=_WAIT_S).close()
    except urllib.error.HTTPError:  # an answer too
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def write_sbom(path: Path, torch: str) -> int:
    """Write the bill of materials, and return uv's exit code."""
    done = run_uv(torch, "export", "--offline", "--preview-features", "sbom-export", "--format", "cyclonedx1.5")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return done.returncode
    path.write_text(done.stdout, encoding="utf-8")
    print(f"{len(json.loads(done.stdout)['components'])} components: {path}")
    return 0


def audit(torch: str, database: str = DATABASE) -> int:
    """Print the known vulnerabilities, and return 1 where there are some."""
    if reason := unreachable(database):
        print(f"Nothing was audited: {database} cannot be reached ({reason}).")
        return 0
    done = run_uv(torch, "audit", "--preview-features", "audit", "--service-url", database)
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sbom", "audit"])
    parser.add_argument("file", nargs="?", type=Path, help="of the bill of materials (default: sbom.json)", default=Path("sbom.json"))
    parser.add_argument("--torch", choices=["cpu", "cuda"], default="cuda", help="torch's build (default: cuda, the image's)")
    options = parser.parse_args()
    sys.exit(write_sbom(options.file, options.torch) if options.what == "sbom" else audit(options.torch))
