"""What is installed: the wheel holds the shipped configurations and the digits, and they work by name in any folder."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from most_ray.cli import main
from most_ray.config import config_from, load_config
from most_ray.config_files import is_shipped, read_yaml, shipped_names
from most_ray.errors import ConfigError
from most_ray.sweep.options import load_sweep
from tests.conftest import ROOT

CONFIGS = ROOT / "jobs" / "configs"
BUILD = "import sys; from setuptools import build_meta as b; (b.build_sdist if sys.argv[2] == 'sdist' else b.build_wheel)(sys.argv[1])"
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def built(source: Path, output: Path, kind: str) -> None:
    words = [sys.executable, "-c", BUILD, str(output), kind]
    subprocess.run(words, cwd=source, env=OUTSIDE, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist, as an index would have both; beside it the sdist."""
    root = tmp_path_factory.mktemp("package")
    source, output = root / "source", root / "dist"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("most_ray", "jobs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    built(source, output, "sdist")
    (sdist,) = output.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    built(unpacked, output, "wheel")
    (found,) = output.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_what_is_shipped_and_its_licences(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    folders = {"configs": CONFIGS, "data": ROOT / "jobs" / "data"}
    files = {f"most_ray/jobs/{name}/{path.relative_to(at).as_posix()}": path for name, at in folders.items() for path in at.rglob("*.*")}
    assert len(files) > 20 and {name for name, path in files.items() if path.is_file()} <= names
    assert all(archive.read(name) == path.read_bytes() for name, path in files.items() if path.is_file())
    assert "most_ray/jobs/data/digits/LICENSE" in names and not [name for name in names if name.startswith(("jobs/", "tests/"))]
    (about,) = (name for name in names if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(archive.read(about))
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-4.0" and len(metadata.get_all("License-File", [])) == 2
    assert metadata["Description-Content-Type"] == "text/markdown" and str(metadata.get_payload()).startswith("# most_ray")


@pytest.mark.slow
def test_installed_the_digits_are_a_configuration_in_any_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "digits").mkdir()
    code = "from most_ray.config import load_config as l; from most_ray.sweep.options import load_sweep as s; import most_ray\n"
    code += "print(most_ray.__file__, *l('digits').train_asr_dirs, *s('sweep-digits', {}).run.val_asr_dirs)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=tmp_path, env={**OUTSIDE, "PYTHONPATH": str(tmp_path / "site")}, check=True, capture_output=True, text=True
    )
    module, *paths = done.stdout.split()
    assert module == str(tmp_path / "site" / "most_ray" / "__init__.py")
    data = tmp_path / "site" / "most_ray" / "jobs" / "data" / "digits"
    assert paths == [str(data / name) for name in ("train_asr", "test_takes", "test_speaker")] and all(map(os.path.isdir, paths))


def test_the_readme_shows_no_picture_that_an_index_does_not_have() -> None:
    assert re.findall(r"!\[[^]]*\]\((?!https?://)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8")) == []


def test_every_shipped_configuration_has_a_name() -> None:
    assert shipped_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert set(shipped_names("sweep")) == {"sweep-digits", "sweep-splits"} and not set(shipped_names("run")) & set(shipped_names("sweep"))


@pytest.mark.parametrize("name", shipped_names("run"))
def test_a_name_means_the_file_but_for_where_its_data_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    by_path = load_config(f"jobs/configs/{name}.yaml")
    assert load_config(name) == by_path == load_config(f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    elsewhere = load_config(name)
    for key, value in vars(by_path).items():
        found = getattr(elsewhere, key)
        if key.endswith("_dirs"):
            assert len(found) == len(value)
            assert all(a == b or (os.path.isabs(a) and os.path.samefile(a, ROOT / b)) for a, b in zip(found, value, strict=True))
        else:
            assert found == value, key


def test_the_data_of_a_shipped_configuration_is_the_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs" / "data" / "digits" / "train_asr").mkdir(parents=True)  # another checkout, say
    monkeypatch.chdir(tmp_path)
    assert all(os.path.samefile(found, ROOT / "jobs/data/digits/train_asr") for found in load_config("digits").train_asr_dirs)
    assert load_sweep("sweep-digits", {}).run.max_steps == 400


def test_a_file_of_that_name_is_meant_and_a_folder_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert is_shipped("digits") and load_config("digits").name == "digits"
    (tmp_path / "small-cpu").write_text("name: mine\n")
    assert load_config("small-cpu") == config_from({"name": "mine"}) and not is_shipped("small-cpu")
    (tmp_path / "digits.yaml").write_text("name: own\n")
    assert load_config("digits.yaml").name == "own" and load_config("digits").name == "digits"
    for path in ("./digits", "digits/", "configs/digits", str(tmp_path / "digits")):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_yaml(path)


def test_an_unknown_name_is_answered_with_those_that_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "digitz"]) == 2
    error = capsys.readouterr().err
    assert "config = 'digitz'" in error and "digits, large" in error and "sweep-digits" not in error and error.count("\n") == 1
    assert main(["sweep", "--config", "digitz"]) == 2
    assert "name a shipped one: sweep-digits, sweep-splits." in capsys.readouterr().err
