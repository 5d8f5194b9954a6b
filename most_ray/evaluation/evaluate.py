"""The one evaluation: `most-ray evaluate`, the end of a run and everything between call this."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from most_ray import storage
from most_ray.data.ingest import Recipe, check_rejected, ingest_directory
from most_ray.data.plan import check_units as one_unit_identity
from most_ray.data.plan import distinct_names
from most_ray.data.store import TokenStore
from most_ray.errors import CheckpointError, DataError
from most_ray.evaluation.decode import count_routing, greedy
from most_ray.evaluation.wer import NORMALISER, word_errors
from most_ray.model.build import check_template, check_units, load_model, read_config
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.routing import load_summary
from most_ray.model.tokenizer import load_tokenizer, vocabulary_of
from most_ray.records import Task
from most_ray.template import template_hash, units_of


@dataclass(frozen=True)
class EvaluationSettings:
    batch_size: int = 64
    max_new_tokens: int = 256
    max_rejected_fraction: float = 0.01


def evaluate_model(
    model_path: str, asr_dirs: Sequence[str], tts_dirs: Sequence[str], settings: EvaluationSettings, store_root: str
) -> dict[str, Any]:
    """Score a model folder. See `evaluate`."""
    tokenizer = load_tokenizer(model_path)
    vocabulary = vocabulary_of(tokenizer)
    stores: list[tuple[Task, TokenStore]] = []
    limit = read_config(model_path).max_position_embeddings
    for task, directories in (("asr", asr_dirs), ("tts", tts_dirs)):
        for directory in directories:
            store = ingest_directory(directory, Recipe(task, vocabulary, limit), store_root)  # type: ignore[arg-type]
            stores.append((task, store))  # type: ignore[arg-type]
    check_rejected([store for _, store in stores], settings.max_rejected_fraction, storage.join(str(store_root), "rejected.jsonl"))
    model = load_model(model_path)
    check_template(model.config, model_path)
    check_units(model.config, one_unit_identity([store for _, store in stores]), model_path)
    if torch.cuda.is_available():
        model.to("cuda")
    names = distinct_names([*asr_dirs, *tts_dirs], [task for task, _ in stores])
    sets = [(name, task, store) for name, (task, store) in zip(names, stores, strict=True)]
    result = evaluate(model, tokenizer, sets, settings)
    return {"model": model_path, **result}


def evaluate(
    model: MostForCausalLM, tokenizer: Any, sets: Sequence[tuple[str, Task, TokenStore]], settings: EvaluationSettings
) -> dict[str, Any]:
    """Decode every ASR record once and score it; loss and perplexity of all sets; selections that leaked across modalities.

    Returns a JSON-ready dictionary: `wer` and `rejected` per ASR set, `sets` with figures, references and hypotheses, `routing`,
    `settings`.
    """
    sections: dict[str, Any] = {}
    with count_routing(model) as routing:
        for name, task, store in sets:
            section = {"task": task, "records": len(store), "rejected": store.manifest["n_rejected"]}
            section["rejected_file"] = storage.join(store.place, "rejected.jsonl")
            section |= teacher_forced(model, store)
            if task == "asr":
                section |= _decode_asr(model, tokenizer, store, settings)
            sections[f"{task}/{name}"] = section
    return {
        "wer": {key.split("/", 1)[1]: section["errors"]["wer"] for key, section in sections.items() if section["task"] == "asr"},
        "routing": load_summary(routing.load, model.config),
        "settings": {
            "normaliser": NORMALISER,
            "decoding": "greedy",
            "batch_size": settings.batch_size,
            "max_new_tokens": settings.max_new_tokens,
            "template": template_hash(),
        },
        "sets": sections,
    }


def _decode_asr(model: MostForCausalLM, tokenizer: Any, store: TokenStore, settings: EvaluationSettings) -> dict[str, Any]:
    ids = vocabulary_of(tokenizer).ids
    tokens = [store.input_ids(row) for row in range(len(store))]
    prompts = [t[: int(store.prompt_lengths[row])] for row, t in enumerate(tokens)]
    # An utterance holds fewer text tokens than units; a model that loops must not run to the general cap on each.
    caps = [min(settings.max_new_tokens, len(units_of(prompt.tolist(), ids)) + 16) for prompt in prompts]
    outputs = greedy(model, prompts, [ids.eos, ids.end_audio], caps, settings.batch_size)
    references = [tokenizer.decode(t[len(p) : -1].tolist()) for t, p in zip(tokens, prompts, strict=True)]
    hypotheses = [tokenizer.decode(output) for output in outputs]
    if len(hypotheses) != len(store):
        raise DataError("evaluation", store.name, f"scored {len(hypotheses)} of {len(store)} records.")
    return {
        "errors": word_errors(references, hypotheses).as_dict(),
        "hit_length_cap": sum(len(output) >= cap for output, cap in zip(outputs, caps, strict=True)),
        "empty": sum(not text.strip() for text in hypotheses),
        "hypotheses": [
            {"id": store.record_id(row), "reference": references[row], "hypothesis": hypotheses[row]} for row in range(len(store))
        ],
    }


@torch.inference_mode()
def teacher_forced(model: MostForCausalLM, store: TokenStore, tokens_per_batch: int = 8192) -> dict[str, float]:
    """Mean cross-entropy per supervised token, and its exponential."""
    model.eval()
    device = next(model.parameters()).device
    pad = int(model.config.pad_token_id or 0)
    total, count = 0.0, 0
    order = sorted(range(len(store)), key=lambda row: (int(store.lengths[row]), row))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(store.lengths[order[stop]]) <= tokens_per_batch:
            stop += 1
        rows = order[start:stop]
        width = int(store.lengths[rows[-1]])
        input_ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens = torch.from_numpy(store.input_ids(row).astype("int64"))
            input_ids[index, : len(tokens)] = tokens
            labels[index, int(store.prompt_lengths[row]) : len(tokens)] = tokens[int(store.prompt_lengths[row]) :]
            mask[index, : len(tokens)] = 1
        output = model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            labels=labels.to(device),
            use_cache=False,
            token_losses_only=True,
        )
        total += float(output.token_losses.double().sum())
        count += len(output.token_losses)
        start = stop
    loss = total / max(1, count)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "supervised_tokens": count}


def write_result(result: dict[str, Any], path: Path) -> None:
    """The result as JSON, in place in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


def require_model(path: str) -> None:
    """Fail early where nothing is.

    Raises:
        CheckpointError: the folder is missing.
    """
    if path.startswith((".", "/")) and not Path(path).exists():
        raise CheckpointError("model", path, "does not exist.")
