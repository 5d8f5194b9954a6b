"""`most-ray transcribe` and `most-ray synthesize`: a model applied to recordings and to texts."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from most_ray import config as configuration
from most_ray.cli.job_files import as_given, to_read, to_write
from most_ray.cli.parser import AGAIN, Parser, add_command, check_model, check_records, config_of_flags, number, print_error
from most_ray.console.terminal import say, say_meanwhile
from most_ray.errors import ConfigError, DataError, RecordError, count_of, printable
from most_ray.io import storage
from most_ray.io.json_values import json_text
from most_ray.io.outputs import Kind, begins_with, check_file, check_folder, replacing
from most_ray.large_imports import at_once
from most_ray.options import ABOVE_0, AT_LEAST_1, add_flag
from most_ray.records.files import UNITS_MANIFEST

if TYPE_CHECKING:
    import numpy as np

    from most_ray.evaluation.decode import Forward
    from most_ray.evaluation.generate import GenerationOptions, Transcript
    from most_ray.speech.units.assets import SpeechAssets

_NOTHING = "no transcriptions: nothing was written"
_AT_ONCE = 32  # recordings in a batch
_PROMPT = 64  # tokens of a prompt without its speech, and of a short answer
_KEYS = {key: key for key in ("num_beams", "max_new_tokens", "max_new_units")}  # flags that are keys of the configuration
_SOFTWARE = "most_ray"  # the mark in recordings that `synthesize` has written
_NO_ASSETS = "Name the folder of the records that it was trained on: --speech DIR."


def add(commands: Any) -> None:
    transcribe = add_command(commands, "transcribe", _transcribe, "convert recordings to text by a model", AGAIN)
    text = "audio files, in any format that libsndfile reads"
    transcribe.add_argument("recordings", nargs="+", type=as_given(Path), metavar="RECORDING", help=text)
    _model_flags(transcribe)
    text = "folder of the speech encoder of its units (default: the one that they were made with)"
    transcribe.add_argument("--encoder", type=as_given(str), help=text)
    text = "the recordings are of one speaker, whose features are normalised over all of them"
    transcribe.add_argument("--one_speaker", action="store_true", help=text)
    transcribe.add_argument("--max_seconds", action=number(float, ABOVE_0), default=120.0, help="refuse longer recordings (default: 120)")
    text = "JSON Lines file for {file, text, units, ended} (default: text to the screen)"
    transcribe.add_argument("--output", type=to_write(Path), help=text)

    speak = add_command(commands, "synthesize", _synthesize, "convert text or units to a recording by a model and its vocoder", AGAIN)
    what = speak.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="text to speak")
    what.add_argument("--units", help="units to convert to speech without a model, as [Hu7][Hu90]")
    text = "directory of ASR or TTS records to convert to speech, each to a file in the folder OUTPUT"
    what.add_argument("--records", type=to_read(str), help=text)
    _model_flags(speak, optional=True)
    text = "a vocoder.safetensors, or a SeamlessM4T vocoder by folder or name (default: the model's own)"
    speak.add_argument("--vocoder", type=to_read(str), help=text)
    speak.add_argument("--limit", action=number(int, AT_LEAST_1), help="with records: the number of records, at most")
    speak.add_argument("--output", type=to_write(Path), required=True, help="WAV or FLAC file (with records: a folder)")


def _model_flags(parser: Parser, optional: bool = False) -> None:
    text = "a run's folder (its export), model folder or checkpoint" + " (not needed for units)" * optional
    parser.add_argument("--model", type=to_read(str), required=not optional, help=text)
    text = "folder with units.json and kmeans.npy (default: the model's own)"
    parser.add_argument("--speech", type=as_given(str), metavar="DIR", help=text)
    for key in _KEYS:
        add_flag(parser, configuration.OPTIONS[key])


def _transcribe(args: argparse.Namespace) -> int:
    if args.output:
        check_file("output", args.output, TRANSCRIPTS)
    config_of_flags(args, _KEYS)  # wrong numbers are said before anything is looked for
    args.model = check_model(args.model)
    if not any(map(os.path.exists, args.recordings)):
        for path in args.recordings:
            print_error(DataError("recording", str(path), "is not there."))
        if args.output:
            say(_NOTHING)
        return 2
    options = _generation_options(args)
    folder = _assets_folder(args)
    from most_ray.speech.units.assets import open_assets

    assets = open_assets(folder, args.encoder)
    lines: list[str] = []
    for path, units, transcript in _transcripts(args, assets, options):
        line = {"file": str(path), "text": transcript.text, "units": " ".join(map(str, units)), "ended": transcript.ended}
        lines.append(json_text(line) + "\n")
        if not args.output:
            cells = (transcript.text,) if len(args.recordings) == 1 else (str(path), transcript.text)
            print(*map(printable, cells), sep="\t")
    if args.output and lines:  # without any, what an earlier command wrote stays
        with replacing("output", args.output) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    if args.output:
        say(f"{count_of(len(lines), 'transcription')}: {args.output}" if lines else _NOTHING)
    return 0 if len(lines) == len(args.recordings) else 2


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
                rule = f"has {count_of(len(units), 'unit')}, the model has room for {max_units}."
                print_error(DataError("recording", str(path), rule, "Cut it."))
        made = transcribe_units(forward, tokenizer, [units for _, units in found], options)
        for (path, units), transcript in zip(found, made, strict=True):
            yield path, units, transcript


def _synthesize(args: argparse.Namespace) -> int:
    if args.records:
        check_records("records", [args.records])
        check_folder("output", args.output)
    else:
        check_file("output", args.output, RECORDING)
        if args.output.suffix.lower() not in (".wav", ".flac"):
            raise ConfigError("output", str(args.output), "is neither a .wav nor a .flac file.")
    if args.text is not None:
        _check_text(args.text)
    if args.text and not args.model:
        raise ConfigError("model", None, "is needed to speak a text: a model folder or a checkpoint.")
    units = _parse_units(args.units) if args.units else []
    config_of_flags(args, _KEYS)
    if args.model:
        args.model = check_model(args.model)
    with at_once():
        from most_ray.evaluation.generate import synthesize_texts
        from most_ray.speech.units.assets import require_units_manifest
        from most_ray.speech.vocoder.vocoders import open_vocoder

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
    names = _recording_names(args) if args.records else []
    known = folder or own
    vocoder = open_vocoder(args.vocoder or str(folder), require_units_manifest(Path(known))["identity"] if known else None)
    if args.records:
        say(f"{count_of(_synthesize_records(args, names, vocoder), 'recording')}: {args.output}")
        return 0
    if not args.units:
        forward, tokenizer = _open(args.model)
        generated = synthesize_texts(forward, tokenizer, [args.text], options)[0]
        if not (units := generated.units):
            raise DataError("text", args.text, "gave no speech: the model answered without a unit.", "It may need more training.")
        if generated.stop is None:
            say(f"most-ray: the speech was cut off after {count_of(len(units), 'unit')}", stream=sys.stderr)
    waves, rate = vocoder([units])
    _write_recording(args.output, waves[0], rate)
    say(f"{len(waves[0]) / rate:.2f} s, {count_of(len(units), 'unit')}: {args.output}")
    return 0


def _parse_units(text: str) -> list[int]:
    """Raises ConfigError for what are no units."""
    from most_ray.records.record import parse_units

    try:
        return list(parse_units(text).tolist())
    except RecordError as error:
        raise ConfigError("units", text[:100], f"{error}.", "As [Hu7][Hu90][Hu481].") from error


def _check_text(text: str) -> None:
    """Raises ConfigError for a text that no record to be spoken could have: it is empty, not encodable, or holds units."""
    from most_ray.records.record import TTS_INSTRUCTION, parse_record

    if not text.strip():
        raise ConfigError("text", text, "is empty.")
    try:
        parse_record({"id": "text", "instruction": TTS_INSTRUCTION, "input": text, "output": "[Hu0]"})
    except RecordError as error:
        raise ConfigError("text", text, f"cannot be spoken: its record {error}.", "Give units by --units.") from error


def _synthesize_records(args: argparse.Namespace, names: Sequence[str], vocoder: Any) -> int:
    """Write the speech of records to files of these names. Returns their number."""
    for name, (_, units) in zip(names, _speech_of(args.records), strict=False):
        waves, rate = vocoder([units])
        _write_recording(args.output / name, waves[0], rate)
    return len(names)


def _recording_names(args: argparse.Namespace) -> list[str]:
    """The name of each record's file, after its id, all different. Raises ConfigError where a file of a name is there already and is
    another's, as the recording itself, and DataError where no record contains speech."""
    names: dict[str, None] = {}
    for record_id, _ in itertools.islice(_speech_of(args.records), args.limit):
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", record_id).lstrip(".")[:120] or "record"
        names[next(name for n in range(1, len(names) + 3) if (name := f"{stem}.wav" if n == 1 else f"{stem}-{n}.wav") not in names)] = None
    if not names:
        raise DataError("records", args.records, "contain no speech.")
    for name in names:
        check_file("output", args.output / name, RECORDING)
    return list(names)


def _write_recording(path: Path, wave: np.ndarray, rate: int) -> None:
    """Write float32 (samples,) as WAV or FLAC, by the path's suffix, with the mark by which `_is_own_recording` knows it."""
    import soundfile

    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", rate, 1, format=path.suffix[1:].upper()) as sink:
        sink.software = _SOFTWARE
        sink.write(wave)
    with replacing("output", path) as temporary:
        temporary.write_bytes(content.getvalue())


def _is_own_recording(path: Path) -> bool:
    import soundfile

    try:
        with soundfile.SoundFile(path) as stream:
            return str(stream.software).startswith(_SOFTWARE)
    except soundfile.SoundFileError:
        return False


# What these commands write, and may replace.
TRANSCRIPTS = Kind("file of transcriptions", begins_with(rb'\{"file": ?"[^\n]*"text": ?"'))
RECORDING = Kind("recording that `most-ray synthesize` has written", _is_own_recording)


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
    if not args.model:
        return str(args.speech)
    say_meanwhile("Loading torch and transformers")
    with at_once():
        from most_ray.checkpoint.export import open_description
        from most_ray.io.run_folder import local_copy
        from most_ray.model.build import check_units
        from most_ray.records.record import units_hash
        from most_ray.speech.units.assets import find_assets, require_units_manifest

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
