"""`most-ray doctor` and `most-ray submit`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from most_ray import config as configuration
from most_ray import storage
from most_ray.cli.parser import Parser, add_command, config_of
from most_ray.errors import ConfigError, nearest

_SUBMITTED = ("train", "sweep", "evaluate", "prepare", "doctor")


def add(commands: Any) -> None:
    doctor = add_command(commands, "doctor", _doctor, "what would fail here, or on the cluster that is named: each with its remedy")
    doctor.add_argument("--config", help="a run's YAML file (default: what a run without one would need)")
    configuration.add_flags(doctor)

    submit = add_command(commands, "submit", _submit, "a command as a job on a cluster, followed; the same run is never made twice at once")
    submit.epilog = (
        "The command is one of train, sweep, evaluate, prepare and doctor, with its own flags: most-ray submit train --config FILE. "
        "In a job, relative places that are written to lie below MOST_RAY_HOME of the cluster's machines (default: the home folder there)."
    )
    _own_flags(submit)
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="the command and its flags")


def _own_flags(parser: argparse.ArgumentParser) -> None:
    text = (
        "the cluster's dashboard as http://HOST:8265, or its head as HOST:6379 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine)"
    )
    parser.add_argument("--address", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--working_dir", type=Path, default=argparse.SUPPRESS, help="folder that goes along (default: this one)")
    parser.add_argument("--detach", action="store_true", default=argparse.SUPPRESS, help="do not follow the job's log")
    parser.add_argument("--stop", metavar="JOB", default=argparse.SUPPRESS, help="stop a job behind a checkpoint, and wait until it has")


def _submit(args: argparse.Namespace) -> int:
    """Flags of `submit` may stand before and behind the command's own."""
    own = Parser(prog="most-ray submit", add_help=False)
    _own_flags(own)
    options, words = own.parse_known_args(args.words, argparse.Namespace(**vars(args)))
    address, folder = getattr(options, "address", None), getattr(options, "working_dir", Path()).absolute()
    console = Console(width=None if sys.stdout.isatty() else 140)
    from most_ray.service import submit as service

    if name := getattr(options, "stop", None):
        if words:
            raise ConfigError("stop", name, "stands alone: it starts nothing.", "Leave the command out.")
        return service.stop(service.open_client(address), name, console)
    run, place, words = _checked(words, folder)
    package = service.package_of(folder)
    client = service.open_client(address)
    cluster = service.describe_cluster(client)
    base = service.job_name(run, place)
    submission, new = service.submit(client, base, ["python", "-m", "most_ray.cli", *words], package)
    shown = ", ".join(f"{amount:g} {name}" for name, amount in cluster.items())
    going = f"{package.bytes / 2**20:.1f} MiB go along" if new else "it is under way already, and is followed"
    _say(console, f"Job {submission} on {client.get_address()} ({shown or 'the cluster does not say what it has'}): {going}.")
    hints = f"Stop it behind a checkpoint: most-ray submit --stop {submission}"
    if getattr(options, "detach", False):
        _say(console, f"{hints}. The same command follows it.")
        return 0
    try:
        return service.follow(client, submission, lambda job: service.why_pending(job, cluster, package), _out)
    except KeyboardInterrupt:
        _say(console, f"\nDetached, the job goes on. The same command follows it again. {hints}")
        return 0


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _checked(words: list[str], folder: Path) -> tuple[str, str, list[str]]:
    """What is submitted, checked as far as that goes here: the run's name, its place, and the words with the configuration's path as the
    job will see it.

    Raises:
        ConfigError: the command, its flags or its configuration are wrong, or would show a credential.
    """
    from most_ray.cli import build_parser  # which imports this module

    if not words or words[0] not in _SUBMITTED:
        rule, remedy = "is nothing that is submitted.", nearest(words[0] if words else "", _SUBMITTED)
        raise ConfigError("command", words[0] if words else None, rule, remedy)
    if secret := next((word for word in words if storage.redact(word) != word), None):
        rule = "holds credentials, and a job's command is seen by all who see the cluster."
        raise ConfigError("flag", storage.redact(secret), rule, "Give the cluster's machines a role, or AWS_ACCESS_KEY_ID and the like.")
    args = build_parser().parse_args(words)
    if args.command == "prepare" or args.command == "evaluate":
        output = str(getattr(args, "output", ""))
        return f"{args.command}-{Path(output).stem}", output, words
    if args.command == "sweep":
        from most_ray.sweep.options import flag_values, load_sweep

        run = load_sweep(args.config, flag_values(args)).run
    else:
        run = configuration.load_config(args.config, configuration.flag_values(args))
    words = _within(words, args.config, folder) if args.config else words
    name = f"doctor-{os.getpid()}" if args.command == "doctor" else run.name
    return name, str(Path(run.output_dir, run.name)), words


def _within(words: list[str], config: str, folder: Path) -> list[str]:
    """The words with the configuration's path below the folder that goes along.

    Raises:
        ConfigError: it lies elsewhere.
    """
    if storage.is_remote(config):
        return words
    path = storage.local(config).resolve()
    if not path.is_relative_to(folder.resolve()):
        rule = f"lies outside of the folder that goes along ({folder})."
        raise ConfigError("config", config, rule, "Copy it into that folder, or name another one by --working_dir.")
    inner = path.relative_to(folder.resolve()).as_posix()
    return [inner if word == config else f"--config={inner}" if word == f"--config={config}" else word for word in words]


def _doctor(args: argparse.Namespace) -> int:
    config = config_of(args)
    from most_ray.service.doctor import examine_run, show

    return show(examine_run(config), Console(width=None if sys.stdout.isatty() else 140))
