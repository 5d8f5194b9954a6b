from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from most_ray.data.ingest import check_rejected, ingest_directory
from most_ray.data.store import TokenStore
from most_ray.errors import DataError
from most_ray.records import parse_record
from most_ray.template import encode_records
from tests.support.builders import asr, char_vocabulary, make_store, tts, write_records


def test_a_store_gives_back_what_was_encoded(tmp_path: Path) -> None:
    raws = [asr(i, units=1 + i % 7) for i in range(50)]
    store = make_store(tmp_path, "a", raws)
    for row, item in enumerate(encode_records([parse_record(raw) for raw in raws], char_vocabulary())):
        assert np.array_equal(store.input_ids(row), item.input_ids)
        assert store.record_id(row) == raws[row]["id"]
        assert (store.lengths[row], store.prompt_lengths[row]) == (len(item.input_ids), item.prompt_length)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("most_ray.data.store._SHARD_TOKENS", 50)
    monkeypatch.setattr("most_ray.data.ingest._BATCH", 3)
    store = make_store(tmp_path, "a", [asr(i) for i in range(20)])
    assert len(store.manifest["shards"]) > 3
    assert [store.record_id(row) for row in range(20)] == [f"utt_{i}" for i in range(20)]


def test_the_same_content_is_not_ingested_twice_and_changed_content_is(tmp_path: Path) -> None:
    first = make_store(tmp_path, "a", [asr(1)])
    stamp = (first.directory / "manifest.json").stat().st_mtime_ns
    again = make_store(tmp_path, "a", [asr(1)])
    assert again.directory == first.directory and (again.directory / "manifest.json").stat().st_mtime_ns == stamp
    changed = make_store(tmp_path, "a", [asr(2)])
    assert changed.directory != first.directory and changed.record_id(0) == "utt_2"


def test_bad_records_are_set_aside_with_file_index_and_reason(tmp_path: Path) -> None:
    no_output = {key: value for key, value in asr(3).items() if key != "output"}
    bad = [no_output, {**asr(4), "input": "[Hu512]"}, {**asr(5), "output": ""}, asr(6, units=500), tts(7), 12]
    store = make_store(tmp_path, "a", [asr(0), *bad, asr(1)])
    assert [store.record_id(row) for row in range(len(store))] == ["utt_0", "utt_1"]
    with pytest.raises(DataError, match=r"max_rejected_fraction.*6 of 8 records.*has no field 'output'"):
        check_rejected([store], 0.01, tmp_path / "rejected.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    by_index = {line["index"]: line["reason"] for line in lines}
    assert sorted(by_index) == [1, 2, 3, 4, 5, 6]
    assert all(line["file"].endswith("records.jsonl") for line in lines)
    assert "outside 0..499" in by_index[2] and "empty output" in by_index[3] and "more than max_seq_length (200)" in by_index[4]
    assert "tts record in a source of asr records" in by_index[5] and "not an object" in by_index[6]
    assert check_rejected([store], 0.8, tmp_path / "rejected.jsonl") == 6


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [tts(0)])
    with pytest.raises(DataError, match="no usable asr record; the first one is a tts record"):
        ingest_directory(tmp_path / "a", "asr", char_vocabulary(), 100, tmp_path / "store")


def test_empty_files_are_an_error_and_new_units_a_new_store(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [])
    with pytest.raises(DataError, match="no usable asr record"):
        ingest_directory(tmp_path / "a", "asr", char_vocabulary(), 100, tmp_path / "store")
    first = make_store(tmp_path, "b", [asr(1)])
    (tmp_path / "b" / "units.json").write_text('{"identity": {"kmeans": "1"}}')
    assert make_store(tmp_path, "b", [asr(1)]).directory != first.directory


def test_an_interrupted_ingest_leaves_no_store(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [asr(0)])
    (tmp_path / "a" / "z.json").write_text("[1, oops")
    with pytest.raises(DataError, match="not JSON at byte 4"):
        ingest_directory(tmp_path / "a", "asr", char_vocabulary(), 100, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", [asr(0)])
    manifest = json.loads((store.directory / "manifest.json").read_text())
    (store.directory / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(DataError, match="version 0"):
        TokenStore(store.directory)


def test_neither_torch_nor_ray_is_loaded() -> None:
    """Data tasks run in many small processes."""
    import subprocess
    import sys

    code = "import sys, most_ray.data.batch, most_ray.data.ingest; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
