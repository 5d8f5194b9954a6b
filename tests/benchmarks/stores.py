"""Token stores of synthetic records, in the store's own format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.config import WeightUnit
from most_ray.data.batch import TokenLayout
from most_ray.data.plan import PlanSpec
from most_ray.data.store import STORE_VERSION, PartWriter, TokenStore, checksummed_json, file_digest
from most_ray.records.template import EncodedRecord

ROW = 2048
LAYOUT = TokenLayout(first_audio=300, last_audio=801, pad=2, unit_base=300)
TASKS = ("asr", "tts")
_PART_RECORDS = 20_000


class Described(TokenStore):
    """A store that has lengths and no shards: a record's tokens follow from its row."""

    def record(self, row: int) -> tuple[str, np.ndarray]:
        return f"{self.name}_{row:09d}", (row + np.arange(self.lengths[row], dtype=np.int32)) % 500 + np.int32(LAYOUT.unit_base)


def write_store(uri: Path, task: str, lengths: np.ndarray, prompts: np.ndarray, shards: Sequence[dict[str, Any]] = ()) -> None:
    """Index and manifest, as ingest writes them."""
    uri.mkdir(parents=True)
    np.save(uri / "lengths.npy", lengths)
    np.save(uri / "prompt_lengths.npy", prompts)
    (uri / "rejected.jsonl").write_bytes(b"")
    content = {
        "name": task,
        "source": str(uri),
        "content": file_digest(uri / "lengths.npy"),
        "units": None,
        "version": STORE_VERSION,
        "task": task,
        "vocabulary": {"tokenizer": "synthetic", "template": "synthetic", "ids": "synthetic"},
        "max_seq_length": ROW,
        "n_records": len(lengths),
        "n_tokens": int(lengths.sum(dtype=np.int64)),
        "n_seen": len(lengths),
        "n_rejected": 0,
        "n_set_aside": 0,
        "index": {name: file_digest(uri / name) for name in ("lengths.npy", "prompt_lengths.npy")},
        "shards": list(shards),
    }
    (uri / "manifest.json").write_bytes(checksummed_json(content))


def draw_lengths(n: int, seed: int, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and prompt lengths, int32 (n,) each: 2 to 30 seconds of speech, a twelfth of them words."""
    lengths = np.random.default_rng(seed).integers(130, 1660, n, dtype=np.int32)
    words = lengths // 12
    return lengths, lengths - words if task == "asr" else words


def describe(root: Path, n: int) -> None:
    """An ASR and a TTS source of `n` records each, by their lengths alone. The manifest lists as many shards as they would have, for it
    is read in whole."""
    names = [
        {"part": f"{i:032x}", "name": "shard-0000.arrow", "rows": 12_000, "bytes": 43 << 20, "digest": f"{i:032x}"}
        for i in range(n // 12_000)
    ]
    for seed, task in enumerate(TASKS):
        write_store(root / task, task, *draw_lengths(n, seed, task), names)


def fill(root: Path, n_bytes: int) -> int:
    """The same two sources with real shards of `n_bytes` of tokens in all. Returns the bytes of the shards."""
    total = 0
    for seed, task in enumerate(TASKS):
        lengths, prompts = draw_lengths(n_bytes // (2 * 4 * 895), seed, task)
        tokens = np.random.default_rng(seed).integers(LAYOUT.unit_base, LAYOUT.last_audio, 1 << 22, dtype=np.int32)
        shards: list[dict[str, Any]] = []
        for start in range(0, len(lengths), _PART_RECORDS):
            stop = min(len(lengths), start + _PART_RECORDS)
            shards += _write_part(root / "parts" / f"{task}{start}", task, start, lengths[start:stop], prompts[start:stop], tokens)
        write_store(root / task, task, lengths, prompts, shards)
        total += sum(shard["bytes"] for shard in shards)
    return total


def _write_part(uri: Path, task: str, first: int, lengths: np.ndarray, prompts: np.ndarray, tokens: np.ndarray) -> list[dict[str, Any]]:
    writer = PartWriter(uri.parent)
    try:
        uris = np.random.default_rng(first).integers(0, len(tokens) - ROW, len(lengths)).tolist()
        rows = zip(uris, lengths.tolist(), prompts.tolist(), strict=True)
        writer.add(
            [f"{task}_{first + i:09d}" for i in range(len(lengths))],
            [EncodedRecord(tokens[begin : begin + length], prompt, task) for begin, length, prompt in rows],  # type: ignore[arg-type]
        )
        writer.publish(str(uri), len(lengths))
    finally:
        writer.close()
    return [{"part": uri.name, **shard} for shard in json.loads((uri / "part.json").read_bytes())["shards"]]


def spec_of(root: Path, unit: WeightUnit, batch: int = 512) -> PlanSpec:
    return PlanSpec(tuple(str(root / task) for task in TASKS), (1, 1), 0, batch, ROW, unit)
