"""Ingest: reads, checks and encodes records once, and writes them to a token store. Bad records are rejected, each with its reason.

A directory is ingested in parts, each a file or a byte range of one (JSON Lines are read from any byte on; other forms are streamed
whole). A part is a pure function of its bytes and the recipe and is built once: parts may be built in any order and by any number of
processes, and those that a killed ingest had finished are kept.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.data.ingest_plan import IngestPlan, Part, Recipe, plan_ingest
from most_ray.data.store import PART_FILES, SCRATCH, PartWriter, TokenStore, checksummed_json, digest, file_digest, read_checksummed_json
from most_ray.errors import DataError, RecordError, count_of, printable
from most_ray.io import storage
from most_ray.io.json_values import parse_json, parse_lines
from most_ray.io.outputs import open_to_readers
from most_ray.records.files import REJECTED, read_with_offsets
from most_ray.records.keys import ID, KEYS, ROW_BYTES, WHOLE, read_keys, repeated, share_compared, speech_key
from most_ray.records.record import Record, parse_records
from most_ray.records.template import EncodedRecord, encode_records

logger = logging.getLogger(__name__)
Runner = Callable[[Sequence[Part], Recipe], None]
_BATCH = 256  # records parsed and encoded at once: their bytes stay in the CPU's cache
_READERS = 16  # threads that read finished parts: on object stores most of the time is latency
_SURE = 1000  # records compared of a file, where not all are, that show a copy
_STALE_S = 86_400.0  # seconds after which an unfinished folder counts as left by a process that was killed


def run_here(parts: Sequence[Part], recipe: Recipe) -> None:
    """Build the parts one after the other in this process."""
    for part in parts:
        build_part(part, recipe)


def ingest_directory(directory: str | Path, recipe: Recipe, store_root: str | Path, run: Runner = run_here) -> TokenStore:
    """The token store of a directory (or URI, or file) of records of one task: the existing one, or a new one.

    Args:
        store_root: folder or URI of all stores and their parts.
        run: builds the missing parts.

    Raises:
        DataError: the directory is missing or has no good record.
    """
    ingest = plan_ingest(directory, recipe, store_root)
    if ingest.missing:
        logger.info("building %d of %d parts of the token store of %s", len(ingest.missing), len(ingest.parts), directory)
        run(ingest.missing, recipe)
        if not storage.is_remote(ingest.uri):
            _remove_stale(storage.local(ingest.parts[0].uri).parent)
    if not storage.exists(storage.join(ingest.uri, "manifest.json")):
        _write_store(ingest)
    store = TokenStore(ingest.uri)
    if len(store) == 0:
        first = next(parse_lines(store.rejected_lines()), {})
        why = f"; the first one {first['reason']} ({first['file']} record {first['index']})" if "reason" in first else ""
        raise DataError("directory", str(directory), f"has no usable {recipe.task} record{why}.")
    return store


def _remove_stale(parts: Path) -> None:
    """Remove unfinished folders that are older than a day: they were left by killed processes. Younger ones may still be in use."""
    for folder in parts.glob(f"{SCRATCH}*"):
        if time.time() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def build_part(part: Part, recipe: Recipe) -> None:
    """Read, check, encode and write one part, unless it exists already. Memory does not grow with the part."""
    if storage.exists(storage.join(part.uri, "part.json")):
        return
    # `closing`: after any error, KeyboardInterrupt too, no half-written folder stays.
    with _scratch(part.uri) as scratch, contextlib.closing(PartWriter(scratch)) as writer:
        n_seen, values = 0, enumerate(read_with_offsets(part.file, part.start, part.stop))
        while batch := list(itertools.islice(values, _BATCH)):
            n_seen += len(batch)
            _add_batch(writer, recipe, batch)
        writer.publish(part.uri, n_seen)


@contextlib.contextmanager
def _scratch(uri: str) -> Iterator[Path]:
    """A local folder for unfinished files of `uri`: the one that contains it, or for a remote URI a private temporary one."""
    if storage.is_remote(uri):
        with tempfile.TemporaryDirectory(prefix="most_ray-", ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
    else:
        folder = storage.local(uri).parent
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _add_batch(writer: PartWriter, recipe: Recipe, batch: Sequence[tuple[int, tuple[int, object]]]) -> None:
    """Check and encode records, given as (index, (byte, value)), and add them to the part or to its rejected records."""
    good: list[tuple[int, int, Record]] = []
    for (index, (byte, raw)), record in zip(batch, parse_records([raw for _, (_, raw) in batch]), strict=True):
        if isinstance(record, RecordError):
            record_id = raw.get("id") if isinstance(raw, dict) else None
            writer.reject(index, byte, str(record), None if record_id is None else str(record_id)[:300])
        elif record.task != recipe.task:
            hint = ": neither its input nor its output holds speech units, [Hu7][Hu90]..." if record.task == "text" else ""
            writer.reject(index, byte, f"is a {record.task} record in a source of {recipe.task} records{hint}", record.id)
        else:
            good.append((index, byte, record))
    ids: list[str] = []
    kept: list[EncodedRecord] = []
    speech: list[int] = []
    for (index, byte, record), item in zip(good, encode_records([r for _, _, r in good], recipe.vocabulary), strict=True):
        if len(item.input_ids) <= recipe.max_seq_length:
            ids.append(record.id)
            kept.append(item)
            speech.append(speech_key(record, item.input_ids))
        elif recipe.overlong == "split" and (pieces := _split(item, recipe.max_seq_length)):
            ids += [f"{record.id}#{number}" for number in range(1, len(pieces) + 1)]
            kept += pieces
            speech += [speech_key(record, piece.input_ids) for piece in pieces]
        else:
            reason = f"has {len(item.input_ids)} tokens, more than max_seq_length ({recipe.max_seq_length})"
            writer.reject(index, byte, reason, record.id, set_aside=recipe.overlong == "set_aside")
    writer.add(ids, kept, speech)


def _split(item: EncodedRecord, limit: int) -> list[EncodedRecord]:
    """Split a long text record into several of at most `limit` tokens, each with the whole prompt and a piece of the output.

    The list is empty where speech would have to be cut, since it is not known which units belong to which words, and where the prompt
    leaves less than half of a row.
    """
    room = limit - item.prompt_length
    if item.task != "text" or 2 * room < limit:
        return []
    prompt, output = np.split(item.input_ids, [item.prompt_length])
    cuts = [output[start : start + room] for start in range(0, len(output), room)]
    return [EncodedRecord(np.concatenate([prompt, cut]), item.prompt_length, item.task) for cut in cuts]


def _read_part(part: Part) -> tuple[dict[str, Any], bytes, list[bytes], bytes | None]:
    """The contents of part.json and index.npy, the lines of rejected.jsonl, and the records' keys (None: the part is of an earlier
    version). Raises DataError where one does not match its checksum."""
    content = read_checksummed_json(storage.join(part.uri, "part.json"), "part")
    files = {}
    for name in PART_FILES:
        uri = storage.join(part.uri, name)
        files[name] = storage.read_bytes(uri)
        if digest(files[name]) != content["files"][name]:
            remedy = f"Delete {storage.redact(part.uri)}; it is built again."
            raise DataError("part", storage.redact(uri), "does not match its checksum.", remedy)
    try:
        keys = storage.read_bytes(storage.join(part.uri, KEYS))
    except FileNotFoundError:
        keys = None
    return content, files["index.npy"], files[REJECTED].splitlines(), keys


def _write_store(ingest: IngestPlan) -> None:
    """Write the store: its manifest and index over the parts, which all exist."""
    with _scratch(ingest.uri) as scratch, tempfile.TemporaryDirectory(prefix=".store-", dir=scratch, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        totals = dict.fromkeys(("n_records", "n_tokens", "n_seen", "n_rejected", "n_set_aside"), 0)
        shards: list[dict[str, Any]] = []
        instruction_lines: list[list[int]] = []
        index: list[np.ndarray] = []
        seen_of: dict[str, int] = {}
        records_of: dict[str, int] = {}  # by file
        known = True
        with (folder / REJECTED).open("wb") as sink, (folder / KEYS).open("wb") as all_keys, ThreadPoolExecutor(_READERS) as pool:
            for part, (content, part_index, rejected, keys) in zip(ingest.parts, pool.map(_read_part, ingest.parts), strict=True):
                all_keys.write(keys or b"")
                shards += [{"part": part.key, **shard} for shard in content["shards"]]
                instruction_lines += [[totals["n_records"] + row, lines] for row, lines in content.get("instruction_lines", ())]
                known = known and "instruction_lines" in content  # parts of earlier versions do not say
                # Not in the pool: numpy parses a file's header with `ast`, which fails in several threads at once in Python 3.11 ("AST
                # constructor recursion depth mismatch").
                index.append(np.load(io.BytesIO(part_index), allow_pickle=False))
                for line in map(parse_json, rejected):
                    line = {"file": storage.redact(part.file), **line, "index": line["index"] + seen_of.get(part.file, 0)}
                    sink.write(json.dumps(line).encode() + b"\n")
                seen_of[part.file] = seen_of.get(part.file, 0) + content["n_seen"]
                records_of[part.file] = records_of.get(part.file, 0) + content["n_records"]
                for name in totals:
                    totals[name] += content[name]
        if (folder / KEYS).stat().st_size == ROW_BYTES * totals["n_records"]:
            check_doubled(folder / KEYS, records_of, ingest.manifest["source"])
        lengths, prompts = np.concatenate(index, axis=1)
        np.save(folder / "lengths.npy", lengths)
        np.save(folder / "prompt_lengths.npy", prompts)
        digests = {name: file_digest(folder / name) for name in ("lengths.npy", "prompt_lengths.npy")}
        manifest = {**ingest.manifest, **totals, "index": digests, "shards": shards}
        manifest |= {"instruction_lines": instruction_lines} if known else {}
        (folder / "manifest.json").write_bytes(checksummed_json(manifest))
        open_to_readers(folder)
        storage.publish(folder, ingest.uri, "manifest.json")


def check_rejected(stores: Sequence[TokenStore], limit: float, report: str | Path) -> int:
    """Write all rejected records of the stores to the file `report` and return their number.

    Raises:
        DataError: the share of bad records in a store is above `limit`. Those that are too long do not count with `overlong: set_aside`.
    """
    storage.write_bytes(str(report), b"".join(store.rejected_lines() for store in stores))
    total = sum(store.manifest["n_rejected"] + store.manifest["n_set_aside"] for store in stores)
    for store in stores:
        rejected, seen = store.manifest["n_rejected"], store.manifest["n_seen"]
        if rejected > limit * seen:
            where = f"{rejected} of {count_of(seen, 'record')} of {store.manifest['source']} are bad{_worst(store.rejected_lines())}"
            remedy = f"See {report}; fix the records or raise max_rejected_fraction."
            raise DataError("max_rejected_fraction", limit, f"is exceeded: {where}.", remedy)
    return total


def _worst(rejected: bytes) -> str:
    """The place and reason of the worst line of a rejected.jsonl: of damage, else of the first record that is bad."""
    lines = [line for line in parse_lines(rejected) if not line.get("set_aside") and {"file", "index", "reason"} <= line.keys()]
    damaged = (line for line in lines if "not JSON at" in line["reason"] or "gzip" in line["reason"])
    first = next(damaged, lines[0] if lines else None)
    return f"; the first, {first['file']} record {first['index']}, {first['reason']}" if first else ""


def check_doubled(keys: Path, records_of: Mapping[str, int], source: str) -> None:
    """Look for records that are in a source more than once, and log a warning where ids are.

    Args:
        keys: the file of the records' keys.
        records_of: the number of records in each file, in their order.

    Raises:
        DataError: a file holds the same records as another one in the same order, so it is a copy.
    """
    files, ends = [storage.redact(file) for file in records_of], np.cumsum(list(records_of.values()))
    share = share_compared(int(ends[-1]))
    with keys.open("rb") as stream:
        whole, rows = read_keys(stream, share, WHOLE)
    pairs = repeated(whole, rows)
    distance = pairs[0] - pairs[1]  # in rows
    later, before = (np.searchsorted(ends, each, side="right") for each in pairs)
    seen = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(files))
    order = np.argsort(later, kind="stable")
    starts = np.flatnonzero(np.diff(later[order], prepend=-1))
    for its in np.split(order, starts[1:]) if len(order) else ():  # the pairs of each file
        index, other = int(later[its[0]]), int(before[its[0]])
        in_order = len(np.unique(distance[its])) == 1 and (before[its] == other).all()
        if in_order and other != index and len(its) == seen[index] == seen[other] and (share == 1.0 or seen[index] >= _SURE):
            rule = f"holds the same records as {files[other]}: they would be trained on twice as often."
            remedy = "Remove one of the two; to weight records, give their folder a larger weight (train_asr_weights, ...)."
            raise DataError("file", files[index], rule, remedy)
    with keys.open("rb") as stream:
        later, before = repeated(*read_keys(stream, share, ID))
    if len(later):
        about = "" if share == 1.0 else "about "
        places = [files[int(np.searchsorted(ends, row[0], side="right"))] for row in (before, later)]
        where = places[0] if places[0] == places[1] else " and ".join(places)
        count = round(len(later) / share)
        share_ids = f"{count_of(count, 'record')} of {source} {'has' if count == 1 else 'have'} an id that an earlier record has"
        text = f"{about}{share_ids}; the first such pair is in {where}"
        logger.warning("%s", printable(text))
