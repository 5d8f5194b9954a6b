"""The quickstart as a newcomer follows it: from `git clone` to the transcript of an own recording, each of its lines in its order."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml

from tests.conftest import ROOT
from tests.support.documents import Block, blocks
from tests.support.speech import RATE, spoken, spoken_folder

# What makes it short: the run of the digits by its configuration, that of own recordings by flags.
SHORT = {"max_steps": 4, "save_steps": 4, "warmup_steps": 0, "eval_steps": None, "max_new_tokens": 4, "max_new_units": 8}
FLAGS = " ".join(f"--{name} {'none' if value is None else value}" for name, value in SHORT.items())
# What is written as the reader's own, and what it is here. The environment of this checkout is used as it is: it takes minutes to make one.
REPLACED = {"make ": "make -o .venv/.installed ", "--from_audio DIR": f"--from_audio recordings {FLAGS}"}
# What is not run, by how its line begins, and why.
ELSEWHERE = {
    "pip install": "tests/unit/test_package.py builds the package and uses it in another folder",
    "most-ray synthesize": "takes a model that has learned to speak",
    **dict.fromkeys(
        (
            "make test",
            "make quick",
            "make bad-inputs",
            "make coverage",
            "make chaos",
            "make cluster",
            "make bench",
            "make sweep",
            "make an4",
        ),
        "hours",
    ),
    **dict.fromkeys(("make docs", "make check", "make lock", "make sbom", "make audit", "make digits-data"), "for contributors"),
}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone, with what this working tree has changed, the configuration of the digits made short, and recordings of the reader."""
    folder = tmp_path / "most_ray"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists() and not (ROOT / name).is_symlink():
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    path = folder / "jobs" / "configs" / "digits.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text(encoding="utf-8")), **SHORT}), encoding="utf-8")
    for name, words in (("a.wav", ["seven"]), ("b.flac", ["one", "two"])):
        soundfile.write(folder / name, spoken("george", words), RATE)
    spoken_folder(folder / "recordings", ["george", "jackson"], range(3))
    return folder


def run(words: str | list[str], folder: Path) -> str:
    """A line in the clone's folder, by the clone's code. Returns what it printed."""
    paths = os.pathsep.join([str(folder / ".venv" / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": paths}
    done = subprocess.run(words, shell=isinstance(words, str), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


def lines_of(block: Block) -> list[str]:
    """The commands of a block as they are written, without comments."""
    return [line for text in block.text.splitlines() if (line := re.sub(r"\s+#.*", "", text).strip())]


def written() -> list[tuple[Block, str]]:
    return [(block, line) for block in blocks(ROOT / "docs" / "quickstart.md") if block.language == "sh" for line in lines_of(block)]


def test_from_a_clone_to_the_transcript_of_an_own_recording(clone: Path) -> None:
    said: dict[str, str] = {}
    for _, line in written():
        if not line.startswith(tuple(ELSEWHERE)):
            text = line
            for before, after in REPLACED.items():
                text = text.replace(before, after)
            said[line] = run(text, clone)
    assert "step 4/4" in said["make train"] and f"Export:     {clone}/runs/digits/export" in said["make train"]
    assert "is complete (4 steps); nothing to do" in said["most-ray train --config jobs/configs/digits.yaml"]
    assert [line.split("\t")[0] for line in said["most-ray transcribe --model runs/digits/export a.wav b.flac"].splitlines()] == [
        "a.wav",
        "b.flac",
    ]
    assert f"Export:     {clone}/runs/recordings/export" in said["most-ray train --from_audio DIR"]
    (example,) = (block for block in blocks(ROOT / "docs" / "quickstart.md") if block.language == "python")
    run([sys.executable, "-c", example.text], clone)
    own = ["recordings/7_george_0.flac", "recordings/2_jackson_1.flac"]
    heard = run(f"most-ray transcribe --model runs/recordings/export {shlex.join(own)}", clone)
    assert [line.split("\t")[0] for line in heard.splitlines()] == own


def test_every_exception_is_still_needed() -> None:
    lines = [line for _, line in written()]
    assert not [part for part in ELSEWHERE if not any(line.startswith(part) for line in lines)]
    assert not [part for part in REPLACED if not any(part in line for line in lines)]
