"""A run's folder as a run leaves it, made up: a loss that falls, a restart, evaluations, experts, hypotheses."""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from most_ray.records.files import SPEECH_FOLDER, VOCODER
from most_ray.speech.vocoder.fit import Example, VocoderSettings, fit_vocoder
from most_ray.speech.vocoder.unit_vocoder import UnitVocoder

LAYERS, EXPERTS = 6, 8
GROUPS = {"text": [0, 1, 2, 3], "audio": [4, 5, 6, 7]}
WANTED = {"asr/train_asr": 0.5, "tts/train_tts": 0.3, "text/train_text": 0.2}
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "she had your dark suit in greasy wash water all year",
    "do not ask me to carry an oily rag like that",
    "a large size in stockings is hard to sell",
    "the birch canoe slid on the smooth planks",
    "glue the sheet to the dark blue background",
    "four hours of steady work faced us",
]
UNITS = {"features": "tones", "kmeans": "abc", "n_units": 6, "rate_hz": 50.0, "repeats_removed": False}  # 20 ms each
MODEL = {
    "vocab_size": 700,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_audio_token": 100,
    "last_audio_token": 601,
    "text_expert_indices": [0, 1, 2],
    "audio_expert_indices": [3, 4, 5, 6, 7],
}
_SOURCE = {"records": 9000, "exact": True, "seconds": 7200.0, "own_speed_seconds": 2400.0, "speech_units": 360_000, "speakers": 4}
DATA = {
    "speakers": {"training": 4, "validation": 5},
    "unseen": 1,
    "training": [{"name": "asr/train_asr", **_SOURCE, "licence": "CC BY 4.0", "units": UNITS}],
    "validation": [{"name": "asr/dev_clean", **_SOURCE, "records": 200, "exact": False, "licence": None, "units": UNITS}],
}
SWAPS = {"the": "a", "dark": "dock", "hours": "ours", "sheet": "seat", "year": "ear", "four": "for", "sell": "cell"}


def write_run(folder: Path, steps: int = 400, seed: int = 0, restart: int | None = 150, done: bool = True, **config: Any) -> Path:
    """A run of `steps` steps that went on once after step `restart`; with done=False it is still going, at half of its steps."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    last = steps if done else steps // 2
    lines: list[dict[str, Any]] = [_start(0, 1.0e9, steps, 4)]
    evaluated = {round(steps * part) for part in (0.25, 0.5, 0.75, 1)}
    for step in range(1, last + 1):
        if step - 1 == restart:
            lines.append(_start(step - 1, 1.0e9 + step + 60, steps, 2))
        late = 60 if restart is not None and step > restart else 0
        lines.append(_train(step, steps, draw, 1.0e9 + step + late, 1 + 0.07 * (seed % 5)))
        if step % 100 == 0 or step == steps:
            lines.append(_experts(step, draw))
        if step in evaluated:
            lines.append(_evaluation(step, steps, draw))
    _write_lines(folder / "metrics.jsonl", lines)
    settings = {
        "name": folder.name,
        "max_steps": steps,
        "learning_rate": 3e-4,
        "train_asr_dirs": ["data/train_asr"],
        "seed": seed,
        "bf16": True,
    }
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in {**settings, **config}.items()))
    versions = {"torch": "2.13.0", "transformers": "5.20.1", "ray": "2.60.0"}
    about = {"python": "3.11.9", "cpu": "Some CPU", "cores": 16, "memory_gb": 128.0, "gpus": ["Some GPU"] * 2, "versions": versions}
    (folder / "environment.json").write_text(json.dumps(about))
    _write_lines(folder / "hypotheses.jsonl", [{"kind": "settings", "format": 1}, *_hypotheses(draw)])
    if done:
        evaluation = next(line for line in reversed(lines) if line["kind"] == "evaluation")
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        (folder / "summary.json").write_text(json.dumps({"name": folder.name, "step": last}))
    return folder


def describe_records(run: Path) -> Path:
    """Let a run's records say more: who speaks, how long, and of recognised ones their units; and its data and its model, in cards.json."""
    head, *rows = map(json.loads, (run / "hypotheses.jsonl").read_text().splitlines())
    for index, row in enumerate(rows):
        row["metadata"] = {"speaker": f"speaker {index % 4}", "duration": 1 + index / 10, "dataset": "made up", "checked": index % 2 == 0}
        row |= {"spoken": {"units": "0 1 2 3", "recording": f"{row['id']}.wav"}} if row["task"] == "asr" else {}
    _write_lines(run / "hypotheses.jsonl", [head, *rows])
    (run / "cards.json").write_text(json.dumps({"model": MODEL, "data": DATA}))
    return run


def write_long_run(folder: Path, steps: int, seed: int = 0) -> Path:
    """A run of very many steps: the lines of one of 1,000 steps again and again, but for its last evaluation and starts."""
    write_run(folder, steps=1000, seed=seed, restart=300)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    often = [line for line in lines if line["kind"] in ("train", "experts")]
    with (folder / "metrics.jsonl").open("ab") as stream:
        for round_ in range(1, steps // 1000):
            later = ({**line, "step": line["step"] + 1000 * round_, "time": line["time"] + 1000 * round_} for line in often)
            stream.writelines(orjson.dumps(line) + b"\n" for line in later)
    return folder


def write_kit(run: Path) -> Path:
    """The folder speech/ of a run, as far as a report reads it: what UNITS are, and a vocoder of six tones."""
    folder = run / SPEECH_FOLDER
    folder.mkdir()
    (folder / "units.json").write_text(json.dumps({"identity": UNITS}))
    _vocoder().save(folder / VOCODER)
    return folder


@functools.cache
def _vocoder() -> UnitVocoder:
    units = np.tile(np.repeat(np.arange(6), 5), 4)
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(np.repeat(300.0 * (units + 1), 320)) / 16000)
    quick = VocoderSettings(steps=20, batch=4, window=24, width=24, griffin_lim_iterations=4)
    return fit_vocoder([Example(units, wave.astype(np.float32), 0, "a")], 6, 50.0, UNITS, False, quick)


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _start(step: int, time: float, steps: int, workers: int) -> dict[str, Any]:
    return {
        "kind": "start",
        "step": step,
        "time": time,
        "workers": workers,
        "topology": {"dp_replicate": 1, "fsdp": 2, "ep": workers // 2},
        "device": "Some GPU",
        "threads": 8,
        "precision": "bfloat16",
        "exact": step == 0,
        "changed": ["data"] if step else [],
        "global_batch_size": 64,
        "total_steps": steps,
        "first_expert_layer": 1,
        "experts": GROUPS,
        "n_experts": EXPERTS,
        "experts_per_token": 2,
        "wanted_mix": WANTED,
    }


def _train(step: int, steps: int, draw: random.Random, time: float, scale: float) -> dict[str, Any]:
    base = scale * (1.2 + 5 * math.exp(-6 * step / steps))
    losses = {task: base * share + draw.gauss(0, 0.06) for task, share in (("asr", 0.6), ("tts", 1.2), ("text", 0.9))}
    speed = (21000 if time - 1.0e9 - step < 1 else 11500) * draw.uniform(0.9, 1.05)
    shares = {name: share * draw.uniform(0.985, 1.015) for name, share in WANTED.items()}
    return {
        "kind": "train",
        "step": step,
        "time": time,
        "epoch": step / 180,
        "loss": None if step == 77 else sum(losses.values()) / 3,
        **{f"{task}_loss": loss for task, loss in losses.items() if step != 77},
        "grad_norm": None if step == 77 else 0.4 + 3 * math.exp(-8 * step / steps) + abs(draw.gauss(0, 0.15)),
        "learning_rate": 3e-4 * min(step / 40, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
        "tokens": 20000,
        "samples": 64,
        "tokens_per_second": speed,
        "step_time": 20000 / speed,
        "data_wait": 0.02 * draw.random(),
        "save_stall": 0.0,
        "mfu": 0.31 * speed / 21000,
        "memory_gb": 41.0 + step / steps,
        "skipped_steps": int(step == 77),
        "leaked": 0,
        "expert_max_over_mean": {"text": 1.3 + draw.random() * 0.3, "audio": 1.2 + 1.5 * math.exp(-5 * step / steps) + draw.random() * 0.2},
        "mix": {
            name: {"records": int(64 * step * s), "tokens": 900 * step, "share": s, "target": WANTED[name]} for name, s in shares.items()
        },
    }


def _experts(step: int, draw: random.Random) -> dict[str, Any]:
    def layer(modality: str) -> list[int]:
        return [draw.randint(2000, 9000) if expert in GROUPS[modality] else 0 for expert in range(EXPERTS)]

    load = {modality: [layer(modality) for _ in range(LAYERS)] for modality in GROUPS}
    return {"kind": "experts", "step": step, "time": 1.0e9 + step, "steps": 100, "load": load}


def _rate(value: float, reference: int) -> dict[str, Any]:
    wrong = round(value * reference)
    kinds = {"substitutions": wrong - wrong // 3, "deletions": wrong // 3, "insertions": 0}
    return {"rate": wrong / reference, **kinds, "reference": reference, "interval": [value * 0.8, value * 1.25]}


def _evaluation(step: int, steps: int, draw: random.Random) -> dict[str, Any]:
    better = math.exp(-2.4 * step / steps)
    sets: dict[str, Any] = {}
    for name, scale in (("asr/dev_clean", 0.5), ("asr/dev_other", 0.9)):
        value = scale * better * draw.uniform(0.95, 1.05)
        own = {"task": "asr", "records": 200, "rejected": 0, "loss": 1 + 2 * better * scale, "words": _rate(value, 2400)}
        shares = {"empty_rate": 0.005, "loop_rate": 0.01, "length_cap_rate": 0.0}
        sets[name] = {
            **own,
            "characters": _rate(value * 0.4, 9800),
            **shares,
            "confusions": [["the", "a", 31], ["dark", "dock", 12], ["an", "", 7], ["", "uh", 3]],
        }
    speech = {"units": _rate(0.2 + 0.5 * better, 9000), "cycle": _rate(0.1 + 0.6 * better, 1200), "duration_ratio": 1.04, "loop_rate": 0.02}
    rest = {"end_of_audio_rate": 0.97, "length_cap_rate": 0.01, "foreign_rate": 0.0}
    sets["tts/dev_tts"] = {"task": "tts", "records": 100, "loss": 2 + 3 * better, **speech, **rest}
    wer = {name.split("/")[1]: figures["words"]["rate"] for name, figures in sets.items() if "words" in figures}
    losses = {name: figures["loss"] for name, figures in sets.items()}
    return {"kind": "evaluation", "step": step, "time": 1.0e9 + step, "seconds": 9.0, "wer": wer, "validation_loss": losses, "sets": sets}


def _hypotheses(draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for index in range(120):
        reference = SENTENCES[index % len(SENTENCES)]
        words = [SWAPS.get(word, word) if draw.random() < 0.25 else word for word in reference.split()]
        words = [word for word in words if draw.random() > 0.03]
        hypothesis = " ".join([*words, "uh"] if draw.random() < 0.1 else words)
        if index % 3 == 2:
            row = {
                "set": "tts/dev_tts",
                "task": "tts",
                "text": reference,
                "recognised": hypothesis,
                "reference": "1 2 3",
                "hypothesis": "1 3",
            }
        else:
            row = {
                "set": "asr/dev_clean" if index % 3 else "asr/dev_other",
                "task": "asr",
                "reference": reference,
                "hypothesis": hypothesis,
            }
        rows.append({"kind": "hypothesis", "id": f"utterance_{index:03d}", **row})
    return rows
