"""--help fits on a screen, takes no time, and leaves nothing out; a configuration may be named by a word of its own."""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from most_ray.cli import build_parser, main
from most_ray.cli.cluster_commands import _check_command
from most_ray.config import OPTIONS
from most_ray.console.help import HelpParser
from most_ray.errors import ConfigError
from most_ray.train import run
from tests.conftest import ROOT

MOST_LINES = 60


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all commands below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.mark.parametrize("columns", [40, 80, 120, 300])
def test_each_commands_help_fits_on_a_screen(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = list(parsers(build_parser()))
    assert len(found) > 15
    for parser in found:
        lines = parser.format_help().splitlines()
        assert len(lines) < MOST_LINES, parser.prog
        assert max(map(len, lines)) <= min(max(columns, 80), 130), parser.prog


def test_that_of_the_engine_without_ray_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        run.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < MOST_LINES


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as done:
        main([*words])
    assert done.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    return [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]


def test_everyday_flags_are_some_and_take_a_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = helped(capsys, "train", "--help")
    shown = [name for name in flags_in(text) if name in OPTIONS]
    assert 12 <= len(shown) <= 18 and shown == [name for name, option in OPTIONS.items() if option.everyday]
    lines = text.splitlines()
    described = [line for line in lines if line.startswith("  -")]
    longer = {above.split()[0] for above, line in itertools.pairwise(lines) if line.startswith("   ") and above.startswith("  -")}
    assert longer <= {"--config"}, "a text of two lines"  # which lists the configurations that are shipped
    assert all(len(line.split("  ")) > 2 for line in described)
    assert lines[-1] == "All flags: most-ray train --help all"


def test_help_all_shows_the_rest_and_the_other_commands_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    every = helped(capsys, "train", "--help", "all")
    assert set(OPTIONS) <= set(flags_in(every)) and "All flags:" not in every
    assert every == helped(capsys, "train", "-h", "all")
    for words in (("plan",), ("sweep",), ("doctor",), ("prepare", "store")):
        for flag in ("--help", "-h"):
            text = helped(capsys, *words, flag)
            assert not set(OPTIONS) & set(flags_in(text)), words
            assert " ".join(text.split()).endswith("is a flag too: most-ray train --help all"), words


def test_the_command_alone_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["prepare"]):
        assert main(words) == 0
        assert capsys.readouterr().out == helped(capsys, *words, "--help")


def test_help_loads_no_large_library() -> None:
    code = (
        "import sys\nfrom most_ray.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'scipy', 'sklearn', 'optuna', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, "train", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_an_abbreviated_flag_stays_an_error_in_the_parser_of_the_engine() -> None:
    parser = HelpParser(prog="x")
    parser.add_argument("--name")
    assert parser.parse_known_args(["--nam", "y"])[1] == ["--nam", "y"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "c.yaml"],
        ["train", "--dry_run", "c.yaml"],
        ["train", "--bf16", "c.yaml", "--max_steps", "3"],
        ["plan", "c.yaml", "--trace", "t"],
        ["sweep", "c.yaml"],
        ["doctor", "c.yaml"],
        ["prepare", "store", "c.yaml"],
        ["prepare", "tts", "c.yaml"],
        ["train", "--max_steps", "3", "--", "c.yaml"],
    ],
)
def test_a_file_is_the_configuration(words: list[str]) -> None:
    args = build_parser().parse_args(words)
    assert str(args.config) == "c.yaml"
    assert getattr(args, "dry_run", None) in (None, "") and getattr(args, "bf16", "true") == "true"


def test_a_device_is_still_a_device() -> None:
    args = build_parser().parse_args(["train", "--dry_run", "H100", "--config", "c.yaml"])
    assert (args.dry_run, args.config) == ("H100", "c.yaml")


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["train", "jobs/configs/digits.yaml"], ["train", "--config=jobs/configs/digits.yaml"]),
        (["train", "--name", "digits.yaml", "{}/jobs/configs/digits.yaml"], None),
        (["train", "--dry_run", "jobs/configs/digits.yaml"], ["train", "--dry_run", "--config=jobs/configs/digits.yaml"]),
    ],
)
def test_a_jobs_file_is_its_configuration_too(words: list[str], sent: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = _check_command([word.format(ROOT) for word in words], ROOT)
    assert job.config == "jobs/configs/digits.yaml"
    assert job.command == (sent or ["train", "--name", "digits.yaml", "--config=jobs/configs/digits.yaml"])


def test_a_file_and_a_flag_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to no flag, and --config"):
        build_parser().parse_args(["train", "a.yaml", "--config", "b.yaml"])


def test_make_alone_lists_its_targets() -> None:
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and "=" not in line.split()[0]]
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets and set(listed) == set(targets[1].split()) - {"asked"}
    for variable in ("PYTHON", "TORCH", "TORCH_INDEX", "KEEP", "AN4", "FSDD"):
        assert f"{variable}=" in text
    said = subprocess.run(["make", "--dry-run", "train"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "most-ray train --config jobs/configs/digits.yaml" in said
