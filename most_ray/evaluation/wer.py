"""Word and character error rates, from counts per record to a rate with its interval.

Rates are taken over a set: errors of all records over reference words of all records, as everybody reports them.
"""

from __future__ import annotations

import collections
import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import jiwer
import numpy as np

from most_ray.config import Normaliser

NORMALISERS: tuple[Normaliser, ...] = get_args(Normaliser)
RESAMPLES = 1000
_CHUNK = 1 << 22  # records drawn at once: memory does not grow with the set


@functools.cache
def normaliser(name: Normaliser) -> Callable[[str], str]:
    """What both sides go through before they are compared; runs of white space become one blank in each.

    none: nothing else. basic: Whisper's for all languages (lower case, what stands in brackets and all punctuation and symbols removed,
    so that "it's" is two words). whisper-english: Whisper's for English besides (numbers as digits, contractions written out, British
    spellings as American ones). Both from transformers; the list of spellings from the package whisper-normalizer.
    """
    if name == "none":
        return lambda text: _one_blank(_units_as_words(text))
    from transformers.models.whisper import english_normalizer as whisper  # takes a second to import

    if name == "basic":
        clean = whisper.BasicTextNormalizer()
    else:
        spellings = importlib.resources.files("whisper_normalizer") / "normalizers" / "english.json"
        clean = whisper.EnglishTextNormalizer(json.loads(spellings.read_text(encoding="utf-8")))
    return lambda text: _one_blank(clean(_units_as_words(text)))


_AUDIO_TOKEN = re.compile(r"\[Hu\d+\]|<\|(?:begin|end)_of_audio\|>")


def _units_as_words(text: str) -> str:
    """Each speech token in a transcription as a word, so that it counts as an error: normalisers drop what stands in brackets."""
    return _AUDIO_TOKEN.sub(" speechtoken ", text)


def _one_blank(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class EditCounts:
    """Per record, (R,) int64 each: edits of a shortest way from reference to hypothesis, and the reference's length."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray
    reference: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions


def word_counts(references: Sequence[str], hypotheses: Sequence[str]) -> EditCounts:
    """Words are what white space parts; texts as they come, normalised before."""
    return _counts(jiwer.process_words(list(references), list(hypotheses)) if references else None)


def character_counts(references: Sequence[str], hypotheses: Sequence[str]) -> EditCounts:
    """Characters are code points, blanks between words included."""
    return _counts(jiwer.process_characters(list(references), list(hypotheses)) if references else None)


def _counts(output: Any) -> EditCounts:
    counts = np.zeros((4, len(output.alignments) if output else 0), np.int64)
    for record, alignment in enumerate(output.alignments if output else ()):
        for chunk in alignment:
            if chunk.type == "substitute":
                counts[0, record] += chunk.ref_end_idx - chunk.ref_start_idx
            elif chunk.type == "delete":
                counts[1, record] += chunk.ref_end_idx - chunk.ref_start_idx
            elif chunk.type == "insert":
                counts[2, record] += chunk.hyp_end_idx - chunk.hyp_start_idx
        counts[3, record] = len(output.references[record])
    return EditCounts(*counts)


def error_rate(counts: EditCounts) -> dict[str, Any]:
    """A set's figures, JSON-ready: rate (None where the references hold nothing), substitutions, deletions, insertions, reference (length)
    and interval, the rate's 95% bootstrap interval [low, high] over records (Bisani and Ney, ICASSP 2004), or None."""
    reference = int(counts.reference.sum())
    return {
        "rate": int(counts.errors.sum()) / reference if reference else None,
        "interval": bootstrap_interval(counts.errors, counts.reference) if reference else None,
        "substitutions": int(counts.substitutions.sum()),
        "deletions": int(counts.deletions.sum()),
        "insertions": int(counts.insertions.sum()),
        "reference": reference,
    }


def bootstrap_interval(errors: np.ndarray, reference: np.ndarray, resamples: int = RESAMPLES) -> list[float]:
    """The 2.5th and 97.5th percentile of sum(errors) / sum(reference) over sets of as many records drawn with replacement. The draws are
    always the same, so a file scored again has the same interval."""
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
    """The most frequent [reference word, hypothesis word, times] that differ; an empty word stands for nothing on that side."""
    counter: collections.Counter[tuple[str, str]] = collections.Counter()
    if not references:
        return []
    output = jiwer.process_words(list(references), list(hypotheses))
    for record, alignment in enumerate(output.alignments):
        heard, said = output.references[record], output.hypotheses[record]
        for chunk in alignment:
            if chunk.type == "substitute":
                left, right = heard[chunk.ref_start_idx : chunk.ref_end_idx], said[chunk.hyp_start_idx : chunk.hyp_end_idx]
                counter.update(zip(left, right, strict=True))
            elif chunk.type == "delete":
                counter.update((word, "") for word in heard[chunk.ref_start_idx : chunk.ref_end_idx])
            elif chunk.type == "insert":
                counter.update(("", word) for word in said[chunk.hyp_start_idx : chunk.hyp_end_idx])
    ordered = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return [[reference, hypothesis, times] for (reference, hypothesis), times in ordered[:most]]
