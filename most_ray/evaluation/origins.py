"""What the records of an evaluation say beside text and speech: columns by which errors can be grouped, and, where there are most errors,
how to listen to the records. It goes into hypotheses.jsonl, as `metadata` and `spoken`; no figure of the result follows from it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from most_ray.errors import DataError
from most_ray.evaluation.hypotheses import SPOKEN, Row, is_value, worst
from most_ray.evaluation.scoring import EvaluationSet
from most_ray.io import storage
from most_ray.records.files import read_raw, record_files
from most_ray.records.record import Record, parse_records
from most_ray.records.template import TokenIds, units_of

logger = logging.getLogger(__name__)
_MOST_COLUMNS, _LONGEST = 24, 200  # of a record's metadata: its columns, and the characters of a value
_LONGEST_PATH, _MOST_UNITS = 1000, 3000
# Columns that name the file of a record's recording: ours, and those of NeMo's manifests and of Hugging Face's audiofolders.
RECORDING = ("recording", "audio_filepath", "audio_path", "audio", "file_name", "path")
_STRETCH = ("start", "channel", "speed")  # how the utterance was read from its recording, see `speech.corpora.audio.load_audio`

Value = str | int | float | bool


def add_origins(rows: Sequence[Row], sets: Sequence[EvaluationSet], ids: TokenIds) -> list[Row]:
    """The rows with `metadata`, where their records have any, and, in the rows of ASR sets with most errors, `spoken`: the units of the
    record, and where its recording is, as far as the record says. Of records that can no longer be read nothing is known."""
    by_set: dict[str, list[Row]] = {each.name: [] for each in sets}
    for row in rows:
        by_set[row["set"]].append(row)
    found: dict[tuple[str, int], Row] = {}
    for each in sets:
        if each.task == "text":
            continue
        known = _columns_of(each.directory, each.store.uri)
        listened = {row["row"] for row in worst(by_set[each.name], SPOKEN)} if each.task == "asr" else set()
        for row in by_set[each.name]:
            columns = known.get(row["id"], {})
            metadata = {key: value for key, value in columns.items() if key not in RECORDING and not _is_long(value)}
            more: Row = {"metadata": dict(list(metadata.items())[:_MOST_COLUMNS])} if metadata else {}
            if row["row"] in listened:
                units = units_of(each.store.input_ids(row["row"]).tolist(), ids)[:_MOST_UNITS]
                more["spoken"] = {"units": " ".join(map(str, units)), **_recording(columns)}
            found[each.name, row["row"]] = more
    return [row | found.get((row["set"], row["row"]), {}) for row in rows]


@functools.lru_cache(maxsize=16)
def _columns_of(directory: str, store: str) -> Mapping[str, Mapping[str, Value]]:
    """The columns of metadata of a directory's records, by id. `store`: the token store of the records as they are, by which they are read
    once per process."""
    found: dict[str, Mapping[str, Value]] = {}
    try:
        for entry in record_files(directory):
            for _, raw in read_raw(entry.uri):
                if isinstance(raw, dict) and isinstance(raw.get("metadata"), dict) and "id" in raw:
                    found.setdefault(_record_id(raw), _plain(raw["metadata"]))
    except (DataError, OSError) as error:
        logger.warning("errors are not grouped by columns: the records of %s can no longer be read (%s)", storage.redact(store), error)
    return found


def _record_id(raw: Mapping[str, Any]) -> str:
    """The id of a record's JSON object, as `parse_records` gives it."""
    if isinstance(raw["id"], str):
        return raw["id"]
    parsed = parse_records([raw])[0]
    return parsed.id if isinstance(parsed, Record) else ""


def _plain(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """The texts, numbers and flags among a record's metadata."""
    return {key: value for key, value in metadata.items() if len(key) <= _LONGEST and is_value(value) and value != ""}


def _is_long(value: Value) -> bool:
    return isinstance(value, str) and len(value) > _LONGEST


def _recording(columns: Mapping[str, Value]) -> dict[str, Value]:
    """What a record says about its recording: `recording`, a path, with `start`, `duration` (seconds), `channel` and `speed` where it has
    them. Empty where it names none."""
    path = next((value for key in RECORDING if isinstance(value := columns.get(key), str)), None)
    if path is None or len(path) > _LONGEST_PATH:
        return {}
    numbers = {key: value for key in (*_STRETCH, "duration") if isinstance(value := columns.get(key), int | float)}
    return {"recording": path, **numbers}
