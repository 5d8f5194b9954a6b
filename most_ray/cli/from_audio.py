"""`most-ray train --from_audio DIR`: from recordings to a run, by commands of `most-ray`, each of which is printed, so that it can be
repeated and changed by hand."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from most_ray import config as configuration
from most_ray.cli.job_files import resolve_paths, to_read
from most_ray.console.help import mark
from most_ray.console.terminal import say
from most_ray.errors import ConfigError, DataError, count_of, printable
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import Kind, begins_with, check_file, check_folder, replacing
from most_ray.io.run_folder import model_source
from most_ray.presets import PRESETS
from most_ray.records.files import PREPARED
from most_ray.runs.evaluator_checks import check_evaluators
from most_ray.runs.room import check_room
from most_ray.speech.corpora.corpus import LAYOUTS, CorpusOptions, Utterance, guess_layout, parse_condition, read_corpus

_SPEEDS = "0.85,0.92,1.0,1.08,1.17"  # of each recording of a small corpus, which makes more voices than there are speakers
_SMALL_HOURS = 10.0  # hours of audio; a corpus with fewer is small
_TEST_SPLITS = ("test", "dev", "validation", "valid", "eval", "dev-clean", "test-clean", "dev-other", "test-other")  # names of splits
_MAX_SECONDS = "60"  # of an utterance: 3,000 units, which fit into the tiny model's positions
_HELD_OUT = 10  # one speaker or recording in ten is kept for validation
_MOST_SPEAKERS = 20  # that are kept for validation
_ASR_SHARE = 0.6  # of the ASR records in the mix
_PASSES = 12  # epochs of the ASR records
_FEWEST_STEPS, _MOST_STEPS = 300, 5000  # of a run: up to some hours on a small machine
_EVERY = (25, 50, 100, 200)  # steps between evaluations, one of these
_FIRST_S, _EVALUATIONS = 45.0, 30  # seconds to the first evaluation, where a run has no more than so many
_TOKENS, _TOKENS_A_SECOND = 20, 50  # of a record, beside its speech, and of a second of speech, about
_STEP_S, _SPEED = 0.2, 8_000  # seconds of any step, and tokens of it in each further second, on two cores, about
_REASONS = {  # why a key of run.yaml has its value, for whoever changes it
    "model_name_or_path": "about a million parameters: learns on a CPU",
    "asr_tts_mix_ratio": "share of recognition; the rest is synthesis, so that the model speaks too",
    "unit_swap_prob": "with the next two: units differ a little at every use, which helps with speakers that are not in the training data",
    "unit_replace_prob": "a unit becomes any other",
    "unit_drop_prob": "a unit is left out",
    "max_seq_length": "tokens of a row: room for the longest recording",
    "train_batch_size": "rows at once, some 4,096 tokens: fits into the memory of a small machine",
    "global_batch_size": "records of a step: fewer where there are few",
    "max_steps": f"some {_PASSES} passes through the recognition records, at least {_FEWEST_STEPS} and at most {_MOST_STEPS:,} steps",
    "learning_rate": "high, as small models take it",
    "adam_beta2": "follows gradients faster than the default, as suits short runs",
    "warmup_steps": "the rate rises over these, so that the first steps do no harm",
    "weight_decay": "stronger than the default, against learning few records by heart",
    "asr_loss_weight": "a transcript has few tokens, speech has many: without this recognition would hardly count",
    "save_steps": "a run that is stopped resumes from the last of these",
    "eval_steps": "the first error rate comes after a minute or so where there are few records; fewer evaluations of longer runs",
}

_RUN_YAML = Kind("configuration that --from_audio has made", begins_with(rb"# Made by `most-ray train --from_audio"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("from recordings")
    text = "recordings with transcripts: makes units and records of them, and trains on both tasks"
    mark(group.add_argument("--from_audio", type=to_read(Path), metavar="DIR", help=text), "train on recordings with transcripts")
    text = "layout of from_audio (default: recognised by its files)"
    mark(group.add_argument("--corpus", choices=list(LAYOUTS), help=text), level="all")
    text = "from which its units are made; see `most-ray prepare units --help` (default: mfcc)"
    mark(group.add_argument("--features", help=text), level="all")


class Division(NamedTuple):
    """A division of a corpus into training and validation, each as a condition for `--where`."""

    train: str
    validation: str
    description: str


def prepare(args: argparse.Namespace, flags: Mapping[str, Any], run: Callable[[Sequence[str]], None]) -> Path:
    """Make records from the recordings, and a run's configuration, whose path is returned. `args`: flags of `add_flags`, and `config`,
    `flags`: keys of the configuration that are given as flags, `run`: runs a command of `most-ray`."""
    if args.config:
        raise ConfigError("from_audio", str(args.from_audio), "and config both define what to train on.", "Leave one of them out.")
    if given := next((name for name in flags if re.fullmatch("(train|val)_(asr|tts)_dirs", name)), None):
        raise ConfigError(given, flags[given], "is what from_audio makes.", "Leave one of them out.")
    if not args.from_audio.is_dir():
        raise DataError("from_audio", str(args.from_audio), "is no folder.", "Check the path.")
    layout = args.corpus or guess_layout(args.from_audio)
    name = str(flags.get("name") or re.sub(r"[^A-Za-z0-9_-]", "_", args.from_audio.absolute().name) or "run")
    run_config = resolve_paths(configuration.config_from({**flags, "name": name}))  # a wrong flag is reported before hours of work
    check_room(run_config)
    check_evaluators(run_config)
    if run_config.model_name_or_path not in PRESETS:
        model_source(run_config.model_name_or_path, known=PRESETS)
    output = run_config.output_dir
    if storage.is_remote(output):
        raise ConfigError("output_dir", storage.redact(output), "is not on this machine, where records are made.", "Name a local folder.")
    data = Path(output) / f"{name}-data"
    check_folder("output_dir", data)
    check_file("output_dir", data / "run.yaml", _RUN_YAML)
    division, hours = _divide(args.from_audio, layout)
    say(f"{args.from_audio}: {layout}, {division.description}")
    say("")
    corpus = ["--corpus", layout, "--input", str(args.from_audio)]
    units = ["prepare", "units", *corpus, "--features", args.features or "mfcc", "--max_seconds", _MAX_SECONDS]
    train, val = str(data / "train_asr"), str(data / "val_asr")
    speeds = ["--perturb", _SPEEDS] if hours < _SMALL_HOURS else []
    run([*units, "--output", train, "--fit_kmeans", "auto", *speeds, "--where", division.train])
    run([*units, "--output", val, "--kmeans", f"{train}/kmeans.npy", "--where", division.validation])
    run(["prepare", "vocoder", *corpus, "--max_seconds", _MAX_SECONDS, "--records", train, "--where", division.train])
    for part in ("train", "val"):
        run(["prepare", "tts", "--input_dir", str(data / f"{part}_asr"), "--output_dir", str(data / f"{part}_tts"), "--dataset_name", name])
    path = data / "run.yaml"
    text = f"# Made by `most-ray train --from_audio {printable(str(args.from_audio))}`.\n{run_text(run_settings(name, output, data))}"
    with replacing("output_dir", path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    words = {key: value if isinstance(value, list | tuple) else [value] for key, value in flags.items()}
    given_flags = [word for key, values in words.items() for word in (f"--{key}", *map(str, values))]
    for line in (f"most-ray {shlex.join(['train', '--config', str(path), *given_flags])}", "", f"{path}:", *text.split("\n")):
        say(line)
    return path


def _divide(directory: Path, layout: str) -> tuple[Division, float]:
    """Divide a corpus, see `choose_division`, and estimate its hours of audio from the headers of the first 200 recordings."""
    from most_ray.speech.corpora.audio import audio_seconds

    speakers, splits, folds = Counter[str](), Counter[str](), Counter[str]()
    in_fold = {str(fold): parse_condition(f"fold={fold}") for fold in range(_HELD_OUT)}
    sampled: list[float] = []
    for entry in read_corpus(CorpusOptions(layout, directory)):
        if isinstance(entry, Utterance):
            speakers[str(entry.columns.get("speaker", ""))] += 1
            splits[str(entry.columns.get("split", ""))] += 1
            folds[next((fold for fold, condition in in_fold.items() if condition.matches(entry)), "")] += 1
            if len(sampled) < 200 and (seconds := audio_seconds(entry.path, entry.duration)) is not None:
                sampled.append(seconds)
    count = folds.total()
    if count < 2:
        rule = f"holds {count_of(count, 'recording')} with text: some are needed for training, and others for validation."
        raise DataError("from_audio", str(directory), rule, "See `most-ray prepare units --help`.")
    return choose_division(speakers, splits, folds), count * sum(sampled) / max(1, len(sampled)) / 3600.0


def choose_division(speakers: Mapping[str, int], splits: Mapping[str, int], folds: Mapping[str, int]) -> Division:
    """Choose what to validate on: the corpus' own test split, else some speakers, who are then unseen, else a tenth of the recordings.

    Args:
        speakers: recordings by speaker, "" where the speaker is not known.
        splits: recordings by split.
        folds: recordings by fold, a number from a hash of the recording; DataError is raised where all are in one.
    """
    count = sum(folds.values())
    tests = [split for split in splits if split.lower() in _TEST_SPLITS]
    if tests and len(tests) < len(splits):
        listed, held = ",".join(sorted(tests)), sum(splits[split] for split in tests)
        description = f"{count_of(count, 'recording')}, {held} of them held out as its split {listed}"
        return Division(f"split!={listed}", f"split={listed}", description)
    named = [speaker for speaker in speakers if speaker and "," not in speaker]
    # No speaker of a third of the recordings or more: too few would be left for training.
    rare = [speaker for speaker in named if speakers[speaker] < count / 3]
    if len(named) >= 4 and rare:
        order = sorted(rare, key=lambda speaker: hashlib.blake2b(speaker.encode(), digest_size=8).digest())
        held_out = sorted(order[: min(_MOST_SPEAKERS, math.ceil(len(named) / _HELD_OUT))])
        listed, held = ",".join(held_out), sum(speakers[speaker] for speaker in held_out)
        whole = f"{count_of(count, 'recording')} of {count_of(len(named), 'speaker')}"
        description = f"{whole}, {held} of {count_of(len(held_out), 'speaker')} held out"
        return Division(f"speaker!={listed}", f"speaker={listed}", description)
    # With few recordings the first fold may be empty.
    fold = next((fold for fold in sorted(folds) if fold and folds[fold] < count), None)
    if fold is None:
        remedy = "Add recordings, or a column `split` that is `test` for some."
        raise DataError("from_audio", None, f"holds {count_of(count, 'recording')} that cannot be divided.", remedy)
    return Division(f"fold!={fold}", f"fold={fold}", f"{count_of(count, 'recording')}, {folds[fold]} of them held out")


def run_text(settings: Mapping[str, Any]) -> str:
    """The configuration as YAML, each setting with its reason."""
    lines = []
    for key, value in settings.items():
        line = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=isinstance(value, list), width=10**6).strip()
        line = line.removeprefix("{").removesuffix("}") if isinstance(value, list) else line
        lines.append(f"{line}  # {_REASONS[key]}" if key in _REASONS else line)
    return "\n".join(lines) + "\n"


def evaluation_steps(seconds_a_step: float, max_steps: int) -> int:
    """Steps between evaluations: the first comes about `_FIRST_S` seconds after the first step, but no more than `_EVALUATIONS` in all."""
    within = max((every for every in _EVERY if every * seconds_a_step <= _FIRST_S), default=_EVERY[0])
    few = next((every for every in _EVERY if every * _EVALUATIONS >= max_steps), _EVERY[-1])
    return max(within, few)


def run_settings(name: str, output: str, data: Path) -> dict[str, Any]:
    """The configuration of a run on the records in `data`: the tiny preset, with steps for `_PASSES` epochs of the ASR records."""
    made = parse_json((data / "train_asr" / PREPARED).read_text(encoding="utf-8"))
    batch = 64 if made["records"] >= 640 else 16
    longest = 1 << max(8, (int(made["longest"]) * 5 // 4 + 64).bit_length())
    steps = round(_PASSES * made["records"] / (_ASR_SHARE * batch) / 50) * 50
    max_steps = min(_MOST_STEPS, max(_FEWEST_STEPS, steps))
    tokens = _TOKENS + _TOKENS_A_SECOND * made.get("hours", 0.0) * 3600 / max(1, made["records"])  # of a record
    return {
        "name": name,
        "output_dir": output,
        "model_name_or_path": "tiny",
        **{f"{part}_{task}_dirs": [str(data / f"{part}_{task}")] for part in ("train", "val") for task in ("asr", "tts")},
        "asr_tts_mix_ratio": _ASR_SHARE,
        "unit_swap_prob": 0.3,
        "unit_replace_prob": 0.1,
        "unit_drop_prob": 0.1,
        "max_seq_length": min(4096, longest),
        "train_batch_size": max(1, 4096 // longest),
        "global_batch_size": batch,
        "max_steps": max_steps,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "asr_loss_weight": 10,
        "save_steps": 200,
        "eval_steps": evaluation_steps(_STEP_S + batch * tokens / _SPEED, max_steps),
    }
