"""docs/screens.md shows what is printed."""

from __future__ import annotations

from tests.support.screens import PAGE, screens_markdown


def test_the_page_of_screens_is_what_is_printed() -> None:
    assert PAGE.read_text(encoding="utf-8") == screens_markdown(), "python -m tests.support.screens"


def test_on_a_screen_no_line_is_too_wide_and_nothing_is_cut() -> None:
    for part in screens_markdown().split("## ")[1:3]:
        width = int(part.split(" columns")[0].split()[-1])
        lines = [line for line in part.splitlines() if not line.startswith("evaluation of step")]
        assert max(map(len, lines)) <= width and "\u2026" not in part
