from __future__ import annotations

import ast
import gzip
import io
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from most_ray.data.ingest import Part, Recipe, build_part, check_rejected, ingest_directory, run_here
from most_ray.data.store import TokenStore
from most_ray.errors import DataError, RecordError
from most_ray.io.json_stream import read_lines, read_values
from most_ray.records.record import Record, parse_record, parse_records
from most_ray.records.template import encode_records
from tests.support.builders import asr, char_vocabulary, make_store, text, tts, write_records


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
    stamp = (Path(first.uri) / "manifest.json").stat().st_mtime_ns
    again = make_store(tmp_path, "a", [asr(1)])
    assert again.uri == first.uri and (Path(again.uri) / "manifest.json").stat().st_mtime_ns == stamp
    changed = make_store(tmp_path, "a", [asr(2)])
    assert changed.uri != first.uri and changed.record_id(0) == "utt_2"


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
        ingest_directory(tmp_path / "a", Recipe("asr", char_vocabulary(), 100, "reject"), tmp_path / "store")


def test_empty_files_are_an_error_and_new_units_a_new_store(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [])
    with pytest.raises(DataError, match="no usable asr record"):
        ingest_directory(tmp_path / "a", Recipe("asr", char_vocabulary(), 100, "reject"), tmp_path / "store")
    first = make_store(tmp_path, "b", [asr(1)])
    (tmp_path / "b" / "units.json").write_text('{"identity": {"kmeans": "1"}}')
    assert make_store(tmp_path, "b", [asr(1)]).uri != first.uri


def test_a_store_of_another_version_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, "a", [asr(0)])
    manifest = json.loads((Path(store.uri) / "manifest.json").read_text())
    (Path(store.uri) / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(DataError, match="version 0"):
        TokenStore(store.uri)


def test_neither_torch_nor_ray_is_loaded() -> None:
    """Data tasks run in many small processes."""
    import subprocess
    import sys

    code = "import sys, most_ray.data.batch, most_ray.data.ingest; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def ingest(directory: Path, **changes: Any) -> TokenStore:
    run = changes.pop("run", run_here)
    recipe = Recipe(**{"task": "asr", "vocabulary": char_vocabulary(), "max_seq_length": 200, "overlong": "reject", **changes})
    return ingest_directory(directory, recipe, directory.parent / "store", run)


def rejected_of(store: TokenStore) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.rejected_lines().splitlines()]


GOOD = st.integers(0, 10**6).map(lambda i: asr(i, units=1 + i % 90))
BAD = st.one_of(
    GOOD.map(lambda r: {k: v for k, v in r.items() if k != "output"}),
    GOOD.map(lambda r: {**r, "input": "[Hu7][Hu500]"}),
    GOOD.map(lambda r: {**r, "input": "plain"}),
    GOOD.map(lambda r: {**r, "output": 3}),
    st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=3)),
)


@given(
    st.lists(st.one_of(GOOD, GOOD, BAD), max_size=25), st.sampled_from(["list", "lines", "data", "zipped"]), st.sampled_from([1 << 26, 700])
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_record_is_in_the_store_or_rejected(tmp_path: Path, records: list[Any], form: str, size: int) -> None:
    """Never both, never neither, in the order of the input, whatever its form and however it is cut into ranges."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "a"
    folder.mkdir()
    numbered = [{**r, "id": f"r{i}"} if isinstance(r, dict) else r for i, r in enumerate([asr(0), *records])]
    lines = "".join(json.dumps(r) + "\n" for r in numbered)
    content = {"list": json.dumps(numbered, indent=1), "data": json.dumps({"data": numbered})}.get(form, lines)
    name = {"list": "a.json", "data": "a.json", "lines": "a.jsonl", "zipped": "a.jsonl.gz"}[form]
    (folder / name).write_bytes(gzip.compress(content.encode()) if form == "zipped" else content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("most_ray.data.ingest_plan.RANGE", size)
        patch.setattr("most_ray.data.ingest._BATCH", 4)
        store = ingest(folder)
    kept = [int(store.record_id(row)[1:]) for row in range(len(store))]
    rejected = [line["index"] for line in rejected_of(store)]
    assert sorted([*kept, *rejected]) == list(range(len(numbered)))
    assert kept == sorted(kept) and rejected == sorted(rejected)
    assert store.manifest["n_seen"] == len(numbered) == len(store) + store.manifest["n_rejected"]
    expected = [r if isinstance(r, Record) else None for r in parse_records(numbered)]
    assert kept == [
        i for i, r in enumerate(expected) if r and r.task == "asr" and len(encode_records([r], char_vocabulary())[0].input_ids) <= 200
    ]


def test_one_thread_parses_the_headers_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts are read at once, and numpy parses with `ast`, which in Python 3.11 fails where threads do so at the same time."""
    folder = write_records(tmp_path / "a", [asr(i) for i in range(60)])
    monkeypatch.setattr("most_ray.data.ingest_plan.RANGE", 700)
    parsing: list[tuple[int, str]] = []
    evaluate = ast.literal_eval

    def noted(text: str) -> Any:
        parsing.append((threading.get_ident(), text))
        return evaluate(text)

    monkeypatch.setattr(ast, "literal_eval", noted)
    assert len(ingest(folder)) == 60
    assert len(parsing) > 5 and {thread for thread, _ in parsing} == {threading.get_ident()}


def mutate(content: bytes, draw: random.Random) -> tuple[bytes, int, int]:
    """The content with a few bytes changed, put in or taken out at one place, and where."""
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice([0, 1, 1, 1, 2, 5, 40]))
    kind = draw.randrange(4)
    new = {
        0: bytes(draw.randrange(256) for _ in range(stop - start)),
        1: b"",
        2: bytes(draw.choice(b'{}[]",:\\\n0u') for _ in range(draw.randrange(1, 4))),
        3: bytes(byte ^ (1 << draw.randrange(8)) for byte in content[start:stop]),
    }[kind]
    return content[:start] + new + content[stop:], start, stop


@pytest.mark.parametrize("form", ["lines", "list", "pretty"])
def test_ten_thousand_broken_files_cost_no_more_than_the_broken_record(form: str) -> None:
    """Whatever happens to a few bytes of a good file: no crash, and every record that was not touched is there as it was."""
    draw = random.Random(form)
    records = [asr(i, units=4) for i in range(6)]
    texts = [json.dumps(record, indent=1 if form == "pretty" else None) for record in records]
    joint, before, after = ("\n", "", "\n") if form == "lines" else (",\n", "[", "]")
    spans, uri = [], len(before)
    for size in map(len, texts):
        spans.append((uri, uri + size))
        uri += size + len(joint)
    content = (before + joint.join(texts) + after).encode()
    read = read_lines if form == "lines" else read_values
    for _ in range(10_000):
        broken, start, stop = mutate(content, draw)
        values = [value for _, value in read(io.BytesIO(broken))]
        parsed = parse_records(values)
        encode_records([record for record in parsed if not isinstance(record, RecordError)], char_vocabulary())
        for record, (begin, end) in zip(records, spans, strict=True):
            if stop < begin - len(joint) or start > end + len(joint):
                assert record in values, (form, start, stop, broken)


def test_a_changed_file_is_taken_in_anew_and_the_others_are_not(tmp_path: Path) -> None:
    made: list[Part] = []

    def counting(parts: Sequence[Part], recipe: Recipe) -> None:
        made.extend(parts)
        run_here(parts, recipe)

    for name in ("x", "y", "z"):
        write_records(tmp_path / "a", [asr(i) for i in range(3)] + [{**asr(9), "id": name}], f"{name}.jsonl")
    first = ingest(tmp_path / "a", run=counting)
    assert len(made) == 3 and len(first) == 12
    assert ingest(tmp_path / "a", run=counting).uri == first.uri and len(made) == 3
    write_records(tmp_path / "a", [asr(5)], "y.jsonl")
    second = ingest(tmp_path / "a", run=counting)
    assert [Path(part.file).name for part in made[3:]] == ["y.jsonl"] and len(second) == 9
    ingest(tmp_path / "a", run=counting, max_seq_length=100)
    assert len(made) == 7


def test_an_unchanged_directory_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "a", [asr(0)])
    os.utime(tmp_path / "a" / "records.jsonl", (1, 1))
    uri = ingest(tmp_path / "a").uri
    monkeypatch.setattr("most_ray.data.ingest_plan._read_digests", lambda entry: pytest.fail("was read"))
    assert ingest(tmp_path / "a").uri == uri


def test_a_corrupt_list_of_what_was_read_is_logged_and_all_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_records(tmp_path / "a", [asr(0)])
    os.utime(tmp_path / "a" / "records.jsonl", (1, 1))
    first = ingest(tmp_path / "a")
    (known,) = (Path(first.uri).parent / "files").iterdir()
    known.write_bytes(known.read_bytes()[:-5])
    assert ingest(tmp_path / "a").uri == first.uri
    assert "are read again: file list" in caplog.text


def test_a_file_changed_within_the_resolution_of_its_time_stamp_is_seen(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [asr(1)])
    stamp = (tmp_path / "a" / "records.jsonl").stat().st_mtime_ns
    first = ingest(tmp_path / "a")
    content = (tmp_path / "a" / "records.jsonl").read_text()
    (tmp_path / "a" / "records.jsonl").write_text(content.replace("one", "two"))
    os.utime(tmp_path / "a" / "records.jsonl", ns=(stamp, stamp))
    assert ingest(tmp_path / "a").uri != first.uri


def test_a_stopped_ingest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished stays; nothing half-written does; the result is that of an undisturbed one."""
    monkeypatch.setattr("most_ray.data.ingest_plan.RANGE", 2000)
    write_records(tmp_path / "a", [asr(i, units=20) for i in range(60)])
    made: list[str] = []

    def stopping(parts: Sequence[Part], recipe: Recipe) -> None:
        for part in parts[:3]:
            build_part(part, recipe)
            made.append(part.key)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path / "a", run=stopping)

    def rest(parts: Sequence[Part], recipe: Recipe) -> None:
        assert not {part.key for part in parts} & set(made)
        run_here(parts[::-1], recipe)  # in any order

    store = ingest(tmp_path / "a", run=rest)
    assert [store.record_id(row) for row in range(len(store))] == [f"utt_{i}" for i in range(60)]
    assert not list((tmp_path / "store").rglob(".*"))


def test_what_a_killed_process_left_is_swept_away_a_day_later(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [asr(0)])
    for name, age in ((".part-old", 90_000), (".part-new", 60)):
        (tmp_path / "store" / "parts" / name).mkdir(parents=True)
        os.utime(tmp_path / "store" / "parts" / name, (time.time() - age,) * 2)
    ingest(tmp_path / "a")
    assert [path.name for path in (tmp_path / "store" / "parts").glob(".*")] == [".part-new"]


def test_a_part_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "a", [asr(0)])
    monkeypatch.setattr("most_ray.data.ingest._add_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ingest(tmp_path / "a")
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.parent.name != "files"]


def test_records_that_are_too_long(tmp_path: Path) -> None:
    long_text = {**text(0), "input": "go", "output": "word " * 80}
    write_records(tmp_path / "a", [text(1), long_text, text(2)])
    rejecting = ingest(tmp_path / "a", task="text")
    assert len(rejecting) == 2 and rejected_of(rejecting)[0]["id"] == "text_0" and rejecting.manifest["n_rejected"] == 1
    aside = ingest(tmp_path / "a", task="text", overlong="set_aside")
    assert aside.manifest["n_rejected"] == 0 and aside.manifest["n_set_aside"] == 1 and rejected_of(aside)[0]["id"] == "text_0"
    assert check_rejected([aside], 0.0, tmp_path / "r.jsonl") == 1
    split = ingest(tmp_path / "a", task="text", overlong="split")
    ids = [split.record_id(row) for row in range(len(split))]
    assert ids == ["text_1", "text_0#1", "text_0#2", "text_0#3", "text_2"] and max(split.lengths) <= 200
    whole = encode_records([parse_record(long_text)], char_vocabulary())[0]
    pieces = [split.input_ids(row)[split.prompt_lengths[row] :] for row in (1, 2, 3)]
    assert np.array_equal(np.concatenate(pieces), whole.input_ids[whole.prompt_length :])
    write_records(tmp_path / "b", [asr(0), asr(1, units=300)])
    assert rejected_of(ingest(tmp_path / "b", overlong="split"))[0]["id"] == "utt_1"


@pytest.mark.parametrize("harm", ["truncated", "flipped", "gone"])
def test_a_damaged_shard_is_named(tmp_path: Path, harm: str) -> None:
    """Before anything is trained on it: at the start, where stores are read through, and by every record that is read."""
    write_records(tmp_path / "a", [asr(i, units=30) for i in range(40)])
    shard = Path(ingest(tmp_path / "a").shard_uri(0))
    content = bytearray(shard.read_bytes())
    if harm == "truncated":
        shard.write_bytes(content[:-100])
    elif harm == "gone":
        shard.unlink()
    else:
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    store = TokenStore(ingest(tmp_path / "a").uri)
    with pytest.raises(DataError, match=rf"{shard.name}.*Delete .*{shard.parent.name}"):
        store.verify()
    with pytest.raises(DataError, match=shard.name):
        [store.input_ids(row) for row in range(len(store))]
    shutil.rmtree(shard.parent)
    again = ingest(tmp_path / "a")
    assert again.uri == store.uri and again.verify() and len(again.input_ids(39)) == again.lengths[39]


def test_every_flipped_bit_of_a_store_is_seen(tmp_path: Path) -> None:
    """Wherever in its files a bit turns: reading all of it never gives other tokens or ids in silence."""
    write_records(tmp_path / "a", [asr(i, units=10) for i in range(5)])
    store = ingest(tmp_path / "a")
    whole = [(store.record_id(row), store.input_ids(row).tolist()) for row in range(5)]
    files = [Path(store.shard_uri(0)), *(Path(store.uri) / name for name in ("manifest.json", "lengths.npy", "prompt_lengths.npy"))]
    draw = random.Random(0)
    for path in files:
        content = path.read_bytes()
        for _ in range(150):
            index = draw.randrange(len(content))
            path.write_bytes(content[:index] + bytes([content[index] ^ (1 << draw.randrange(8))]) + content[index + 1 :])
            try:
                damaged = TokenStore(store.uri)
                read = [(damaged.record_id(row), damaged.input_ids(row).tolist()) for row in range(5)]  # the id by itself, too
            except DataError:
                continue
            assert read == whole, f"{path.name} byte {index}"
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["index.npy", "rejected.jsonl", "part.json"])
def test_a_damaged_part_is_not_made_a_store_of(tmp_path: Path, name: str) -> None:
    """Parts outlive the stores that they were made for: what is taken from one is checked first."""
    write_records(tmp_path / "a", [asr(0), "bad", asr(1)])
    store = ingest(tmp_path / "a")
    shutil.rmtree(store.uri)
    (uri,) = (tmp_path / "store" / "parts").rglob(name)
    content = bytearray(uri.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    uri.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*Delete .*{uri.parent.name}"):
        ingest(tmp_path / "a")
    assert not list((tmp_path / "store").glob(".*"))
    shutil.rmtree(uri.parent)
    assert len(ingest(tmp_path / "a")) == 2


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    write_records(tmp_path / "a", [asr(0)])
    os.mkfifo(tmp_path / "a" / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl.*not a regular file"):
        ingest(tmp_path / "a")
    (tmp_path / "a" / "pipe.jsonl").unlink()
    (tmp_path / "a" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot be listed .*gone\.jsonl"):
        ingest(tmp_path / "a")
