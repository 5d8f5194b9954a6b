"""What one rank of an evaluation does: its share of the records, each decoded and scored once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from most_ray.config import RunConfig
from most_ray.data.store import TokenStore
from most_ray.errors import DataError
from most_ray.evaluation.decode import Forward, SearchOptions, count_routing
from most_ray.evaluation.generate import GenerationOptions, decode_text, synthesize_prompts, transcribe_prompts, transcribe_units
from most_ray.evaluation.hypotheses import Row, add_normalised, is_looping
from most_ray.evaluation.wer import Normaliser
from most_ray.io import storage
from most_ray.records.files import read_raw, record_files
from most_ray.records.record import ASR_INSTRUCTION, N_UNITS, Record, Task, parse_records
from most_ray.records.template import IGNORE, split_prompt, units_of
from most_ray.records.tokenizer import vocabulary_of

Recogniser = Callable[[Sequence[Sequence[int]]], list[str]]  # units of many utterances -> what somebody else hears in them


@dataclass(frozen=True)
class EvaluationSettings:
    """How records are decoded and compared; see config.EvaluationOptions. Written to the first line of hypotheses.jsonl."""

    batch_size: int
    max_new_tokens: int
    max_new_units: int
    num_beams: int
    length_penalty: float
    normaliser: Normaliser
    max_rejected_fraction: float
    recogniser: str | None
    vocoder: str | None

    @classmethod
    def of(cls, config: RunConfig) -> EvaluationSettings:
        """Those of a configuration; its local paths become absolute, since tasks have another working directory."""
        recogniser, vocoder = (uri and storage.absolute_if_exists(uri) for uri in (config.recogniser, config.vocoder))
        return cls(
            config.eval_batch_size,
            config.max_new_tokens,
            config.max_new_units,
            config.num_beams,
            config.length_penalty,
            config.normaliser,
            config.max_rejected_fraction,
            recogniser,
            vocoder,
        )

    @property
    def limits(self) -> GenerationOptions:
        return GenerationOptions(
            SearchOptions(self.batch_size, self.num_beams, self.length_penalty), self.max_new_tokens, self.max_new_units
        )


@dataclass(frozen=True)
class EvaluationSet:
    """name: task/folder, as results call it."""

    name: str
    task: Task
    store: TokenStore


@dataclass(frozen=True)
class EvalShard:
    """rows: lines of hypotheses.jsonl by (set, row); load: selections (L, 2, E) int64."""

    rows: dict[tuple[int, int], Row]
    load: np.ndarray


def score_shard(
    forward: Forward,
    tokenizer: Any,
    sets: Sequence[EvaluationSet],
    settings: EvaluationSettings,
    rank: int = 0,
    world: int = 1,
    outside: Recogniser | None = None,
) -> EvalShard:
    """Decode and score every `world`-th record of the sets, by length, so that shares are alike. Collective where `forward` is."""
    rows: dict[tuple[int, int], Row] = {}
    forward.model.eval()
    with count_routing(forward.model) as load:
        for index, each in enumerate(sets):
            lengths = each.store.lengths
            mine = sorted(range(len(each.store)), key=lambda row: (int(lengths[row]), row))[rank::world]
            losses = record_losses(forward, each.store, mine)
            if each.task == "asr":
                details = _recognise(forward, tokenizer, each.store, mine, settings)
            elif each.task == "tts":
                details = _speak(forward, tokenizer, each.store, mine, settings, asr_instruction(tokenizer, sets), outside)
            else:
                details = [{} for _ in mine]
            for row, loss, detail in zip(mine, losses, details, strict=True):
                line = {"kind": "hypothesis", "set": each.name, "task": each.task, "row": row, "id": each.store.record_id(row)}
                supervised = int(each.store.lengths[row]) - int(each.store.prompt_lengths[row])
                scored = {**line, **detail, "loss": loss if math.isfinite(loss) else None, "supervised_tokens": supervised}
                rows[index, row] = add_normalised(scored, settings.normaliser)
        forward.drain()
    return EvalShard(rows, load.numpy())


def _prompts(store: TokenStore, rows: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and outputs (with their end markers) as token ids."""
    cut = [(store.input_ids(row), int(store.prompt_lengths[row])) for row in rows]
    return [tokens[:prompt] for tokens, prompt in cut], [tokens[prompt:] for tokens, prompt in cut]


def _recognise(
    forward: Forward, tokenizer: Any, store: TokenStore, rows: Sequence[int], settings: EvaluationSettings
) -> list[dict[str, Any]]:
    ids = vocabulary_of(tokenizer).ids
    prompts, outputs = _prompts(store, rows)
    references = [decode_text(tokenizer, output[:-1]) for output in outputs]
    results = []
    for reference, heard in zip(references, transcribe_prompts(forward, tokenizer, prompts, settings.limits), strict=True):
        foreign = sum(ids.unit_base <= token < ids.unit_base + N_UNITS or token == ids.begin_audio for token in heard.tokens)
        line = {"reference": reference, "hypothesis": heard.text, "ended": heard.ended}
        results.append({**line, "looping": is_looping(heard.tokens), "foreign": foreign})
    return results


def _speak(
    forward: Forward,
    tokenizer: Any,
    store: TokenStore,
    rows: Sequence[int],
    settings: EvaluationSettings,
    instruction: str,
    outside: Recogniser | None,
) -> list[dict[str, Any]]:
    """Units of each text, and the text that is recognised in them."""
    ids = vocabulary_of(tokenizer).ids
    prompts, outputs = _prompts(store, rows)
    texts = _texts(store, rows, [decode_text(tokenizer, prompt[1:-1]) for prompt in prompts])  # between the sentence and the audio marker
    found = synthesize_prompts(forward, tokenizer, prompts, texts, settings.limits)
    spoken = [each.units for each in found]
    audible = [index for index, units in enumerate(spoken) if units]
    recognised = [heard.text for heard in transcribe_units(forward, tokenizer, spoken, settings.limits, instruction)]
    heard = [""] * len(spoken) if outside else None
    if outside and heard is not None:
        for index, text in zip(audible, outside([spoken[index] for index in audible]), strict=True):
            heard[index] = text
    return [
        {
            "text": texts[index],
            "recognised": recognised[index],
            **({"heard": heard[index]} if heard is not None else {}),
            "reference": " ".join(map(str, units_of(output.tolist(), ids))),
            "hypothesis": " ".join(map(str, units)),
            "ended": each.stop == ids.end_audio,
            "hit_cap": each.stop is None,
            "looping": is_looping([unit for unit, _ in itertools.groupby(units)]),  # a unit that goes on is a sound that is held
            "foreign": len(each.tokens) - len(units),
        }
        for index, (each, units, output) in enumerate(zip(found, spoken, outputs, strict=True))
    ]


def _texts(store: TokenStore, rows: Sequence[int], prompts: Sequence[str]) -> list[str]:
    """What each prompt asks to be spoken. Where an instruction or a text has several lines, the records themselves tell where it begins.

    Raises:
        DataError: they do not.
    """
    split = [split_prompt(prompt) for prompt in prompts]
    if not any("\n" in text for _, text in split):
        return [text for _, text in split]
    asked: dict[str, Record] = {}
    for entry in record_files(store.manifest["source"]):
        for _, raw in read_raw(entry.uri):
            record = parse_records([raw])[0]
            if isinstance(record, Record) and record.task == "tts":
                asked[record.id] = record
    texts = []
    for row, whole in zip(rows, ("\n".join(parts) for parts in split), strict=True):
        record = asked.get(store.record_id(row), Record("", "", "", ""))
        if f"{record.instruction}\n{record.input}" != whole:
            raise DataError("id", store.record_id(row), "has several lines, and its text cannot be told from its instruction.")
        texts.append(str(record.input))
    return texts


def asr_instruction(tokenizer: Any, sets: Sequence[EvaluationSet]) -> str:
    """The instruction that speech is recognised by: that of the first recognition record, else the usual one."""
    for each in sets:
        if each.task == "asr" and len(each.store):
            prompt = each.store.input_ids(0)
            start = int(np.flatnonzero(prompt == vocabulary_of(tokenizer).ids.begin_audio)[0])
            return decode_text(tokenizer, prompt[1:start]).removeprefix("User: ").removesuffix("\n")
    return ASR_INSTRUCTION


@torch.no_grad()
def record_losses(forward: Forward, store: TokenStore, rows: Sequence[int], tokens_per_batch: int = 8192) -> list[float]:
    """Cross-entropy of each record's supervised tokens, summed; `rows` by ascending length share batches."""
    losses: list[float] = []
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * int(store.lengths[rows[stop]]) <= tokens_per_batch:
            stop += 1
        batch = rows[start:stop]
        width = max(int(store.lengths[row]) for row in batch)
        input_ids = torch.full((len(batch), width), forward.pad)
        labels = torch.full((len(batch), width), IGNORE)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        supervised = []
        for index, row in enumerate(batch):
            tokens, prompt = torch.from_numpy(store.input_ids(row).astype("int64")), int(store.prompt_lengths[row])
            input_ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
            labels[index, prompt : len(tokens)] = tokens[prompt:]
            supervised.append(len(tokens) - prompt)
        output = forward(
            input_ids=input_ids.to(forward.device),
            attention_mask=mask.to(forward.device),
            labels=labels.to(forward.device),
            use_cache=False,
            token_losses_only=True,
        )
        losses += [float(part.double().sum()) for part in output.token_losses.cpu().split(supervised)]
        start = stop
    return losses
