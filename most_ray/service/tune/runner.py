"""A sweep from its configuration to its winner: checks and measures everything first, then lets Ray Tune run the trials."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
import ray.exceptions
import torch
from ray import tune
from ray.tune.error import TuneError
from ray.tune.stopper import Stopper
from rich.console import Console

from most_ray.config import OPTIONS, RunConfig, config_from
from most_ray.config_files import SWEEP
from most_ray.console.library_log import LIBRARIES_LOG, divert_native
from most_ray.console.terminal import print_line
from most_ray.errors import ConfigError, count_of
from most_ray.io import storage
from most_ray.io.json_values import json_text, parse_json
from most_ray.io.run_folder import COMMIT, LEDGER, RunFolder
from most_ray.options import current_words, to_plain
from most_ray.report import write_report
from most_ray.runs.job import Job
from most_ray.runs.lifecycle import save_report
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.resolve import Prepared, prepare_run
from most_ray.service.cluster.connection import check_local, check_local_room, cluster_gpus
from most_ray.service.cluster.stop_requests import ShutdownSignal, run_stopped
from most_ray.service.preflight.checks import check_cluster, report_findings
from most_ray.service.tasks.ingest_tasks import ingest_runner
from most_ray.service.training.attempts import RunIncompleteError
from most_ray.service.tune.schedulers import Asha, Fifo, Pbt, Recorder
from most_ray.service.tune.search import NotPickled, Proposals
from most_ray.service.tune.trial_actor import TRAIN, Slots, TrialActor
from most_ray.service.tune.trial_resources import ACTOR_CPUS, TrialResources
from most_ray.sweep.ledger import BEST, KEPT, LedgerFile, Trial, commands_of, kept_uri, ranked
from most_ray.sweep.measure import Affinity, measure_affinity, step_seconds
from most_ray.sweep.options import SWEEP_OPTIONS, Sweep
from most_ray.sweep.screens import last_screen, start_screen, trial_line
from most_ray.sweep.space import parse_space
from most_ray.sweep.trials import StartModel, TrialBase, estimate, first_valid, start_config, start_keys
from most_ray.trackers.select import wandb_key, with_environment

AFFINITY = "affinity.json"  # in the sweep's folder: what was measured of the starting models
_ROOM_TIMEOUT_S = 30 * 86400.0  # default of a trial's room_timeout_s: a trial that gave up would lose its result
_EVALUATION_LAG = 2  # evaluations by which population based training may trail a run
_ACTOR_FAILURES = 3  # losses of a trial's actor, as with its node, after which the trial is started again


def run_sweep(sweep: Sweep, console: Console) -> dict[str, Any]:
    """Run all trials that have not ended; a sweep of the same name resumes. Returns the summary. Raises UserError where the user can fix
    something, the sweep was asked to stop, or all its trials failed."""
    check_local_room(sweep.run)
    check_local(sweep.run)
    check_outputs(sweep.run)
    with_environment(sweep.run)  # which checks WANDB_MODE: the trials get it
    uri = sweep.run.run_uri
    others = [name for name in ("metrics.jsonl", "checkpoints", "parts", "config.yaml") if storage.exists(storage.join(uri, name))]
    if others and not storage.exists(storage.join(uri, LEDGER)):
        rule = f"is taken: {storage.redact(uri)} holds {others[0]}, and is not a sweep's."
        raise ConfigError("name", sweep.run.name, rule, "Choose another name.")
    folder = RunFolder(uri)
    divert_native(folder.local / LIBRARIES_LOG)
    with contextlib.closing(LedgerFile(folder)) as file, ShutdownSignal().on_sigterm() as shutdown:
        return _run(sweep, folder, file, console, shutdown)


def _run(sweep: Sweep, folder: RunFolder, file: LedgerFile, console: Console, shutdown: ShutdownSignal) -> dict[str, Any]:
    _check_unchanged(sweep, file)
    if cluster_gpus(sweep.run) is not None:
        shutdown.install()
        report_findings(check_cluster(sweep.run), console)
    models = {key: start_config(sweep, key) for key in start_keys(sweep)}
    # Before anything is ingested or started, so before the experts' affinity to text is known: any order serves this check.
    first_valid(TrialBase(sweep, {key: StartModel(model, range(model.n_routed_experts)) for key, model in models.items()}, {}))
    starts = {key: _prepare(sweep, key) for key in models}
    prepared = next(iter(starts.values()))
    left = max(0, sweep.max_trials - len(file.ledger.trials)) + len(file.ledger.in_state("open"))
    if left > 0:
        resources = TrialResources(sweep, prepared, left, file.ledger.sweep.get("shared"))
        jobs = {key: replace(each.job, threads=resources.threads) for key, each in starts.items()}
        affinities, step_s = _measure_starts(folder, jobs, resources.use_gpu, sweep)
        orders = {key: affinities[key].order if key in affinities else None for key in models}
        setting = TrialBase(sweep, {key: StartModel(model, orders[key]) for key, model in models.items()}, resources.shared)
        cost = estimate(sweep, prepared.job.total_steps, left, resources.concurrent, step_s)
        storage.write_bytes(folder.at(SWEEP), sweep.to_yaml(moves=True).encode())
        file.write("sweep", **_description(sweep, prepared.job, resources, file))
        start_screen(sweep, file.ledger, folder.uri, prepared.job, resources.description, list(affinities.values()), cost, console)
        out_of_time = _search(setting, prepared.job, folder, file, resources.concurrent, console, shutdown)
        if shutdown.is_set():
            raise run_stopped("was received: the running trials have stopped after a checkpoint.", shutdown.name)
        if out_of_time:
            text = f"max_hours = {sweep.options.max_hours:g} are used up; the same command with a higher value resumes."
            print_line(console, text)
    else:
        print_line(console, f"All {count_of(len(file.ledger.trials), 'trial')} of {sweep.run.name!r} have ended; nothing to do.")
    return _finish(sweep, folder, file, console)


def _check_unchanged(sweep: Sweep, file: LedgerFile) -> None:
    """Raise ConfigError where the ledger's trials could not be compared with this sweep's, because a key has changed."""
    before, now = current_words(OPTIONS, file.ledger.sweep.get("fixed") or {}), _fixed(sweep)
    if "space" in before:  # earlier versions kept numbers where this one keeps their text
        before["space"], now["space"] = parse_space(before["space"]), sweep.space
    # A key that only one of the two has belongs to another version, and its default does what that version did. A folder may be renamed.
    if changed := sorted(name for name in {*before} & {*now} - {"name"} if before[name] != now[name]):
        rule = f"is the name of a sweep with {'another value' if len(changed) == 1 else 'other values'} of {', '.join(changed)}."
        raise ConfigError("name", sweep.run.name, rule, "Choose a new name, or put back what was changed.")


def _fixed(sweep: Sweep) -> dict[str, Any]:
    """The keys that must be equal in all starts of a sweep, as plain JSON values."""
    run, options = vars(sweep.run.redacted()), vars(sweep.options)
    kept = {name: value for name, value in {**run, **options}.items() if not {**OPTIONS, **SWEEP_OPTIONS}[name].inert}
    content = {**kept, "objectives": [str(objective) for objective in sweep.objectives], "space": dict(sweep.raw_space)}
    return parse_json(json.dumps(content))


def _prepare(sweep: Sweep, key: str) -> Prepared:
    """Prepare what all trials of one starting model (`key`: see `start_key`) share: make a run's checks, ingest its data, build the
    model."""
    base = sweep.run
    name = "start" + "".join(f"-{value}" for value in parse_json(key).values() if isinstance(value, int))
    changes = {**parse_json(key), "output_dir": base.run_uri, "name": name, "store_dir": base.store_uri}
    return prepare_run(config_from({**sweep.values, **changes}), ingest_runner, gpus=cluster_gpus(base))


def _measure_starts(folder: RunFolder, jobs: Mapping[str, Job], use_gpu: bool, sweep: Sweep) -> tuple[dict[str, Affinity], float | None]:
    """Measure the starting models, by a run from each, on a GPU where the trials use GPUs. Returns how much text each model's experts
    carry, by `start_key`, where trials split experts by affinity; it is measured once and kept in the sweep's folder. And the seconds of a
    training step (None: it does not fit)."""
    splits = next((d.values for d in sweep.space.dimensions if d.name == "expert_split"), ())
    known = _read_affinities(folder) if "affinity" in splits else {}
    wanted = [key for key in jobs if "affinity" in splits and key not in known]
    if use_gpu:
        task = ray.remote(num_cpus=1, num_gpus=1, max_retries=0, max_calls=1)(_measure)
        found, step_s = ray.get(task.remote(dict(jobs), wanted))
    else:
        found, step_s = _measure(jobs, wanted)
    if found:
        known |= found
        content = {**asdict(next(iter(known.values()))), "starts": {key: asdict(each) for key, each in known.items()}}
        storage.write_bytes(folder.at(AFFINITY), json.dumps(content).encode())
    return known, step_s


def _measure(jobs: Mapping[str, Job], affinities: Sequence[str]) -> tuple[dict[str, Affinity], float | None]:
    first = next(iter(jobs.values()))
    device = torch.device("cuda" if torch.cuda.is_available() and first.config.use_gpu is not False else "cpu")
    return {key: measure_affinity(jobs[key], device) for key in affinities}, step_seconds(first, device)


def _read_affinities(folder: RunFolder) -> dict[str, Affinity]:
    """The affinities that an earlier start has measured; empty where there are none, which are then measured."""
    try:
        return {key: Affinity(**each) for key, each in parse_json(storage.read_bytes(folder.at(AFFINITY)))["starts"].items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _description(sweep: Sweep, job: Job, resources: TrialResources, file: LedgerFile) -> dict[str, Any]:
    """The ledger's line for this start of the sweep."""
    before = file.ledger.sweep.get("full")
    return {
        "name": sweep.run.name,
        "objectives": [str(objective) for objective in sweep.objectives],
        "dimensions": [dimension.described() for dimension in sweep.space.dimensions],
        "search": sweep.options.search,
        "scheduler": sweep.options.scheduler,
        "max_trials": sweep.max_trials,
        "max_steps": job.total_steps,
        "concurrent": resources.concurrent,
        "full": dict(sweep.overruled) if before is None else before,
        "shared": resources.shared,
        "fixed": _fixed(sweep),
    }


class TimeBudgetStopper(NotPickled, Stopper):
    """Ends the sweep on a signal, or at `deadline` (seconds of the monotonic clock; None: no limit)."""

    def __init__(self, shutdown: ShutdownSignal, deadline: float | None) -> None:
        self._shutdown, self._deadline = shutdown, deadline

    def __call__(self, _trial_id: str, _result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._shutdown.is_set() or self.out_of_time

    @property
    def out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def _search(
    setting: TrialBase, job: Job, folder: RunFolder, file: LedgerFile, concurrent: int, console: Console, shutdown: ShutdownSignal
) -> bool:
    """Run the trials until all have ended. Returns whether the time was up before that."""
    sweep, options = setting.sweep, setting.sweep.options
    left_s = options.max_hours * 3600 - file.ledger.spent_s if options.max_hours else None
    stopper = TimeBudgetStopper(shutdown, None if left_s is None else time.monotonic() + left_s)

    def on_update(trial: Trial) -> None:
        print_line(console, trial_line(trial, sweep.objectives))

    recorder, proposals = Recorder(file, on_update, job.total_steps), Proposals(setting, file, on_update)
    search: dict[str, Any] = {"search_alg": proposals, "num_samples": sweep.max_trials, "max_concurrent_trials": concurrent}
    scheduler: Any = Fifo(recorder, job.total_steps)
    space: dict[str, Any] = {}
    slots = None
    if options.scheduler == "asha":
        scheduler = Asha(recorder, sweep, job.total_steps, file.ledger.trials)
    elif options.scheduler == "pbt":  # takes no searcher: its population is complete from the beginning
        specs = list(iter(proposals.next, None))
        if not specs:
            return False
        synchronous = len(specs) > concurrent
        scheduler = Pbt(recorder, setting, job.total_steps, file, folder.uri, synchronous)
        search, space = {"num_samples": 1}, {"spec": tune.grid_search(specs)}
        slots = ray.remote(num_cpus=0)(Slots).remote(concurrent) if synchronous else None
    actor = tune.with_parameters(TrialActor, common={**_common(setting, folder), "slots": slots})
    with _quiet_tune():
        tuner = tune.Tuner(
            tune.with_resources(actor, {"CPU": ACTOR_CPUS}),
            param_space=space,
            tune_config=tune.TuneConfig(scheduler=scheduler, **search),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder.uri,
                stop=stopper,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=_ACTOR_FAILURES),
            ),
        )
        shutdown.install()
        try:
            with shutdown.grace_period():
                tuner.fit()
        except (TuneError, ray.exceptions.RayError) as error:
            rule = f"was cut short ({str(error).strip().splitlines()[-1]})."
            raise RunIncompleteError("sweep", sweep.run.name, rule, "Run the same command again to resume.") from error
        finally:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be gone with its node
                if slots is not None:
                    ray.kill(slots)
            storage.remove(folder.at("tune"))
    return stopper.out_of_time and bool(file.ledger.in_state("open"))


def _common(setting: TrialBase, folder: RunFolder) -> dict[str, Any]:
    """What all trials' actors are given (see `TrialActor`), as plain values: an actor starts without torch."""
    config = setting.config({}, "trial")
    values = {**setting.sweep.values, **{name: getattr(config, name) for name in ("output_dir", "store_dir", "wandb_group")}}
    plain = to_plain(values)
    if "room_timeout_s" not in values:
        plain["room_timeout_s"] = _ROOM_TIMEOUT_S
    if setting.sweep.options.scheduler == "pbt":  # a checkpoint stays until it is evaluated and others have begun with it
        saves = math.ceil(_EVALUATION_LAG * (config.eval_steps or 1) / config.save_steps) + _EVALUATION_LAG
        plain["keep_last"] = max(config.keep_last, saves)
    return {
        "values": {**plain, "ray_address": ray.get_runtime_context().gcs_address},
        "sweep_uri": folder.uri,
        "directory": os.getcwd(),
        "environment": _tracking_environment(setting.sweep.run),
        "train": TRAIN,
        "objectives": [objective.metric for objective in setting.sweep.objectives],
    }


def _tracking_environment(config: RunConfig) -> dict[str, str]:
    """Variables of W&B that trials are started with, as this process has them."""
    found = {"WANDB_API_KEY": key.reveal()} if (key := wandb_key(config)) else {}
    return found | {name: os.environ[name] for name in ("WANDB_MODE",) if os.environ.get(name)}


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Turn off Tune's files, tables and advice within the block: the ledger and the sweep's own lines report what happens."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    levels = {each: each.level for each in map(logging.getLogger, ("ray.tune", "ray.air", "ray.train"))}
    for each in levels:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in levels.items():
            each.setLevel(level)
        for name in settings:
            os.environ.pop(name, None)
        os.environ.update(before)


def _finish(sweep: Sweep, folder: RunFolder, file: LedgerFile, console: Console) -> dict[str, Any]:
    """Write best.yaml, summary.json and the report, and show the last screen. Returns the summary. Raises RunIncompleteError where all
    trials failed."""
    ledger, objective = file.reread(), sweep.objectives[0]
    order = ranked(ledger.trials.values(), objective)
    best = next((trial for trial in order if trial.state == "finished"), None)
    winner: dict[str, Any] | None = None
    if best:
        winner = {"trial": best.number, "run": best.runs[-1], "values": best.values, "step": best.step, "metrics": best.results[-1].metrics}
        value = best.metric(objective.metric)
        why = f"Trial {best.number} of the sweep {sweep.run.name}: {objective.metric} = {value!r} after {count_of(best.step, 'step')}."
        storage.write_bytes(folder.at(BEST), TrialBase(sweep, {}, {}).best_yaml(best, why, moves=True).encode())
    _remove_kept(folder, file)
    summary = {
        "name": sweep.run.name,
        "objectives": [str(each) for each in sweep.objectives],
        "trials": {state: len(ledger.in_state(state)) for state in ("finished", "stopped", "failed", "open")},
        "best": winner,
        "commands": commands_of(ledger, ".", sweep.run.name, best.runs[-1]) if best else {},  # in the sweep's folder
        "hours": round(ledger.spent_s / 3600, 4),
        "report": "report.html",
    }
    storage.write_bytes(folder.at("summary.json"), json_text(summary, indent=1).encode())
    save_report(folder, write_report)
    commands = commands_of(ledger, folder.uri, sweep.run.name, best.runs[-1]) if best else {}
    summary |= {"commands": commands, "report": storage.redact(folder.at("report.html"))}
    last_screen(ledger, sweep.objectives, summary, console)
    if ledger.trials and not best and not ledger.in_state("open", "stopped"):
        rule = f"failed, all {len(ledger.trials)} of them; the last: {list(ledger.trials.values())[-1].reason}"
        raise RunIncompleteError("trials", None, rule, "Their logs are in trials/*/train.log.")
    return summary


def _remove_kept(folder: RunFolder, file: LedgerFile) -> None:
    """Remove the checkpoints that were kept for other trials, once no trial is open; except those that a trial's last run began with,
    because best.yaml may name one."""
    if file.ledger.in_state("open"):
        return
    parents = [trial.parents[-1] for trial in file.ledger.trials.values() if trial.parents]
    wanted = {kept_uri(folder.uri, parent["run"], parent["step"]) for parent in parents if parent}
    kept = folder.at(KEPT)
    if not wanted:
        storage.remove(kept)
    uris = {storage.parent(entry.uri) for entry in storage.list_files(kept, (COMMIT,))} if storage.exists(kept) else set()
    for uri in uris - wanted:
        storage.remove(uri)
