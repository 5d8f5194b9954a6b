"""`--version`, `env` and `completion`: what is installed, told without loading it, and flags for shells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import most_ray
from most_ray.cli import build_parser, main
from most_ray.cli.completion import SHELLS, script
from most_ray.config import OPTIONS
from most_ray.runs import environment


def test_the_version_and_its_commit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, text in (({}, ""), ({"commit": "1" * 40, "modified": True}, f" (commit {'1' * 12}, modified)")):
        monkeypatch.setattr("most_ray.cli.about_commands.source_commit", lambda commit=commit: commit)
        with pytest.raises(SystemExit) as done:
            main(["--version"])
        assert done.value.code == 0 and capsys.readouterr().out == f"most-ray {most_ray.__version__}{text}\n"


def test_the_environment_is_told_without_secrets_and_without_loading_a_library() -> None:
    variables = {"RAY_AUTH_TOKEN": "hidden1", "WANDB_API_KEY": "hidden2", "MOST_RAY_CACHE_DIR": "s3://u:hidden3@b/c", "HF_HOME": "\x1b[31m"}
    code = "import sys; from most_ray.cli import main; main(sys.argv[1:]); assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    for flags in ([], ["--json"]):
        found = subprocess.run(
            [sys.executable, "-c", code, "env", *flags],
            env={**environment.os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.returncode == 0, found.stderr
        assert "hidden" not in found.stdout and "\x1b" not in found.stdout
        for name in (*variables, "torch", "cpu", "cores", "memory_gb"):
            assert name in found.stdout
    values = json.loads(found.stdout)
    assert values["versions"]["ray"] == environment.version_of("ray") and values["variables"]["RAY_AUTH_TOKEN"] == "***"


def test_devices_are_those_that_the_driver_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\necho 'NVIDIA H200, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert environment.installation()["gpus"] == ["NVIDIA H200, 143771 MiB"] * 2
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.installation()["gpus"] == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_has_every_command_and_flag(shell: str) -> None:
    text = script(build_parser(), shell)
    for name in (*OPTIONS, "dry_run", "fit_kmeans", "rescore", "detach", "version"):
        assert (f"-l {name} " if shell == "fish" else f"--{name}") in text, name
    for command in ("train", "prepare", "units", "completion", "submit"):
        assert command in text


def completed(*words: str, folder: Path) -> list[str]:
    """What bash offers for the last of these words."""
    code = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _most_ray || true; printf "%s\\n" "${COMPREPLY[@]:-}"'
    path = folder / "script"
    path.write_text(script(build_parser(), "bash"))
    found = subprocess.run(["bash", "-euc", code, "bash", str(path), *words], capture_output=True, text=True, timeout=30, check=True)
    assert found.stderr == ""
    return found.stdout.split()


def test_bash_completes_commands_flags_and_choices(tmp_path: Path) -> None:
    assert completed("most-ray", "tr", folder=tmp_path) == ["train", "transcribe"]
    assert completed("most-ray", "train", "--learning", folder=tmp_path) == ["--learning_rate"]
    assert completed("most-ray", "train", "c.yaml", "--max_st", folder=tmp_path) == ["--max_steps"]
    assert completed("most-ray", "prepare", "un", folder=tmp_path) == ["units"]
    assert "--fit_kmeans" in completed("most-ray", "prepare", "units", "--fit", folder=tmp_path)
    assert completed("most-ray", "train", "--weight_unit", "", folder=tmp_path) == ["records", "tokens"]
    assert completed("most-ray", "train", "--bf16", "t", folder=tmp_path) == ["true"]
    assert {"bash", "zsh", "fish"} < set(completed("most-ray", "completion", "", folder=tmp_path))
    assert completed("most-ray", "train", "c.ya", folder=tmp_path) == []  # so that bash looks for files


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script(build_parser(), "bash")
    assert main(["completion", "tcsh"]) == 2 and "invalid choice" in capsys.readouterr().err
