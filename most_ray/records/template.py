"""The prompt template: records to token ids and labels, the same one for ingest, training, validation and decoding.

    <bos> "User: {instruction}\\n{input}\\n\\nAssistant: " {output} <end>

Speech is written as its unit tokens; on the input side it is enclosed in the audio markers. A spoken output begins with the
begin-of-audio marker, which is part of the prompt, and ends with the end-of-audio marker; a text output ends with the end-of-sentence
marker. The supervised tokens are the output and its end marker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np

from most_ray.records.record import N_UNITS, Record, Task

IGNORE = -100  # label of a position without supervision, as in torch's cross_entropy
TEXT, AUDIO, PADDING = 0, 1, 2  # modality of a token: units and their two markers are AUDIO, other tokens TEXT, filled positions PADDING

_PIECES = {
    "before_input": "User: {instruction}\n",
    "after_input": "\n\nAssistant: ",
    "input_speech": "<boa>{units}<eoa>",
    "output_text": "{text}<eos>",
    "output_speech": "<boa> in the prompt, {units}<eoa>",
    "version": "1",
}


def template_hash() -> str:
    """Hash of the template; token stores and checkpoints keep it, and one with another hash is refused."""
    return hashlib.blake2b(json.dumps(_PIECES, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokenizer's special tokens."""

    bos: int
    eos: int
    pad: int
    begin_audio: int
    end_audio: int
    unit_base: int  # of unit 0; unit u is token unit_base + u


@dataclass(frozen=True)
class Vocabulary:
    """What the template needs of a tokenizer."""

    ids: TokenIds
    encode: Callable[[Sequence[str]], list[list[int]]]  # texts to ids; adds no marker, and marker spellings in a text stay text
    tokenizer_hash: str

    def fingerprint(self) -> dict[str, str]:
        """Everything that the tokens of a record depend on, apart from the record."""
        return {"tokenizer": self.tokenizer_hash, "template": template_hash(), "ids": json.dumps(asdict(self.ids))}


class EncodedRecord(NamedTuple):
    """One record as tokens."""

    input_ids: np.ndarray  # int32 (tokens,)
    prompt_length: int  # tokens at the start that are not supervised
    task: Task
    instruction_lines: int = 1  # by which `split_prompt` finds the end of the instruction

    def labels(self) -> np.ndarray:
        """Labels, int32 (tokens,), aligned with input_ids: the model shifts them."""
        labels = self.input_ids.copy()
        labels[: self.prompt_length] = IGNORE
        return labels


def encode_records(records: Sequence[Record], vocabulary: Vocabulary) -> list[EncodedRecord]:
    """Encode records: the distinct text pieces of all in one tokenizer call, units by addition. The arrays are views of one array."""
    spelled = [template_texts(record) for record in records]
    distinct = list(dict.fromkeys(text for pieces in spelled for text in pieces))
    tokens = _arrays(distinct, vocabulary.encode(distinct))
    ids = vocabulary.ids
    bos, eos, begin, end = (np.array([token], np.int32) for token in (ids.bos, ids.eos, ids.begin_audio, ids.end_audio))
    base = np.int32(ids.unit_base)
    parts: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []  # tokens of each record's prompt, and all its tokens
    for record, pieces in zip(records, spelled, strict=True):
        first = len(parts)
        parts += (bos, tokens[pieces[0]])
        if not isinstance(record.input, str):
            parts += (begin, record.input + base, end, tokens[pieces[1]])
        if not isinstance(record.output, str):
            parts.append(begin)
        prompt = sum(map(len, parts[first:]))
        parts += (tokens[pieces[-1]], eos) if isinstance(record.output, str) else (record.output + base, end)
        sizes.append((prompt, prompt + len(parts[-2]) + 1))
    flat = np.concatenate([*parts, bos[:0]])
    ends = accumulate((size for _, size in sizes), initial=0)
    spans = zip(records, sizes, pairwise(ends), strict=True)
    return [EncodedRecord(flat[a:b], prompt, r.task, r.instruction.count("\n") + 1) for r, (prompt, _), (a, b) in spans]


def _arrays(texts: Sequence[str], ids: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Ids by text, each int32 (tokens,), views of one array."""
    flat = np.fromiter(chain.from_iterable(ids), np.int32)
    ends = list(accumulate(map(len, ids), initial=0))
    return {text: flat[a:b] for text, (a, b) in zip(texts, pairwise(ends), strict=True)}


def template_texts(record: Record) -> list[str]:
    """The text pieces of a record as the template spells them, the output last if it is text; a tokenizer is trained on these."""
    before, after = _PIECES["before_input"].format(instruction=record.instruction), _PIECES["after_input"]
    texts = [before + record.input + after] if isinstance(record.input, str) else [before, after]
    return [*texts, record.output] if isinstance(record.output, str) else texts


def split_prompt(text: str, instruction_lines: int = 1) -> tuple[str, str]:
    """Split a prompt of text alone, as `template_texts` spells it, into an instruction of so many lines and the input."""
    lines = text.removeprefix("User: ").removesuffix(_PIECES["after_input"]).split("\n", instruction_lines)
    return "\n".join(lines[:instruction_lines]), "".join(lines[instruction_lines:])


def units_of(token_ids: Sequence[int], ids: TokenIds) -> list[int]:
    """The speech units among token ids, in their order."""
    return [token - ids.unit_base for token in token_ids if 0 <= token - ids.unit_base < N_UNITS]
