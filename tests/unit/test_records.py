from __future__ import annotations

import datetime as dt
import gzip
import io
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.errors import DataError, RecordError
from most_ray.io import storage
from most_ray.io.json_stream import read_lines
from most_ray.records.files import read_raw, read_with_offsets, record_files
from most_ray.records.record import (
    Record,
    asr_to_tts,
    parse_record,
    parse_records,
    parse_units,
    parse_units_batch,
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
    """Promise 29 of docs/promises.md: JSON Lines and the other forms are accepted as they come."""
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


def read(path: Path) -> tuple[list[object], list[str]]:
    """Good values, and why the others are none."""
    values = [raw for _, raw in read_raw(path)]
    return [v for v in values if not isinstance(v, RecordError)], [str(v) for v in values if isinstance(v, RecordError)]


@pytest.mark.parametrize(
    ("content", "offset"),
    [("hello", 0), ("[1, 2, x]", 7), ('{"id": "a", "b" }', 16), ("", 0), ("[" + " " * 100_000 + "?]", 100_001)],
)
def test_not_json_names_the_byte(tmp_path: Path, content: str, offset: int) -> None:
    (tmp_path / "bad.json").write_text(content)
    _, reasons = read(tmp_path / "bad.json")
    assert len(reasons) == 1 and reasons[0].startswith(f"is not JSON at byte {offset} ")


def test_truncated_list_and_gzip_keep_what_is_whole(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(json.dumps(RECORDS)[:-9])
    good, reasons = read(tmp_path / "cut.json")
    assert good == RECORDS[:3] and len(reasons) == 1 and "is not JSON at byte" in reasons[0]
    content = json.dumps([asr(i, units=300) for i in range(500)]).encode()
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(content)[:-5000])
    good, reasons = read(tmp_path / "cut.json.gz")
    assert len(good) > 400 and len(reasons) == 1 and "not a whole gzip" in reasons[0]
    (tmp_path / "not.json.gz").write_bytes(b"plain text")
    assert read(tmp_path / "not.json.gz")[1][0].startswith("is not a whole gzip file")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(asr(i, units=300)).encode() for i in range(500)))[:-5000])
    good, reasons = read(tmp_path / "cut.jsonl.gz")
    assert len(good) > 400 and "not a whole gzip" in reasons[-1]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: '{"version": 2, "data": ' + text + "}"])
def test_good_records_around_a_broken_one_are_kept(tmp_path: Path, indent: int | None, wrap: Any) -> None:
    """Every way of breaking one record of a list: its neighbours are there, the damage is told once."""
    whole = [json.dumps({**record, "metadata": {"a": {"b": [{"c": 1}]}}}, indent=indent) for record in RECORDS]
    broken = [
        whole[1][:-1],
        whole[1][1:],
        whole[1].replace('"input"', '"input', 1),
        whole[1].replace(":", "", 1),
        whole[1][:40],
        "}",
        '{"',
        "tru",
    ]
    for text in broken:
        (tmp_path / "list.json").write_text(wrap("[" + ", ".join([whole[0], text, *whole[2:]]) + "]"))
        good, reasons = read(tmp_path / "list.json")
        assert [record["id"] for record in good if isinstance(record, dict) and "id" in record] in (
            ["utt_0", "utt_2", "utt_3"],
            ["utt_0", "utt_3"],
        )
        assert len(reasons) == 1 and "is not JSON at byte" in reasons[0], (text, reasons)


def test_a_bad_line_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    lines = [json.dumps(RECORDS[0]), '{"id": oops}', json.dumps(RECORDS[1]), "\xff\xfe"]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("\n".join(lines[:3]).encode() + b"\n\xff\xfe\n")
    values = [raw for _, raw in read_raw(path)]
    assert [values[0], values[2]] == RECORDS[:2]
    assert isinstance(values[1], RecordError) and f"byte {len(lines[0]) + 1 + 7}" in str(values[1])
    assert isinstance(values[3], RecordError)


def test_bytes_that_are_not_utf8_cost_one_record(tmp_path: Path) -> None:
    texts = [json.dumps(record).encode() for record in RECORDS]
    (tmp_path / "bad.json").write_bytes(b"[" + b",".join([texts[0], texts[1].replace(b"one", b"\xff\xfe"), *texts[2:]]) + b"]")
    values = [raw for _, raw in read_raw(tmp_path / "bad.json")]
    parsed = parse_records(values)
    assert [isinstance(record, RecordError) for record in parsed] == [False, True, False, False]
    assert "not UTF-8" in str(parsed[1])


def test_huge_fields_and_deep_nesting_cost_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("most_ray.io.json_stream.MAX_RECORD", 1 << 16)
    monkeypatch.setattr("most_ray.io.json_stream._CHUNK", 1 << 12)
    texts = [json.dumps(record) for record in RECORDS]
    deep = '{"id": "deep", "instruction": ' + "[" * 100_000 + "]" * 100_000 + "}"
    huge = json.dumps({**RECORDS[0], "metadata": {"x": "y" * 1_000_000}})
    for bad in (deep, huge):
        lines = [texts[0], bad, *texts[1:]]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        (tmp_path / "a.json").write_text("[" + ",".join(lines) + "]")
        for name in ("a.jsonl", "a.json"):
            good, reasons = read(tmp_path / name)
            assert good == RECORDS and len(reasons) == 1, (name, reasons)


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_byte_ranges_together_give_every_line_once(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("most_ray.io.json_stream._CHUNK", chunk)
    content = "\n".join([*map(json.dumps, RECORDS), "", "oops", json.dumps(asr(9))]).encode()
    whole = list(read_lines(io.BytesIO(content)))
    for size in (1, 13, 100, len(content)):
        found = []
        for start in range(0, len(content), size):
            stream = io.BytesIO(content)
            stream.seek(max(0, start - 1))
            found += list(read_lines(stream, start, start + size))
        assert [(b, str(v)) for b, v in found] == [(b, str(v)) for b, v in whole]


@given(st.lists(st.one_of(st.text(max_size=30), st.lists(st.integers(0, 700), max_size=20).map(units_to_text)), max_size=12))
def test_units_in_batches_are_units_one_by_one(texts: list[str]) -> None:
    for text, units in zip(texts, parse_units_batch(texts), strict=True):
        if isinstance(units, RecordError):
            with pytest.raises(RecordError) as expected:
                parse_units(text)
            assert str(units) == str(expected.value)
        else:
            assert units.dtype == np.int32 and units.tolist() == parse_units(text).tolist()


def test_units_with_spaces_and_zeros() -> None:
    texts = [
        "[Hu1] [Hu2]",
        "[Hu007]",
        "[Hu12]x[Hu3]",
        "[Hu12]]",
        "[[Hu12]",
        "[Hu499][Hu500]",
        "[Hu1",
        "",
        "[Hu5]",
        "[Hu1][Hu2]é",
        "[hu1]",
        "[Hu1p]",
    ]
    found = [u.tolist() if isinstance(u, np.ndarray) else None for u in parse_units_batch(texts)]
    assert found == [[1, 2], [7], None, None, None, None, None, None, [5], None, None, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": "[Hu500]"}, "outside 0..499"),
        ({"input": "[Hu1][Hu" + "9" * 5000 + "]"}, "outside 0..499"),
        ({"output": "half \ud83d"}, "surrogate"),
        ({"id": "\ud83d"}, "'id' holds bytes that are not UTF-8, or half a surrogate"),
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
    assert [entry.uri for entry in record_files(tmp_path)] == [str(tmp_path / "sub" / "a.jsonl")]
    assert [entry.name for entry in record_files(tmp_path / "sub" / "a.jsonl")] == ["a.jsonl"]


@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize(("cut", "end"), [(1, ""), (2, ""), (30, ""), (1, ", }"), (1, ', "x": }')])
def test_a_damaged_wrapper_gives_its_records_once(tmp_path: Path, size: int, cut: int, end: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [asr(i) for i in range(size)]})[:-cut] + end)
    good, reasons = read(tmp_path / "a.json")
    ids = [record["id"] for record in good if isinstance(record, dict)]
    assert ids == [f"utt_{i}" for i in range(size)][: len(ids)] and len(ids) >= size - 1 and len(reasons) == 1, reasons


def test_records_with_much_inside_are_found_behind_damage(tmp_path: Path) -> None:
    words = {"words": [{"w": str(i), "t": i} for i in range(500)]}
    texts = [json.dumps({**asr(i), "metadata": words}) for i in range(30)]
    texts[0] = texts[0].replace("utt_0", 'utt"_0')
    (tmp_path / "a.json").write_text("[" + ",".join(texts) + "]")
    good, reasons = read(tmp_path / "a.json")
    assert len(good) == 29 and len(reasons) == 1


def test_hopeless_nesting_is_given_up_in_time(tmp_path: Path) -> None:
    deep = '{"id": ' * 30_000 + "1" + "}" * 30_000
    (tmp_path / "a.json").write_text("[" + ",".join([json.dumps(asr(0)), deep, json.dumps(asr(1))]) + "]")
    started = time.process_time()
    good, reasons = read(tmp_path / "a.json")
    assert good == [asr(0), asr(1)] and len(reasons) == 1
    assert time.process_time() - started < 20


def test_numbers_that_are_large(tmp_path: Path) -> None:
    huge = json.dumps(asr(1)).replace('"utt_1"', "9" * 5000)
    long_id = json.dumps(asr(2)).replace('"utt_2"', "123456789012345678901234567890")
    lines = [json.dumps(asr(0)), huge, long_id, json.dumps(asr(3))]
    (tmp_path / "a.json").write_text("[" + ",".join(lines) + "]")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    for name in ("a.json", "a.jsonl"):
        values = [raw for _, raw in read_raw(tmp_path / name)]
        assert isinstance(values[1], RecordError)
        records = parse_records([values[i] for i in (0, 2, 3)])
        assert [r.id for r in records if isinstance(r, Record)] == ["utt_0", "123456789012345678901234567890", "utt_3"]


def test_two_lists_under_one_name_are_both_read(tmp_path: Path) -> None:
    a, b = (json.dumps([asr(i)]) for i in (0, 1))
    (tmp_path / "a.json").write_text(f'{{"data": {a}, "data": {b}}}')
    assert read(tmp_path / "a.json") == ([asr(0), asr(1)], [])


def test_units_are_not_joined_over_records() -> None:
    """Two broken texts that would be whole ones behind each other stay broken."""
    for texts in (["[Hu1", "2][Hu3]"], ["[Hu4][Hu", "5]"], ["[Hu4]", "[", "Hu5]"]):
        found = parse_units_batch(texts)
        assert [isinstance(units, RecordError) for units in found] == [text != "[Hu4]" for text in texts]


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.jsonl", json.dumps(RECORDS).encode(), "must end in .json"),
        ("a.jsonl", json.dumps(RECORDS, indent=1).encode(), "holds one JSON list"),
        ("a.jsonl.gz", gzip.compress(json.dumps(RECORDS, indent=1).encode()), "holds one JSON list"),
        ("a.jsonl", json.dumps(RECORDS[0], indent=1).encode(), "a record has more than one line"),
        ("a.json", gzip.compress(json.dumps(RECORDS).encode()), "must end in .gz"),
        ("a.jsonl.gz", "\n".join(map(json.dumps, RECORDS)).encode(), "must not end in .gz"),
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS)).encode("utf-16"), "is UTF-16"),
        ("a.json", json.dumps(RECORDS).encode("utf-16-be"), ""),
    ],
)
def test_a_file_of_another_form_than_its_name_says_is_explained(tmp_path: Path, name: str, content: bytes, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    good, reasons = read(tmp_path / name)
    assert not [value for value in good if isinstance(value, dict)] and hint in reasons[0]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "wrapped.json"])
def test_deep_values_cost_one_record(tmp_path: Path, name: str) -> None:
    """Ids and metadata that are nested deeper than code that recurses can take, by a little and by far."""
    for depth in (120, 500, 900, 2000):
        deep = "[" * depth + "]" * depth
        objects = '{"a": ' * depth + "1" + "}" * depth
        bad = [json.dumps(RECORDS[1]).replace('"utt_1"', deep), json.dumps(RECORDS[1]).replace('{"speaker": 1}', objects)]
        texts = [json.dumps(RECORDS[0]), *bad, json.dumps(RECORDS[2])]
        content = "\n".join(texts) if name.endswith("l") else "[" + ",".join(texts) + "]"
        (tmp_path / name).write_text('{"data": ' + content + "}" if name.startswith("w") else content)
        good, reasons = read(tmp_path / name)
        assert good == [RECORDS[0], RECORDS[2]] and len(reasons) in (1, 2), (depth, reasons)
        assert all("nested" in reason for reason in reasons)


UNITS = [7, 90, 481]
SPELLINGS = {
    "cosy": "".join(f"<|unit_{unit}|>" for unit in UNITS),
    "speechgpt": "<sosp>" + "".join(f"<{unit}>" for unit in UNITS) + "<eosp>",
    "glm": "<|begin_of_audio|>" + "".join(f"<|audio_{unit}|>" for unit in UNITS) + "<|end_of_audio|>",
    "lower": "[hu7][hu90][hu481]",
    "upper": "[HU7]",
    "one": "<7>",
    "spaced": "[Hu 7][Hu 90]",
    "within": "say <|unit_7|><|unit_90|><|unit_481|> now",
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("side", ["input", "output"])
def test_units_of_other_projects_are_refused_with_the_right_spelling(name: str, side: str) -> None:
    """As text they would be trained on in silence."""
    raw = {"id": "a", "instruction": "Say it.", "input": "seven", "output": "seven", side: SPELLINGS[name]}
    with pytest.raises(RecordError, match=rf"field '{side}' .*\[Hu7\]\[Hu90\]"):
        parse_record(raw)


@pytest.mark.parametrize(
    "words", ["[Humming] la la", "[Hugh:] hi", "<h1>Title</h1><h2>x</h2>", "see [1][2][3] and <7>", "<s> hi </s>", "a <b> c", "x<1>y<2>"]
)
def test_brackets_in_texts_are_text(words: str) -> None:
    assert parse_record({**asr(0), "output": words}).task == "asr"
    assert parse_record({"id": "a", "instruction": words, "input": words, "output": words}).task == "text"


def test_units_in_the_instruction_are_refused() -> None:
    with pytest.raises(RecordError, match="'instruction' holds speech units"):
        parse_record({**asr(0), "instruction": "Transcribe [Hu1][Hu2][Hu3]"})


@pytest.mark.parametrize("value", [["x"], {"a": 1}])
def test_ids_are_strings_or_numbers(value: Any) -> None:
    with pytest.raises(RecordError, match="field 'id' is"):
        parse_record({**asr(0), "id": value})
    assert parse_record({**asr(0), "id": 7}).id == "7"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_the_options_of_a_uri_are_no_part_of_a_files_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, uri = "\n".join(map(json.dumps, RECORDS)).encode(), f"s3://bucket/{name}?region=eu"
    monkeypatch.setattr(storage, "open_read", lambda _: io.BytesIO(gzip.compress(text) if name.endswith(".gz") else text))
    assert [value for _, value in read_with_offsets(uri)] == RECORDS
    if name == "a.jsonl":
        ranges = [(0, 100), (100, 300), (300, None)]
        assert [value for each in ranges for _, value in read_with_offsets(uri, *each)] == RECORDS
