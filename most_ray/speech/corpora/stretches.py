"""Which part of its recording a row of a user's table means. A time or a channel that is not understood is refused, never left out: the
whole recording would be used with the text of a part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from most_ray.errors import RecordError, shown
from most_ray.speech.corpora import tables
from most_ray.speech.corpora.audio import ANY_CHANNEL

_SLACK = 0.05  # seconds by which a start, a duration and an end may disagree: tables round
_STARTS = ("start", "offset")  # ours, and NeMo's
_OWN = (*_STARTS, "duration", "end")
_REMEDY = "name the columns start and duration, or start and end, in seconds"
_POSITIONS = frozenset(  # words in names of columns that say where something begins or ends
    {"start", "starts", "begin", "begins", "beginning", "end", "ends", "stop", "offset", "onset", "from", "to", "xmin", "xmax"}
    | {"tmin", "tmax", "starttime", "endtime", "begintime", "stoptime", "startsec", "endsec", "startms", "endms"}
)
_LENGTHS = frozenset({"duration", "dur", "length", "len", "seconds", "secs", "sec", "ms", "samples", "frames"})
_SPANS = frozenset({"time", "times", "timestamp", "timestamps", "segment", "segments", "span", "interval", "range"})
_OF_TEXT = frozenset({"char", "chars", "character", "token", "word", "line", "page", "text", "byte", "date", "year"})  # no times of audio
_CHANNELS = ("channel", "channel_id", "channel_selector", "audio_channel", "ch")
_CHANNEL = re.compile(r"\d+|[a-d]|l|r|left|right", re.IGNORECASE)
_TIME = re.compile(r"[-+]?\d[\d:.,]*(?:e[-+]?\d+)?\s*(?:h|m|min|s|sec|secs|seconds|ms|msec)?", re.IGNORECASE)
_SPAN = re.compile(r"\W*\d+(?:[.:]\d+)*\s*s?\s*(?:-|–|,|;|to|-->|\s)\s*\d+(?:[.:]\d+)*\s*s?\W*")
_MONTH = re.compile(r"(?:19|20)\d\d-\d\d")


class RowStretch(NamedTuple):
    """A part of a recording."""

    begin: float | None  # seconds; None: the row gives no start
    duration: float | None  # seconds; None: up to the end
    length: float | None  # seconds of the whole recording by the row
    channel: int | None
    columns: frozenset[str]  # those that said so


def read_stretch(row: Mapping[str, Any]) -> RowStretch:
    """The part that a row means, by `start` (or `offset`) with `duration` or `end`, in seconds; `duration` alone is the recording's.

    Raises:
        RecordError: a time is no number of seconds, contradicts another, or is in a column that is not understood.
    """
    given = {name: row[name] for name in _OWN if row.get(name) not in (None, "")}
    starts = [name for name in _STARTS if name in given]
    if len(starts) > 1:
        raise RecordError("has a start and an offset: which one is meant is not known")
    begin, duration = (given.get(name) for name in (starts[0] if starts else "start", "duration"))
    # Without a column for starts, the duration is that of the whole recording, which the recording itself gives more exactly.
    cuts = any(name in row for name in _STARTS)
    start = tables.parse_seconds(begin) if starts else 0.0
    lasts = tables.parse_seconds(duration, 1e-9) if duration is not None else None
    if cuts and (start is None or (lasts is None and duration is not None)):
        raise RecordError(f"has a start or a duration that is not a number of seconds: {shown(begin)}, {shown(duration)}")
    if "end" in given and _is_time(given["end"]):
        lasts = _until(given["end"], start if starts else None, lasts if cuts else None)
    _check_others(row, has_start=bool(starts), has_end=lasts is not None)
    channel = ANY_CHANNEL if any(_is_channel(row.get(name)) for name in _CHANNELS) else None
    used = frozenset({"start", "duration", *(name for name in ("offset", "end") if row.get(name) in (None, "") or _is_time(row[name]))})
    return RowStretch(start if starts else None, lasts if cuts else None, None if cuts else lasts, channel, used)


def _until(end: object, start: float | None, lasts: float | None) -> float:
    """The seconds from a start to an end. Raises RecordError where there is no start before it, or a duration that contradicts."""
    stop = tables.parse_seconds(end)
    if start is None or stop is None or stop <= start:
        raise RecordError(f"has an end that is not a number of seconds after its start: {shown(end)}")
    if lasts is not None and abs(start + lasts - stop) > _SLACK:
        raise RecordError(f"has a duration, {lasts:g}, and an end, {stop:g}, that contradict each other")
    return round(stop - start, 6) if lasts is None else lasts


def _check_others(row: Mapping[str, Any], has_start: bool, has_end: bool) -> None:
    """Raise RecordError for a column that says where a part begins or ends, or, where a start is known, how long it is."""
    for name, value in row.items():
        words = set(_words(name))
        if name in _OWN or value in (None, "") or words & _OF_TEXT:
            continue
        position = bool(words & _POSITIONS) and _is_time(value)
        length = has_start and not has_end and bool(words & _LENGTHS) and _is_time(value)
        if position or length or (words & _SPANS and _is_span(value)):
            raise RecordError(f"has a column {shown(name)} with a time, {shown(value)}, that is not understood: {_REMEDY}")


def _words(name: str) -> Iterable[str]:
    return re.findall("[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _is_time(value: object) -> bool:
    if isinstance(value, str):
        return _TIME.fullmatch(value.strip()) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_span(value: object) -> bool:
    if isinstance(value, str):
        return _SPAN.fullmatch(value) is not None and not _MONTH.fullmatch(value.strip())
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, list) and len(value) == 2 and all(map(_is_time, value))


def _is_channel(value: object) -> bool:
    if isinstance(value, str):
        return _CHANNEL.fullmatch(value.strip()) is not None
    return isinstance(value, int) and not isinstance(value, bool)
