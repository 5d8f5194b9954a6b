"""Word error rates, with everything kept that is needed to score again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jiwer

NORMALISER = "lower-strip"  # lower case, runs of white space as one blank


@dataclass(frozen=True)
class WordErrors:
    """wer: (substitutions + deletions + insertions) / reference words."""

    wer: float
    substitutions: int
    deletions: int
    insertions: int
    words: int
    records: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Errors over a set, words counted over all records together. An empty set has no rate: ValueError."""
    if not references:
        raise ValueError("no records to score")
    output = jiwer.process_words([normalise(text) for text in references], [normalise(text) for text in hypotheses])
    words = output.hits + output.substitutions + output.deletions
    return WordErrors(
        wer=output.wer,
        substitutions=output.substitutions,
        deletions=output.deletions,
        insertions=output.insertions,
        words=words,
        records=len(references),
    )
