"""What one rank of an evaluation does: its share of the records, each decoded and scored once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from most_ray.data.store import TokenStore
from most_ray.errors import DataError
from most_ray.evaluation.decode import Forward, Search, count_routing, decode
from most_ray.evaluation.hypotheses import Row, looping, with_normalised
from most_ray.evaluation.wer import Normaliser
from most_ray.model.tokenizer import vocabulary_of
from most_ray.records import ASR_INSTRUCTION, N_UNITS, Record, Task, parse_records, read_raw, record_files
from most_ray.template import IGNORE, encode_records, split_prompt, units_of

Outside = Callable[[Sequence[Sequence[int]]], list[str]]  # units of many utterances -> what somebody else hears in them


@dataclass(frozen=True)
class EvaluationSettings:
    """How records are decoded and compared; see config.EvaluationOptions."""

    batch_size: int = 64
    max_new_tokens: int = 256
    max_new_units: int = 1500
    num_beams: int = 1
    length_penalty: float = 1.0
    normaliser: Normaliser = "basic"
    max_rejected_fraction: float = 0.01

    @property
    def search(self) -> Search:
        return Search(self.batch_size, self.num_beams, self.length_penalty)


@dataclass(frozen=True)
class EvaluationSet:
    """name: task/folder, as results call it."""

    name: str
    task: Task
    store: TokenStore


@dataclass(frozen=True)
class Share:
    """rows: lines of hypotheses.jsonl by (set, row); load: selections (L, 2, E) int64."""

    rows: dict[tuple[int, int], Row]
    load: np.ndarray


def score_share(
    forward: Forward,
    tokenizer: Any,
    sets: Sequence[EvaluationSet],
    settings: EvaluationSettings,
    rank: int = 0,
    world: int = 1,
    outside: Outside | None = None,
) -> Share:
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
                rows[index, row] = with_normalised(scored, settings.normaliser)
        forward.drain()
    return Share(rows, load.numpy())


def _prompts(store: TokenStore, rows: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and outputs (with their end markers) as token ids."""
    cut = [(store.input_ids(row), int(store.prompt_lengths[row])) for row in rows]
    return [tokens[:prompt] for tokens, prompt in cut], [tokens[prompt:] for tokens, prompt in cut]


def _text(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    return str(tokenizer.decode(np.asarray(tokens).tolist(), clean_up_tokenization_spaces=False))


def _capped(forward: Forward, prompts: Sequence[np.ndarray], wanted: Sequence[int]) -> list[int]:
    """Length caps within the positions that the model has."""
    limit = forward.model.config.max_position_embeddings
    return [max(0, min(cap, limit - len(prompt))) for prompt, cap in zip(prompts, wanted, strict=True)]


def _recognise(
    forward: Forward, tokenizer: Any, store: TokenStore, rows: Sequence[int], settings: EvaluationSettings
) -> list[dict[str, Any]]:
    ids = vocabulary_of(tokenizer).ids
    prompts, outputs = _prompts(store, rows)
    references = [_text(tokenizer, output[:-1]) for output in outputs]
    results = []
    for reference, (tokens, ended, hypothesis) in zip(references, _transcribe(forward, tokenizer, prompts, settings), strict=True):
        foreign = sum(ids.unit_base <= token < ids.unit_base + N_UNITS or token == ids.begin_audio for token in tokens)
        line = {"reference": reference, "hypothesis": hypothesis, "ended": ended, "looping": looping(tokens), "foreign": foreign}
        results.append(line)
    return results


def _transcribe(
    forward: Forward, tokenizer: Any, prompts: Sequence[np.ndarray], settings: EvaluationSettings
) -> list[tuple[list[int], bool, str]]:
    """(tokens, ended, text) of each prompt with speech."""
    ids = vocabulary_of(tokenizer).ids
    # An utterance holds fewer text tokens than units; a model that loops must not run to the general cap on each.
    wanted = [min(settings.max_new_tokens, len(units_of(prompt.tolist(), ids)) + 16) for prompt in prompts]
    found = decode(forward, prompts, [ids.eos, ids.end_audio], _capped(forward, prompts, wanted), settings.search)
    return [(result.tokens, result.stop is not None, _text(tokenizer, result.tokens)) for result in found]


def _speak(
    forward: Forward,
    tokenizer: Any,
    store: TokenStore,
    rows: Sequence[int],
    settings: EvaluationSettings,
    instruction: str,
    outside: Outside | None,
) -> list[dict[str, Any]]:
    """Units of each text, and the text that is recognised in them."""
    vocabulary = vocabulary_of(tokenizer)
    ids = vocabulary.ids
    prompts, outputs = _prompts(store, rows)
    texts = _texts(store, rows, [_text(tokenizer, prompt[1:-1]) for prompt in prompts])  # between the sentence and the audio marker
    # A token of text is spoken in 5 to 20 units; without a cap by length a model that loops would run to the general one on each.
    wanted = [min(settings.max_new_units, 64 + 24 * len(tokens)) for tokens in vocabulary.encode(texts)] if texts else []
    found = decode(forward, prompts, [ids.end_audio, ids.eos], _capped(forward, prompts, wanted), settings.search)
    spoken = [units_of(result.tokens, ids) for result in found]
    audible = [index for index, units in enumerate(spoken) if units]
    heard_again = [Record(str(index), instruction, np.array(spoken[index], np.int32), "-") for index in audible]
    again = [encoded.input_ids[: encoded.prompt_length] for encoded in encode_records(heard_again, vocabulary)]
    recognised = [""] * len(spoken)
    for index, (_, _, text) in zip(audible, _transcribe(forward, tokenizer, again, settings), strict=True):
        recognised[index] = text
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
            "ended": result.stop == ids.end_audio,
            "hit_cap": result.stop is None,
            "looping": looping([unit for unit, _ in itertools.groupby(units)]),  # a unit that goes on is a sound that is held
            "foreign": len(result.tokens) - len(units),
        }
        for index, (result, units, output) in enumerate(zip(found, spoken, outputs, strict=True))
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
        for _, raw in read_raw(entry.place):
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
            return _text(tokenizer, prompt[1:start]).removeprefix("User: ").removesuffix("\n")
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
