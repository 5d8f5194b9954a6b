"""Scores one rank's shard of the records of an evaluation: each is decoded and scored once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from most_ray.config import RunConfig
from most_ray.data.store import TokenStore
from most_ray.errors import DataError
from most_ray.evaluation.decode import Forward, count_routing
from most_ray.evaluation.generate import GenerationOptions, decode_text, synthesize_prompts, transcribe_prompts, transcribe_units
from most_ray.evaluation.hypotheses import Row, add_normalised, is_looping
from most_ray.evaluation.wer import Normaliser
from most_ray.io import storage
from most_ray.records.files import read_raw, record_files
from most_ray.records.record import ASR_INSTRUCTION, N_UNITS, Record, Task, parse_records
from most_ray.records.template import IGNORE, TokenIds, split_prompt, units_of
from most_ray.records.tokenizer import vocabulary_of

Recogniser = Callable[[Sequence[Sequence[int]]], list[str]]  # units of utterances -> their texts


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
        """The settings in a configuration; its local paths become absolute, since tasks have another working directory."""
        recogniser, vocoder = (uri and storage.absolute_if_exists(uri) for uri in (config.recogniser, config.vocoder))
        values = {each.name: getattr(config, each.name) for each in dataclasses.fields(cls) if hasattr(config, each.name)}
        return cls(**{**values, "batch_size": config.eval_batch_size, "recogniser": recogniser, "vocoder": vocoder})

    @property
    def generation(self) -> GenerationOptions:
        """How outputs are decoded."""
        search = (self.batch_size, self.num_beams, self.length_penalty)
        return GenerationOptions(*search, self.max_new_tokens, self.max_new_units)


@dataclass(frozen=True)
class EvaluationSet:
    """One directory of records to evaluate."""

    name: str  # task/folder, as in the results
    task: Task
    store: TokenStore
    directory: str  # path or URI of the records, with the options and credentials that `store.manifest` leaves out


@dataclass(frozen=True)
class EvalShard:
    """What one rank has scored."""

    rows: dict[tuple[int, int], Row]  # lines of hypotheses.jsonl by (index of the set, row in its store)
    load: np.ndarray  # selections by layer, modality and expert, int64 (layers, 2, experts)


def score_shard(
    forward: Forward,
    tokenizer: Any,
    sets: Sequence[EvaluationSet],
    settings: EvaluationSettings,
    rank: int = 0,
    world: int = 1,
    recogniser: Recogniser | None = None,
) -> EvalShard:
    """Decode and score every `world`-th record of the sets, in order of length, so that all ranks have equally much to do; `recogniser` is
    external, for synthesised speech. Collective if `forward` is."""
    scorer = _Scorer(forward, tokenizer, settings, vocabulary_of(tokenizer).ids, asr_instruction(tokenizer, sets), recogniser)
    rows: dict[tuple[int, int], Row] = {}
    forward.model.eval()
    with count_routing(forward.model) as load:
        for index, each in enumerate(sets):
            lengths = each.store.lengths
            mine = sorted(range(len(each.store)), key=lambda row: (int(lengths[row]), row))[rank::world]
            losses = record_losses(forward, each.store, mine)
            for row, loss, detail in zip(mine, losses, scorer.details(each, mine), strict=True):
                line = {"kind": "hypothesis", "set": each.name, "task": each.task, "row": row, "id": each.store.record_id(row)}
                supervised = int(each.store.lengths[row]) - int(each.store.prompt_lengths[row])
                scored = {**line, **detail, "loss": loss if math.isfinite(loss) else None, "supervised_tokens": supervised}
                rows[index, row] = add_normalised(scored, settings.normaliser)
        forward.drain()
    return EvalShard(rows, load.numpy())


@dataclass(frozen=True)
class _Scorer:
    """Decodes records, and makes the fields that hypotheses.jsonl has for their task (see `hypotheses`)."""

    forward: Forward
    tokenizer: Any
    settings: EvaluationSettings
    ids: TokenIds
    instruction: str  # for recognising what the model has synthesised
    recogniser: Recogniser | None

    def details(self, each: EvaluationSet, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The fields of some records of a set, in the order of `rows`."""
        if each.task == "text":
            return [{} for _ in rows]
        cut = [(each.store.input_ids(row), int(each.store.prompt_lengths[row])) for row in rows]
        prompts, outputs = [tokens[:prompt] for tokens, prompt in cut], [tokens[prompt:] for tokens, prompt in cut]
        return self._recognise(prompts, outputs) if each.task == "asr" else self._synthesise(each, rows, prompts, outputs)

    def _recognise(self, prompts: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        speech, results = {*range(self.ids.unit_base, self.ids.unit_base + N_UNITS), self.ids.begin_audio}, []
        found = transcribe_prompts(self.forward, self.tokenizer, prompts, self.settings.generation)
        for output, transcript in zip(outputs, found, strict=True):
            tokens, foreign = transcript.tokens, sum(token in speech for token in transcript.tokens)
            texts = {"reference": decode_text(self.tokenizer, output[:-1]), "hypothesis": transcript.text}
            results.append({**texts, "ended": transcript.ended, "looping": is_looping(tokens), "foreign": foreign})
        return results

    def _synthesise(
        self, each: EvaluationSet, rows: Sequence[int], prompts: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
    ) -> list[dict[str, Any]]:
        texts = _texts(each, rows, [decode_text(self.tokenizer, prompt[1:-1]) for prompt in prompts])  # without <bos> and the audio marker
        found = synthesize_prompts(self.forward, self.tokenizer, prompts, texts, self.settings.generation)
        spoken = [result.units for result in found]
        recognised = transcribe_units(self.forward, self.tokenizer, spoken, self.settings.generation, self.instruction)
        audible = [index for index, units in enumerate(spoken) if units]
        heard = dict(zip(audible, self.recogniser([spoken[index] for index in audible]), strict=True)) if self.recogniser else {}
        return [
            {
                "text": text,
                "recognised": transcript.text,
                **({"heard": heard.get(index, "")} if self.recogniser else {}),
                "reference": " ".join(map(str, units_of(output.tolist(), self.ids))),
                "hypothesis": " ".join(map(str, result.units)),
                "ended": result.stop == self.ids.end_audio,
                "hit_cap": result.stop is None,
                "looping": is_looping([unit for unit, _ in itertools.groupby(result.units)]),  # a repeated unit is a sustained sound
                "foreign": len(result.tokens) - len(result.units),
            }
            for index, (text, transcript, output, result) in enumerate(zip(texts, recognised, outputs, found, strict=True))
        ]


def _texts(each: EvaluationSet, rows: Sequence[int], prompts: Sequence[str]) -> list[str]:
    """The text to synthesise in each prompt: what follows the instruction. A store of an earlier version does not say how many lines an
    instruction has. If that matters, the records are read again. Raises DataError if the records no longer have a prompt's text."""
    texts = [split_prompt(prompt, each.store.instruction_lines(row) or 1)[1] for row, prompt in zip(rows, prompts, strict=True)]
    if not any("\n" in text and each.store.instruction_lines(row) is None for row, text in zip(rows, texts, strict=True)):
        return texts
    ids = [each.store.record_id(row) for row in rows]
    wanted = set(ids)
    raws = (raw for entry in record_files(each.directory) for _, raw in read_raw(entry.uri))
    parsed = (found for raw in raws if isinstance(found := parse_records([raw])[0], Record))
    records = {record.id: record for record in parsed if record.id in wanted and record.task == "tts"}
    for record_id, prompt in zip(ids, prompts, strict=True):
        record = records.get(record_id, Record("", "", "", ""))
        if split_prompt(prompt, record.instruction.count("\n") + 1) != (record.instruction, record.input):
            raise DataError("id", record_id, "has several lines, and its record no longer says which of them are its text.")
    return [str(records[record_id].input) for record_id in ids]


def asr_instruction(tokenizer: Any, sets: Sequence[EvaluationSet]) -> str:
    """The instruction for recognising speech: that of the first ASR record of the sets, else the default."""
    for each in sets:
        if each.task == "asr" and len(each.store):
            prompt = each.store.input_ids(0)
            start = int(np.flatnonzero(prompt == vocabulary_of(tokenizer).ids.begin_audio)[0])
            return decode_text(tokenizer, prompt[1:start]).removeprefix("User: ").removesuffix("\n")
    return ASR_INSTRUCTION


@torch.no_grad()
def record_losses(forward: Forward, store: TokenStore, rows: Sequence[int], tokens_per_batch: int = 8192) -> list[float]:
    """The cross-entropy of each record, summed over its supervised tokens. Rows of ascending length pack well into batches."""
    losses: list[float] = []
    stop = 0
    while (start := stop) < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * int(store.lengths[rows[stop]]) <= tokens_per_batch:
            stop += 1
        batch = rows[start:stop]
        tokens = [torch.from_numpy(store.input_ids(row).astype("int64")) for row in batch]
        prompts = [int(store.prompt_lengths[row]) for row in batch]
        labels = [torch.cat([torch.full((prompt,), IGNORE), ids[prompt:]]) for ids, prompt in zip(tokens, prompts, strict=True)]
        inputs = {
            "input_ids": pad_sequence(tokens, batch_first=True, padding_value=forward.pad),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
        inputs = {name: tensor.to(forward.device) for name, tensor in inputs.items()}
        output = forward(**inputs, use_cache=False, token_losses_only=True)
        supervised = [len(ids) - prompt for ids, prompt in zip(tokens, prompts, strict=True)]
        losses += [float(part.double().sum()) for part in output.token_losses.cpu().split(supervised)]
    return losses
