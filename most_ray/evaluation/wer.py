"""Word and character error rates with their confidence intervals, from counts per record.

A rate is that of a set: the errors of all records over the reference words of all records, as is usual.
"""

from __future__ import annotations

import collections
import functools
import importlib.resources
import itertools
import re
import unicodedata
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
# Of the texts that `normaliser` makes: rates by two versions are of two measures. 2: marks stay with their letters, apostrophes are equal.
NORMALISER_VERSION = 2
_PLAIN = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bc\u2032\u00b4`\uff07"), "'")  # characters that are typed for an apostrophe
_BRACKETS = (("<[", ">]", re.compile(r"[<\[][^>\]]*[>\]]")), ("(", ")", re.compile(r"\([^)]+\)")))
_MOST_MARKS = 30  # on one letter, as in Unicode's stream-safe texts (UAX 15): the time to put marks in order is quadratic
_SELECTORS = re.compile("[\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_EDITS = ("substitute", "delete", "insert")  # jiwer's names
_CHUNK = 1 << 22  # records drawn at once, so that memory does not grow with the set


@functools.cache
def normaliser(name: Normaliser) -> Callable[[str], str]:
    """The function that both sides are normalised with before they are compared. Each reduces runs of white space to one blank.

    none: nothing else. basic: Whisper's for all languages (lower case; text in brackets, punctuation and symbols removed, so that "it's" is
    two words), but marks stay with their letters: vowel signs make words. whisper-english: Whisper's for English (also numbers as digits,
    contractions written out, British spellings as American ones), transformers' with the list of spellings of the package
    whisper-normalizer. For the last two a typographic apostrophe is the same as a plain one."""
    if name == "none":
        return lambda text: " ".join(_marked(text).split())
    clean = _english() if name == "whisper-english" else _basic
    # One blank for many, or an expression of the library would search them from each on.
    return lambda text: " ".join(clean(" ".join(_without_brackets(_marked(text).translate(_PLAIN).lower()).split())).split())


def _marked(text: str) -> str:
    """A text in which each speech token is a word, which counts as an error: normalisers drop text in brackets."""
    return _AUDIO_TOKEN.sub(" speechtoken ", text)


def _without_brackets(text: str) -> str:
    """A text without what is in brackets, as Whisper's expressions for it leave it, and with blanks, which Whisper makes of them later, for
    opening brackets that nothing closes: from each of these an expression would search the rest of the text."""
    for opening, closing, pattern in _BRACKETS:
        end = max(map(text.rfind, closing)) + 1
        text = pattern.sub("", text[:end]) + text[end:].translate(dict.fromkeys(map(ord, opening), " "))
    return text


def _basic(text: str) -> str:
    """A text in lower case, in Unicode's composed form, with blanks for symbols, punctuation, and marks that follow no letter."""
    kept, on_letter = [], False
    for character in unicodedata.normalize("NFKC", _few_marks(text)):
        category = unicodedata.category(character)
        if category in ("Mn", "Mc") and on_letter:
            if not _SELECTORS.match(character):  # which choose between forms of a letter
                kept.append(character)
        else:
            on_letter = category[0] == "L" or (on_letter and category == "Cf")  # joiners stand between letters
            kept.append(" " if category[0] in "MSP" else character)
    return "".join(kept).lower()


def _few_marks(text: str) -> str:
    """A text without the marks that follow `_MOST_MARKS` others."""
    if text.isascii():
        return text
    groups = itertools.groupby(text, lambda character: unicodedata.combining(character) > 0)
    return "".join("".join(itertools.islice(group, _MOST_MARKS) if marks else group) for marks, group in groups)


def _english() -> Callable[[str], str]:
    from transformers.models.whisper import english_normalizer as whisper  # takes a second to import

    spellings = importlib.resources.files("whisper_normalizer") / "normalizers" / "english.json"
    clean = whisper.EnglishTextNormalizer(parse_json(spellings.read_text(encoding="utf-8")))

    def normalise(text: str) -> str:
        try:
            return str(clean(_few_marks(text)))
        except ValueError:  # a number of thousands of digits; its words are compared as they are
            return _basic(text)

    return normalise


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


def of_records(counts: EditCounts, rows: Sequence[int]) -> EditCounts:
    """The counts of some of the records."""
    return EditCounts(*(column[list(rows)] for column in vars(counts).values()))


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
    found = [(pair, times) for pair, times in word_pairs(references, hypotheses).items() if pair[0] != pair[1]]
    return [[left, right, times] for (left, right), times in sorted(found, key=lambda item: (-item[1], item[0]))[:most]]


def word_pairs(references: Sequence[str], hypotheses: Sequence[str]) -> collections.Counter[tuple[str, str]]:
    """How often each (reference word, hypothesis word) is aligned, equal ones too; a word is empty in a deletion or insertion."""
    counter: collections.Counter[tuple[str, str]] = collections.Counter()
    if not references:
        return counter
    output = jiwer.process_words(list(references), list(hypotheses))
    for record, alignment in enumerate(output.alignments):
        reference, hypothesis = output.references[record], output.hypotheses[record]
        for chunk in alignment:
            left, right = reference[chunk.ref_start_idx : chunk.ref_end_idx], hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            counter.update(itertools.zip_longest(left, right, fillvalue=""))
    return counter
