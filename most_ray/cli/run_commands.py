"""Commands for runs, models and sweeps: init-model, train, plan, report, export, sweep."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from most_ray import config as configuration
from most_ray.cli import from_audio
from most_ray.cli.job_files import as_given, resolve_paths, to_read, to_write
from most_ray.cli.parser import AGAIN, add_command, add_config, check_records, config_of, naming_files, number
from most_ray.console.help import mark
from most_ray.console.terminal import LOG_WIDTH, Terminal, say, say_meanwhile
from most_ray.errors import ConfigError, DataError, count_of
from most_ray.io import storage
from most_ray.io.journal import TRACE
from most_ray.io.json_values import json_text
from most_ray.io.outputs import check_file, check_new_folder, replacing, replacing_folder
from most_ray.io.run_folder import checkpoint_source
from most_ray.large_imports import at_once
from most_ray.options import MOST_SEED, NOT_NEGATIVE
from most_ray.presets import check_preset

_MOST_PLANNED = 1_000_000  # steps that `plan` lists at once


def add(commands: Any) -> None:
    from most_ray.sweep import options as sweep_options

    init = add_command(commands, "init-model", _init_model, "make a starting model with its tokenizer", AGAIN)
    init.add_argument("--preset", help="name of a new model's size (tiny)")
    init.add_argument(
        "--from_deepseek", metavar="DIR_OR_NAME", help="start from DeepSeek-V2 in Hugging Face layout, a folder or hf:OWNER/NAME"
    )
    init.add_argument("--records", type=to_read(str), nargs="+", default=[], help="directories of records whose text the tokenizer learns")
    init.add_argument("--output", type=to_write(Path), required=True, help="folder for the model")
    init.add_argument("--seed", action=number(int, NOT_NEGATIVE, MOST_SEED), default=0, help="of the weights (default: 0)")

    train = add_command(
        commands, "train", _train, "train a run in OUTPUT_DIR/NAME; the same name resumes", "the same command starts or resumes the run"
    )
    add_config(train, "YAML file of a run's keys, which flags overrule", as_given(str), shipped="run")
    text = "describe the run with its memory, checkpoints and time on a DEVICE, as H100 or cpu, and start nothing"
    default = "(default: this machine's GPU or CPU; H100 for a run on GPUs where there is none)"
    dry_run = train.add_argument("--dry_run", nargs="?", const="", metavar="DEVICE", help=f"{text} {default}")
    mark(dry_run, "describe the run on a DEVICE and start nothing")
    from_audio.add_flags(train)
    configuration.add_flags(train)

    plan = add_command(commands, "plan", _plan, "list the records of each step, without training", AGAIN)
    add_config(plan, "the run's YAML file", as_given(str))
    plan.add_argument("--steps", default="0:20", help="range of steps as FROM:TO, TO included, counted from 1 (default: 0:20)")
    plan.add_argument("--trace", type=as_given(Path), required=True, help="file for the lines that `train --trace_records` would write")
    configuration.add_flags(plan, "elsewhere")

    report = add_command(commands, "report", _report, "write an HTML page about one run, several runs side by side, or a sweep", AGAIN)
    report.add_argument("runs", type=as_given(str), nargs="+", metavar="RUN", help="folders of runs, or of one sweep; paths or URIs")
    text = "folder of the recordings that were evaluated, to play the worst recognised ones (default: where their records say)"
    report.add_argument("--audio", type=as_given(Path), metavar="DIR", help=text)
    report.add_argument("--output", type=to_write(Path), help="HTML file (default: RUN/report.html; for several runs report.html)")

    export = add_command(commands, "export", _export, "convert a checkpoint to Hugging Face layout", AGAIN)
    text = "a run's folder (its newest checkpoint), or a step-... folder of its checkpoints/"
    export.add_argument("--checkpoint", type=to_read(str), required=True, help=text)
    export.add_argument("--output", type=to_write(Path), required=True, help="folder for the model")

    text = "find the best settings by many short runs; the same name resumes"
    sweep = add_command(commands, "sweep", _sweep, text, "what the trials have reached is kept, the same command resumes")
    sweep.epilog = (
        "The file's `space` lists settings: any of a run's keys, audio_experts (their number), expert_split (contiguous, interleaved or "
        "affinity). Each has {choice: [...]}, {grid: [...]}, {uniform: [low, high]}, {loguniform: [low, high]} or {randint: [low, high]}, "
        "both ends included; short forms: 2..6, [a, b], a | b."
    )
    text = "YAML file with `space`, any of the sweep's keys, and any of a run's, which apply to all trials; flags overrule it"
    add_config(sweep, text, as_given(str), needed=True, shipped="sweep")
    sweep_options.add_flags(sweep)
    configuration.add_flags(sweep, "elsewhere")


def _init_model(args: argparse.Namespace) -> int:
    if (args.preset is None) == (args.from_deepseek is None):
        raise ConfigError("preset", args.preset, "or from_deepseek is needed to start from, exactly one of them.")
    check_records("records", args.records)
    if args.preset:
        check_preset(args.preset)
    if args.preset and not args.records:
        raise ConfigError("records", None, "is needed with preset: the tokenizer learns from the records' text.")
    check_new_folder("output", args.output)
    say_meanwhile("Loading torch and transformers")
    with at_once():
        from most_ray.model.build import from_deepseek, init_model
        from most_ray.runs.resolve import texts_of

    with replacing_folder("output", args.output) as folder:
        if args.preset:
            model = init_model(args.preset, (text for path in args.records for text in texts_of(path)), folder, args.seed)
        else:
            model = from_deepseek(args.from_deepseek, folder)
    say(f"{count_of(model.num_parameters(), 'parameter')}, vocabulary of {model.config.vocab_size}: {args.output}")
    return 0


def _train(args: argparse.Namespace) -> int:
    for name in ("corpus", "features"):
        if getattr(args, name) and not args.from_audio:
            raise ConfigError(name, getattr(args, name), "is used only with from_audio: it describes the recordings.")
    if args.from_audio and args.dry_run is not None:
        raise ConfigError("dry_run", args.dry_run, "does not go with from_audio, which has no records yet.", "Name its run.yaml as config.")
    if args.from_audio:
        args.config = from_audio.prepare(args, configuration.flag_values(args), _echoed)
    config = config_of(args)
    console = Terminal(LOG_WIDTH)
    if args.dry_run is not None:
        from most_ray.runs.first_checks import check_sizes

        check_sizes(config)
        say_meanwhile("Loading torch and transformers")
        with at_once():
            from most_ray.planner.dry_run import dry_run
        from most_ray.planner.screen import dry_screen

        dry_screen(dry_run(config, args.dry_run), console)
        return 0
    from most_ray.service.training.start import run_training  # Ray only after the first checks

    summary = run_training(config, console)
    from most_ray.console.run_screens import last_screen
    from most_ray.runs.first_checks import placed

    last_screen(placed(summary, config.run_uri), console)
    return 0


def _echoed(words: Sequence[str]) -> None:
    """Print a command and run it. Raises DataError where its exit code is not 0."""
    from most_ray.cli import build_parser  # which imports this module

    say(f"most-ray {shlex.join(words)}")
    args = build_parser().parse_args(words)
    if code := args.run(args):
        raise DataError("command", shlex.join(words), f"ended with exit code {code}.")
    say("")


def _plan(args: argparse.Namespace) -> int:
    match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", args.steps)
    first, last = (max(1, int(match[1])), int(match[2])) if match else (1, 0)
    if first > last:
        raise ConfigError("steps", args.steps, "is not a range FROM:TO of steps, which are counted from 1.")
    if last - first >= _MOST_PLANNED:
        raise ConfigError("steps", args.steps, f"holds more than {_MOST_PLANNED:,} steps.", "Give several ranges, one after the other.")
    check_file("trace", args.trace, TRACE)
    config = config_of(args)
    from most_ray.runs.first_checks import first_checks

    first_checks(config)
    say_meanwhile("Loading torch and transformers")
    with at_once():
        from most_ray.runs.resolve import prepare_run
        from most_ray.service.tasks.ingest_tasks import ingest_runner

    plan = prepare_run(config, ingest_runner).plan
    lines = ({"step": step, "records": plan.record_ids(plan.step(step))} for step in range(first, last + 1))
    with replacing("trace", args.trace) as temporary, temporary.open("w", encoding="utf-8") as sink:
        sink.writelines(json_text(line) + "\n" for line in lines)
    say(f"steps {first} to {last}: {args.trace}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from most_ray.report import REPORT, write_report

    apart = storage.is_remote(args.runs[0]) or len(args.runs) > 1
    output = args.output or (Path("report.html") if apart else storage.local(args.runs[0]) / "report.html")
    check_file("output", output, REPORT)
    write_report(args.runs, output, args.audio)
    say(str(output))
    return 0


def _export(args: argparse.Namespace) -> int:
    from most_ray.checkpoint import catalog

    checkpoint = checkpoint_source(args.checkpoint)
    if not os.path.lexists(args.output):  # what is there is looked at first, and needs the libraries
        catalog.read_marker(checkpoint)
    say_meanwhile("Loading torch and transformers")
    with at_once():
        from most_ray.checkpoint.export import export_checkpoint

    export_checkpoint(checkpoint, args.output)
    if checkpoint != args.checkpoint:
        say(f"of {checkpoint}, the newest checkpoint")
    say(str(args.output))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from most_ray.sweep.options import flag_values, load_sweep

    with naming_files(args):
        sweep = load_sweep(args.config, flag_values(args))
    run = resolve_paths(sweep.run)
    sweep = replace(sweep, run=run, values={name: getattr(run, name) for name in {**sweep.values, "output_dir": run.output_dir}})
    from most_ray.runs.first_checks import check_directories

    check_directories(run)
    say(f"Sweep {storage.redact(run.run_uri)}: loading torch, transformers and Ray Tune")
    with at_once():
        from most_ray.service.tune.runner import run_sweep

    run_sweep(sweep, Terminal(140))
    return 0
