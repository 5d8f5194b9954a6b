"""Records that are twice in a source, in two sources, or in training and validation are found and named."""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from most_ray.data.ingest import Recipe, ingest_directory
from most_ray.data.store import TokenStore
from most_ray.errors import DataError
from most_ray.records import keys
from most_ray.records.record import Task, parse_record
from most_ray.runs.overlap import warn_of_overlaps
from tests.support.builders import asr, char_vocabulary, text, tts, write_records

RAWS = [asr(i, units=20) for i in range(6)]


def ingest(folder: Path, task: Task = "asr") -> TokenStore:
    return ingest_directory(folder, Recipe(task, char_vocabulary(), 400, "reject"), folder.parent / "store")


def made(folder: Path, records: list[Any], task: Task = "asr") -> TokenStore:
    return ingest(write_records(folder, records), task)


def as_list(path: Path) -> None:
    path.with_name("again.json").write_text(json.dumps(RAWS, indent=1))


def zipped(path: Path) -> None:
    path.with_name("records.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))


def copied(path: Path) -> None:
    path.with_name("records (1).jsonl").write_bytes(path.read_bytes())


def in_a_folder(path: Path) -> None:
    (path.parent / "old").mkdir()
    (path.parent / "old" / "records.jsonl").write_bytes(path.read_bytes())


@pytest.mark.parametrize("copy", [as_list, zipped, copied, in_a_folder])
def test_a_file_that_is_a_copy_in_any_form_is_refused_and_named(tmp_path: Path, copy: Callable[[Path], None]) -> None:
    folder = write_records(tmp_path / "a", RAWS)
    copy(folder / "records.jsonl")
    for _ in range(2):
        with pytest.raises(DataError, match=r"file = .*holds the same records as .*Remove one of the two"):
            ingest(folder)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_ids_that_are_doubled_with_other_content_are_counted_and_the_first_pair_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_records(tmp_path / "a", RAWS, "one.jsonl")
    write_records(folder, [{**raw, "output": "mended"} for raw in RAWS[:3]], "two.jsonl")
    with caplog.at_level(logging.WARNING):
        assert len(ingest(folder)) == 9
    (message,) = caplog.messages
    assert message.startswith("3 records of") and "one.jsonl and" in message and message.endswith("two.jsonl")


def test_a_file_with_some_records_of_another_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_records(tmp_path / "a", RAWS)
    write_records(folder, RAWS[2:4], "part.jsonl")  # so it may be on purpose, as in another order
    assert len(ingest(folder)) == 8 and "2 records of" in caplog.text


def test_a_file_that_holds_its_own_records_twice_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert len(made(tmp_path / "a", [*RAWS, *RAWS])) == 12
    assert "6 records of" in caplog.text and "is in " in caplog.text


def test_good_sources_are_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training = [made(tmp_path / "a", RAWS[:3]), made(tmp_path / "t", [tts(i, units=20) for i in range(3)], "tts")]
    warn_of_overlaps(training, [made(tmp_path / "v", RAWS[3:]), made(tmp_path / "x", [text(0)], "text")])
    assert caplog.text == ""


def test_validation_on_what_is_trained_on_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Equal records, equal speech under other ids, equal speech of the other task, and equal ids."""
    training = [made(tmp_path / "train", RAWS)]
    renamed = [{**raw, "id": f"x{i}", "output": "other words"} for i, raw in enumerate(RAWS[:2])]
    same_ids = [{**asr(90 + i, units=20), "id": f"utt_{i}"} for i in range(2)]
    cases: list[tuple[str, list[Any], Task, str]] = [
        ("same", RAWS[2:5], "asr", "3 of the 3 asr records"),
        ("renamed", renamed, "asr", "2 of the 2 asr records"),
        ("spoken", [tts(i, units=20) for i in (4, 70)], "tts", "1 of the 2 tts records"),
        ("ids", same_ids, "asr", "have ids that records in training have"),
    ]
    for name, records, task, message in cases:
        caplog.clear()
        warn_of_overlaps(training, [made(tmp_path / name, records, task)])
        (found,) = caplog.messages
        assert message in found and str(tmp_path / "train") in found and "nothing about new data" in found


def test_two_sources_with_the_same_records_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_overlaps([made(tmp_path / "a", RAWS), made(tmp_path / "b", RAWS[4:])], [])
    (message,) = caplog.messages
    assert message.startswith("2 of the 2 asr records of") and "are also in another source" in message


def test_stores_of_earlier_versions_have_no_keys_and_are_used_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new, old = made(tmp_path / "a", RAWS), made(tmp_path / "b", RAWS)
    (Path(old.uri) / keys.KEYS).unlink()
    warn_of_overlaps([old], [new])
    (Path(old.uri) / keys.KEYS).write_bytes(b"cut off")
    warn_of_overlaps([old], [new])
    assert caplog.text == ""


def test_parts_of_earlier_versions_make_a_store(tmp_path: Path) -> None:
    store = made(tmp_path / "a", RAWS)
    for path in (tmp_path / "store").rglob(keys.KEYS):
        path.unlink()
    (Path(store.uri) / "manifest.json").unlink()
    Path(store.uri).rename(tmp_path / "gone")
    assert len(ingest(tmp_path / "a")) == 6


def test_of_many_records_a_share_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "COMPARED", 1000)
    ids = np.array([keys.id_key(f"utt_{i % 40_000}") for i in range(50_000)], "<u8")
    content = np.stack([ids, np.zeros_like(ids), ids], axis=1).tobytes()
    share = keys.share_compared(50_000)
    found, rows = keys.read_keys(io.BytesIO(content), share, keys.ID)
    assert 800 < len(found) < 1200
    later, before = keys.repeated(found, rows)
    assert (later - before == 40_000).all() and round(len(later) / share) == pytest.approx(10_000, rel=0.2)
    assert len(keys.read_keys(io.BytesIO(content), share, keys.SPEECH)[0]) == 0


def test_short_speech_has_no_key_and_the_side_does_not_matter() -> None:
    tokens = np.zeros(1, np.int32)
    assert keys.speech_key(parse_record(asr(1, units=5)), tokens) == 0
    assert keys.speech_key(parse_record(asr(1, units=20)), tokens) == keys.speech_key(parse_record(tts(1, units=20)), tokens) != 0
    assert keys.id_key("tts_utt_1") == keys.id_key("utt_1") != keys.id_key("utt_2")
