"""Speech without recordings: units of the repository's digits records, converted to sound by the vocoder beside them.

Derived, as those records are, from the Free Spoken Digit Dataset: see jobs/data/digits/README.md.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from most_ray.records.files import read_raw
from most_ray.records.record import parse_units
from most_ray.speech.vocoder.vocoders import Vocoder, open_vocoder
from tests.conftest import ROOT

DIGITS = ROOT / "jobs" / "data" / "digits"
RATE = 16000  # Hz
SENTENCES = (["seven", "three", "zero"], ["nine", "one", "eight", "two"], ["four", "six", "five"])
PITCHES = {"george": 1.0, "jackson": 0.85, "nicolas": 1.2, "yweweler": 1.1}  # the vocoder has one voice: others are played at other speeds


@functools.cache
def _records() -> list[dict[str, Any]]:
    """200: four speakers, ten digits, five takes each."""
    return [raw for _, raw in read_raw(str(DIGITS / "test_takes" / "records.jsonl.gz")) if isinstance(raw, dict)]


@functools.cache
def _vocoder() -> Vocoder:
    return open_vocoder(str(DIGITS / "train_asr"), None)


@functools.cache
def _say(index: int) -> np.ndarray:
    """A record as sound, float32 (samples,)."""
    raw = _records()[index]
    (wave,), rate = _vocoder()([parse_units(raw["input"]).tolist()])
    assert rate == RATE
    return soxr.resample(wave, RATE * PITCHES[raw["metadata"]["speaker"]], RATE).astype(np.float32)


def spoken(speaker: str, words: Sequence[str], take: int = 0) -> np.ndarray:
    """Digits said by a speaker with short pauses, float32 (samples,) in 16-bit steps."""
    parts = [np.zeros(800, np.float32)]
    for word in words:
        known = {"speaker": speaker, "take": str(take)}
        at = next(i for i, raw in enumerate(_records()) if raw["output"] == word and known.items() <= raw["metadata"].items())
        parts += [_say(at), np.zeros(800, np.float32)]
    return np.round(np.concatenate(parts) * 32767).clip(-32768, 32767).astype(np.float32) / 32768


def spoken_folder(folder: Path, speakers: Sequence[str], takes: Sequence[int]) -> list[dict[str, str]]:
    """Write a corpus of recordings `N_SPEAKER_TAKE.flac` of every digit, with transcripts.tsv (path, speaker, take, split, text); take 0 is
    the test split. Returns its rows."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    folder.mkdir(parents=True)
    rows = []
    for speaker in speakers:
        for digit, word in enumerate(words):
            for take in takes:
                row = {"path": f"{digit}_{speaker}_{take}.flac", "speaker": speaker, "take": str(take)}
                rows.append({**row, "split": "train" if take else "test", "text": word})
                soundfile.write(folder / row["path"], spoken(speaker, [word], take), RATE)
    table = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (folder / "transcripts.tsv").write_text("\n".join(table) + "\n")
    return rows


def published_corpora(root: Path) -> Path:
    """Write LibriSpeech, common_voice_en and an4 of synthesised digits, each as it is published, with the speakers that tests select."""
    librispeech(root / "LibriSpeech")
    common_voice(root / "common_voice_en")
    an4(root / "an4")
    return root


def librispeech(root: Path) -> None:
    """Three speakers with three sentences each."""
    for speaker, voice in (("1867", "george"), ("3526", "jackson"), ("61", "nicolas")):
        chapter = root / "train-clean-5" / speaker / "100"
        chapter.mkdir(parents=True)
        lines = []
        for index, words in enumerate(SENTENCES):
            soundfile.write(chapter / f"{speaker}-100-{index:04d}.flac", spoken(voice, words), RATE)
            lines.append(f"{speaker}-100-{index:04d} {' '.join(words).upper()}\n")
        (chapter / f"{speaker}-100.trans.txt").write_text("".join(lines))


def common_voice(root: Path) -> None:
    """Nine clips of three speakers, one sentence with quotes."""
    (root / "clips").mkdir(parents=True)
    with (root / "validated.tsv").open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream, delimiter="\t", lineterminator="\n")
        rows.writerow(["client_id", "path", "sentence", "up_votes", "down_votes", "age", "gender", "accent"])
        for index, (voice, words) in enumerate(itertools.product(("george", "jackson", "nicolas"), SENTENCES)):
            soundfile.write(root / "clips" / f"common_voice_en_{100 + index}.mp3", spoken(voice, words), RATE)
            text = f'"{words[0].capitalize()}," {" ".join(words[1:])}.' if index == 4 else f"{' '.join(words).capitalize()}."
            rows.writerow([f"client {voice}", f"common_voice_en_{100 + index}.mp3", text, "2", "0", "", "", ""])


def an4(root: Path) -> None:
    """Two speakers with three sentences each."""
    (root / "etc").mkdir(parents=True)
    files, texts = [], []
    for speaker, voice in (("fash", "george"), ("mkem", "jackson")):
        (root / "wav" / "an4_clstk" / speaker).mkdir(parents=True)
        for number, words in enumerate(SENTENCES, start=100):
            name = f"an4_clstk/{speaker}/an{number}-{speaker}-b"
            soundfile.write(root / "wav" / f"{name}.ogg", spoken(voice, words), RATE)
            files.append(f"{name}\n")
            texts.append(f"<s> {' '.join(words).upper()} </s> ({Path(name).name})\n")
    (root / "etc" / "an4_train.fileids").write_text("".join(files))
    (root / "etc" / "an4_train.transcription").write_text("".join(texts))
