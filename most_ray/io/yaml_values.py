"""YAML from files: the one place that parses it, so that what is hostile or ambiguous in it fails in one way.

Numbers, dates and words as `no` are read as the text that stands in the file: which of them a key wants to be, its option knows. YAML 1.1,
which PyYAML's own loaders follow, makes 10 of `012`, 750 of `12:30` and 1.1 of `1.10`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from most_ray.io.json_values import MAX_DEPTH

MAX_BYTES = 1 << 20  # of a file
_MAX_VALUES = 20_000  # in a file, those that aliases repeat counted each time
_NULLS = ("", "~", "null", "Null", "NULL")
_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {f"{_PREFIX}{name}" for name in ("str", "int", "float", "bool", "null")}
_TAGS = {"!", f"{_PREFIX}seq", f"{_PREFIX}map", *_SCALARS}  # the others stand for dates, sets, bytes and Python's objects


def parse_yaml(text: bytes | str) -> Any:
    """The value of a YAML text: mappings, lists, texts and None; anchors and aliases are allowed.

    Raises:
        ValueError: it is not YAML, not UTF-8 or has several documents; a key is no text, stands twice or merges mappings; a value has a tag
            of its own; values are nested more than `MAX_DEPTH` deep, refer to themselves, or are too many.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES:,} bytes")
    try:
        return _build(yaml.parse(text.decode("utf-8") if isinstance(text, bytes) else text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error


@dataclass
class _Open:
    """A mapping or a list whose end has not been read."""

    value: dict[str, Any] | list[Any]
    anchor: str | None
    size: int = 1  # values in it, itself included
    height: int = 1  # levels of lists and mappings in it, itself included
    key: str | None = None  # of a mapping: whose value comes next


def _build(events: Iterator[yaml.Event]) -> Any:
    """The value that a parser's events describe. Without recursion: the depth of a file is its author's."""
    root = _Open([], None)
    stack, anchors = [root], dict[str, tuple[Any, int, int]]()
    try:
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent) and root.value:
                raise ValueError(f"has a second document ({_place(event)})")
            _take(event, stack, anchors)
    except ValueError as error:
        outermost = stack[1].key if len(stack) > 1 else None
        at = "" if outermost is None or repr(outermost) in str(error) else f", in {outermost[:100]!r}"
        raise ValueError(f"{error}{at}") from error
    return root.value[0] if root.value else None  # type: ignore[index]


def _take(event: yaml.Event, stack: list[_Open], anchors: dict[str, tuple[Any, int, int]]) -> None:
    """Add what an event describes to the innermost open value; `anchors`: value, size and height of what has a name."""
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise ValueError(f"has an alias *{event.anchor} of nothing that ends before it ({_place(event)})")
        _add(stack, event, *anchors[event.anchor])
    elif isinstance(event, yaml.ScalarEvent):
        value = _scalar(event)
        if event.anchor:
            anchors[event.anchor] = (value, 1, 0)
        _add(stack, event, value, 1, 0)
    elif isinstance(event, yaml.CollectionStartEvent):
        _check_tag(event)
        stack.append(_Open({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor))
        _check_size(len(stack) - 1, 0)
    elif isinstance(event, yaml.CollectionEndEvent):
        done = stack.pop()
        if done.anchor:
            anchors[done.anchor] = (done.value, done.size, done.height)
        _add(stack, event, done.value, done.size, done.height)


def _scalar(event: yaml.ScalarEvent) -> str | None:
    """The text of a scalar; None where it is a null."""
    _check_tag(event)
    plain = event.tag is None and event.implicit[0]
    return None if event.tag == f"{_PREFIX}null" or (plain and event.value in _NULLS) else event.value


def _check_tag(event: Any) -> None:
    if event.tag is not None and event.tag not in _TAGS:
        raise ValueError(f"has a value with the tag {event.tag!r} ({_place(event)}): only texts, numbers, lists and mappings are read")


def _add(stack: list[_Open], event: yaml.Event, value: Any, size: int, height: int) -> None:
    """Add a value to the innermost mapping or list: as a key where one is due."""
    inner = stack[-1]
    inner.size, inner.height = inner.size + size, max(inner.height, height + 1)
    _check_size(len(stack) - 1 + height, sum(each.size for each in stack))
    if isinstance(inner.value, list):
        inner.value.append(value)
    elif inner.key is not None:
        inner.value[inner.key], inner.key = value, None
    else:
        inner.key = _key(event, value)
        if inner.key in inner.value:
            raise ValueError(f"has the key {inner.key!r} twice ({_place(event)})")


def _key(event: yaml.Event, value: Any) -> str:
    if not isinstance(event, yaml.ScalarEvent | yaml.AliasEvent) or not isinstance(value, str | None):
        raise ValueError(f"has a list or a mapping as a key ({_place(event)})")
    if value == "<<" and getattr(event, "implicit", (False,))[0]:
        raise ValueError(f"merges mappings by `<<` ({_place(event)}), which is not part of YAML 1.2: write the keys")
    return "null" if value is None else value


def _check_size(depth: int, size: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} deep")
    if size > _MAX_VALUES:
        raise ValueError(f"has more than {_MAX_VALUES:,} values, those that aliases repeat included")


def _place(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"
