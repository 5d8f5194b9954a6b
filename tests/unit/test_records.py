from __future__ import annotations

import datetime as dt
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.errors import DataError
from most_ray.records import (
    RecordError,
    asr_to_tts,
    parse_record,
    parse_units,
    read_raw,
    record_files,
    units_to_text,
)
from tests.support.builders import asr, tts

RECORDS = [asr(i) for i in range(4)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(RECORDS)),
        ("data.json", json.dumps({"data": RECORDS})),
        ("data_after_other_keys.json", json.dumps({"version": {"a": [1]}, "data": RECORDS, "n": 4})),
        ("lines.jsonl", "\n".join(map(json.dumps, RECORDS))),
        ("lines_as.json", "\n".join(map(json.dumps, RECORDS))),
        ("blank_lines.jsonl", "\n\n".join(map(json.dumps, RECORDS)) + "\n\n"),
        ("pretty.json", json.dumps(RECORDS, indent=4)),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_json_form_gives_the_same_records(tmp_path: Path, name: str, content: str, zipped: bool) -> None:
    """Promise 29: JSON Lines and the other forms are accepted as they come."""
    path = tmp_path / (name + ".gz" * zipped)
    if zipped:
        with gzip.open(path, "wt") as sink:
            sink.write(content)
    else:
        path.write_text(content)
    assert [raw for _, raw in read_raw(path)] == RECORDS


def test_single_object(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[0]))
    assert [raw for _, raw in read_raw(tmp_path / "one.json")] == RECORDS[:1]


def test_a_metadata_key_called_data_is_no_wrapper(tmp_path: Path) -> None:
    for record in ({**RECORDS[0], "metadata": {"data": [1, {"x": 2}]}}, {**RECORDS[0], "data": [1]}):
        (tmp_path / "one.json").write_text(json.dumps(record))
        assert [raw for _, raw in read_raw(tmp_path / "one.json")] == [record]


def test_a_large_list_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("w") as sink:
        sink.write("[" + ",".join(json.dumps(asr(i % 50, units=200)) for i in range(15_000)) + "]")
    size = path.stat().st_size
    tracemalloc.start()
    count = sum(1 for _ in read_raw(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 15_000
    assert size > 15e6 and peak < 3e6


@pytest.mark.parametrize(
    ("content", "offset"),
    [("hello", 0), ("[1, 2, x]", 7), ('{"id": "a", "b" }', 16), ("", 0), ("[" + " " * 100_000 + "?]", 100_001)],
)
def test_not_json_names_file_and_byte(tmp_path: Path, content: str, offset: int) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"bad\.json.*not JSON at byte {offset} "):
        list(read_raw(path))


def test_truncated_list_and_gzip(tmp_path: Path) -> None:
    content = json.dumps(RECORDS)[:-9]
    (tmp_path / "cut.json").write_text(content)
    with pytest.raises(DataError, match=f"not JSON at byte {len(content)} "):
        list(read_raw(tmp_path / "cut.json"))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode())[:-12])
    with pytest.raises(DataError, match="not a whole gzip"):
        list(read_raw(tmp_path / "cut.json.gz"))
    (tmp_path / "not.json.gz").write_bytes(b"plain text")
    with pytest.raises(DataError, match="not a whole gzip"):
        list(read_raw(tmp_path / "not.json.gz"))


def test_a_bad_line_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = [json.dumps(RECORDS[0]), '{"id": oops}', json.dumps(RECORDS[1]), "\xff\xfe"]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("\n".join(lines[:3]).encode() + b"\n\xff\xfe\n")
    values = [raw for _, raw in read_raw(path)]
    assert [values[0], values[2]] == RECORDS[:2]
    assert isinstance(values[1], RecordError) and f"byte {len(lines[0]) + 1 + 7}" in str(values[1])
    assert isinstance(values[3], RecordError)


def test_binary_in_a_list_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b'[{"id": "\xff\xfe"}]')
    with pytest.raises(DataError, match="not JSON at byte"):
        list(read_raw(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": "[Hu500]"}, "outside 0..499"),
        ({"input": "[Hu1][Hu" + "9" * 5000 + "]"}, "outside 0..499"),
        ({"output": "half \ud83d"}, "surrogate"),
        ({"id": "\ud83d"}, "'id' holds half a surrogate"),
        ({"input": "[Hu1] and text [Hu2]"}, "mixes speech units"),
        ({"output": " "}, "empty output"),
        ({"output": 7}, "'output' is int"),
        ({"metadata": [1]}, "'metadata' is list"),
        ({"output": "[Hu3]"}, "speech in both"),
    ],
)
def test_bad_fields_have_reasons(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError, match=reason.replace("[", r"\[")):
        parse_record({**asr(0), **change})


@pytest.mark.parametrize("name", ["id", "instruction", "input", "output"])
def test_a_missing_field_is_named(name: str) -> None:
    raw = asr(0)
    del raw[name]
    with pytest.raises(RecordError, match=f"no field '{name}'"):
        parse_record(raw)


@pytest.mark.parametrize("raw", [None, 1, "x", [1], RecordError])
def test_what_is_no_object_is_no_record(raw: object) -> None:
    with pytest.raises(RecordError, match="not an object"):
        parse_record(raw)


def test_tasks() -> None:
    assert parse_record(asr(0)).task == "asr"
    assert parse_record(tts(0)).task == "tts"
    assert parse_record({**asr(0), "input": "plain"}).task == "text"


@given(st.lists(st.integers(0, 499), min_size=1, max_size=50))
def test_units_round_trip(units: list[int]) -> None:
    assert parse_units(units_to_text(units)).tolist() == units


def test_conversion_to_tts_keeps_metadata_and_swaps_sides() -> None:
    raw = asr(1)
    converted = asr_to_tts(raw, "digits", dt.datetime(2026, 1, 2, tzinfo=dt.UTC))
    assert converted["id"] == "tts_utt_1"
    assert (converted["input"], converted["output"]) == (raw["output"], raw["input"])
    assert converted["metadata"] == {
        "speaker": 1,
        "task": "tts",
        "original_task": "asr",
        "dataset": "digits",
        "conversion_timestamp": "2026-01-02T00:00:00+00:00",
    }
    assert parse_record(converted).task == "tts"


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        record_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no records"):
        record_files(tmp_path)
    (tmp_path / "units.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_text("")
    assert record_files(tmp_path) == [tmp_path / "sub" / "a.jsonl"]
