"""`most-ray sweep`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from rich.console import Console

from most_ray import config as configuration
from most_ray.cli.job_files import resolve_paths
from most_ray.cli.parser import add_command


def add(commands: Any) -> None:
    from most_ray.sweep import options

    sweep = add_command(commands, "sweep", _sweep, "find the best settings by many short runs; the same name resumes")
    text = "YAML file with `space`, any of the sweep's keys, and any of a run's, which apply to all trials; flags overrule it"
    sweep.epilog = (
        "The file's `space` lists settings: any of a run's keys, audio_experts (their number), expert_split (contiguous, interleaved or "
        "affinity). Each has {choice: [...]}, {grid: [...]}, {uniform: [low, high]}, {loguniform: [low, high]} or {randint: [low, high]}, "
        "both ends included; short forms: 2..6, [a, b], a | b."
    )
    sweep.add_argument("--config", required=True, help=text)
    options.add_flags(sweep)
    configuration.add_flags(sweep)


def _sweep(args: argparse.Namespace) -> int:
    from most_ray.sweep.options import flag_values, load_sweep

    sweep = load_sweep(args.config, flag_values(args))
    run = resolve_paths(sweep.run)
    sweep = replace(sweep, run=run, values={name: getattr(run, name) for name in {**sweep.values, "output_dir": run.output_dir}})
    from most_ray.service.tune.runner import run_sweep

    run_sweep(sweep, Console(width=None if sys.stdout.isatty() else 140))  # a log file has no width
    return 0
