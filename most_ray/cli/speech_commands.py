"""`most-ray transcribe` and `most-ray synthesize`: a model applied to recordings and to texts."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from most_ray import config as configuration
from most_ray.cli.job_files import to_read, to_write
from most_ray.cli.parser import Parser, add_command, check_above_0, check_model, check_output, config_of_flags, print_error
from most_ray.console.terminal import say
from most_ray.errors import ConfigError, DataError, RecordError, printable
from most_ray.io import storage
from most_ray.options import add_flag
from most_ray.records.files import UNITS_MANIFEST

if TYPE_CHECKING:
    from most_ray.evaluation.decode import Forward
    from most_ray.evaluation.generate import GenerationOptions, Transcript
    from most_ray.speech.units.assets import SpeechAssets

_AT_ONCE = 32  # recordings in a batch
_PROMPT = 64  # tokens of a prompt without its speech, and of a short answer
_KEYS = {key: key for key in ("num_beams", "max_new_tokens", "max_new_units")}  # flags that are keys of the configuration
_NO_ASSETS = "Name the folder of the records that it was trained on: --speech DIR."


def add(commands: Any) -> None:
    transcribe = add_command(commands, "transcribe", _transcribe, "convert recordings to text by a model")
    text = "audio files, in any format that libsndfile reads"
    transcribe.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING", help=text)
    _model_flags(transcribe)
    transcribe.add_argument("--encoder", help="folder of the speech encoder of its units (default: the one that they were made with)")
    text = "the recordings are of one speaker, whose features are normalised over all of them"
    transcribe.add_argument("--one_speaker", action="store_true", help=text)
    transcribe.add_argument("--max_seconds", type=float, default=120.0, help="refuse longer recordings (default: 120)")
    text = "JSON Lines file for {file, text, units, ended} (default: text to the screen)"
    transcribe.add_argument("--output", type=to_write(Path), help=text)

    speak = add_command(commands, "synthesize", _synthesize, "convert text or units to a recording by a model and its vocoder")
    what = speak.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="text to speak")
    what.add_argument("--units", help="units to convert to speech without a model, as [Hu7][Hu90]")
    text = "directory of ASR or TTS records to convert to speech, each to a file in the folder OUTPUT"
    what.add_argument("--records", type=to_read(str), help=text)
    _model_flags(speak, optional=True)
    text = "a vocoder.safetensors, or a SeamlessM4T vocoder by folder or name (default: the model's own)"
    speak.add_argument("--vocoder", type=to_read(str), help=text)
    speak.add_argument("--limit", type=int, help="with records: the number of records, at most")
    speak.add_argument("--output", type=to_write(Path), required=True, help="WAV or FLAC file (with records: a folder)")


def _model_flags(parser: Parser, optional: bool = False) -> None:
    text = "model folder or checkpoint" + " (not needed for units)" * optional
    parser.add_argument("--model", type=to_read(str), required=not optional, help=text)
    parser.add_argument("--speech", metavar="DIR", help="folder with units.json and kmeans.npy (default: the model's own)")
    for key in _KEYS:
        add_flag(parser, configuration.OPTIONS[key])


def _transcribe(args: argparse.Namespace) -> int:
    from most_ray.speech.units.assets import open_assets

    if args.output:
        check_output(args.output)
    check_above_0("max_seconds", args.max_seconds)
    options = _generation_options(args)
    assets = open_assets(_assets_folder(args), args.encoder)
    written = 0
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(args.output.open("w", encoding="utf-8")) if args.output else None
        for path, units, transcript in _transcripts(args, assets, options):
            written += 1
            if sink:
                line = {"file": str(path), "text": transcript.text, "units": " ".join(map(str, units)), "ended": transcript.ended}
                sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                cells = (transcript.text,) if len(args.recordings) == 1 else (str(path), transcript.text)
                print(*map(printable, cells), sep="\t")
    if args.output:
        say(f"{written} transcriptions: {args.output}")
    return 0 if written == len(args.recordings) else 2


def _transcripts(
    args: argparse.Namespace, assets: SpeechAssets, options: GenerationOptions
) -> Iterator[tuple[Path, list[int], Transcript]]:
    """Each recording with its units and its transcript, in batches of `_AT_ONCE` (recordings of one speaker: all at once). Recordings that
    cannot be used are reported on standard error and skipped."""
    from most_ray.evaluation.generate import transcribe_units
    from most_ray.speech.corpora.audio import load_audio

    forward, tokenizer = _open(args.model)
    max_units = forward.model.config.max_position_embeddings - _PROMPT
    size = len(args.recordings) if args.one_speaker else _AT_ONCE
    for start in range(0, len(args.recordings), size):
        waves: list[tuple[Path, Any]] = []
        for path in args.recordings[start : start + size]:
            try:
                waves.append((path, load_audio(path, assets.extractor.sample_rate, max_seconds=args.max_seconds)))
            except DataError as error:
                print_error(error)
        found = []
        for (path, _), units in zip(waves, assets.encode([wave for _, wave in waves], args.one_speaker), strict=True):
            if len(units) <= max_units:
                found.append((path, units.tolist()))
            else:
                rule = f"has {len(units)} units, the model has room for {max_units}."
                print_error(DataError("recording", str(path), rule, "Cut it."))
        made = transcribe_units(forward, tokenizer, [units for _, units in found], options)
        for (path, units), transcript in zip(found, made, strict=True):
            yield path, units, transcript


def _synthesize(args: argparse.Namespace) -> int:
    import soundfile

    from most_ray.evaluation.generate import synthesize_texts
    from most_ray.records.record import parse_units
    from most_ray.speech.units.assets import require_units_manifest
    from most_ray.speech.vocoder.vocoders import open_vocoder

    if args.limit is not None and args.limit < 1:
        raise ConfigError("limit", args.limit, "must be at least 1.")
    if not args.records:
        check_output(args.output)
        if args.output.suffix.lower() not in (".wav", ".flac"):
            raise ConfigError("output", str(args.output), "is neither a .wav nor a .flac file.")
    if args.text is not None and not args.text.strip():
        raise ConfigError("text", args.text, "is empty.")
    if args.text and not args.model:
        raise ConfigError("model", None, "is needed to speak a text: a model folder or a checkpoint.")
    options = _generation_options(args)
    folder = _assets_folder(args) if args.model or args.speech else None
    described = args.records and not storage.is_remote(args.records) and (Path(args.records) / UNITS_MANIFEST).exists()
    own = args.records if described else None  # the folder of records if it is local and describes their units
    if folder is None and not args.vocoder:
        folder = own
    if own and folder and require_units_manifest(Path(own))["identity"] != require_units_manifest(Path(folder))["identity"]:
        reason = f"have other units than those of {folder}."
        raise DataError("records", args.records, reason, "Leave --speech and --model out, or name the records' own.")
    if not (folder or args.vocoder):
        raise ConfigError("speech", None, "or vocoder or model is needed, to turn units into speech.")
    known = folder or own
    vocoder = open_vocoder(args.vocoder or str(folder), require_units_manifest(Path(known))["identity"] if known else None)
    if args.records:
        say(f"{_synthesize_records(args, vocoder)} recordings: {args.output}")
        return 0
    if args.units:
        try:
            units = parse_units(args.units).tolist()
        except RecordError as error:
            raise ConfigError("units", args.units[:100], f"{error}.", "As [Hu7][Hu90][Hu481].") from error
    else:
        forward, tokenizer = _open(args.model)
        generated = synthesize_texts(forward, tokenizer, [args.text], options)[0]
        if not (units := generated.units):
            raise DataError("text", args.text, "gave no speech: the model answered without a unit.", "It may need more training.")
        if generated.stop is None:
            say(f"most-ray: the speech was cut off after {len(units)} units", stream=sys.stderr)
    waves, rate = vocoder([units])
    args.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(args.output, waves[0], rate)
    say(f"{len(waves[0]) / rate:.2f} s, {len(units)} units: {args.output}")
    return 0


def _synthesize_records(args: argparse.Namespace, vocoder: Any) -> int:
    """Write the speech of records to a file each, named after the record's id. Returns their number."""
    import soundfile

    if args.output.exists() and not args.output.is_dir():
        raise ConfigError("output", str(args.output), "is a file; records go to a folder.")
    args.output.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for record_id, units in itertools.islice(_speech_of(args.records), args.limit):
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", record_id).lstrip(".")[:120] or "record"
        name = next(name for n in range(1, len(taken) + 3) if (name := stem if n == 1 else f"{stem}-{n}") not in taken)
        taken.add(name)
        waves, rate = vocoder([units])
        soundfile.write(args.output / f"{name}.wav", waves[0], rate)
    if not taken:
        raise DataError("records", args.records, "contain no speech.")
    return len(taken)


def _speech_of(directory: str) -> Iterator[tuple[str, list[int]]]:
    """Ids and units of the records that contain speech; records that are not valid are skipped."""
    from most_ray.records.files import read_raw, record_files
    from most_ray.records.record import parse_records

    for entry in record_files(directory):
        for _, raw in read_raw(entry.uri):
            record = parse_records([raw])[0]
            if not isinstance(record, RecordError):
                speech = record.input if record.task == "asr" else record.output
                if not isinstance(speech, str):
                    yield record.id, speech.tolist()


def _generation_options(args: argparse.Namespace) -> GenerationOptions:
    from most_ray.evaluation.generate import GenerationOptions

    return GenerationOptions.of(config_of_flags(args, _KEYS))


def _assets_folder(args: argparse.Namespace) -> str:
    """The folder of the speech assets: that of --speech, else the model's own. Raises UserError where the model does not exist, has none,
    or was trained on other units."""
    from most_ray.checkpoint.export import open_description
    from most_ray.io.run_folder import local_copy
    from most_ray.model.build import check_units
    from most_ray.records.record import units_hash
    from most_ray.speech.units.assets import find_assets, require_units_manifest

    if not args.model:
        return str(args.speech)
    check_model(args.model)
    config, _ = open_description(args.model)
    if args.speech:
        check_units(config, units_hash(require_units_manifest(Path(args.speech))), args.model)
        return str(args.speech)
    found = find_assets(args.model, getattr(config, "units_identity", None))
    if found is None:
        raise DataError("model", args.model, "has no folder speech/, which describes how to convert recordings to its units.", _NO_ASSETS)
    return local_copy(found, UNITS_MANIFEST)


def _open(uri: str) -> tuple[Forward, Any]:
    """Load a model onto the GPU, if there is one, and its tokenizer."""
    import torch

    from most_ray.checkpoint.export import open_model
    from most_ray.evaluation.decode import Forward
    from most_ray.model.build import check_template

    model, tokenizer = open_model(uri)
    check_template(model.config, uri)
    model.eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return Forward(model), tokenizer
