"""The command line: `most-ray COMMAND --help`. Thin: flags to calls, errors to one paragraph and exit code 2."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import track

from most_ray import config as configuration
from most_ray import storage
from most_ray.errors import CheckpointError, ConfigError, UserError, nearest


class Parser(argparse.ArgumentParser):
    """Errors name the nearest known flag or command; no abbreviations, so that a typo never becomes another flag."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        keywords["allow_abbrev"] = False
        keywords.setdefault("formatter_class", lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=130))
        super().__init__(*args, **keywords)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("--"):
                name = word[2:].split("=", 1)[0]
                raise ConfigError(f"--{name}", None, "is no known flag.", nearest(name, getattr(parsed, "known_flags", [])))
        if unknown:
            raise ConfigError("argument", unknown[0], "belongs to no flag.")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", None, f"{message}.", f"See `{self.prog} --help`.")

    def flag_names(self) -> list[str]:
        return [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]


def build_parser() -> Parser:
    parser = Parser(prog="most-ray", description="Post-train MoST on speech recognition and synthesis.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def add(where: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> Parser:
        command: Parser = where.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    prepare = commands.add_parser("prepare", help="make records", description="Make records.").add_subparsers(
        dest="what", metavar="WHAT", required=True, parser_class=Parser
    )
    _units_flags(add(prepare, "units", _prepare_units, "a folder of audio and transcripts.tsv (path, text, ...) to ASR records"))
    tts = add(prepare, "tts", _prepare_tts, "ASR records to TTS records")
    tts.add_argument("--input_dir", type=Path, required=True, help="directory of ASR records")
    tts.add_argument("--output_dir", type=Path, required=True, help="where the TTS records go")
    tts.add_argument("--dataset_name", required=True, help="goes into the records' metadata")
    tts.add_argument("--file_pattern", default="*", help="which files to convert (default: *)")

    store = add(prepare, "store", _prepare_store, "the token stores of a run's records, as `train` makes them at its first start")
    store.description = _STORE_HELP
    store.add_argument("--config", type=Path, help="YAML file with any of the keys below; flags overrule it")
    store.add_argument("--verify", action="store_true", help="read every byte of the stores and compare it with its checksum")
    configuration.add_flags(store)

    init = add(commands, "init-model", _init_model, "a starting model with its tokenizer")
    init.add_argument("--preset", help="size of a new model (tiny)")
    init.add_argument("--from_deepseek", metavar="DIR_OR_NAME", help="start from DeepSeek-V2 in Hugging Face layout")
    init.add_argument("--records", type=Path, nargs="+", default=[], help="directories of records whose text the tokenizer learns")
    init.add_argument("--output", type=Path, required=True, help="where the model goes")
    init.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")

    train = add(commands, "train", _train, "a training run in OUTPUT_DIR/NAME; the same name resumes")
    train.add_argument("--config", type=Path, help="YAML file with any of the keys below; flags overrule it")
    configuration.add_flags(train)

    plan = add(commands, "plan", _plan, "which records each step will hold, without training")
    plan.add_argument("--config", type=Path, help="the run's YAML file")
    plan.add_argument("--steps", default="0:20", help="range of steps as FROM:TO, TO included, counted from 1 (default: 0:20)")
    plan.add_argument("--trace", type=Path, required=True, help="file for the lines that --trace_records would write")
    configuration.add_flags(plan)

    _evaluate_flags(add(commands, "evaluate", _evaluate, "word error rates and losses of a model"))

    report = add(commands, "report", _report, "a page to look at: one run, or several side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, paths or URIs")
    report.add_argument("--output", type=Path, help="HTML file (default: RUN/report.html; for several runs report.html)")

    export = add(commands, "export", _export, "a checkpoint to Hugging Face layout")
    export.add_argument("--checkpoint", required=True, help="a step-... folder of a run's checkpoints/")
    export.add_argument("--output", type=Path, required=True, help="where the model goes")
    _remember_flags(parser)
    return parser


def _remember_flags(parser: Parser) -> None:
    parser.set_defaults(known_flags=parser.flag_names())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _remember_flags(command)


def _units_flags(parser: Parser) -> None:
    parser.add_argument("--corpus", choices=["folder"], default="folder", help="layout of the input (default: folder)")
    parser.add_argument("--input", type=Path, required=True, help="the corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder for records.jsonl.gz, units.json and kmeans.npy")
    parser.add_argument("--features", choices=["mfcc"], default="mfcc", help="features under the units (default: mfcc)")
    parser.add_argument("--kmeans", type=Path, help="centroids (.npy) to use")
    parser.add_argument("--fit_kmeans", type=int, metavar="K", help="fit K centroids to the selected recordings instead")
    parser.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="take only such rows; != excludes, commas list")
    parser.add_argument("--perturb", default="1.0", help="speeds at which each recording is taken, as 0.9,1.0,1.1 (default: 1.0)")
    parser.add_argument("--speaker_column", default="speaker", help="column that tells speakers apart (default: speaker)")
    parser.add_argument("--name", help="data set name, the start of each id (default: the input folder's)")
    parser.add_argument("--keep_repeats", action="store_true", help="do not remove repeated units")
    parser.add_argument("--seed", type=int, default=0, help="of the k-means (default: 0)")


def _prepare_units(args: argparse.Namespace) -> int:
    from most_ray.speech.corpora import parse_condition
    from most_ray.speech.prepare import UnitsJob, prepare_units

    try:
        perturb = tuple(float(speed) for speed in args.perturb.split(","))
    except ValueError as error:
        raise ConfigError("perturb", args.perturb, "is not a list of numbers as 0.9,1.0,1.1.") from error
    job = UnitsJob(
        input=args.input,
        output=args.output,
        kmeans=args.kmeans,
        fit_kmeans=args.fit_kmeans,
        where=[parse_condition(text) for text in args.where],
        perturb=perturb,
        speaker_column=args.speaker_column,
        name=args.name,
        keep_repeats=args.keep_repeats,
        seed=args.seed,
    )
    console = Console()
    counts = prepare_units(job, lambda items, what, n: _tracked(items, what, n, console))
    print(f"{counts['records']} records ({counts['hours']:.2f} h) of {counts['speakers']} speakers in {args.output}")
    if counts["rejected"]:
        print(f"{counts['rejected']} recordings were set aside: {args.output / 'rejected.jsonl'}")
    return 0


def _tracked(items: Iterable[Any], what: str, total: int, console: Console) -> Iterable[Any]:
    return track(items, what, total=total, console=console, disable=not console.is_terminal)


def _prepare_tts(args: argparse.Namespace) -> int:
    from most_ray.speech.prepare import prepare_tts

    counts = prepare_tts(args.input_dir, args.output_dir, args.dataset_name, args.file_pattern)
    print(f"{counts['records']} TTS records from {counts['files']} files in {args.output_dir}")
    if counts["rejected"]:
        print(f"{counts['rejected']} records were set aside: {args.output_dir / 'rejected.jsonl'}")
    return 0


_STORE_HELP = """Records to token stores: every directory of the configuration is read, checked, tokenised once and written to store_dir.
What is there already is left alone, and where something changed only that is taken in anew. `train` does the same at its first start.
Large inputs are spread over the cluster, as tasks over files and byte ranges; a run that was stopped goes on where it was. Disk cost: 4
bytes a token, and per record 20 bytes and its id: 3.4 KB for a record of 820 tokens, against 5.8 KB as JSON; 68 GB for 20 million of them.
With a store_dir on an object store each node keeps what it reads in MOST_RAY_CACHE_DIR (at most MOST_RAY_CACHE_GB, by default 64)."""


def _prepare_store(args: argparse.Namespace) -> int:
    config = _config(args)
    from most_ray.service.ingest import runner_of
    from most_ray.service.screens import print_stores
    from most_ray.train.prepare import make_stores

    started = time.monotonic()
    stores = make_stores(config, args.verify, runner_of)
    print_stores(stores, time.monotonic() - started, Console())
    return 0


def _init_model(args: argparse.Namespace) -> int:
    from most_ray.model.build import from_deepseek, init_model
    from most_ray.train.prepare import texts_of

    if (args.preset is None) == (args.from_deepseek is None):
        raise ConfigError("preset", args.preset, "or from_deepseek, exactly one of them, says what to start from.")
    if args.preset:
        if not args.records:
            raise ConfigError("records", None, "is needed with preset: the tokenizer learns from the records' text.")
        model = init_model(args.preset, (text for path in args.records for text in texts_of(path)), args.output, args.seed)
    else:
        model = from_deepseek(args.from_deepseek, args.output)
    print(f"{model.num_parameters():,} parameters, vocabulary of {model.config.vocab_size}: {args.output}")
    return 0


def _config(args: argparse.Namespace) -> configuration.RunConfig:
    return configuration.load_config(args.config, configuration.flag_values(args))


def _train(args: argparse.Namespace) -> int:
    config = _config(args)
    from most_ray.service.screens import last_screen
    from most_ray.service.trainer import run_training

    console = Console(width=None if sys.stdout.isatty() else 120)  # a log file has no width of its own
    last_screen(run_training(config, console), console)
    return 0


def _plan(args: argparse.Namespace) -> int:
    match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", args.steps)
    first, last = (max(1, int(match[1])), int(match[2])) if match else (1, 0)
    if first > last:
        raise ConfigError("steps", args.steps, "is not a range FROM:TO of steps, which are counted from 1.")
    if args.trace.is_dir():
        raise ConfigError("trace", str(args.trace), "is a folder.", "Name a file.")
    config = _config(args)
    from most_ray.service.ingest import runner_of
    from most_ray.train.prepare import prepare_run

    plan = prepare_run(config, runner_of).plan
    args.trace.parent.mkdir(parents=True, exist_ok=True)
    with args.trace.open("w", encoding="utf-8") as sink:
        for step in range(first, last + 1):
            sink.write(json.dumps({"step": step, "records": plan.record_ids(plan.step(step))}, ensure_ascii=False) + "\n")
    print(f"steps {first} to {last}: {args.trace}")
    return 0


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
    parser.add_argument("--length_penalty", type=float, default=1.0, help="with beams: score over length to this power (default: 1)")
    parser.add_argument(
        "--num_workers", type=int, default=1, help="processes that share the records out, through Ray (default: 1, without)"
    )
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each of several workers (default: 0)")
    parser.add_argument("--ray_address", help="cluster to use (default: the one of RAY_ADDRESS, else one on this machine)")
    parser.add_argument("--max_rejected_fraction", type=float, default=0.01, help="largest share of bad records (default: 0.01)")
    parser.add_argument("--store_dir", help="where token stores are kept (default: beside the output)")


def _evaluate(args: argparse.Namespace) -> int:
    _check_output(args.output)
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
    if args.model.startswith((".", "/")) and not Path(args.model).exists():
        raise CheckpointError("model", args.model, "does not exist.")
    from most_ray.evaluation.evaluate import Directories
    from most_ray.evaluation.share import EvaluationSettings
    from most_ray.service.cluster import check_evaluation_gpus, start_ray
    from most_ray.service.evaluation import EvaluationJob
    from most_ray.service.validation import evaluate_place

    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = EvaluationSettings(
        args.batch_size,
        args.max_new_tokens,
        args.max_new_units,
        args.num_beams,
        args.length_penalty,
        args.normaliser or configuration.EvaluationOptions.normaliser,
        args.max_rejected_fraction,
    )
    # Tasks have another working directory.
    directories = Directories(*(tuple(map(storage.absolute, dirs)) for dirs in (args.asr_dirs, args.tts_dirs, args.text_dirs)))
    store_dir = storage.absolute(args.store_dir or args.output.absolute().parent / "store")
    model = storage.absolute(args.model) if storage.exists(args.model) else args.model
    if args.num_workers > 1:
        start_ray(configuration.config_from({"ray_address": args.ray_address}), 1, args.num_workers, False)
        check_evaluation_gpus("gpus", args.gpus, args.gpus * args.num_workers)
    evaluation = evaluate_place(EvaluationJob(directories, settings, store_dir, args.num_workers, args.gpus), model)
    evaluation.write(args.output)
    _show_evaluation(evaluation.result, args.output)
    return 0


def _check_output(path: Path) -> None:
    """Before anything is done for it.

    Raises:
        ConfigError: it is no local file's path.
    """
    if re.match(r"[a-z0-9]+:/", str(path)):
        raise ConfigError("output", str(path), "is no local place.", "Name a file on this machine.")
    if path.is_dir():
        raise ConfigError("output", str(path), "is a folder.", "Name a file.")


def _rescore(args: argparse.Namespace) -> int:
    if args.output.exists() and Path(args.rescore).exists() and args.output.samefile(args.rescore):
        raise ConfigError("output", str(args.output), "is the file that is scored: it would be lost.", "Name another.")
    if args.model or args.asr_dirs or args.tts_dirs or args.text_dirs:
        raise ConfigError("rescore", args.rescore, "needs neither a model nor directories: the file holds what was decoded.")
    from most_ray.evaluation.hypotheses import rescore, write_figures

    result = rescore(args.rescore, args.normaliser)
    write_figures(args.output, result)
    _show_evaluation(result, args.output)
    return 0


def _show_evaluation(result: dict[str, Any], output: Path) -> None:
    from most_ray.evaluation.hypotheses import evaluation_lines

    print("\n".join([*evaluation_lines(result), str(output)]))


def _report(args: argparse.Namespace) -> int:
    from most_ray.report import write_report

    apart = storage.is_remote(args.runs[0]) or len(args.runs) > 1
    output = args.output or (Path("report.html") if apart else storage.local(args.runs[0]) / "report.html")
    _check_output(output)
    write_report(args.runs, output)
    print(output)
    return 0


def _export(args: argparse.Namespace) -> int:
    from most_ray.train.export import export_checkpoint

    export_checkpoint(args.checkpoint, args.output)
    print(args.output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. 0: done; 1: a run failed; 2: something that the user can mend; 75: stopped as asked, the same command goes on."""
    # Read when torch loads, here and in the Ray processes that this one starts. Threads that wait without spinning lose nothing on
    # an idle machine, and on a busy one a step is up to 25 times faster (tests/benchmarks/RESULTS.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # progress is seen as it happens, in a log file too
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("most_ray").setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    try:
        args = build_parser().parse_args(argv)
        return int(args.run(args))
    except UserError as error:
        print(f"most-ray: {error.kind}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever reads has had enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        logging.getLogger("most_ray").debug("", exc_info=True)
        print(f"most-ray: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("most-ray: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
