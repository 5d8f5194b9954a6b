"""A model asked for a transcription or for speech: the decoding that evaluations and single requests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from most_ray.config import EvaluationOptions
from most_ray.errors import DataError
from most_ray.evaluation.decode import Forward, SearchOptions, decode
from most_ray.records.record import ASR_INSTRUCTION, TTS_INSTRUCTION, Record
from most_ray.records.template import encode_records, units_of
from most_ray.records.tokenizer import vocabulary_of


@dataclass(frozen=True)
class GenerationOptions:
    """How outputs are searched for, and how long they may get; see config.EvaluationOptions."""

    search: SearchOptions
    max_new_tokens: int
    max_new_units: int

    @classmethod
    def of(cls, options: EvaluationOptions) -> GenerationOptions:
        """Those of a configuration."""
        search = SearchOptions(options.eval_batch_size, options.num_beams, options.length_penalty)
        return cls(search, options.max_new_tokens, options.max_new_units)


@dataclass(frozen=True)
class Transcript:
    """A transcription; `ended` is false where the length cap cut it."""

    tokens: list[int]
    text: str
    ended: bool


@dataclass(frozen=True)
class GeneratedUnits:
    """Units of speech; `tokens` of the output in all, and the token that ended it (None: the length cap)."""

    units: list[int]
    tokens: list[int]
    stop: int | None


def transcribe_units(
    forward: Forward, tokenizer: Any, utterances: Sequence[Sequence[int]], limits: GenerationOptions, instruction: str = ASR_INSTRUCTION
) -> list[Transcript]:
    """What the model reads in so many utterances' units; nothing in one without units.

    Raises:
        DataError: an utterance is longer than the model's positions.
    """
    audible = [index for index, units in enumerate(utterances) if len(units)]
    records = [Record(str(index), instruction, np.array(utterances[index], np.int32), "-") for index in audible]
    results = [Transcript([], "", True)] * len(utterances)
    for index, heard in zip(audible, transcribe_prompts(forward, tokenizer, _prompts(forward, tokenizer, records), limits), strict=True):
        results[index] = heard
    return results


def synthesize_texts(
    forward: Forward, tokenizer: Any, texts: Sequence[str], limits: GenerationOptions, instruction: str = TTS_INSTRUCTION
) -> list[GeneratedUnits]:
    """Units that the model says so many texts in.

    Raises:
        DataError: a text is longer than the model's positions.
    """
    records = [Record(str(index), instruction, text, np.zeros(1, np.int32)) for index, text in enumerate(texts)]
    return synthesize_prompts(forward, tokenizer, _prompts(forward, tokenizer, records), texts, limits)


def transcribe_prompts(forward: Forward, tokenizer: Any, prompts: Sequence[np.ndarray], limits: GenerationOptions) -> list[Transcript]:
    """The same for prompts (tokens,) that hold speech already."""
    ids = vocabulary_of(tokenizer).ids
    # An utterance holds fewer text tokens than units; a model that loops must not run to the general cap on each.
    wanted = [min(limits.max_new_tokens, len(units_of(prompt.tolist(), ids)) + 16) for prompt in prompts]
    found = decode(forward, prompts, [ids.eos, ids.end_audio], _capped(forward, prompts, wanted), limits.search)
    return [Transcript(result.tokens, decode_text(tokenizer, result.tokens), result.stop is not None) for result in found]


def synthesize_prompts(
    forward: Forward, tokenizer: Any, prompts: Sequence[np.ndarray], texts: Sequence[str], limits: GenerationOptions
) -> list[GeneratedUnits]:
    """The same for prompts (tokens,) that ask for these texts."""
    vocabulary = vocabulary_of(tokenizer)
    ids = vocabulary.ids
    # A token of text is spoken in 5 to 20 units; without a cap by length a model that loops would run to the general one on each.
    wanted = [min(limits.max_new_units, 64 + 24 * len(tokens)) for tokens in vocabulary.encode(texts)] if texts else []
    found = decode(forward, prompts, [ids.end_audio, ids.eos], _capped(forward, prompts, wanted), limits.search)
    return [GeneratedUnits(units_of(result.tokens, ids), result.tokens, result.stop) for result in found]


def decode_text(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    return str(tokenizer.decode(np.asarray(tokens).tolist(), clean_up_tokenization_spaces=False))


def _prompts(forward: Forward, tokenizer: Any, records: Sequence[Record]) -> list[np.ndarray]:
    prompts = [encoded.input_ids[: encoded.prompt_length] for encoded in encode_records(records, vocabulary_of(tokenizer))]
    limit = forward.model.config.max_position_embeddings
    for record, prompt in zip(records, prompts, strict=True):
        if len(prompt) >= limit:
            reason = f"makes {len(prompt)} tokens, the model has {limit} positions."
            raise DataError("request", int(record.id) + 1, reason, "Cut it into shorter ones.")
    return prompts


def _capped(forward: Forward, prompts: Sequence[np.ndarray], wanted: Sequence[int]) -> list[int]:
    """Length caps within the positions that the model has."""
    limit = forward.model.config.max_position_embeddings
    return [max(0, min(cap, limit - len(prompt))) for prompt, cap in zip(prompts, wanted, strict=True)]
