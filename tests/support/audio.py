"""Recordings for tests: made ones, real ones, damaged ones; and what `most-ray prepare units` makes of them."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.cli import main
from most_ray.records.files import read_raw, record_files
from most_ray.speech.units.corpus_parts import Part, PartTask, run_in_process


def tone(seconds: float, pitch: float, rate: int = 8000) -> np.ndarray:
    """A rising tone with a quiet high one, float32 (samples,)."""
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * pitch * t * (1 + 0.3 * t)) + 0.01 * np.sin(2 * np.pi * 3000 * t)).astype(np.float32)


def tones(folder: Path, count: int = 8) -> Path:
    """A folder corpus of FLACs by the speakers a and b in turns; the last two are the test split."""
    folder.mkdir(parents=True)
    rows = ["path\tspeaker\ttext\tsplit"]
    for index in range(count):
        soundfile.write(folder / f"{index}.flac", tone(0.4 + 0.05 * index, 200 + 90 * index), 8000)
        rows.append(f"{index}.flac\t{'ab'[index % 2]}\tword {index}\t{'train' if index < count - 2 else 'test'}")
    (folder / "transcripts.tsv").write_text("\n".join(rows) + "\n")
    return folder


def links(folder: Path, source: Path, count: int) -> Path:
    """A folder corpus of one recording under many names."""
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index:05d}{source.suffix}").symlink_to(source)
        (folder / f"{index:05d}.txt").write_text(f"word {index}")
    return folder


def table(folder: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """transcripts.tsv of (path, text)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transcripts.tsv").write_text("path\ttext\n" + "".join(f"{path}\t{text}\n" for path, text in rows))
    return folder


def hours_of_silence(path: Path, hours: float, rate: int = 16000) -> Path:
    """A WAV whose samples are a hole in its file."""
    size = int(hours * 3600 * rate) * 2
    with io.BytesIO() as small:
        soundfile.write(small, np.zeros(1, np.int16), rate, format="WAV", subtype="PCM_16")
        header = bytearray(small.getvalue()[:44])
    header[4:8], header[40:44] = (36 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    path.write_bytes(header)
    os.truncate(path, 44 + size)
    return path


def cut(source: Path, target: Path, part: float = 0.6) -> Path:
    """The first part of a file's bytes."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * part)])
    return target


def units_command(source: Path, output: Path, *words: str, corpus: str = "folder") -> list[str]:
    return ["prepare", "units", "--corpus", corpus, "--input", str(source), "--output", str(output), "--num_actors", "0", *words]


def prepare(source: Path, output: Path, *words: str, corpus: str = "folder") -> list[dict[str, Any]]:
    """The records that the command makes."""
    assert main(units_command(source, output, *words, corpus=corpus)) == 0
    return records_of(output)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command says that ends with exit code 2: one line."""
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("most-ray: ") and "Traceback" not in said and said.count("\n") == 1
    return said


def records_of(folder: Path) -> list[dict[str, Any]]:
    found = [value for entry in record_files(folder) for _, value in read_raw(entry.uri)]
    assert all(isinstance(value, dict) for value in found)
    return found  # type: ignore[return-value]


def lines_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Counting:
    """A runner that remembers what it was asked to make, in what order it likes, and that may be stopped after some parts."""

    def __init__(self, stop_after: int | None = None, backwards: bool = False) -> None:
        self.made: list[tuple[str, int]] = []
        self._stop_after, self._backwards = stop_after, backwards

    def __call__(self, work: PartTask, parts: Sequence[Part]) -> Iterator[dict[str, float]]:
        for part in reversed(parts) if self._backwards else parts:
            if len(self.made) == self._stop_after:
                raise KeyboardInterrupt
            yield from run_in_process(work, [part])
            self.made.append((type(work).__name__, part.index))
