"""Small records, stores, plans and models for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.data.batch import TokenLayout
from most_ray.data.ingest import Recipe, ingest_directory
from most_ray.data.plan import Plan, PlanSpec
from most_ray.data.store import TokenStore
from most_ray.records.record import ASR_INSTRUCTION, TTS_INSTRUCTION, units_to_text
from most_ray.records.template import TokenIds, Vocabulary

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IDS = TokenIds(bos=0, eos=1, pad=2, begin_audio=800, end_audio=801, unit_base=300)
LAYOUT = TokenLayout(IDS.unit_base, IDS.end_audio, IDS.pad, IDS.unit_base)


def char_vocabulary() -> Vocabulary:
    """One token a byte: no tokenizer library, no torch."""
    return Vocabulary(IDS, lambda texts: [[3 + byte for byte in text.encode()] for text in texts], "chars")


def asr(index: int, units: int = 5, text: str | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    return {
        "id": f"utt_{index}",
        "instruction": ASR_INSTRUCTION,
        "input": units_to_text(rng.integers(0, 500, units).tolist()),
        "output": text or WORDS[index % 10],
        "metadata": {"speaker": index % 3},
    }


def tts(index: int, units: int = 5) -> dict[str, Any]:
    record = asr(index, units)
    return {
        **record,
        "id": f"tts_{record['id']}",
        "instruction": TTS_INSTRUCTION,
        "input": record["output"],
        "output": record["input"],
    }


def text(index: int) -> dict[str, Any]:
    return {
        "id": f"text_{index}",
        "instruction": "Repeat.",
        "input": WORDS[index % 10],
        "output": WORDS[index % 10],
        "metadata": {},
    }


def write_records(directory: Path, records: list[Any], name: str = "records.jsonl") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return directory


def make_store(root: Path, name: str, records: list[Any], task: str = "asr", limit: int = 200) -> TokenStore:
    directory = write_records(root / name, records)
    return ingest_directory(directory, Recipe(task, char_vocabulary(), limit, "reject"), root / "store")  # type: ignore[arg-type]


def make_plan(root: Path, sizes: tuple[int, int] = (23, 17), batch: int = 6, seed: int = 0, length: int = 200) -> Plan:
    """ASR and TTS sources of unequal record lengths, mixed 3:2."""
    rng = np.random.default_rng(1)
    a = make_store(root, "a", [asr(i, int(rng.integers(1, 40))) for i in range(sizes[0])], "asr", length)
    b = make_store(root, "b", [tts(i, int(rng.integers(1, 40))) for i in range(sizes[1])], "tts", length)
    return Plan(PlanSpec((a.uri, b.uri), (3, 2), seed, batch, length, "records"))


def tiny_config(**changes: Any) -> Any:
    from most_ray.model.configuration import MostConfig

    settings: dict[str, Any] = {
        "vocab_size": 832,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "max_position_embeddings": 512,
        "first_audio_token": IDS.unit_base,
        "last_audio_token": IDS.end_audio,
        "bos_token_id": IDS.bos,
        "eos_token_id": IDS.eos,
        "pad_token_id": IDS.pad,
        "aux_loss_alpha": 0.01,
    }
    return MostConfig(**{**settings, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    import torch

    from most_ray.model.modeling import MostForCausalLM

    torch.manual_seed(seed)
    model = MostForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        # Fresh routers are all but indifferent: larger weights make routing, and its gradients, matter.
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(20.0)
    return model
