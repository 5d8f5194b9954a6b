"""Tables that hold at any width: no figure is cut. The first column, of names, is folded; columns for which there is no room follow in a
further table with the same names."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from most_ray.errors import printable, redact

_NAME = 12  # characters: names are not folded to fewer where columns can go into a further table
_EDGE, _BETWEEN = 4, 3  # characters beside the columns, and between two of them


def fitting(table: Table, width: int) -> list[Table]:
    """A table of texts as one table or several that have at most `width` characters."""
    headings = [_text(column.header) for column in table.columns]
    cells = [[_text(cell) for cell in column.cells] for column in table.columns]
    if len(headings) < 2 or 2 * sum(column.justify == "right" for column in table.columns) < len(headings):
        return [table]  # a table of words, whose cells are folded
    widths = [max(map(cell_len, [*column, *_words(heading)])) for heading, column in zip(headings, cells, strict=True)]
    longest = max(map(cell_len, [headings[0], *cells[0]]))
    natural = [longest, *(max(each, cell_len(heading)) for each, heading in zip(widths[1:], headings[1:], strict=True))]
    if _total(natural) <= width:
        return [table]
    name, blocks = _blocks(longest, widths, width)
    return [_part(table, headings, cells, [name, *widths[1:]], block, index) for index, block in enumerate(blocks)]


def _blocks(longest: int, widths: Sequence[int], width: int) -> tuple[int, list[list[int]]]:
    """The width of the column of names, and the other columns of each table."""
    room = width - _total([0, *widths[1:]])
    if room >= min(longest, _NAME):
        return min(longest, room), [list(range(1, len(widths)))]
    name, blocks = min(longest, max(_NAME, width // 4)), list[list[int]]()
    for column in range(1, len(widths)):
        if blocks and _total([name, *(widths[each] for each in [*blocks[-1], column])]) <= width:
            blocks[-1].append(column)
        else:
            blocks.append([column])
    return name, blocks


def _part(
    table: Table, headings: Sequence[str], cells: Sequence[Sequence[str]], widths: Sequence[int], block: Sequence[int], index: int
) -> Table:
    """The table of some columns; the first one stands in each part."""
    title = _text(table.title or "")
    part = Table(title=f"{title} (continued)" if index and title else title or None)
    for column in (0, *block):
        heading = "\n".join(textwrap.wrap(headings[column], max(1, widths[column]), break_long_words=column == 0))
        like = table.columns[column]
        part.add_column(Text(heading), justify=like.justify, style=like.style, overflow="fold", no_wrap=column > 0, width=widths[column])
    for row in zip(*(cells[column] for column in (0, *block)), strict=True):
        part.add_row(*row)
    return part


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * (len(widths) - 1) + _EDGE


def _words(heading: str) -> list[str]:
    return heading.split() or [""]


def _text(value: object) -> str:
    return "\n".join(printable(redact(line)) for line in str(value).split("\n"))
