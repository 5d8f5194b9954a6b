"""The reference pages are made from the declarations alone."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest

from most_ray.config import RunConfig
from most_ray.sweep.options import SweepOptions


def test_every_key_stands_in_the_reference_once(generator: ModuleType) -> None:
    page = generator.docs_reference.configuration_markdown()
    for field in (*dataclasses.fields(RunConfig), *dataclasses.fields(SweepOptions)):
        assert page.count(f"\n| `{field.name}` |") == 1, field.name
    assert "| `lr_scheduler` | `linear`, `cosine`, `constant` | `cosine` |" in page
    assert "| `store_dir` |" in page
    assert "`false`" in page


def test_every_command_has_a_section_that_the_summary_links_to(generator: ModuleType) -> None:
    page = generator.docs_reference.command_line_markdown()
    for command in ("prepare units", "prepare store", "train", "sweep", "evaluate", "submit"):
        assert f"[`most-ray {command}`](#most-ray-{command.replace(' ', '-')})" in page
        assert f"\n## most-ray {command}\n" in page
    assert "| `--dry_run` | `DEVICE` |" in page
    assert "--learning_rate" not in page  # a key of the configuration, which has a page of its own


def test_pages_depend_neither_on_the_terminal_nor_on_the_environment(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = generator.docs_reference.configuration_markdown(), generator.docs_reference.command_line_markdown()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (generator.docs_reference.configuration_markdown(), generator.docs_reference.command_line_markdown()) == before


def test_tables_have_as_many_cells_in_each_row_as_in_the_head(generator: ModuleType) -> None:
    for page in (generator.docs_reference.configuration_markdown(), generator.docs_reference.command_line_markdown()):
        head = 0
        for line in page.splitlines():
            cells = line.replace("\\|", "").count("|")
            head = cells if line.startswith("|") and not head else head if line.startswith("|") else 0
            assert not line.startswith("|") or cells == head, line
