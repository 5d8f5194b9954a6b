"""Records that stand in for those that a dry run does not find: of stated number and lengths, so that a run is estimated before its data is
prepared. Without data `train` ends with an error, as ever."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from most_ray.io import storage
from most_ray.records.record import ASR_INSTRUCTION, N_UNITS, TTS_INSTRUCTION, Task, units_to_text

TRAINING_RECORDS = 100_000  # that are assumed in each directory; for validation, WRITTEN_RECORDS
MEAN_TOKENS = 440  # of a record: LibriSpeech's with 500 units of HuBERT, see docs/real-size.md
WRITTEN_RECORDS = 1000  # in each folder; more are these, repeated
_UNITS_PER_WORD = 10  # of speech: 20.9 units and 2.3 words a second, a little less for what is no word
_AROUND: dict[Task, int] = {"asr": 17, "tts": 17, "text": 12}  # tokens of instruction, template and markers, about
_WORDS = [f"{first}{second}" for first in ("ba", "de", "ki", "lo", "mu") for second in ("", "na", "ro", "si", "ta", "vel")]
_GOLDEN = 0.6180339887498949  # its multiples, without their whole parts, are spread evenly


def mean_tokens(longest: int) -> int:
    """Tokens of an assumed record on average, where rows have `longest` tokens."""
    return min(MEAN_TOKENS, longest // 2)


def write_assumed(folder: Path, task: Task, longest: int, number: int) -> None:
    """Write records of a task to a new folder, of `mean_tokens` on average, from a quarter of that to seven quarters.

    Args:
        longest: tokens of a row.
        number: of the folder among all that are written, no two of which hold the same records.
    """
    folder.mkdir(parents=True)
    with (folder / "records.jsonl").open("w", encoding="utf-8") as sink:
        for index in range(WRITTEN_RECORDS):
            tokens = round(mean_tokens(longest) * (0.25 + 1.5 * (index * _GOLDEN % 1.0)))
            draw = np.random.default_rng([number, index])
            sink.write(json.dumps({"id": f"assumed-{number}-{index}", **_content(task, max(2, tokens - _AROUND[task]), draw)}) + "\n")


def _content(task: Task, tokens: int, draw: np.random.Generator) -> dict[str, str]:
    """What a record with about so many tokens in its input and output says."""
    if task == "text":
        return {"instruction": "Continue.", "input": _words(tokens // 2, draw), "output": _words(tokens - tokens // 2, draw)}
    words = max(1, tokens // (_UNITS_PER_WORD + 1))
    said, speech = _words(words, draw), units_to_text(draw.integers(0, N_UNITS, tokens - words).tolist())
    if task == "asr":
        return {"instruction": ASR_INSTRUCTION, "input": speech, "output": said}
    return {"instruction": TTS_INSTRUCTION, "input": said, "output": speech}


def _words(count: int, draw: np.random.Generator) -> str:
    return " ".join(_WORDS[number] for number in draw.integers(0, len(_WORDS), count))


def notes_of(directories: Sequence[str], records: int, longest: int) -> list[str]:
    """What a dry run says of directories that are assumed to hold `records` records each; nothing where there are none."""
    named = ", ".join(map(storage.redact, directories))
    return [f"no records at {named}: assumes {records:,} in each, of {mean_tokens(longest)} tokens each on average"] if directories else []
