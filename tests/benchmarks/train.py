"""Training: our step beside those of the peers (tests/benchmarks/peers.py), on the same records, by turns in one process.

    python -m tests.benchmarks.train [--work digits an4 librispeech] [--rounds 7] [--model small|tiny] [--threads 2]

Work: what `most-ray train` makes of the spoken digits, of AN4 (500 MFCC units, repeats removed) and of LibriSpeech with published units
(50 a second, repeats kept; ASR and TTS by halves, rows of 2,048): its plans, packs and mixes. In a round every way makes one optimizer step
on the same records; ours makes its batch within its time, as the Trainer and the original do. A way's rate is that of its tokens (or slots:
positions of its rows, padding too) in the median round, a ratio the median over rounds of the two rates. AN4 is the headline. Where others
use the same cores, ratios of processor time say more than those of the clock, most of all with one thread.

`tiny` is the preset; `small` has 27 M parameters and DeepSeek-V2's shape (the weights of experts, too, are not normalised).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it, before torch loads

import torch
import transformers
from transformers.trainer_pt_utils import get_length_grouped_indices

from most_ray.config import RunConfig, load_config
from most_ray.data.batch import Batch, TokenLayout, rank_batch
from most_ray.data.plan import Plan
from most_ray.model.build import read_config
from most_ray.model.modeling import MostForCausalLM
from most_ray.optim.train_state import make_state
from most_ray.records.template import IGNORE, PADDING
from most_ray.records.tts_records import Conversion, prepare_tts
from most_ray.runs.resolve import prepare_run
from most_ray.speech.corpora.corpus import CorpusOptions
from most_ray.speech.units.prepare import UnitsJob, prepare_units
from most_ray.train.step import StepSettings, run_step
from tests.benchmarks import common
from tests.benchmarks.peers import OriginalPeer, Record, Stopwatch, TransformersPeer, records_of, train_with_trainer

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "v_head_dim": 32,
    "norm_topk_prob": False,
    "text_expert_indices": list(range(8)),
    "audio_expert_indices": list(range(8, 16)),
}
WORKS = ("digits", "an4", "librispeech")
HEADLINE = "an4"
WAYS = {
    "ours": "most_ray, bf16 (default)",
    "ours_fp32": "most_ray, float32",
    "transformers": "transformers, plain loop, packed",
    "transformers_bf16": "  the same in bf16",
    "hf_trainer": "Trainer, padded",
    "hf_trainer_grouped": "  the same, grouped by length",
    "original": "original, padded (rebuilt)",
}
SLOTWISE = ("ours_fp32", "transformers", "transformers_bf16")  # of the same rows, so that slots and tokens have the same ratio
CPU = torch.device("cpu")
POOL = 64  # steps whose records are grouped by length
WARM_UP = 2  # rounds: kernels of half precision are made for each shape when it first comes


@dataclass(frozen=True)
class Work:
    """A run as `most-ray train` would start it; `model`: its initial state."""

    config: RunConfig
    plan: Plan
    layout: TokenLayout
    model: MostForCausalLM

    def batch(self, step: int) -> Batch:
        return rank_batch(self.plan, step, 0, 1, self.config.train_batch_size, self.layout)


@dataclass
class Timed:
    """One way's steps behind the warm-up: what each took, its slots and supervised tokens."""

    took: list[common.Took] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)

    def rates(self, of: str = "supervised", clock: str = "wall") -> list[float]:
        """Per second of each step."""
        return [amount / getattr(took, clock) for amount, took in zip(getattr(self, of), self.took, strict=True)]


def an4_records() -> Path:
    """Records of real recordings, made once. Unlike `make an4`: of each recording once, and of all speakers."""
    folder = common.RESULTS / "an4"
    corpus = CorpusOptions("an4", common.SHARED / "data" / "an4")
    prepare_units(UnitsJob(corpus, folder / "asr", fit_kmeans=500), lambda items, _what, _n: items)
    prepare_tts(Conversion(folder / "asr", folder / "tts", "an4"))
    return folder


def librispeech_records() -> Path:
    folder = common.RESULTS / "librispeech"
    prepare_tts(Conversion(common.SHARED / "data" / "librispeech_units", folder / "tts", "librispeech"))
    return folder


def changes_of(name: str) -> dict[str, Any]:
    """What the work changes in its shipped configuration."""
    if name == "digits":
        data = common.ROOT / "jobs" / "data" / "digits"
        return {"train_asr_dirs": [str(data / "train_asr")], "train_tts_dirs": [str(data / "train_tts")]}
    if name == "an4":
        folder = an4_records()
        return {"train_asr_dirs": [str(folder / "asr")], "train_tts_dirs": [str(folder / "tts")]}
    folder, units = librispeech_records(), str(common.SHARED / "data" / "librispeech_units")
    return {"train_asr_dirs": [units], "train_tts_dirs": [str(folder / "tts")], "asr_tts_mix_ratio": 0.5, "max_seq_length": 2048}


def open_work(name: str, model: str) -> Work:
    shipped = common.ROOT / "jobs" / "configs" / f"{name if name != 'librispeech' else 'librispeech_units'}.yaml"
    nothing: dict[str, Any] = {"val_asr_dirs": [], "val_tts_dirs": [], "use_gpu": False, "num_workers": [1]}
    uri = {"output_dir": str(common.RESULTS), "name": f"train-{name}"}
    prepared = prepare_run(load_config(shipped, {**nothing, **changes_of(name), **uri}))
    torch.manual_seed(0)
    made = MostForCausalLM(read_config(prepared.job.model_path, **(SMALL if model == "small" else {})))
    return Work(prepared.job.config, prepared.plan, prepared.job.layout, made)


def copy_of(model: MostForCausalLM) -> MostForCausalLM:
    made = MostForCausalLM(model.config)
    made.load_state_dict(model.state_dict())
    return made


def own_step(work: Work, total: int, dtype: torch.dtype | None) -> Callable[[int], object]:
    """Our way: the batch of a step is made and trained on."""
    state = make_state(copy_of(work.model), work.config, total)
    settings = replace(StepSettings.of(work.config, CPU), dtype=dtype)
    return lambda step: run_step(state, work.batch(step), settings)


def grouped_steps(work: Work, count: int) -> list[list[Record]]:
    """Batches as the Trainer makes them of many records with `group_by_length`; some of them, short and long ones."""
    size = work.config.global_batch_size or 1
    pool = [record for step in range(1, POOL + 1) for record in records_of(work.batch(step))]
    order = get_length_grouped_indices([len(record["input_ids"]) for record in pool], size, generator=torch.Generator().manual_seed(0))
    batches = [[pool[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return [batches[index * len(batches) // count] for index in range(count)]


def compare(work: Work, rounds: int) -> dict[str, Timed]:
    """All ways by turns. The Trainer's loop is the outer one: between its steps it waits for the others."""
    steps = range(1, WARM_UP + rounds + 1)
    batches = [work.batch(step) for step in steps]
    records, grouped = [records_of(batch) for batch in batches], grouped_steps(work, len(steps))
    models, config = [copy_of(work.model) for _ in range(3)], work.config
    plain = TransformersPeer(models[0], config, len(steps))
    half = TransformersPeer(models[1], config, len(steps), torch.bfloat16)
    original = OriginalPeer(models[2], config, len(steps))
    own, exact = (own_step(work, len(steps), dtype) for dtype in (torch.bfloat16, None))
    # On either side of the Trainer's two kinds of steps, what is compared most stands together.
    behind: list[dict[str, Callable[[int], object]]] = [
        {"ours": lambda k: own(k + 1), "transformers": lambda k: plain.step(batches[k])},
        {
            "ours_fp32": lambda k: exact(k + 1),
            "transformers_bf16": lambda k: half.step(batches[k]),
            "original": lambda k: original.step(records[k]),
        },
    ]
    found: dict[str, Timed] = defaultdict(Timed)
    done = 0

    def note(name: str, number: int, took: common.Took) -> None:
        packed = name == "ours" or name in SLOTWISE
        own_records = grouped[number] if name == "hf_trainer_grouped" else records[number]
        if number >= WARM_UP:
            found[name].took.append(took)
            found[name].slots.append(batches[number].input_ids.size if packed else padded_slots(own_records))
            found[name].supervised.append(supervised(own_records))

    def between(trainers: common.Took) -> None:
        nonlocal done
        number, second = divmod(done, 2)
        note("hf_trainer_grouped" if second else "hf_trainer", number, trainers)
        for name, way in behind[second].items():
            watch = Stopwatch()
            way(number)
            note(name, number, watch.read())
        done += 1

    with tempfile.TemporaryDirectory() as folder:
        train_with_trainer(copy_of(work.model), [step for pair in zip(records, grouped, strict=True) for step in pair], folder, between)
    return found


def padded_slots(records: Sequence[Record]) -> int:
    return len(records) * max(len(record["input_ids"]) for record in records)


def supervised(records: Sequence[Record]) -> int:
    return sum(label != IGNORE for record in records for label in record["labels"])


def shares(work: Work, rounds: int) -> dict[str, float]:
    """Of the packed rows: what holds tokens, what of those is supervised; tokens of a record."""
    batches = [work.batch(step) for step in range(WARM_UP + 1, WARM_UP + rounds + 1)]
    tokens = sum(int((batch.modality != PADDING).sum()) for batch in batches)
    lengths = [len(record["input_ids"]) for batch in batches for record in records_of(batch)]
    return {
        "fill": tokens / sum(batch.input_ids.size for batch in batches),
        "supervised_share": sum(sum(batch.n_supervised) for batch in batches) / tokens,
        "mean_length": statistics.mean(lengths),
    }


def ratio(found: dict[str, Timed], peer: str, clock: str = "wall") -> float:
    """Of our default's supervised tokens a second to the peer's."""
    pairs = zip(found["ours"].rates(clock=clock), found[peer].rates(clock=clock), strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def report(name: str, work: Work, found: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Prints the work's table; its figures."""
    figures: dict[str, float] = {f"{key}_{name}": value for key, value in shares(work, rounds).items()}
    rows: list[list[object]] = []
    for way, title in WAYS.items():
        timed = found[way]
        relative = {clock: ratio(found, way, clock) for clock in common.Took._fields}
        fill = figures[f"fill_{name}"] if way == "ours" or way in SLOTWISE else None
        middle = {key: statistics.median(timed.rates(key)) for key in ("slots", "supervised")}
        step_s, cpu_s = (statistics.median(getattr(took, clock) for took in timed.took) for clock in common.Took._fields)
        noise = max(timed.rates()) / middle["supervised"] - 1
        rows.append(
            [title, step_s, cpu_s, middle["slots"], middle["supervised"], *(f"{each:.2f}" for each in relative.values()), f"{noise:.0%}"]
        )
        figures |= {f"{key}_per_s_{way}_{name}": value for key, value in middle.items()}
        figures |= {f"step_s_{way}_{name}": step_s, f"step_cpu_s_{way}_{name}": cpu_s, f"noise_{way}_{name}": noise}
        if way != "ours":
            figures |= {f"ratio_{way}_{name}": relative["wall"], f"ratio_{way}_{name}_cpu": relative["cpu"]}
        if fill is None:
            figures[f"padded_over_packed_slots_{way}_{name}"] = sum(timed.slots) / sum(found["ours"].slots)
    common.show(
        f"{name}: {work.config.global_batch_size} records a step, rows of {work.config.max_seq_length}, {rounds} rounds",
        ["", "s a step", "CPU s", "slots/s", "supervised/s", "ours over", "in CPU time", "noise"],
        rows,
        [
            f"Records of {figures[f'mean_length_{name}']:.0f} tokens; packed rows are filled to {figures[f'fill_{name}']:.1%}, "
            f"{figures[f'supervised_share_{name}']:.1%} of the tokens supervised; padded rows have "
            f"{figures[f'padded_over_packed_slots_hf_trainer_{name}']:.2f} times as many slots."
        ],
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=("small", "tiny"), default="small")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    for name in options.work:
        work = open_work(name, options.model)
        parameters = sum(parameter.numel() for parameter in work.model.parameters())
        common.console.print(f"{options.model}: {parameters / 1e6:.1f} M parameters, {options.threads} threads")
        figures |= report(name, work, compare(work, options.rounds), options.rounds)
        figures |= {"parameters": parameters}
    headline = HEADLINE if HEADLINE in options.work else options.work[0]
    short = {f"ratio_{peer}": figures[f"ratio_{peer}_{headline}"] for peer in ("transformers", "hf_trainer", "original")}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"headline": headline, "model": options.model, "rounds": options.rounds, "threads": options.threads}
    common.write("train", {**short, **about, **versions, **figures})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
