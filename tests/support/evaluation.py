"""A small model folder with a real tokenizer, and records of every task to score it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from most_ray.config import config_from
from most_ray.evaluation.decode import Forward
from most_ray.evaluation.evaluate import Directories, Evaluation, merge_shards, open_sets
from most_ray.evaluation.scoring import EvaluationSettings, Recogniser, score_shard
from most_ray.model.build import load_model, save_model
from most_ray.records.tokenizer import load_tokenizer, token_ids, train_tokenizer
from tests.support.builders import WORDS, asr, text, tiny_model, tts, write_records

SETTINGS = EvaluationSettings.of(config_from({"eval_batch_size": 3, "max_new_tokens": 12, "max_new_units": 20}))


@dataclass(frozen=True)
class Scene:
    """A model folder, directories of records, and where their stores go."""

    model: str
    directories: Directories
    stores: str


def make_scene(root: Path, n_asr: int = 7, n_tts: int = 3, n_text: int = 2) -> Scene:
    tokenizer = train_tokenizer([f"User: {word}. Assistant: " for word in WORDS], 300)
    ids = token_ids(tokenizer)
    special = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    model = tiny_model(3, vocab_size=len(tokenizer), first_audio_token=ids.unit_base, last_audio_token=ids.end_audio, **special)
    with torch.no_grad():  # decided enough that float32 noise turns no choice, with ends that come
        model.lm_head.weight.mul_(8.0)
        model.lm_head.weight[[ids.eos, ids.end_audio]] *= 2.0
    save_model(model, tokenizer, root / "model")
    spoken = write_records(
        root / "spoken", [asr(index, 3 + 2 * index, f"{WORDS[index]} {WORDS[(3 * index) % 10]}") for index in range(n_asr)]
    )
    to_speak = write_records(root / "to_speak", [tts(index, 4 + index) for index in range(n_tts)])
    written = write_records(root / "written", [text(index) for index in range(n_text)])
    return Scene(str(root / "model"), Directories((str(spoken),), (str(to_speak),), (str(written),)), str(root / "stores"))


def evaluate(
    scene: Scene, settings: EvaluationSettings = SETTINGS, world: int = 1, outside: Recogniser | None = None, model: Any = None
) -> Evaluation:
    """By one process, in `world` shares."""
    model = model or load_model(scene.model)
    tokenizer = load_tokenizer(scene.model)
    sets = open_sets(model.config, tokenizer, scene.model, scene.directories, settings, scene.stores)
    shares = [score_shard(Forward(model), tokenizer, sets, settings, rank, world, outside) for rank in range(world)]
    return merge_shards(shares, sets, settings, model.config, tokenizer, scene.model)
