"""Word and character error rates with their confidence intervals, from counts per record.

A rate is that of a set: the errors of all records over the reference words of all records, as is usual.
"""

from __future__ import annotations

import collections
import functools
import importlib.resources
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jiwer
import numpy as np

from most_ray.config import Normaliser
from most_ray.io.json_values import parse_json

NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)
RESAMPLES = 1000
_AUDIO_TOKEN = re.compile(r"\[Hu\d+\]|<\|(?:begin|end)_of_audio\|>")
_EDITS = ("substitute", "delete", "insert")  # jiwer's names
_CHUNK = 1 << 22  # records drawn at once, so that memory does not grow with the set


@functools.cache
def normaliser(name: Normaliser) -> Callable[[str], str]:
    """The function that both sides are normalised with before they are compared. Each reduces runs of white space to one blank.

    none: nothing else. basic: Whisper's for all languages (lower case; text in brackets, punctuation and symbols removed, so that "it's" is
    two words). whisper-english: Whisper's for English (also numbers as digits, contractions written out, British spellings as American
    ones). Both are transformers'; the list of spellings is from the package whisper-normalizer."""
    clean: Callable[[str], str] = str
    if name != "none":
        from transformers.models.whisper import english_normalizer as whisper  # takes a second to import

        clean = whisper.BasicTextNormalizer()
    if name == "whisper-english":
        spellings = importlib.resources.files("whisper_normalizer") / "normalizers" / "english.json"
        clean = whisper.EnglishTextNormalizer(parse_json(spellings.read_text(encoding="utf-8")))
    # A speech token in a transcription becomes a word, so that it counts as an error: normalisers drop text in brackets.
    return lambda text: " ".join(clean(_AUDIO_TOKEN.sub(" speechtoken ", text)).split())


@dataclass(frozen=True)
class EditCounts:
    """Edits per record in a shortest alignment of reference and hypothesis; each is int64 (records,)."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray
    reference: np.ndarray  # length of the reference

    @property
    def errors(self) -> np.ndarray:
        """All edits, int64 (records,)."""
        return self.substitutions + self.deletions + self.insertions


def word_counts(references: Sequence[str], hypotheses: Sequence[str]) -> EditCounts:
    """Count edits of words, separated by white space, in texts that are normalised already."""
    return _counts(jiwer.process_words(list(references), list(hypotheses)) if references else None)


def character_counts(references: Sequence[str], hypotheses: Sequence[str]) -> EditCounts:
    """Count edits of characters, which are code points and include the blanks between words, in texts that are normalised already."""
    return _counts(jiwer.process_characters(list(references), list(hypotheses)) if references else None)


def _counts(output: Any) -> EditCounts:
    """Counts from jiwer's output; None: no records."""
    counts = np.zeros((4, len(output.alignments) if output else 0), np.int64)
    for record, alignment in enumerate(output.alignments if output else ()):
        for chunk in alignment:
            if chunk.type in _EDITS:  # a deletion has no words in the hypothesis, an insertion none in the reference
                length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                counts[_EDITS.index(chunk.type), record] += length
        counts[3, record] = len(output.references[record])
    return EditCounts(*counts)


def error_rate(counts: EditCounts) -> dict[str, Any]:
    """The error rate of a set, JSON-ready: rate (None if the references are empty), substitutions, deletions, insertions, reference
    (length) and interval, the rate's 95% bootstrap interval [low, high] over records (Bisani and Ney, ICASSP 2004), or None."""
    sums = {name: int(column.sum()) for name, column in vars(counts).items()}
    rate = int(counts.errors.sum()) / sums["reference"] if sums["reference"] else None
    return {"rate": rate, "interval": None if rate is None else bootstrap_interval(counts.errors, counts.reference), **sums}


def bootstrap_interval(errors: np.ndarray, reference: np.ndarray, resamples: int = RESAMPLES) -> list[float]:
    """The 2.5th and 97.5th percentile of sum(errors) / sum(reference), int64 (records,) both, over `resamples` sets of as many records,
    drawn with replacement. The draws are always the same, so a file that is scored again has the same interval."""
    generator = np.random.Generator(np.random.PCG64(0))
    rates: list[np.ndarray] = []
    left, at_once = resamples, max(1, _CHUNK // len(errors))
    while left > 0:
        drawn = generator.integers(len(errors), size=(min(left, at_once), len(errors)))
        words = reference[drawn].sum(1)
        rates.append((errors[drawn].sum(1) / np.maximum(words, 1))[words > 0])
        left -= at_once
    return [float(value) for value in np.percentile(np.concatenate(rates), [2.5, 97.5])]


def confusions(references: Sequence[str], hypotheses: Sequence[str], most: int = 30) -> list[list[Any]]:
    """The `most` most frequent [reference word, hypothesis word, times] that differ; a word is empty in a deletion or insertion."""
    counter: collections.Counter[tuple[str, str]] = collections.Counter()
    if not references:
        return []
    output = jiwer.process_words(list(references), list(hypotheses))
    for record, alignment in enumerate(output.alignments):
        reference, hypothesis = output.references[record], output.hypotheses[record]
        for chunk in alignment:
            if chunk.type in _EDITS:
                left, right = reference[chunk.ref_start_idx : chunk.ref_end_idx], hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
                counter.update(itertools.zip_longest(left, right, fillvalue=""))
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return [[left, right, times] for (left, right), times in ordered[:most]]
