"""Samples of large record directories for the dry run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from most_ray.data.ingest_plan import read_units_manifest
from most_ray.data.store import TokenStore
from most_ray.errors import RecordError
from most_ray.io import storage
from most_ray.records.files import UNITS_MANIFEST, read_with_offsets, record_files

SAMPLE_RECORDS = 2000  # of each directory


def copy_sample(directory: str, target: Path) -> float:
    """Write the first records of a directory, bad ones included, to a new folder. Returns how many times larger the directory is."""
    target.mkdir(parents=True)
    entries, size = record_files(directory), 0.0
    lines: list[str] = []
    for entry in entries:
        start, last = len(lines), 0
        if start >= SAMPLE_RECORDS:
            break
        for byte, value in read_with_offsets(entry.uri):
            if len(lines) == SAMPLE_RECORDS:
                last = byte
                break
            lines.append(json.dumps("not JSON" if isinstance(value, RecordError) else value))
        if last and entry.name.endswith(".gz"):  # the compressed size of what was read is unknown: compress it again
            last = len(gzip.compress("\n".join(lines[start:]).encode()))
        size += last or entry.size
    (target / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if units := read_units_manifest(storage.absolute(directory)):
        (target / UNITS_MANIFEST).write_text(json.dumps(units), encoding="utf-8")
    return max(1.0, sum(entry.size for entry in entries) / max(1.0, size))


class ExtrapolatedStore(TokenStore):
    """A store with about as many records as the whole directory `source`, which is `factor` times its sample: those of that, repeated."""

    def __init__(self, sample: TokenStore, factor: float, source: str) -> None:
        super().__init__(sample.uri)
        count = round(len(sample) * factor)
        self.lengths, self.prompt_lengths = np.resize(sample.lengths, count), np.resize(sample.prompt_lengths, count)
        n_tokens = int(self.lengths.sum(dtype=np.int64))
        self.manifest = {**sample.manifest, "n_records": count, "n_tokens": n_tokens, "source": storage.redact(source)}
        self._sampled = len(sample)

    def record(self, row: int) -> tuple[str, np.ndarray]:
        return super().record(row % self._sampled)
