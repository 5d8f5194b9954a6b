"""`most-ray prepare ...`: recordings to records, and records to token stores."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from most_ray import config as configuration
from most_ray.cli.job_files import as_given, to_read, to_write
from most_ray.cli.parser import AGAIN, CONTINUES, Parser, add_command, add_commands, add_config, config_of, number, tracked
from most_ray.console.help import mark
from most_ray.console.terminal import Terminal, say
from most_ray.errors import ConfigError, UserError, count_of, printable
from most_ray.io.hub import check_model_name
from most_ray.large_imports import at_once
from most_ray.options import ABOVE_0, AT_LEAST_1, MOST_SEED, NOT_NEGATIVE, SHARE, parse_number
from most_ray.records.record import N_UNITS
from most_ray.runs.room import check_actors
from most_ray.speech.corpora.corpus import LAYOUTS, Condition, CorpusOptions, parse_condition
from most_ray.speech.units.extractors import KINDS, parse_features
from most_ray.speech.units.features import EncoderSettings

if TYPE_CHECKING:
    from most_ray.speech.units.corpus_parts import Runner
    from most_ray.speech.units.prepare import ChooseRunner, UnitsJob

_MOST_ACTORS = 100_000  # more than any cluster starts


def add(commands: Any) -> None:
    prepare = add_commands(commands.add_parser("prepare", help="make records", description="Make records."), "what", "WHAT")
    units = add_command(prepare, "units", _units, "recordings with transcripts to ASR records", CONTINUES)
    _corpus_flags(units)
    units.add_argument("--output", type=to_write(Path), required=True, help="folder for records, units.json, kmeans.npy, rejected.jsonl")
    units.add_argument("--kmeans", type=to_read(Path), help="centroids (.npy or .safetensors) to use")
    units.add_argument("--fit_kmeans", metavar="K", help="fit K centroids to the recordings instead (auto: as many as they support)")
    _fit_flags(units)
    units.add_argument("--perturb", default="1.0", help="speeds at which each recording is used, as 0.9,1.0,1.1 (default: 1.0)")
    mark(units.add_argument("--keep_repeats", action="store_true", help="do not remove repeated units"), level="all")
    mark(
        units.add_argument("--licence", help="of the recordings and texts, for units.json and reports (default: a published corpus' own)"),
        level="all",
    )
    text = "end with an error where a larger share of the corpus' entries cannot be used (default: 0.5, if they are more than six)"
    mark(units.add_argument("--max_rejected_fraction", action=number(float, SHARE), help=text), level="all")
    text = "file format of the records (default: jsonl.gz)"
    mark(units.add_argument("--form", choices=["jsonl.gz", "jsonl", "json"], default="jsonl.gz", help=text), level="all")

    kmeans = add_command(prepare, "kmeans", _kmeans, "centroids for the units of recordings", CONTINUES)
    _corpus_flags(kmeans)
    kmeans.add_argument("--output", type=to_write(Path), required=True, help=".npy or .safetensors, which also says what it was fitted on")
    kmeans.add_argument("--k", default="auto", help="centroids, at most 500 (default: auto, as many as the recordings support)")
    _fit_flags(kmeans)

    vocoder = add_command(prepare, "vocoder", _vocoder, "learn from recordings to turn the units of their records into speech", AGAIN)
    _corpus_flags(vocoder, features=False)
    text = "folder of `prepare units`; vocoder.safetensors is written to it"
    vocoder.add_argument("--records", type=to_read(Path), required=True, help=text)
    text = "folder of the units' speech encoder (default: the one that they were made with)"
    vocoder.add_argument("--encoder", type=as_given(str), help=text)
    text = "seconds of speech to learn from, at most (default: 1800)"
    vocoder.add_argument("--seconds", action=number(float, ABOVE_0), default=1800.0, help=text)
    text = "of its weights and of the choice of recordings (default: 0)"
    vocoder.add_argument("--seed", action=number(int, NOT_NEGATIVE, MOST_SEED), default=0, help=text)

    tts = add_command(prepare, "tts", _tts, "ASR records to TTS records, of one directory or of all that --config lists", AGAIN)
    add_config(tts, "JSON list of {dataset_name, input_dir, output_dir, file_pattern}", as_given(Path))
    tts.add_argument("--input_dir", type=to_read(Path), help="directory of ASR records")
    tts.add_argument("--output_dir", type=to_write(Path), help="directory for the TTS records")
    tts.add_argument("--dataset_name", help="written to the records' metadata (default: the directory's name)")
    tts.add_argument("--file_pattern", default="*", help="which files to convert (default: *)")

    store = add_command(prepare, "store", _store, "make the token stores of a run's records, as `train` does at its first start", CONTINUES)
    store.description = _STORE_HELP
    add_config(store, "YAML file of a run's keys; flags overrule it", as_given(str))
    store.add_argument("--verify", action="store_true", help="read every byte of the stores and compare the checksums")
    configuration.add_flags(store, "elsewhere")


def _corpus_flags(parser: Parser, features: bool = True) -> None:
    parser.listing = ("layouts of folders, for --corpus", {name: layout.files for name, layout in LAYOUTS.items()})
    parser.add_argument("--corpus", choices=list(LAYOUTS), default="folder", help="layout of the input (default: folder)")
    parser.add_argument("--input", type=to_read(Path), required=True, help="the corpus' folder")
    parser.add_argument("--splits", nargs="+", default=[], help="splits of a published corpus (default: all; Common Voice: validated)")
    mark(
        parser.add_argument("--casing", choices=["cased", "upper"], default="cased", help="which of LibriHeavy's texts (default: cased)"),
        level="all",
    )
    parser.add_argument("--name", help="data set name, the start of each id (default: the corpus' or the input folder's)")
    text = "use only these utterances; != excludes, commas separate values"
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help=text)
    mark(
        parser.add_argument("--speaker_column", default="speaker", help="column with the speaker of an utterance (default: speaker)"),
        level="all",
    )
    parser.add_argument("--max_seconds", action=number(float, ABOVE_0), default=120.0, help="reject longer utterances (default: 120)")
    if features:
        text = f"{', '.join(KINDS)}, or KIND:NAME_OR_DIR:LAYER as hubert:hf:facebook/hubert-base-ls960:9 (default: mfcc)"
        parser.add_argument("--features", default="mfcc", help=text)
        text = "processes that share the work, through Ray (default: one per GPU or core for large inputs, else 0: none)"
        mark(parser.add_argument("--num_actors", action=number(int, NOT_NEGATIVE, _MOST_ACTORS), help=text), level="all")
        text = "GPUs of each process; 0.5 lets two share one (default: 1 for encoders where there are GPUs)"
        mark(parser.add_argument("--gpus_per_actor", action=number(float, NOT_NEGATIVE), help=text), level="all")
        mark(
            parser.add_argument(
                "--ray_address", help="cluster to use (default: the one of RAY_ADDRESS, else Ray is started on this machine)"
            ),
            level="all",
        )


def _fit_flags(parser: Parser) -> None:
    mark(
        parser.add_argument("--algorithm", choices=["minibatch", "lloyd"], default="minibatch", help="of the k-means (default: minibatch)"),
        level="all",
    )
    text = "frames to fit it to, drawn at random (default: 200000)"
    mark(parser.add_argument("--fit_frames", action=number(int, AT_LEAST_1), default=200_000, help=text), level="all")
    mark(
        parser.add_argument("--seed", action=number(int, NOT_NEGATIVE, (1 << 32) - 1), default=0, help="of the k-means (default: 0)"),
        level="all",
    )


def _job(args: argparse.Namespace, **more: Any) -> UnitsJob:
    """What to convert, from the flags of a corpus and `more` fields."""
    from most_ray.speech.units.prepare import UnitsJob

    corpus, where = _corpus(args)
    features = parse_features(args.features)
    check_actors(args.num_actors, args.gpus_per_actor, features.uses_gpu, args.ray_address)
    if isinstance(features, EncoderSettings):
        check_model_name(features.source, "features")
    same = {name: getattr(args, name) for name in ("speaker_column", "max_seconds", "algorithm", "fit_frames", "seed")}
    return UnitsJob(corpus=corpus, features=features, where=where, **same, **more)


def _corpus(args: argparse.Namespace) -> tuple[CorpusOptions, list[Condition]]:
    """The corpus of the flags, and the conditions that its utterances must meet."""
    if args.name and printable(args.name) != args.name:
        raise ConfigError("name", args.name, "holds characters that a terminal acts on instead of showing.", "Leave them out.")
    corpus = CorpusOptions(args.corpus, args.input, args.name, args.casing, tuple(args.splits))
    return corpus, [parse_condition(text) for text in args.where]


def _progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    return tracked(items, what, total, Terminal())


def _runner(args: argparse.Namespace, job: UnitsJob) -> ChooseRunner:
    """Chooses between this process and a pool of actors by the bytes of audio. Ray is imported only for the pool: that takes seconds."""

    def choose(size: int) -> Runner:
        from most_ray.speech.units.corpus_parts import run_in_process, worth_a_cluster

        if args.num_actors == 0 or (args.num_actors is None and not worth_a_cluster(job.features, size)):
            return run_in_process
        from most_ray.service.tasks.unit_tasks import pool_runner

        return pool_runner(job.features, args.num_actors, args.gpus_per_actor, args.ray_address)

    return choose


def _how_many(flag: str, text: str | None) -> int | None:
    """The number of units to fit, from a flag's text; 0 for "auto", as many as the frames support; None: the flag is not given."""
    if text is None or text == "auto":
        return None if text is None else 0
    try:
        count: int = parse_number(flag, int, text)
    except ConfigError as error:
        raise ConfigError(flag, text, "is neither a number of units nor auto.") from error
    if not 2 <= count <= N_UNITS:
        raise ConfigError(flag, count, f"must be in 2..{N_UNITS}.")
    return count


def _units(args: argparse.Namespace) -> int:
    from most_ray.speech.units.prepare import prepare_units

    try:
        perturb = tuple(parse_number("perturb", float, speed) for speed in args.perturb.split(","))
    except ConfigError as error:
        raise ConfigError("perturb", args.perturb, "is not a list of numbers as 0.9,1.0,1.1.") from error
    fit = _how_many("fit_kmeans", args.fit_kmeans)
    more = {"kmeans": args.kmeans, "fit_kmeans": fit, "perturb": perturb, "keep_repeats": args.keep_repeats, "form": args.form}
    more |= {"max_rejected_fraction": args.max_rejected_fraction, "licence": args.licence}
    job = _job(args, output=args.output, **more)
    counts = prepare_units(job, _progress, _runner(args, job))
    unchanged = ": nothing has changed" if counts.get("unchanged") else ""
    of = f" of {count_of(counts['speakers'], 'speaker')}" if counts["speakers"] else ""
    of += f" at {count_of(len(perturb), 'speed')}" if len(perturb) > 1 else ""
    made, units = count_of(counts["records"], "record"), count_of(counts["units"], "unit")
    say(f"{made} ({counts['hours']:.2f} h){of} in {units}: {args.output}{unchanged}")
    if counts["rejected"]:
        say(f"{_rejected(counts['rejected'], 'entry')}: {args.output / 'rejected.jsonl'}")
    if unread := counts.get("unread"):
        found = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        say(f"of them, recordings in formats that are not read: {found}; convert them to WAV or FLAC")
    return 0


def _rejected(number: int, what: str) -> str:
    """`1 record was rejected`, `2 records were rejected`."""
    return f"{count_of(number, what)} {'was' if number == 1 else 'were'} rejected"


def _kmeans(args: argparse.Namespace) -> int:
    from most_ray.speech.units.prepare import prepare_kmeans

    job = _job(args, output=args.output.parent, fit_kmeans=_how_many("k", args.k), max_rejected_fraction=1.0)
    try:
        found = prepare_kmeans(job, args.output, _progress, _runner(args, job))
    except UserError as error:
        if error.field == "fit_kmeans":  # the name of this command's flag in `prepare units`
            raise type(error)("k", error.value, error.rule, error.remedy) from error
        raise
    fitted = f"{count_of(found['units'], 'unit')} of {count_of(found['frames'], 'frame')}"
    say(f"{fitted}, mean squared distance {found['inertia']:.4f}: {args.output}")
    return 0


def _vocoder(args: argparse.Namespace) -> int:
    from most_ray.speech.vocoder.fit import VocoderSettings
    from most_ray.speech.vocoder.prepare_vocoder import prepare_vocoder

    (corpus, where), settings = _corpus(args), VocoderSettings(seed=args.seed, max_seconds=args.seconds)
    column = args.speaker_column
    found = prepare_vocoder(corpus, args.records, where, column, settings, _progress, args.max_seconds, args.encoder)
    made = ": nothing has changed"
    if not found.get("unchanged"):
        made = f" of {count_of(found['recordings'], 'recording')} ({found['seconds'] / 60:.1f} min), voice {found['voice'] or 'of all'}"
    say(f"vocoder{made}: {args.records / 'vocoder.safetensors'}")
    return 0


def _tts(args: argparse.Namespace) -> int:
    from most_ray.records.tts_records import Conversion, check_conversion, prepare_tts, read_conversions

    if args.config:
        if args.input_dir or args.output_dir or args.dataset_name or args.file_pattern != "*":
            rule = "lists the directories: it contains input_dir, output_dir, dataset_name and file_pattern."
            raise ConfigError("config", str(args.config), rule, "Leave the flags out.")
        conversions = read_conversions(args.config)
    elif not (args.input_dir and args.output_dir):
        raise ConfigError("input_dir", None, "and output_dir are needed, or a config that lists them.")
    else:
        conversions = [Conversion(args.input_dir, args.output_dir, args.dataset_name, args.file_pattern)]
    for conversion in conversions:
        check_conversion(conversion)
    for conversion in conversions:
        counts = prepare_tts(conversion)
        say(f"{count_of(counts['records'], 'TTS record')} from {count_of(counts['files'], 'file')} in {conversion.output_dir}")
        if counts["rejected"]:
            say(f"{_rejected(counts['rejected'], 'record')}: {conversion.output_dir / 'rejected.jsonl'}")
    return 0


_STORE_HELP = """Records to token stores: every directory of the configuration is read, checked, tokenised once and written to store_dir.
Stores that exist are kept, and only directories that have changed are ingested again. `train` does the same at its first start. Large
inputs are spread over the cluster, as tasks over files and byte ranges; a command that was stopped resumes where it was. Disk space: 4
bytes per token, and per record 70 bytes and its id: 3.4 KB for a record of 820 tokens, against 5.8 KB as JSON; 68 GB for 20 million
records. With a store_dir on an object store each node caches what it reads in MOST_RAY_CACHE_DIR (at most MOST_RAY_CACHE_GB, by default
64)."""


def _store(args: argparse.Namespace) -> int:
    config = config_of(args)
    from most_ray.console.run_screens import print_stores
    from most_ray.runs.first_checks import check_directories

    check_directories(config)
    with at_once():
        from most_ray.runs.resolve import make_stores
        from most_ray.service.tasks.ingest_tasks import ingest_runner

    started = time.monotonic()
    print_stores(make_stores(config, args.verify, ingest_runner), time.monotonic() - started, Terminal())
    return 0
