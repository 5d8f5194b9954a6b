"""`most-ray doctor` and `most-ray submit`; `most-ray jobs` is in a module of its own."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from most_ray import config as configuration
from most_ray.cli import jobs_command
from most_ray.cli.job_files import as_given
from most_ray.cli.parser import Parser, add_command, add_config, config_of, naming_files
from most_ray.config import OPTIONS, RunConfig
from most_ray.config_files import is_shipped
from most_ray.console.terminal import Terminal, say, write_log
from most_ray.errors import ConfigError, nearest
from most_ray.io import storage

if TYPE_CHECKING:
    from most_ray.service.cluster.job_package import Package

_SUBMITTED = ("train", "sweep", "evaluate", "prepare", "doctor")  # commands that can be jobs
_CREDENTIALS_REMEDY = "Give the cluster's machines a role, or AWS_ACCESS_KEY_ID and the like."
_out = write_log


def add(commands: Any) -> None:
    doctor = add_command(commands, "doctor", _doctor, "check what would fail on this machine or the named cluster, with a remedy for each")
    add_config(doctor, "a run's YAML file (default: the checks of a run without one)", as_given(str))
    configuration.add_flags(doctor, "elsewhere")

    text = "run a command as a job on a cluster and follow it; the same run is never submitted twice at once"
    submit = add_command(commands, "submit", _submit, text)
    submit.epilog = (
        "The command is one of train, sweep, evaluate, prepare and doctor, with its own flags: most-ray submit train --config FILE. "
        "In a job, relative paths that are written to are below MOST_RAY_HOME of the cluster's machines (default: the home folder there)."
    )
    _own_flags(submit)
    submit.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="the command and its flags")
    jobs_command.add(commands)


def _own_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=argparse.SUPPRESS, help=jobs_command.ADDRESS_HELP)
    text = "folder that is sent with the job (default: this one)"
    parser.add_argument("--working_dir", type=as_given(Path), default=argparse.SUPPRESS, help=text)
    parser.add_argument("--detach", action="store_true", default=argparse.SUPPRESS, help="do not follow the job's log")
    text = "show what would be sent with the job, and the largest of it; no cluster is asked"
    parser.add_argument("--what", action="store_true", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--stop", metavar="JOB", default=argparse.SUPPRESS, help="as `most-ray jobs --stop`")


def _submit(args: argparse.Namespace) -> int:
    """Submit a command; the flags of `submit` itself may be given before and after the command's own."""
    own = Parser(prog="most-ray submit", add_help=False)
    _own_flags(own)
    options, command = own.parse_known_args(args.words, argparse.Namespace(**vars(args)))
    address, folder = getattr(options, "address", None), getattr(options, "working_dir", Path()).absolute()
    from most_ray.service.cluster import submit as service
    from most_ray.service.cluster.job_package import package_of

    if name := getattr(options, "stop", None):
        if command:
            raise ConfigError("stop", name, "takes no command: it starts nothing.", "Leave the command out.")
        return service.stop(service.open_client(address), name, _out)
    show_only = getattr(options, "what", False)
    if show_only and not command:
        return _show_package(package_of(folder), [])
    job = _check_command(command, folder)
    package = package_of(folder)
    if job.config:
        package.check_contains(job.config)
    if show_only:
        return _show_package(package, job.reads)
    for sentence in package.omissions(job.reads):
        say(sentence)
    client = service.open_client(address)
    cluster = service.describe_cluster(client)
    base = service.job_name(job.name, job.uri)
    where = f" --address {shlex.quote(storage.redact(address))}" if address else ""
    stop_hint = f"Stop it{' after a checkpoint' if job.resumes else ''}: most-ray submit --stop"
    submission = None
    try:
        submission, new = service.submit(client, base, ["python", "-m", "most_ray.cli", *job.command], package, _out)
        shown = ", ".join(f"{amount:g} {name}" for name, amount in cluster.items()) or "the cluster does not report its resources"
        state = f"{package.amount} are sent" if new else "it is under way already, and is followed"
        _out(f"Job {submission} on {storage.redact(client.get_address())} ({shown}): {state}.\n")
        if getattr(options, "detach", False):
            _out(f"{stop_hint} {submission}{where}. The same command follows it.\n")
            return 0
        return service.follow(client, submission, lambda job: service.why_pending(job, cluster, package), _out)
    except KeyboardInterrupt:
        if submission is None and (submission := service.running_job(client, base, _out)) is None:
            _out("\nInterrupted: the cluster has no job of this run under way. The same command submits it.\n")
            return 130
        _out(f"\nDetached, the job continues. The same command follows it again. {stop_hint} {submission}{where}\n")
        return 0


def _show_package(package: Package, reads: Sequence[tuple[str, str]]) -> int:
    """Print what would be sent with a job, and what stays. Raises ConfigError where it is too large. `reads`: see `_Job`."""
    from most_ray.service.cluster.job_package import size_text

    say(f"{package.amount} of {package.folder} would be sent:")
    for name, size in package.largest:
        say(f"  {size_text(size):>8}  {name}")
    for sentence in package.omissions(reads):
        say(sentence)
    package.check_size()
    return 0


@dataclass(frozen=True)
class _Job:
    """What is submitted."""

    name: str
    uri: str  # what it writes to, which with the name distinguishes it from other jobs
    command: list[str]  # with the path of its configuration as the job will see it
    config: str | None  # that path, where the configuration is sent with the job
    resumes: bool  # whether it resumes from a checkpoint when it is submitted again
    reads: list[tuple[str, str]]  # (flag or key, path or URI) of what it reads


def _check_command(command: list[str], folder: Path) -> _Job:
    """Parse a command and check it, as far as that is possible on this machine. Raises ConfigError where the command, its flags or its
    configuration are wrong, or contain a credential. `folder`: the one that is sent with the job."""
    from most_ray.cli import build_parser  # which imports this module

    if not command or command[0] not in _SUBMITTED:
        rule, remedy = "cannot be submitted.", nearest(command[0] if command else "", _SUBMITTED)
        raise ConfigError("command", command[0] if command else None, rule, remedy)
    if secret := next((word for word in command if storage.redact(word) != word), None):
        rule = "contains credentials, and everyone who can see the cluster can see a job's command."
        raise ConfigError("flag", storage.redact(secret), rule, _CREDENTIALS_REMEDY)
    args = build_parser().parse_args(command)
    if args.command == "prepare" and args.what is None:
        raise ConfigError("command", "prepare", "needs the word for what is prepared.", "See `most-ray prepare --help`.")
    run = _run_of(args)
    name, uri = _identity(args, run)
    config = str(args.config) if getattr(args, "config", None) else None
    inner = _inner(config, folder) if config and not storage.is_remote(config) and not is_shipped(config) else None
    if inner:
        command = _with_config(command, args, inner)
    resumes = args.command == "sweep" or (args.command == "train" and args.dry_run is None)
    return _Job(name, uri, command, inner, resumes, list(_reads(args, run)))


def _with_config(command: list[str], args: argparse.Namespace, inner: str) -> list[str]:
    """A command with the path of its configuration as the job will see it, by --config. `args`: the command, parsed."""
    from most_ray.cli import build_parser  # which imports this module

    if args.file is None:
        pairs = zip(["", *command], command, strict=False)
        return [f"--config={inner}" if word.startswith("--config=") else inner if last == "--config" else word for last, word in pairs]
    # FILE may be any of the words of its name, and the others are values of flags: it is the one without which FILE is missing.
    for index in (index for index, word in enumerate(command) if Path(word).name == Path(args.file).name):
        changed = [*command[:index], f"--config={inner}", *command[index + 1 :]]
        with contextlib.suppress(ConfigError):
            if build_parser().parse_args(changed).file is None:
                return changed
    raise ConfigError("argument", str(args.file), "could also be the value of a flag.", "Name it by --config.")


def _run_of(args: argparse.Namespace) -> RunConfig | None:
    """The run that a command is for; None for a command that has no run. Raises ConfigError where its configuration holds a credential."""
    if args.command == "evaluate" or (args.command == "prepare" and args.what != "store"):
        return None
    with naming_files(args):
        if args.command == "sweep":
            from most_ray.sweep.options import flag_values, load_sweep

            run = load_sweep(args.config, flag_values(args)).run
        else:
            run = configuration.load_config(args.config, configuration.flag_values(args))
    if args.config and not storage.is_remote(args.config) and not is_shipped(args.config):
        redacted = run.redacted()
        _check_secrets(args.config, {name: str(value) for name, value in vars(run).items() if value != getattr(redacted, name)})
    return run


def _reads(args: argparse.Namespace, run: RunConfig | None) -> Iterator[tuple[str, str]]:
    """What a command reads, as (flag or key, path or URI)."""
    for name, value in vars(run or args).items():
        location = OPTIONS[name].location if name in OPTIONS else None
        if (location and location.access == "read") or name in args.read_flags:
            yield from ((name, str(uri)) for uri in (value if isinstance(value, list | tuple) else [value]) if uri)


def _identity(args: argparse.Namespace, run: RunConfig | None) -> tuple[str, str]:
    """A name and a URI that are equal for the same command, and differ between two commands that may run at once."""
    if args.command == "evaluate":
        return f"evaluate-{args.output.stem}", str(args.output)
    if run is None:
        given = vars(args)
        uri = next(str(given[name]) for name in ("output", "output_dir", "records", "config", "what") if given.get(name))
        if args.what == "tts" and args.config:
            from most_ray.records.tts_records import read_conversions

            with contextlib.suppress(OSError):  # as text: a Path has lost one slash of a URI
                _check_secrets(args.config, {"input_dir": args.config.read_text(encoding="utf-8", errors="replace")})
            read_conversions(args.config)
        return f"prepare-{args.what}-{Path(uri).stem}", uri
    uri = str(Path(run.output_dir, run.name))
    if args.command == "prepare":
        return f"prepare-store-{run.name}", (run.store_dir or uri) + " verified" * args.verify
    dry = args.command == "train" and args.dry_run is not None
    return f"doctor-{run.name}" if args.command == "doctor" else f"dry-{run.name}" if dry else run.name, uri


def _check_secrets(config: str | Path, values: dict[str, str]) -> None:
    """Raise ConfigError where a value of a configuration contains a credential."""
    if name := next((name for name, value in values.items() if storage.redact(value) != value), None):
        rule = f"contains credentials ({name}), and the cluster keeps what is sent with a job."
        raise ConfigError("config", storage.redact(str(config)), rule, _CREDENTIALS_REMEDY)


def _inner(config: str, folder: Path) -> str:
    """A configuration's path relative to the folder that is sent with the job. Raises ConfigError where it is not in it."""
    path = storage.local(config).resolve()
    if not path.is_relative_to(folder.resolve()):
        rule = f"is outside of the folder that is sent with the job ({folder})."
        raise ConfigError("config", config, rule, "Copy it into that folder, or name another one by --working_dir.")
    return path.relative_to(folder.resolve()).as_posix()


def _doctor(args: argparse.Namespace) -> int:
    config = config_of(args)
    from most_ray.service.preflight.doctor import examine_run, show

    return show(examine_run(config), Terminal(140))
