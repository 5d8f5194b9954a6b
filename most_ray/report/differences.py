"""Alignment of a reference's words with a transcription's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jiwer

Kind = Literal["equal", "substitute", "delete", "insert"]
_UNITS = re.compile(r"\s*(?:\[Hu\d+\]\s*)+")  # a text of speech units alone
_BLANK = re.compile(r"\s+")


@dataclass(frozen=True)
class Piece:
    """Successive words that are equal on both sides, or substituted, deleted or inserted in the hypothesis."""

    kind: Kind
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


def words_of(value: Any) -> tuple[str, ...]:
    """The words of a text, or the numbers of speech units, which are given as `[Hu7][Hu90]` or as a list."""
    if isinstance(value, (list, tuple)):
        return tuple(str(item) for item in value)
    text = "" if value is None else str(value)
    if _UNITS.fullmatch(text):
        return tuple(re.findall(r"\d+", text))
    return tuple(text.split())


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Piece]:
    """The pieces of the shortest edit in reading order: jiwer's alignment, whose errors WER counts."""
    if not reference and not hypothesis:
        return []
    both = [" ".join(_BLANK.sub("_", word) or "_" for word in words) for words in (reference, hypothesis)]
    plain = jiwer.Compose([jiwer.ReduceToListOfListOfWords()])  # without jiwer's default normalisation
    output = jiwer.process_words(both[0], both[1], reference_transform=plain, hypothesis_transform=plain)
    return [
        Piece(
            chunk.type,
            tuple(reference[chunk.ref_start_idx : chunk.ref_end_idx]) if chunk.type != "insert" else (),
            tuple(hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]) if chunk.type != "delete" else (),
        )
        for chunk in output.alignments[0]
    ]
