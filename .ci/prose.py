"""Checks the prose of the product and its documentation against a list of words that have a plainer one.

    python .ci/prose.py [FILE ...]      # by default everything that git tracks below WHERE

In Python files only comments and strings are read. Exit code 1 where a word was found; each line says file, line, word and replacement.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

WHERE = ("most_ray", "jobs", "docs", "examples", "cluster/README.md", "README.md", "CONTRIBUTING.md", "tests/benchmarks/RESULTS.md")
SUFFIXES = (".py", ".md", ".html", ".css", ".js")
VENDORED = (".min.js",)
# Each pattern is a regular expression over words, without regard to case; a group named by `(?<!...)` guards what is meant otherwise.
PLAIN = {
    r"tells?\b(?! apart)": "says, reports, logs",
    r"told(?! apart)": "reported, logged",
    r"telling(?! apart)": "reporting",
    r"hears?|heard(?! of)|hearing": "recognises, reads, decodes, listens to",
    r"wish(?:es|ed)?": "request",
    r"asked for|asks for|ask for": "requested, requests",
    r"mends?|mended|mending": "fixes, repairs",
    r"anew": "again, from scratch",
    r"reckon(?:s|ed|ing)?": "estimates, counts",
    r"go(?:es)? on|going on|went on|gone on": "continues, resumes",
    r"lies|lie(?! to)|lying": "is, is stored",
    r"behind(?! a proxy| a firewall| NAT)": "after, following; of a URI: stored at",
    r"nobody|whom": "a plain description",
    r"passed over|passes over|pass over": "skipped",
    r"to the (?:last )?bit": "bitwise identical",
    r"by turns|in turns": "alternating",
    r"tak(?:e|es|en|ing) in\b(?! (?:the|a|any|this|each|seconds|order))": "ingested",
    r"made one": "built",
    r"turn(?:s|ed)? round": "converted",
    r"come about|came about": "happen",
    r"alike": "equal, the same way",
    r"likes\b": "others of the kind",
    r"sets? aside": "rejects",
    r"as it were|so to speak|for ever|thereby|whence|hitherto|oneself|one's own|lest|ought": "a plainer word",
    r"there be|shall": "must, does",
    r"made ready": "prepared",
    r"besides": "also, in addition",
}
# A quoted word is a key or a name, not prose.
RULES = [(re.compile(rf"(?<![\w-])(?!(?<=[\"`])\w+[\"`])(?:{pattern})(?![\w-])", re.IGNORECASE), plain) for pattern, plain in PLAIN.items()]
LAZY = re.compile(r'^\s*[rf]?"""(?:The same|As above)\b[^"]*"""')


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and the text there that people read."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def complaints(path: Path) -> Iterator[str]:
    """What is wrong with a file's prose."""
    for number, line in prose_of(path):
        if LAZY.match(line):
            yield f"{path}:{number}: a docstring that begins with 'The same': say what it does"
        for rule, plain in RULES:
            for found in rule.finditer(line):
                yield f"{path}:{number}: {found[0]!r}: {plain}"


def main(argv: list[str]) -> int:
    names = argv or subprocess.run(["git", "ls-files", "--", *WHERE], capture_output=True, text=True, check=True).stdout.split()
    own = [Path(name) for name in names if name.endswith(SUFFIXES) and not name.endswith(VENDORED)]
    found = [each for path in own if path.exists() for each in complaints(path)]
    print("\n".join(found) if found else f"prose: {len(names)} files, no word of the list")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
