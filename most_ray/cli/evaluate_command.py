"""`most-ray evaluate`, with and without a model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from most_ray import config as configuration
from most_ray.cli.parser import Parser, add_command, check_output
from most_ray.errors import CheckpointError, ConfigError
from most_ray.io import storage


def add(commands: Any) -> None:
    _evaluate_flags(add_command(commands, "evaluate", _evaluate, "word error rates and losses of a model"))


def _evaluate_flags(parser: Parser) -> None:
    default = configuration.EvaluationOptions()
    parser.add_argument("--model", help="model folder, checkpoint or hub name")
    for task, what in (("asr", "ASR"), ("tts", "TTS"), ("text", "text-only")):
        parser.add_argument(f"--{task}_dirs", nargs="+", default=[], help=f"directories of {what} records, paths or URIs")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file for the figures; OUTPUT.hypotheses.jsonl is written beside it"
    )
    parser.add_argument("--rescore", metavar="FILE", help="score a hypotheses.jsonl again, without a model")
    normalisers = ("none", "basic", "whisper-english")
    parser.add_argument(
        "--normaliser", choices=normalisers, help=f"of both sides (default: {default.normaliser}; of --rescore: the file's)"
    )
    for flag, name, what in (
        ("batch_size", "eval_batch_size", "records decoded at once"),
        ("num_beams", "num_beams", "beams of the search (1: greedy)"),
        ("max_new_tokens", "max_new_tokens", "length cap of a text"),
        ("max_new_units", "max_new_units", "length cap of speech"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"{what} (default: {value})")
    parser.add_argument("--recogniser", help="Whisper or CTC checkpoint that transcribes the model's speech as well")
    parser.add_argument("--vocoder", help="what makes that speech sound for it (default: the model's own)")
    parser.add_argument("--length_penalty", type=float, default=1.0, help="with beams: score over length to this power (default: 1)")
    parser.add_argument(
        "--num_workers", type=int, default=1, help="processes that share the records out, through Ray (default: 1, without)"
    )
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each of several workers (default: 0)")
    parser.add_argument("--ray_address", help="cluster to use (default: the one of RAY_ADDRESS, else one on this machine)")
    parser.add_argument("--max_rejected_fraction", type=float, default=0.01, help="largest share of bad records (default: 0.01)")
    parser.add_argument("--store_dir", help="where token stores are kept (default: beside the output)")


def _evaluate(args: argparse.Namespace) -> int:
    check_output(args.output)
    if args.output.name.endswith(".hypotheses.jsonl"):
        raise ConfigError("output", str(args.output), "is a name of hypotheses, which are written beside the output.", "Name a JSON file.")
    if args.rescore:
        return _rescore(args)
    if not args.model:
        raise ConfigError("model", None, "is needed: a model folder, a checkpoint or a hub name.")
    if not (args.asr_dirs or args.tts_dirs or args.text_dirs):
        raise ConfigError("asr_dirs", None, "or tts_dirs or text_dirs is needed: name at least one directory of records.")
    for name in ("batch_size", "max_new_tokens", "max_new_units", "num_beams", "num_workers"):
        if getattr(args, name) < 1:
            raise ConfigError(name, getattr(args, name), "must be at least 1.")
    for name in ("length_penalty", "gpus"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ConfigError(name, getattr(args, name), "must be a number that is not negative.")
    if args.gpus and args.num_workers == 1:
        raise ConfigError("gpus", args.gpus, "is for several workers: one uses the GPU where there is one.", "Set num_workers.")
    if args.vocoder and not args.recogniser:
        raise ConfigError("vocoder", args.vocoder, "is of use only with a recogniser.", "Name one, or leave it out.")
    if args.model.startswith((".", "/")) and not Path(args.model).exists():
        raise CheckpointError("model", args.model, "does not exist.")
    from most_ray.evaluation.evaluate import Directories
    from most_ray.evaluation.inline import EvaluationJob
    from most_ray.evaluation.scoring import EvaluationSettings
    from most_ray.service.cluster.connection import check_evaluation_gpus, start_ray
    from most_ray.service.tasks.evaluation_tasks import evaluate_checkpoint

    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = EvaluationSettings(
        args.batch_size,
        args.max_new_tokens,
        args.max_new_units,
        args.num_beams,
        args.length_penalty,
        args.normaliser or configuration.EvaluationOptions.normaliser,
        args.max_rejected_fraction,
        args.recogniser and storage.absolute_if_exists(args.recogniser),
        args.vocoder and storage.absolute_if_exists(args.vocoder),
    )
    # Tasks have another working directory.
    directories = Directories(*(tuple(map(storage.absolute, dirs)) for dirs in (args.asr_dirs, args.tts_dirs, args.text_dirs)))
    store_dir = storage.absolute(args.store_dir or args.output.absolute().parent / "store")
    model = storage.absolute_if_exists(args.model)
    if args.num_workers > 1:
        start_ray(configuration.config_from({"ray_address": args.ray_address}), 1, args.num_workers, False)
        check_evaluation_gpus("gpus", args.gpus, args.gpus * args.num_workers)
    evaluation = evaluate_checkpoint(EvaluationJob(directories, settings, store_dir, args.num_workers, args.gpus), model)
    evaluation.write(args.output)
    _show_evaluation(evaluation.result, args.output)
    return 0


def _rescore(args: argparse.Namespace) -> int:
    if args.output.exists() and Path(args.rescore).exists() and args.output.samefile(args.rescore):
        raise ConfigError("output", str(args.output), "is the file that is scored: it would be lost.", "Name another.")
    if args.recogniser or args.vocoder:
        raise ConfigError("rescore", args.rescore, "listens to nothing: recogniser and vocoder belong to an evaluation of a model.")
    if args.model or args.asr_dirs or args.tts_dirs or args.text_dirs:
        raise ConfigError("rescore", args.rescore, "needs neither a model nor directories: the file holds what was decoded.")
    from most_ray.evaluation.hypotheses import rescore, write_result

    result = rescore(args.rescore, args.normaliser)
    write_result(args.output, result)
    _show_evaluation(result, args.output)
    return 0


def _show_evaluation(result: dict[str, Any], output: Path) -> None:
    from most_ray.evaluation.hypotheses import result_lines

    print("\n".join([*result_lines(result), str(output)]))
