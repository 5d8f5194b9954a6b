"""The project's Markdown: its blocks of code, the commands in them, its links and its headings."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

GENERATED = ("docs/configuration.md", "docs/command-line.md", "docs/metrics.md")
_OTHERS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "cluster/README.md",
    "examples/README.md",
    "jobs/data/digits/README.md",
    "tests/benchmarks/RESULTS.md",
)
_FENCE = re.compile(r"^(\s*)```(\S*)\s*$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\]|\n)*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_ASSIGNED = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of its fence, from 1
    language: str
    text: str
    heading: str  # of its section
    patched: bool  # a patch stands before it in its section: what it shows works with that patch applied

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """All pages that are read by people: README.md, those of docs/, and others beside what they describe."""
    found = [ROOT / name for name in _OTHERS if (ROOT / name).exists()]
    return [*found, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """A page's fenced blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    begun: tuple[int, str] | None = None
    heading, patched = "", False
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if match and begun is None:
            begun = number, match[2]
        elif match and begun:
            start, language = begun
            yield Block(page, start, language, "\n".join(lines[start : number - 1]) + "\n", heading, patched)
            begun, patched = None, patched or language == "diff"
        elif begun is None and line.startswith("#"):
            heading, patched = line.lstrip("# "), False
    assert begun is None, f"{page}:{begun}: a block that does not end"


def prose(page: Path) -> str:
    """A page's text with its blocks left empty, so that lines keep their numbers."""
    inside, kept = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = bool(_FENCE.match(line))
        kept.append("" if fence or inside else line)
        inside ^= fence
    return "\n".join(kept)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell block as words, without comments, pipes and assignments before them."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                while words and _ASSIGNED.match(words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """Code within a page's sentences and tables, with the number of its line."""
    for number, line in enumerate(prose(page).splitlines(), 1):
        yield from ((number, found) for found in _CODE.findall(line.replace("\\|", "|")))


def links(page: Path) -> Iterator[str]:
    """Where a page's links and pictures lead, but for other sites."""
    for target in _LINK.findall(re.sub(r"`[^`\n]+`", "code", prose(page))):
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings that a code host and MkDocs agree on."""
    found: set[str] = set()
    for title in re.findall(r"(?m)^#{1,6} (.+?)\s*$", prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        host = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        simple = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode("ascii")
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", simple).strip().lower())
        if host == site:
            found.add(host)
    return found
