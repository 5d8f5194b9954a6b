"""A record's recording, where it is at hand, as samples and as a picture."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.records.files import PREPARED
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.corpora.user_folder import AUDIO

_BESIDE = (".", "recordings", "audio", "wav")  # folders beside records in which their recordings are looked for
_WINDOW, _BANDS, _HIGH = 400, 64, 80  # samples of a spectrum; its bands; decibels from the loudest one that are shown
_COLOURS = ((252, 252, 250), (205, 220, 235), (120, 160, 200), (53, 97, 142), (24, 42, 74), (10, 14, 30))  # from quiet to loud
_LEVELS = 32  # colours of a picture


def recordings_folders(records: str, given: Path | None = None) -> list[Path]:
    """The folders in which recordings of the records in a directory may be: the one `given`, else those beside the records and the corpus
    that they were prepared from. Only folders of this machine."""
    if given is not None:
        return [folder for name in _BESIDE if (folder := given / name).is_dir()]
    if storage.is_remote(records):
        return []
    root = storage.local(records)
    root = root if root.is_dir() else root.parent
    folders = [root / name for name in _BESIDE]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # records that another program or an earlier version has made
        folders.append(Path(str(parse_json((root / PREPARED).read_bytes())["corpus"])))
    return [folder for folder in folders if folder.is_dir()]


def load_recording(
    record_id: str, about: Mapping[str, Any], metadata: Mapping[str, Any], folders: Sequence[Path], rate: int, most: float
) -> tuple[np.ndarray, float] | None:
    """The speech of a record from its recording; None where none is at hand, or it cannot be read.

    Args:
        about: `recording`, the path, with `start`, `channel` and `speed`, as far as the record states them.
        metadata: of the record; with the name of its `dataset` its id begins.
        folders: where relative paths and files named as the record's id are looked for.
        rate: of the samples, in Hz.
        most: seconds of the result.

    Returns:
        float32 (samples,) of at most `most` seconds, and the seconds of the whole utterance.
    """
    speed, start = _number(about.get("speed"), 1.0), _number(about.get("start"), 0.0)
    duration = _number(about.get("duration"), 0.0) * speed if "start" in about else 0.0
    channel = about.get("channel")
    part = {"speed": speed, "start": start, "duration": duration or None, "channel": channel if isinstance(channel, int) else None}
    for path in _candidates(record_id, about, metadata, folders):
        if os.path.isfile(path):
            try:
                wave = load_audio(path, rate, **part)  # type: ignore[arg-type]
            except (DataError, ValueError, OverflowError):
                continue
            return wave[: round(most * rate)], len(wave) / rate
    return None


def _candidates(record_id: str, about: Mapping[str, Any], metadata: Mapping[str, Any], folders: Sequence[Path]) -> Iterator[Path]:
    """The files that may be a record's recording: the one that it names, else files that are named as its id."""
    name = about.get("recording")
    if isinstance(name, str) and "\0" not in name:
        yield from [Path(name)] if Path(name).is_absolute() else [folder / name for folder in folders]
        yield from (folder / Path(name).name for folder in folders)
        return
    plain = record_id.removesuffix(f"_sp{metadata['speed']:g}") if isinstance(metadata.get("speed"), int | float) else record_id
    names = [plain, plain.removeprefix(f"{metadata.get('dataset')}_")]
    for stem in (name for name in names if name == Path(name).name and "\0" not in name):
        yield from (folder / f"{stem}{suffix}" for folder in folders for suffix in sorted(AUDIO))


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6 else default


def spectrogram_png(wave: np.ndarray, rate: int, columns: int = 240) -> bytes:
    """A PNG of the log mel spectrogram of samples, float32 (samples,): at most `columns` wide, low frequencies at the bottom."""
    hop = max(rate // 200, -(-len(wave) // columns))
    padded = np.pad(wave, (0, max(0, _WINDOW - len(wave))))
    starts = np.arange(0, max(1, len(padded) - _WINDOW + 1), hop)[:columns]
    frames = padded[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames, 1024)) ** 2 @ _bands(rate)
    decibels = 10 * np.log10(np.maximum(power, 1e-12))
    level = np.clip((decibels - decibels.max() + _HIGH) / _HIGH, 0, 1) if wave.any() else np.zeros_like(decibels)
    return _png(np.round(level.T[::-1] * (_LEVELS - 1)).astype(np.uint8))


def _bands(rate: int) -> np.ndarray:
    """Weights (513 bins, bands) of triangular bands that are even on the mel scale (O'Shaughnessy), each with the sum 1."""
    edges = 700 * (np.exp(np.linspace(0, np.log1p(rate / 2 / 700), _BANDS + 2)) - 1)
    bins = np.linspace(0, rate / 2, 513)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0, np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)))
    weights[np.argmin(np.abs(bins - middle), axis=0), np.arange(_BANDS)] += 1e-3  # a band that is narrower than a bin
    return weights / weights.sum(axis=0)


def _png(levels: np.ndarray) -> bytes:
    """A PNG (ISO/IEC 15948) of colours by their number, uint8 (rows, columns)."""
    steps = np.linspace(0, len(_COLOURS) - 1, _LEVELS)
    palette = np.stack([np.interp(steps, np.arange(len(_COLOURS)), channel) for channel in np.array(_COLOURS).T], axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = levels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in levels)  # each without a filter
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (b"IHDR", header), (b"PLTE", np.round(palette).astype(np.uint8).tobytes()), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
