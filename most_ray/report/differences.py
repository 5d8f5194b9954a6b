"""Words of a reference and of a hypothesis, aligned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jiwer

Kind = Literal["equal", "substitute", "delete", "insert"]
_UNITS = re.compile(r"\s*(?:\[Hu\d+\]\s*)+")
_BLANK = re.compile(r"\s+")


@dataclass(frozen=True)
class Piece:
    """A run of words: the same on both sides, replaced, missing in the hypothesis or added in it."""

    kind: Kind
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


def words_of(value: Any) -> tuple[str, ...]:
    """The words of a text, or the units of speech as `[Hu7][Hu90]` or as numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(str(item) for item in value)
    text = "" if value is None else str(value)
    if _UNITS.fullmatch(text):
        return tuple(re.findall(r"\d+", text))
    return tuple(text.split())


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Piece]:
    """The pieces of the shortest edit, in reading order; jiwer's alignment, which is what WER counts."""
    if not reference and not hypothesis:
        return []
    both = [" ".join(_BLANK.sub("_", word) or "_" for word in words) for words in (reference, hypothesis)]
    plain = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])  # no normaliser of its own: words stay where they are
    output = jiwer.process_words(both[0], both[1], reference_transform=plain, hypothesis_transform=plain)
    return [
        Piece(
            chunk.type,
            tuple(reference[chunk.ref_start_idx : chunk.ref_end_idx]) if chunk.type != "insert" else (),
            tuple(hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]) if chunk.type != "delete" else (),
        )
        for chunk in output.alignments[0]
    ]
