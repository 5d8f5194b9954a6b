"""The one reader of the package's own JSON Lines, and the follower of a file that grows and is cut back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from most_ray.io.journal import Follower
from most_ray.io.json_values import parse_json, parse_line, parse_lines, read_lines

DAMAGED = b'{"kind": "sweep"}\n[1]\n"text"\n7\n\n{"a"\n\xff\xfe\n\x00\x00\x00\n\x00{"a": 1}\n{"b": 2}\n{"c'
WHOLE = [{"kind": "sweep"}, {"b": 2}]


def test_damaged_lines_and_what_is_no_object_are_skipped(tmp_path: Path) -> None:
    """Cut off by a kill, NUL after a crash of the machine, not UTF-8."""
    (tmp_path / "lines").write_bytes(DAMAGED)
    assert list(parse_lines(DAMAGED)) == WHOLE == list(read_lines(tmp_path / "lines"))
    assert list(read_lines(tmp_path / "missing")) == []


def test_a_line_needs_no_end() -> None:
    assert parse_line(b'{"a": 1}') == parse_line(b'{"a": 1}\n') == {"a": 1}


def test_values_of_the_standard_library_are_read() -> None:
    """Lines of earlier versions may hold what `json.dumps` writes and strict parsers refuse."""
    line = parse_line(json.dumps({"loss": math.nan, "top": -math.inf, "text": "\ud800"}).encode())
    assert line is not None and math.isnan(line["loss"]) and line["top"] == -math.inf and line["text"] == "\ud800"
    with pytest.raises(ValueError, match="column 2"):
        parse_json("{")


def lines(first: int, last: int, attempt: int = 1) -> str:
    return "".join(json.dumps({"step": step, "attempt": attempt}) + "\n" for step in range(first, last + 1))


def steps(follower: Follower) -> list[int]:
    return [line["step"] for line in follower.new_lines()]


def test_a_follower_of_new_lines_alone_continues_at_the_end_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert steps(Follower(str(path), only_new=True)) == []
    path.write_text(lines(1, 50))
    follower = Follower(str(path), only_new=True)
    assert steps(follower) == []
    with path.open("a") as stream:
        stream.write(lines(51, 52) + '{"step": 53')
    assert steps(follower) == [51, 52] and steps(follower) == []
    path.write_text(lines(1, 10, attempt=2))  # shorter
    assert steps(follower) == []
    with path.open("a") as stream:
        stream.write(lines(11, 12, attempt=2))
    assert steps(follower) == [11, 12]
    path.write_text(lines(1, 60, attempt=3))  # longer than before
    assert steps(follower) == []
    with path.open("a") as stream:
        stream.write(lines(61, 61, attempt=3))
    assert steps(follower) == [61]


def test_a_follower_of_all_lines_starts_over_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(str(path))
    assert steps(follower) == []
    path.write_text(lines(1, 20))
    assert steps(follower) == list(range(1, 21)) and steps(follower) == []
    path.write_text(lines(1, 30, attempt=2))
    assert steps(follower) == list(range(1, 31))
