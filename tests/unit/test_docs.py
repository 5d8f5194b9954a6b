"""README.md and docs/: generated pages are up to date, links lead somewhere, and every command, configuration and record in a block is one
that the program takes. `tests/end_to_end/test_docs.py` runs the commands that need neither a cluster nor a GPU."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from most_ray import config as configuration
from most_ray.cli import build_parser
from most_ray.cli.parser import Parser
from most_ray.errors import ConfigError, RecordError
from most_ray.planner.hardware import device_of
from most_ray.records.record import parse_records
from most_ray.records.tts_records import read_conversions
from most_ray.sweep import options
from most_ray.train import run
from tests.conftest import ROOT, tool
from tests.support.documents import GENERATED, Block, anchors, blocks, commands, inline_code, links, pages

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
WRITTEN = [page for page in PAGES if page.id not in GENERATED]
LANGUAGES = ("sh", "yaml", "json", "python", "text", "diff")
TRACKED = ("jobs/", "cluster/", "tests/", ".ci/", "docs/", "most_ray/")
MADE = ("FILE", "DIR", "SWEEP/best.yaml", "data/run.yaml")  # configurations that a reader or an earlier command has made
JOBS = {"train": "train", "tune": "sweep", "evaluate": "evaluate", "prepare": "prepare"}  # jobs/*.py and the commands that they are
KEYS = {each.name for section in (*configuration.SECTIONS, options.SweepOptions) for each in fields(section)} | {"space"}
# Of programs that are not ours, and of benchmarks.
OTHER_FLAGS = {"--shutdown-timeout", "--node-ip-address", "--signal", "--check", "--kills", "--saves", "--every"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_generated_pages_are_up_to_date(generator: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """And no room is above its limits, none without a docstring, and no promise without a test."""
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_named(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generator.docs_metrics, "metrics_markdown", lambda: "# Something else\n")
    monkeypatch.setattr(generator, "MOST_MODULES", 3)
    assert generator.main(["--check"]) == 1
    message = capsys.readouterr().err
    assert "docs/metrics.md is out of date: .venv/bin/python .ci/docs.py" in message
    assert "docs/configuration.md" not in message and re.search(r"most_ray\.model has \d+ modules", message)


def test_a_change_of_lines_alone_makes_no_page_out_of_date(generator: ModuleType) -> None:
    table = "| [`most_ray/io`](#most_rayio) | Files. | 5 | 1,092 |\n"
    assert generator.without_counts(table) == generator.without_counts(table.replace("1,092", "987"))
    assert generator.without_counts(table) != generator.without_counts(table.replace("| 5 |", "| 6 |"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_measured_figures_are_those_of_the_results(page: str) -> None:
    """Of the tables that name a command in their last column."""
    results = (ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    rows = [
        line.split("|") for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if re.search(r"\| (`python -m|the same)", line)
    ]
    figures = {figure for row in rows if len(row) == 6 for figure in re.findall(r"\d[\d.]*\d", f"{row[2]} {row[3]}")}
    assert len(figures) >= 10 and not {figure for figure in figures if figure not in results}


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [tool("mkdocs"), "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    page = (tmp_path / "site" / "architecture" / "index.html").read_text(encoding="utf-8")
    assert 'src="../layers.svg"' in page and "../most_ray/config.py" not in page


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are(page: Path) -> None:
    """A block without a language is checked by nothing, nor is one that is only indented."""
    assert not [block.where for block in blocks(page) if block.language not in LANGUAGES]
    if page.is_relative_to(ROOT / "docs") or page.name == "README.md":
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?m)^\n {4}(?:most-ray|make|python|sh|ray) ", text), "an indented command: use ```sh"


# Commands


@functools.cache
def parser() -> Parser:
    return build_parser()


def check_config(args: Any) -> None:
    """A configuration that is in the repository loads with the flags; of another one the flags are right."""
    path = getattr(args, "config", None)
    flags = options.flag_values(args)
    if args.command == "sweep":
        options.load_sweep(path, flags)
    elif args.command == "prepare" and args.what == "tts":
        return
    elif "known_flags" in vars(args) and "learning_rate" in args.known_flags:
        assert path is None or path in MADE or (ROOT / path).exists(), f"no such configuration: {path}"
        configuration.load_config(None if path in (None, *MADE) else path, flags)
    if getattr(args, "dry_run", None):
        device_of(args.dry_run, True, torch.bfloat16, 1, 1)


def most_ray(words: list[str]) -> None:
    args = parser().parse_args(words)
    if args.command == "submit":
        if "--stop" not in args.words and not getattr(args, "stop", None):
            most_ray(args.words)
        return
    check_config(args)


def make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8") + (ROOT / ".ci" / "venv.sh").read_text(encoding="utf-8")
    for word in words:
        name, given, _ = word.partition("=")
        pattern = rf"\$[({{]{name}[)}}:]|\${name}\b" if given else rf"(?m)^{re.escape(name)}:"
        assert re.search(pattern, text), f"make has no {word}"


def torchrun(words: list[str]) -> None:
    """torchrun's own flags by its parser, the engine's by the engine's."""
    found = get_args_parser().parse_args(words)
    assert (found.module, found.training_script) == (True, "most_ray.train.run")
    train(found.training_script_args)


def train(words: list[str]) -> None:
    args = parser().parse_args(["train", *(word.replace("%a", "0") for word in words)])
    check_config(args)


def python(words: list[str]) -> None:
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        if module == "pytest":
            return
        path = ROOT / (module.replace(".", "/") + ".py")
        path = path if path.exists() else ROOT / module.replace(".", "/") / "__main__.py"
        path = path if path.exists() else path.with_name("__init__.py")
    else:
        path, rest = ROOT / words[0], words[1:]
        if path.parent == ROOT / "jobs":
            return most_ray([JOBS[path.stem], *rest])
    text = path.read_text(encoding="utf-8")
    unknown = [word for word in rest if word.startswith("--") and f'"{word}"' not in text]
    assert not unknown, f"{path} has no {unknown}"
    return None


def shell(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file()


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert extra in extras, f"no extra {extra}"


def run_training(words: list[str]) -> None:
    assert words[0] in ("single", "dp", "ep", "large")
    train(words[1:])


def sbatch(words: list[str]) -> None:
    script = next(index for index, word in enumerate(words) if not word.startswith("-"))
    assert (ROOT / words[script]).is_file()
    train(words[script + 1 :])


def ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli  # takes a second

    assert words[0] in cli.commands, f"ray has no {words[0]}"
    if "--" in words:
        check_command(words[words.index("--") + 1 :])


def sources(words: list[str]) -> None:
    assert words == ["~/.most_ray/cluster/env"], "what `sh cluster/local/up.sh` writes"


def known(*subcommands: str) -> Callable[[list[str]], None]:
    """A program of others, with those of its subcommands that the pages use: paths in the repository are checked for all programs."""

    def check(words: list[str]) -> None:
        assert not subcommands or words[0] in subcommands, f"{words[0]}: add it here once it was tried"

    return check


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "most-ray": most_ray,
    "make": make,
    "torchrun": torchrun,
    "python": python,
    "sh": shell,
    ".": sources,
    "pip": pip,
    "jobs/run_training.sh": run_training,
    "sbatch": sbatch,
    "ray": ray,
    "docker": known("build", "push"),
    "kubectl": known("apply", "create", "port-forward"),
    "openssl": known("rand"),
    "umask": known("077"),
    "chmod": known("600"),
    "promtool": known("test"),
    "aws": known("ec2"),
    "gcloud": known("compute"),
    "systemctl": known("disable"),
    "ssh": known(),
    "tr": known(),
}


def check_command(words: list[str]) -> None:
    """Raises where the program would not take it, or where it names a file of the repository that is not there."""
    assert words[0] in PROGRAMS, f"{words[0]}: nothing here checks it"
    for word in words:
        if word.startswith(TRACKED) and "%" not in word:
            assert (ROOT / word).exists(), f"no {word}"
    PROGRAMS[words[0]](words[1:])


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        for words in commands(block.text) if block.language == "sh" and not block.patched else ():
            try:
                check_command(words)
            except (AssertionError, ConfigError, SystemExit, OSError) as error:
                wrong.append(f"{block.where}: {' '.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("most-ray train --config jobs/configs/digits.yaml --learning_rat 1", "learning_rat"),
        ("most-ray train --config runs/digits.yaml", "no such configuration"),
        ("most-ray train --config jobs/configs/digits.yaml --weight_unit bytes", "weight_unit"),
        ("most-ray submit trian --config jobs/configs/digits.yaml", "is no command"),
        ("make trian", "make has no trian"),
        ("make an4 AN5=DIR", "make has no AN5=DIR"),
        ("torchrun -m most_ray.train.run --config jobs/configs/digits.yaml --ep_siz 2", "ep_siz"),
        ("sh cluster/local/upp.sh", "no cluster/local/upp.sh"),
        ("python -m tests.benchmarks.train --nonsense", "nonsense"),
        ("ray jobs submit", "ray has no jobs"),
        ("rm -rf /", "nothing here checks it"),
    ],
)
def test_wrong_commands_are_found(command: str, message: str) -> None:
    (words,) = commands(command)
    with pytest.raises((AssertionError, ConfigError), match=message):
        check_command(words)


def test_the_engines_parser_is_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun -m most_ray.train.run` takes the keys of `most-ray train`, which is how its commands are checked here."""

    class EnoughError(ConfigError):
        exit_code = 99

    def enough(path: str, flags: dict[str, Any]) -> None:
        assert (path, flags) == ("x.yaml", {"ep_size": "2"})
        raise EnoughError("config", path, "is read.")

    monkeypatch.setattr(run.configuration, "load_config", enough)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main(["--config", "x.yaml", "--ep_size", "2"]) == 99


def subparser(words: list[str]) -> tuple[Parser, list[str]]:
    """The parser of the command that some words begin with, and the words after it."""
    found, rest = parser(), list(words)
    while rest:
        below = next((action.choices for action in found._actions if isinstance(action.choices, dict)), None)
        if below is None or rest[0].startswith("--"):
            break
        assert rest[0] in below, f"no command {rest[0]}"
        found = below[rest.pop(0)]
    return found, rest


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_flags_and_keys_in_sentences_exist(page: Path) -> None:
    flags = {f"--{name}" for name in _all_flags(parser())} | OTHER_FLAGS
    wrong = []
    for number, code in inline_code(page):
        try:
            if re.search(r"\b(COMMAND|NAME)\b", code):
                continue
            if code.startswith("most-ray "):
                found, rest = subparser([word for word in code.split()[1:] if not word.startswith((".", "["))])
                known_flags = {*found.flag_names(), *(_all_flags(parser()) if found.prog.endswith("submit") else ())}
                unknown = [word for word in rest if word.startswith("--") and word[2:].split("=")[0] not in known_flags]
                assert not unknown, f"{found.prog} has no {unknown}"
            elif code.startswith("make ") and code.split()[1] != "...":
                make(code.split()[1:])
            elif code.startswith("python -m "):
                python(code.split()[1:])
            elif re.fullmatch(r"--[a-z_-]+([ =].*)?", code):
                assert code.split()[0].split("=")[0] in flags, "no such flag"
            elif "cluster" not in page.parts and (match := re.match(r"([a-z_]+): \S", code)):
                assert match[1] in KEYS, "no such key"
        except (AssertionError, ConfigError) as error:
            wrong.append(f"{page.name}:{number}: {code}: {error}")
    assert not wrong, "\n".join(wrong)


def _all_flags(found: Parser) -> set[str]:
    below = [choice for action in found._actions if isinstance(action.choices, dict) for choice in action.choices.values()]
    return set(found.flag_names()).union(*map(_all_flags, below))


def test_messages_of_wrong_set_ups_are_those_of_the_code() -> None:
    """Clause by clause, as the values between them differ."""
    files = [*(ROOT / "most_ray").rglob("*.py"), *(ROOT / "cluster" / "local").glob("*.sh")]
    source = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in files).replace('" f"', "").replace('" "', "")
    table = (ROOT / "docs" / "cluster" / "what-breaks.md").read_text(encoding="utf-8").split("| set-up |")[1]
    messages = re.findall(r"`([^`]*)`", " ".join(line.split("|")[2] for line in table.splitlines()[2:] if line.startswith("|")))
    clauses = [
        part.strip() for text in messages for part in re.split(r"[.:,'\[\]()]|\d+|\b(?:on )?HOST\b|\bGPU\b|\bRAY_PORT\b|\bbytes\b", text)
    ]
    of_the_system = ("No space left on device", "Read-only file system")
    said = [
        clause
        for clause in clauses
        if len(clause) >= 12 and not clause.endswith("=") and not clause.startswith("--") and clause not in of_the_system
    ]
    assert len(said) > 20 and not [clause for clause in said if clause not in source]


# What is not a command


def check_yaml(block: Block, folder: Path) -> None:
    values = yaml.safe_load(block.text)
    if "space" in values:
        (folder / "sweep.yaml").write_text(block.text, encoding="utf-8")
        options.load_sweep(folder / "sweep.yaml", {})
    else:
        configuration.config_from(values)


def check_json(block: Block, folder: Path) -> None:
    value = json.loads(block.text)
    if isinstance(value, list):
        (folder / "tts.json").write_text(block.text, encoding="utf-8")
        assert read_conversions(folder / "tts.json")
    else:
        assert not isinstance(parse_records([value])[0], RecordError)


def check_python(block: Block, _: Path) -> None:
    for node in ast.walk(ast.parse(block.text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        assert all(importlib.util.find_spec(name) for name in names)


CHECKS = {"yaml": check_yaml, "json": check_json, "python": check_python}


@pytest.mark.parametrize("page", PAGES)
def test_configurations_records_and_python_are_right(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if check := CHECKS.get(block.language):
            check(block, tmp_path)
