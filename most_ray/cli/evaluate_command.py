"""`most-ray evaluate`: scores a model, or scores stored hypotheses again."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from most_ray import config as configuration
from most_ray.cli.job_files import as_given, to_read, to_write
from most_ray.cli.parser import AGAIN, add_command, check_model, check_records, config_of_flags
from most_ray.console.terminal import say, say_meanwhile
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.outputs import check_file
from most_ray.large_imports import at_once
from most_ray.options import add_flag, flag_values
from most_ray.runs.evaluator_checks import check_evaluators
from most_ray.runs.room import check_evaluation_room

# Flags that are keys of the configuration; some have a shorter name here, where everything concerns evaluation.
_KEYS = {
    "normaliser": "normaliser",
    "batch_size": "eval_batch_size",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "max_new_tokens": "max_new_tokens",
    "max_new_units": "max_new_units",
    "recogniser": "recogniser",
    "vocoder": "vocoder",
    "num_workers": "eval_workers",
    "gpus": "eval_gpus",
    "ray_address": "ray_address",
    "max_rejected_fraction": "max_rejected_fraction",
    "store_dir": "store_dir",
}


def add(commands: Any) -> None:
    parser = add_command(commands, "evaluate", _evaluate, "measure word error rates and losses of a model", AGAIN)
    parser.add_argument("--model", type=to_read(str), help="a run's folder (its export), model folder, checkpoint, or hf:OWNER/NAME")
    for task, what in (("asr", "ASR"), ("tts", "TTS"), ("text", "text-only")):
        text = f"directories of {what} records, paths or URIs"
        parser.add_argument(f"--{task}_dirs", type=to_read(str), nargs="+", default=[], help=text)
    text = "JSON file for the results; OUTPUT.hypotheses.jsonl is written beside it"
    parser.add_argument("--output", type=to_write(Path), required=True, help=text)
    parser.add_argument("--rescore", type=as_given(str), metavar="FILE", help="score a hypotheses.jsonl again, without a model")
    helps = {
        "normaliser": f"of references and hypotheses (default: {configuration.EvaluationOptions.normaliser}; of --rescore: the file's)",
        "vocoder": "turns the units of that speech into sound for it (default: the model's own)",
        "num_workers": "processes that share the records, through Ray (default: 1, without Ray)",
        "gpus": "GPUs of each of several workers (default: 0)",
        "max_rejected_fraction": "largest fraction of bad records",
        "store_dir": "where token stores are kept (default: beside the output)",
    }
    for flag, key in _KEYS.items():
        add_flag(parser, configuration.OPTIONS[key], flag, helps.get(flag, ""))


def _evaluate(args: argparse.Namespace) -> int:
    from most_ray.evaluation.hypotheses import HYPOTHESES, RESULT, hypotheses_path

    if args.output.name.endswith(".hypotheses.jsonl"):
        raise ConfigError("output", str(args.output), "is a name of hypotheses, which are written beside the output.", "Name a JSON file.")
    if args.rescore:
        return _rescore(args)
    check_file("output", args.output, RESULT)
    check_file("output", hypotheses_path(args.output), HYPOTHESES)
    if not args.model:
        raise ConfigError("model", None, "is needed: a model folder, a checkpoint, or hf:OWNER/NAME on the hub.")
    if not (args.asr_dirs or args.tts_dirs or args.text_dirs):
        raise ConfigError("asr_dirs", None, "or tts_dirs or text_dirs is needed: name at least one directory of records.")
    config = config_of_flags(args, _KEYS)
    if config.eval_gpus and config.eval_workers == 1:
        raise ConfigError("gpus", config.eval_gpus, "is for several workers: one uses the GPU where there is one.", "Set num_workers.")
    if config.vocoder and not config.recogniser:
        raise ConfigError("vocoder", config.vocoder, "is used only with a recogniser.", "Name one, or leave it out.")
    if config.eval_workers > 1:
        check_evaluation_room(config, "num_workers", "gpus")
    check_evaluators(config)
    args.model = check_model(args.model)
    for flag in ("asr_dirs", "tts_dirs", "text_dirs"):
        check_records(flag, getattr(args, flag))
    say_meanwhile("Loading torch and transformers")
    with at_once():
        from most_ray.evaluation.evaluate import Directories
        from most_ray.evaluation.inline import EvaluationJob
        from most_ray.evaluation.scoring import EvaluationSettings
        from most_ray.service.cluster.connection import check_evaluation_gpus, start_ray
        from most_ray.service.tasks.evaluation_tasks import evaluate_checkpoint

    # Tasks have another working directory.
    directories = Directories(*(tuple(map(storage.absolute, dirs)) for dirs in (args.asr_dirs, args.tts_dirs, args.text_dirs)))
    store_dir = storage.absolute(config.store_dir or args.output.absolute().parent / "store")
    model = storage.absolute_if_exists(args.model)
    if config.eval_workers > 1:
        start_ray(replace(config, eval_gpus=0.0), 1, config.eval_workers, False)  # GPUs are checked next, by the name of their flag
        check_evaluation_gpus("gpus", config.eval_gpus, config.eval_gpus * config.eval_workers)
    job = EvaluationJob(directories, EvaluationSettings.of(config), store_dir, config.eval_workers, config.eval_gpus)
    evaluation = evaluate_checkpoint(job, model)
    evaluation.write(args.output)
    return _show_evaluation(evaluation.result, args.output)


def _rescore(args: argparse.Namespace) -> int:
    if os.path.exists(args.output) and os.path.exists(args.rescore) and os.path.samefile(args.output, args.rescore):
        raise ConfigError("output", str(args.output), "is the file that is scored: it would be lost.", "Name another.")
    given = flag_values(args, _KEYS)
    config_of_flags(args, _KEYS)  # wrong values of flags that have no use here are errors too
    if given.get("recogniser") or given.get("vocoder"):
        raise ConfigError("rescore", args.rescore, "runs no recogniser: recogniser and vocoder are for the evaluation of a model.")
    if args.model or args.asr_dirs or args.tts_dirs or args.text_dirs:
        raise ConfigError("rescore", args.rescore, "takes neither a model nor directories: the file holds what was decoded.")
    from most_ray.evaluation.hypotheses import RESULT, rescore, write_result

    check_file("output", args.output, RESULT)
    result = rescore(args.rescore, given.get("normaliser"))
    write_result(args.output, result)
    return _show_evaluation(result, args.output)


def _show_evaluation(result: dict[str, Any], output: Path) -> int:
    from most_ray.evaluation.hypotheses import result_lines

    for line in (*result_lines(result), str(output)):
        say(line)
    return 0
