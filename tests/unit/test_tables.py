"""Tables hold at any width: no figure is cut, names are folded, and what has no room follows below."""

from __future__ import annotations

import io
import re

import pytest
from rich.table import Table

from most_ray.console.tables import fitting
from most_ray.console.terminal import Terminal

NAMES = ["asr/test_takes", "asr/a_very_long_name_of_a_set_of_records_that_somebody_has_made"]


def table(columns: int) -> Table:
    made = Table(title="Rates")
    made.add_column("set", overflow="fold")
    for index in range(columns):
        made.add_column(f"95 % interval {index}", justify="right")
    for row, name in enumerate(NAMES):
        made.add_row(name, *(f"{row}{index}.{index}% to 10.4%" for index in range(columns)))
    return made


def shown(made: Table, width: int) -> str:
    console = Terminal(file=io.StringIO(), width=width)
    console.print(made)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 300])
@pytest.mark.parametrize("columns", [1, 3, 8, 20])
def test_every_figure_and_every_name_is_whole(width: int, columns: int) -> None:
    text = shown(table(columns), width)
    assert all(len(line) <= width for line in text.splitlines()) and "…" not in text
    for row in range(2):
        assert all(f"{row}{index}.{index}% to 10.4%" in text for index in range(columns))
    first = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert first.count(NAMES[1]) == len(fitting(table(columns), width)), "in each part"
    assert "\\n" not in text and len(re.findall("Rates", text)) == len(fitting(table(columns), width))


def test_a_table_that_fits_stays_as_it_is() -> None:
    made = table(1)
    assert fitting(made, 200) == [made]
    words = Table("record", "reference")
    words.add_row("a" * 100, "b" * 100)
    assert fitting(words, 40) == [words], "words are folded by the table itself"


def test_names_are_folded_before_columns_go_below() -> None:
    (part,) = fitting(table(3), 80)
    assert [str(column.header) for column in part.columns[1:]] == [f"95 % interval\n{index}" for index in range(3)]
