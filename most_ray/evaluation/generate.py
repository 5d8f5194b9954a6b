"""Transcription and synthesis by a model, as evaluations and the commands `transcribe` and `synthesize` use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from most_ray.config import EvaluationOptions
from most_ray.errors import DataError, count_of
from most_ray.evaluation.decode import Forward, SearchOptions, decode
from most_ray.records.record import ASR_INSTRUCTION, TTS_INSTRUCTION, Record
from most_ray.records.template import encode_records, units_of
from most_ray.records.tokenizer import vocabulary_of


@dataclass(frozen=True)
class GenerationOptions(SearchOptions):
    """How outputs are decoded; see config.EvaluationOptions."""

    max_new_tokens: int  # length cap of a text
    max_new_units: int  # length cap of speech

    @classmethod
    def of(cls, options: EvaluationOptions) -> GenerationOptions:
        """The options in a configuration."""
        search = (options.eval_batch_size, options.num_beams, options.length_penalty)
        return cls(*search, options.max_new_tokens, options.max_new_units)


@dataclass(frozen=True)
class Transcript:
    """The transcription of an utterance."""

    tokens: list[int]
    text: str
    ended: bool  # False: it was cut off by the length cap


@dataclass(frozen=True)
class GeneratedUnits:
    """The speech synthesised for a text."""

    units: list[int]
    tokens: list[int]  # of the output, which may have others than units
    stop: int | None  # token that ended it; None: the length cap


def transcribe_units(
    forward: Forward, tokenizer: Any, utterances: Sequence[Sequence[int]], options: GenerationOptions, instruction: str = ASR_INSTRUCTION
) -> list[Transcript]:
    """Transcribe utterances, given as units; one without units has an empty transcript. Raises DataError if an utterance is longer than the
    model's positions."""
    audible = [index for index, units in enumerate(utterances) if len(units)]
    records = [Record(str(index), instruction, np.array(utterances[index], np.int32), "-") for index in audible]
    results = [Transcript([], "", True)] * len(utterances)
    found = transcribe_prompts(forward, tokenizer, _prompts(forward, tokenizer, records), options)
    for index, transcript in zip(audible, found, strict=True):
        results[index] = transcript
    return results


def synthesize_texts(
    forward: Forward, tokenizer: Any, texts: Sequence[str], options: GenerationOptions, instruction: str = TTS_INSTRUCTION
) -> list[GeneratedUnits]:
    """Synthesise texts. Raises DataError if a text is longer than the model's positions."""
    records = [Record(str(index), instruction, text, np.zeros(1, np.int32)) for index, text in enumerate(texts)]
    return synthesize_prompts(forward, tokenizer, _prompts(forward, tokenizer, records), texts, options)


def transcribe_prompts(forward: Forward, tokenizer: Any, prompts: Sequence[np.ndarray], options: GenerationOptions) -> list[Transcript]:
    """Transcribe the speech in prompts, int32 (tokens,) each."""
    ids = vocabulary_of(tokenizer).ids
    # An utterance has fewer text tokens than units; a model that loops must not run up to the general cap for each.
    caps = [min(options.max_new_tokens, len(units_of(prompt.tolist(), ids)) + 16) for prompt in prompts]
    found = decode(forward, prompts, [ids.eos, ids.end_audio], _capped(forward, prompts, caps), options)
    return [Transcript(result.tokens, decode_text(tokenizer, result.tokens), result.stop is not None) for result in found]


def synthesize_prompts(
    forward: Forward, tokenizer: Any, prompts: Sequence[np.ndarray], texts: Sequence[str], options: GenerationOptions
) -> list[GeneratedUnits]:
    """Synthesise prompts, int32 (tokens,) each. The texts are those in the prompts."""
    vocabulary, ids = vocabulary_of(tokenizer), vocabulary_of(tokenizer).ids
    # A token of text takes 5 to 20 units; without a cap by length a model that loops would run up to the general cap for each.
    caps = [min(options.max_new_units, 64 + 24 * len(tokens)) for tokens in vocabulary.encode(texts)] if texts else []
    found = decode(forward, prompts, [ids.end_audio, ids.eos], _capped(forward, prompts, caps), options)
    return [GeneratedUnits(units_of(result.tokens, ids), result.tokens, result.stop) for result in found]


def decode_text(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, with its spaces unchanged."""
    return str(tokenizer.decode(np.asarray(tokens).tolist(), clean_up_tokenization_spaces=False))


def _prompts(forward: Forward, tokenizer: Any, records: Sequence[Record]) -> list[np.ndarray]:
    """The records' prompts, int32 (tokens,) each."""
    prompts = [encoded.input_ids[: encoded.prompt_length] for encoded in encode_records(records, vocabulary_of(tokenizer))]
    limit = forward.model.config.max_position_embeddings
    for record, prompt in zip(records, prompts, strict=True):
        if len(prompt) >= limit:
            reason = f"makes {count_of(len(prompt), 'token')}, the model has {count_of(limit, 'position')}."
            raise DataError("request", int(record.id) + 1, reason, "Cut it into shorter ones.")
    return prompts


def _capped(forward: Forward, prompts: Sequence[np.ndarray], caps: Sequence[int]) -> list[int]:
    """Length caps, reduced to the positions that the model has left."""
    limit = forward.model.config.max_position_embeddings
    return [max(0, min(cap, limit - len(prompt))) for prompt, cap in zip(prompts, caps, strict=True)]
