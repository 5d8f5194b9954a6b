"""hypotheses.jsonl, which has a line for each record of an evaluation, and the result, which is computed from these lines alone, so that a
file that is scored again gives the same numbers.

The first line has the settings: {"kind": "settings", "format", "settings", "sets": {name: {"task", "records", "rejected",
"rejected_file"}}, "routing"}. Each further line is a record: kind "hypothesis", set, task, row (in its set), id, loss (sum over supervised
tokens; null if it is not finite), supervised_tokens, and
    asr: reference, hypothesis, both also normalised, ended (false: length cap), looping, foreign (tokens of speech);
    tts: text and recognised (what the model itself recognises in its speech), both also normalised, reference and hypothesis (units), ended
        (by the end-of-audio marker), hit_cap, looping, foreign (tokens that are not units); `heard`, if an external recogniser was used.
Where the records say more, `metadata` (texts, numbers and flags by column) and, in the ASR rows with most errors, `spoken` (see `origins`).
"""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import DataError, count_of, nearest, shown
from most_ray.evaluation.wer import (
    NORMALISER_VERSION,
    NORMALISERS,
    character_counts,
    confusions,
    error_rate,
    normaliser,
    word_counts,
)
from most_ray.io import storage
from most_ray.io.json_values import json_text, parse_json
from most_ray.io.outputs import Kind, begins_with
from most_ray.metrics.figures import RATES, TITLES
from most_ray.metrics.notes import SHORT, short_speech_notes
from most_ray.metrics.texts import rate_text
from most_ray.records.record import TASKS

logger = logging.getLogger(__name__)
FORMAT = 1  # of the file
EVALUATIONS = "evaluations"  # the folder in a run's folder that has a file for each evaluation
_SAMPLES = 5  # of each set, in the result
SPOKEN = 10  # records of a set, the worst, that can be listened to
RESULT = Kind("result of an evaluation", begins_with(rb'\{\s*"wer": ?\{.*"sets": ?\{'))
HYPOTHESES = Kind("file of hypotheses", begins_with(rb'\{"kind": ?"settings", ?"format": ?\d'))
_REMEDY = "Name a hypotheses.jsonl that an evaluation has written."
_MOST = 1 << 53  # of a count: larger ones are no longer exact as floats


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_loss(value: Any) -> bool:
    """Whether a value is null, or a number whose sums stay finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e200)


def is_value(value: Any) -> bool:
    """Whether something is a text, a number or a flag, as the columns of records are by which errors can be grouped."""
    return isinstance(value, str) or (isinstance(value, bool | int | float) and abs(value) < 1e200)  # false for NaN


def _is_length(value: Any) -> bool:
    """Whether a value is null, or the seconds that a unit may stand for."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6)


Fields = Mapping[str, Callable[[Any], bool]]  # names of fields, and whether a value may be theirs
_FIRST: Fields = {"settings": _is_object, "sets": _is_object, "routing": _is_object}
_ABOUT: Fields = {
    "task": lambda value: value in TASKS,
    "records": _is_count,
    "rejected": _is_count,
    "rejected_file": _is_text,
    "seconds_per_unit": _is_length,
}
_COMMON: Fields = {"set": _is_text, "row": _is_count, "id": _is_text, "loss": _is_loss, "supervised_tokens": _is_count}
_SIDES: Fields = {"reference": _is_text, "hypothesis": _is_text, "ended": _is_flag, "looping": _is_flag, "foreign": _is_count}
_SPEECH: Fields = {"text": _is_text, "recognised": _is_text, "hit_cap": _is_flag}
_FIELDS: Mapping[str, Fields] = {"asr": {**_COMMON, **_SIDES}, "tts": {**_COMMON, **_SIDES, **_SPEECH}, "text": _COMMON}

Row = dict[str, Any]  # a line of the file, of a record


def add_normalised(row: Row, name: Any) -> Row:
    """The row with its texts also as they are compared, normalised by the normaliser `name`."""
    pairs = {"asr": ("reference", "hypothesis"), "tts": ("text", "recognised", "heard"), "text": ()}[row["task"]]
    clean = normaliser(name)
    return row | {f"normalised_{key}": clean(row[key]) for key in pairs if key in row}


def evaluation_result(header: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Compute the result of an evaluation, JSON-ready, from the file's first line without kind and format, and its rows: `wer` (by ASR
    set), `validation_loss` (by set), `sets`, `overall` (by task), `samples`, `routing`, `settings`. Rates are None where there is nothing
    to divide by."""
    by_set: dict[str, list[Row]] = {name: [] for name in header["sets"]}
    for row in rows:
        by_set[row["set"]].append(row)
    seconds = {name: about.get("seconds_per_unit") for name, about in header["sets"].items()}
    sets = {name: {**header["sets"][name], **_section(header["sets"][name]["task"], lines, seconds)} for name, lines in by_set.items()}
    overall = {task: _section(task, lines, seconds) for task in TASKS if (lines := [row for row in rows if row["task"] == task])}
    return {
        "wer": {name.split("/", 1)[1]: section["words"]["rate"] for name, section in sets.items() if section["task"] == "asr"},
        "validation_loss": {name: section["loss"] for name, section in sets.items()},
        "sets": sets,
        "overall": overall,
        "samples": [sample for name, lines in by_set.items() for sample in _samples(name, lines)],
        "routing": header["routing"],
        "settings": header["settings"],
    }


def _section(task: str, rows: Sequence[Row], seconds: Mapping[str, float | None]) -> dict[str, Any]:
    """The figures of some records. `seconds`: that a unit stands for, by set, where it is known."""
    # fsum: bitwise identical in any order of the records, so for any number of ranks.
    losses, count = [row["loss"] for row in rows], sum(row["supervised_tokens"] for row in rows)
    loss = math.fsum(losses) / count if count and None not in losses else None
    perplexity = None if loss is None or loss > 700.0 else math.exp(loss)  # larger ones overflow
    section = {"task": task, "records": len(rows), "loss": loss, "perplexity": perplexity, "supervised_tokens": count}
    if task == "tts":
        return section | _synthesis(rows) | _lengths(rows, seconds)
    return section | _recognition(rows) if task == "asr" else section


def _recognition(rows: Sequence[Row]) -> dict[str, Any]:
    references, hypotheses = _column(rows, "normalised_reference"), _column(rows, "normalised_hypothesis")
    return {
        "words": error_rate(word_counts(references, hypotheses)),
        "characters": error_rate(character_counts(references, hypotheses)),
        "empty_rate": _fraction(not row["hypothesis"].strip() for row in rows),
        "loop_rate": _fraction(row["looping"] for row in rows),
        "length_cap_rate": _fraction(not row["ended"] for row in rows),
        "foreign_rate": _fraction(row["foreign"] > 0 for row in rows),
        "confusions": confusions(references, hypotheses),
    }


def _synthesis(rows: Sequence[Row]) -> dict[str, Any]:
    """units: unit error rate against the recording, a rough measure, since there are many ways to say a text; cycle: word error rate of
    what the model recognises in its own speech; outside: of what an external recogniser does; duration_ratio: generated units over the
    recordings' units."""
    texts = _column(rows, "normalised_text")
    recorded, generated = (sum(len(row[side].split()) for row in rows) for side in ("reference", "hypothesis"))
    section = {
        "units": error_rate(word_counts(_column(rows, "reference"), _column(rows, "hypothesis"))),
        "cycle": error_rate(word_counts(texts, _column(rows, "normalised_recognised"))),
        "duration_ratio": generated / recorded if recorded else None,
        "loop_rate": _fraction(row["looping"] for row in rows),
        "end_of_audio_rate": _fraction(row["ended"] for row in rows),
        "length_cap_rate": _fraction(row["hit_cap"] for row in rows),
        "foreign_rate": _fraction(row["foreign"] > 0 for row in rows),
    }
    if rows and all("heard" in row for row in rows):
        section["outside"] = error_rate(word_counts(texts, _column(rows, "normalised_heard")))
    return section


def _lengths(rows: Sequence[Row], seconds: Mapping[str, float | None]) -> dict[str, Any]:
    """How long the model's speech and the recordings are, and how many records are far too short."""
    units = [[len(row[side].split()) for side in ("hypothesis", "reference")] for row in rows]
    figures: dict[str, Any] = {"short_records": sum(generated < SHORT * recorded for generated, recorded in units)}
    each = [seconds.get(row["set"]) for row in rows]
    known = rows and None not in each
    for side, name in enumerate(("generated_seconds", "recorded_seconds")):
        lengths = [counts[side] * (one or 0.0) for counts, one in zip(units, each, strict=True)]
        figures[name] = math.fsum(lengths) / len(lengths) if known else None
        figures[f"{name}_median"] = statistics.median(lengths) if known else None
    return figures


def _column(rows: Sequence[Row], key: str) -> list[str]:
    return [row[key] for row in rows]


def _fraction(flags: Any) -> float | None:
    marks = list(flags)
    return sum(marks) / len(marks) if marks else None


def _samples(name: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    """A few evenly spaced records of a set, as texts on both sides."""
    sides = {"asr": [("reference", "hypothesis")], "tts": [("text", "recognised")]}
    chosen = [(row, pair) for row in rows[:: max(1, len(rows) // _SAMPLES)][:_SAMPLES] for pair in sides.get(row["task"], [])]
    return [{"set": name, "id": row["id"], "reference": row[left], "hypothesis": row[right]} for row, (left, right) in chosen]


def worst(rows: Sequence[Row], count: int) -> list[Row]:
    """Of recognised records at most `count` that have errors: those with most errors per word of the reference first, and each error once
    before any comes a second time."""
    references, hypotheses = ([str(row[f"normalised_{side}"]) for row in rows] for side in ("reference", "hypothesis"))
    counts = word_counts(references, hypotheses)
    rates = counts.errors / np.maximum(counts.reference, 1)
    order = [int(index) for index in np.lexsort((-counts.errors, -rates)) if counts.errors[index]]
    first: dict[tuple[str, str], int] = {}
    for index in order:
        first.setdefault((references[index], hypotheses[index]), index)
    new = set(first.values())
    return [rows[index] for index in [*first.values(), *(index for index in order if index not in new)][:count]]


def is_looping(tokens: Sequence[int], repeats: int = 4, longest: int = 32, at_least: int = 8) -> bool:
    """Whether a sequence of at most `longest` tokens is repeated, `repeats` times in a row and over `at_least` tokens."""
    array = np.asarray(tokens)
    for period in range(1, min(longest, len(array) // 2) + 1):
        needed = max(repeats * period, at_least) - period
        same = np.concatenate([[0], array[period:] == array[:-period], [0]])
        edges = np.flatnonzero(np.diff(same))
        if len(edges) and int((edges[1::2] - edges[::2]).max()) >= needed:
            return True
    return False


def hypotheses_path(path: Path) -> Path:
    """The file of hypotheses beside a file of results: NAME.hypotheses.jsonl."""
    return path.with_name(f"{path.name.removesuffix('.json')}.hypotheses.jsonl")


def write_hypotheses(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write hypotheses.jsonl. Atomic."""
    lines = [{"kind": "settings", "format": FORMAT, **header}, *rows]
    storage.write_bytes(path, "".join(json_text(line) + "\n" for line in lines).encode())


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON. Atomic."""
    storage.write_bytes(path, json_text(result, indent=1).encode())


def result_lines(result: dict[str, Any]) -> list[str]:
    """A result as lines of text, one or two for each set."""
    lines = []
    for name, section in result["sets"].items():
        shown = [f"{TITLES[key]} {_rate_or_none(section[key])}" for key in RATES if key in section]
        shown += [f"{key} {section[key]:.{digits}f}" for key, digits in (("loss", 4), ("perplexity", 3)) if section[key] is not None]
        shares = ("empty_rate", "loop_rate", "length_cap_rate", "foreign_rate")
        shown += [f"{key.removesuffix('_rate').replace('_', ' ')} {section[key]:.1%}" for key in shares if section.get(key)]
        if section.get("generated_seconds") is not None:
            shown.append(f"speech {_length(section, 'generated_seconds')}, recordings {_length(section, 'recorded_seconds')}")
        lines.append(f"{name}: {'  '.join(shown)}  records {section['records']}")
        if section["rejected"]:
            lines.append(f"{name}: {section['rejected']} records were rejected, see {section['rejected_file']}")
    return [*lines, *short_speech_notes(result["sets"]), f"selections across the modality border: {result['routing']['leaked']}"]


def _length(section: Mapping[str, Any], name: str) -> str:
    return f"{section[name]:.2f} s on average (median {section[f'{name}_median']:.2f} s)"


def _rate_or_none(errors: dict[str, Any]) -> str:
    return "undefined (no reference words)" if errors["rate"] is None else rate_text(errors)


def read_hypotheses(uri: str) -> tuple[dict[str, Any], list[Row]]:
    """Read hypotheses.jsonl: its first line, without kind and format, and its rows. Raises DataError if the file is missing or is something
    else, a line cannot be used, or records are missing or doubled."""
    shown_uri = storage.redact(uri)
    try:
        raw = storage.read_bytes(uri).splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError("rescore", shown_uri, "does not exist, or is a folder.", _REMEDY) from error
    except OSError as error:
        raise DataError("rescore", shown_uri, f"cannot be read ({error.strerror or error}).", _REMEDY) from error
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(raw, 1):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError("rescore", f"{shown_uri}:{number}", f"is not JSON ({error}).", _REMEDY) from error
        where = f"{shown_uri}:{number}"
        lines.append(_first_line(value, where) if number == 1 else _record_line(value, where, lines[0]["sets"]))
    if not lines:
        raise DataError("rescore", shown_uri, "is empty.", _REMEDY)
    header = {key: value for key, value in lines[0].items() if key not in ("kind", "format")}
    found: dict[str, set[int]] = {name: set() for name in header["sets"]}
    count = Counter(row["set"] for row in lines[1:])
    for row in lines[1:]:
        found[row["set"]].add(row["row"])
    for name, about in header["sets"].items():
        rows, records = found[name], about["records"]
        if not (count[name] == len(rows) == records and max(rows, default=-1) == records - 1):
            rule = f"holds {count_of(count[name], 'record')} of {name}, {len(rows)} different ones; {records} were evaluated."
            raise DataError("rescore", shown_uri, rule, "Take the whole file, each record once.")
    return header, lines[1:]


def _first_line(line: Any, where: str) -> dict[str, Any]:
    if not isinstance(line, dict) or line.get("kind") != "settings":
        raise DataError("rescore", where, "is not a settings line.", _REMEDY)
    if line.get("format") != FORMAT:
        raise DataError("rescore", where, f"has format {shown(line.get('format'))}; this version reads {FORMAT}.")
    _check_fields(line, _FIRST, where)
    _check_fields(line["routing"], {"leaked": _is_count}, where)
    try:
        json.dumps(line, allow_nan=False)
    except ValueError as error:
        raise DataError("rescore", where, "has a number that is not finite.", _REMEDY) from error
    for name, about in line["sets"].items():
        _check_fields({"seconds_per_unit": None, **about} if isinstance(about, dict) else about, _ABOUT, where)
        if not re.fullmatch(rf"{about['task']}/.+", name, re.DOTALL):
            raise DataError(
                "rescore", where, f"has a set {shown(name)} of the task {about['task']}, which is not {about['task']}/NAME.", _REMEDY
            )
    return line


def _record_line(line: Any, where: str, sets: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(line, dict) or line.get("kind") != "hypothesis" or line.get("task") not in TASKS:
        raise DataError("rescore", where, "is not a line of a record.", _REMEDY)
    _check_fields(line, _FIELDS[line["task"]], where)
    if not _is_text(outside := line.get("heard", "")):
        raise DataError("rescore", where, f"has {shown(outside)} in field `heard`.", _REMEDY)
    for name, value in (("metadata", line.get("metadata", {})), ("spoken", line.get("spoken", {}))):
        if not isinstance(value, dict) or not all(map(is_value, value.values())):
            raise DataError("rescore", where, f"has {shown(value)} in field {name!r}.", _REMEDY)
    if line["set"] not in sets or sets[line["set"]]["task"] != line["task"]:
        raise DataError("rescore", where, f"belongs to no set of line 1: {shown(line['set'])}.", _REMEDY)
    return line


def _check_fields(found: Any, fields: Fields, where: str) -> None:
    for name, holds in fields.items():
        if not isinstance(found, dict) or name not in found:
            raise DataError("rescore", where, f"has no field {name!r}.", _REMEDY)
        if not holds(found[name]):
            raise DataError("rescore", where, f"has {shown(found[name])} in field {name!r}.", _REMEDY)


def warn_of_version(uri: str, settings: Mapping[str, Any], name: str) -> None:
    """Log a warning where an evaluation with these settings, at `uri`, was scored by another version of the normaliser `name`."""
    version = settings.get("normaliser_version", 1)  # which files of the first version do not name
    if version != NORMALISER_VERSION and name != "none":
        text = "%s was scored by version %s of the normalisers, new figures are by version %d: compare figures of one version only"
        logger.warning(text, storage.redact(uri), shown(version), NORMALISER_VERSION)


def _located(header: dict[str, Any], uri: str) -> dict[str, Any]:
    """The first line of a file of hypotheses, at `uri` in a run's folder or its folder of evaluations, with what it names relative to the
    run's folder as paths or URIs."""
    folder = storage.parent(storage.absolute(uri))
    folder = storage.parent(folder) if storage.base_name(folder) == EVALUATIONS else folder
    sets = {name: {**about, "rejected_file": _found(folder, about["rejected_file"])} for name, about in header["sets"].items()}
    model = header["settings"].get("model")
    settings = {"model": _found(folder, model)} if isinstance(model, str) else {}
    return {**header, "settings": header["settings"] | settings, "sets": sets}


def _found(folder: str, way: str) -> str:
    """`storage.located` of what is there; else the text as it is, which may be a name on a hub, or any text in a damaged file."""
    if storage.is_remote(way):  # what is elsewhere is not looked for
        return way
    try:
        place = storage.located(folder, way)
        return storage.redact(place) if storage.exists(place) else way
    except (DataError, OSError):
        return way


def rescore(uri: str, name: str | None = None) -> dict[str, Any]:
    """Compute the result of an evaluation again from its hypotheses.jsonl, with the normaliser `name` (None: the evaluation's own). Raises
    DataError if the file cannot be used, or the normaliser is unknown."""
    header, rows = read_hypotheses(uri)
    name = name or header["settings"].get("normaliser")
    if name not in NORMALISERS:
        raise DataError("normaliser", name, "is not known.", nearest(str(name)[:100], NORMALISERS))
    warn_of_version(uri, header["settings"], name)
    header["settings"] = header["settings"] | {"normaliser": name, "normaliser_version": NORMALISER_VERSION}
    header = _located(header, uri)
    return evaluation_result(header, [add_normalised(row, name) for row in rows])
