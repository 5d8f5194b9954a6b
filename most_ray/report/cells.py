"""Cells of the report's tables as plain data; templates/macros.html draws them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer

from most_ray.metrics import texts


@dataclass(frozen=True)
class Cell:
    """Text of a table cell, with what is drawn around it."""

    text: str = ""
    look: Literal["", "strong", "code", "command", "mark", "none"] = ""  # "none": a placeholder
    interval: str = ""  # confidence interval, after the text
    small: str = ""  # small print, at the end
    colour: str = ""  # of a square before the text
    bar: float = 0.0  # length of a bar after the text, in em
    heat: float = 0.0  # 0 to 1, how strongly the cell is filled
    right: bool = False  # of a filled cell: in the colour of what is right, not of what is wrong
    kind = "cell"  # which macro draws it


@dataclass(frozen=True)
class Piece:
    """Successive words that are equal on both sides, or substituted, deleted or inserted in the hypothesis."""

    kind: Literal["equal", "substitute", "delete", "insert"]
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """A transcription aligned with its reference; `cut`: only the beginning is shown."""

    pieces: Sequence[Piece]
    cut: bool
    kind = "difference"


@dataclass(frozen=True)
class Player:
    uri: str  # data: URI with the whole sound
    label: str  # for screen readers
    picture: str = ""  # data: URI of a PNG of its spectrogram
    kind = "player"


Content = str | Cell | Difference | Player | Sequence["Content"] | None  # a sequence: one below the other; None: unknown, a dash
Row = Sequence[Content]  # the first cell names the row


def duration(seconds: float | None) -> str | None:
    """Seconds in the unit that suits them; None stays None."""
    return None if seconds is None else texts.duration(seconds)


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Piece]:
    """The pieces of the shortest edit in reading order: jiwer's alignment, whose errors WER counts."""
    if not reference and not hypothesis:
        return []
    both = [" ".join(re.sub(r"\s+", "_", word) or "_" for word in words) for words in (reference, hypothesis)]
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
