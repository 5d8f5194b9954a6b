"""A sweep from its configuration to its winner: everything is checked and measured, then Ray Tune carries the trials out."""

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

from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.io import storage
from most_ray.io.run_folder import LEDGER, RunFolder
from most_ray.report import write_report
from most_ray.runs.job import Job
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.resolve import Prepared, prepare_run, store_dir_of
from most_ray.service.cluster.connection import cluster_gpus
from most_ray.service.cluster.stop_requests import ShutdownSignal, run_stopped
from most_ray.service.preflight.checks import check_cluster, report_findings
from most_ray.service.tasks.ingest_tasks import runner_of
from most_ray.service.training.attempts import RunIncompleteError
from most_ray.service.tune.search import Asha, Fifo, OnTrialUpdate, Pbt, Proposals, Recorder, Unsaved
from most_ray.service.tune.trial import TRAIN, Slots, TrialActor
from most_ray.service.tune.trial_resources import ACTOR_CPUS, TrialResources
from most_ray.sweep.ledger import BEST, KEPT, LedgerFile, Trial, commands_of, kept_uri, ranked
from most_ray.sweep.measure import Affinity, measure_affinity, step_seconds
from most_ray.sweep.options import Sweep
from most_ray.sweep.screens import last_screen, start_screen, trial_line
from most_ray.sweep.trials import Setting, Start, estimate, first_valid, start_keys, starting_config
from most_ray.trackers.select import wandb_key

logger = logging.getLogger(__name__)
AFFINITY = "affinity.json"
_PATIENCE_S = 30 * 86400.0  # for room that others have taken: a trial that gave up would be a result lost
_JUDGED_LATE = 2  # evaluations that population based training may be behind a run
_ACTOR_FAILURES = 3  # losses of a trial's actor, as with its node, that the trial goes on after
# What may differ between two starts of a sweep: it changes no trial.
_FREE = (
    "max_trials max_hours max_concurrent_trials output_dir ray_address room_timeout_s max_failures failure_window_s data_timeout_s "
    "wandb_project wandb_mode wandb_tags wandb_group tensorboard load_alert store_dir base keep_last keep_best best_metric"
)


def run_sweep(sweep: Sweep, console: Console) -> dict[str, Any]:
    """Make all trials that are still to be made. The same name goes on where it stopped. Returns the summary.

    Raises:
        UserError: what the user can mend, a sweep that was asked to stop, or one all of whose trials failed.
    """
    check_outputs(sweep.run)
    uri = sweep.run.run_uri
    others = [name for name in ("metrics.jsonl", "checkpoints", "parts", "config.yaml") if storage.exists(storage.join(uri, name))]
    if others and not storage.exists(storage.join(uri, LEDGER)):
        rule = f"is taken: {storage.redact(uri)} holds {others[0]}, and is no sweep's."
        raise ConfigError("name", sweep.run.name, rule, "Choose another name.")
    folder = RunFolder(uri)
    file = LedgerFile(folder)
    try:
        with ShutdownSignal().on_sigterm() as terminated:
            return _run(sweep, folder, file, console, terminated)
    finally:
        file.close()


def _run(sweep: Sweep, folder: RunFolder, file: LedgerFile, console: Console, terminated: ShutdownSignal) -> dict[str, Any]:
    _check_same(sweep, file)
    if cluster_gpus(sweep.run) is not None:
        terminated.install(interrupt=True)
        report_findings(check_cluster(sweep.run), console)
    models = {key: starting_config(sweep, key) for key in start_keys(sweep)}
    # Before anything is taken in or started, so before it is known which experts carry text: any order will do for it.
    first_valid(Setting(sweep, {key: Start(model, range(model.n_routed_experts)) for key, model in models.items()}, {}))
    starts = {key: _prepare(sweep, key) for key in models}
    prepared = next(iter(starts.values()))
    job = prepared.job
    left = max(0, sweep.max_trials - len(file.ledger.trials)) + len(file.ledger.in_state("open"))
    if left > 0:
        allotment = TrialResources(sweep, prepared, left, file.ledger.sweep.get("shared"))
        jobs = {key: replace(each.job, threads=allotment.threads) for key, each in starts.items()}
        affinities, step_s = _measured(folder, jobs, allotment, sweep)
        orders = {key: affinities[key].order if key in affinities else None for key in models}
        setting = Setting(sweep, {key: Start(model, orders[key]) for key, model in models.items()}, allotment.shared)
        cost = estimate(sweep, job.total_steps, left, allotment.concurrent, step_s)
        storage.write_bytes(folder.at("sweep.yaml"), sweep.to_yaml().encode())
        file.write("sweep", **_description(sweep, job, allotment, file))
        start_screen(sweep, file.ledger, folder.uri, job, allotment.where, list(affinities.values()), cost, console)
        cut = _search(setting, job, folder, file, allotment.concurrent, console, terminated)
        if terminated.is_set():
            raise run_stopped("came: trials under way have stopped behind a checkpoint.", terminated.name)
        if cut:
            console.print(f"max_hours = {sweep.options.max_hours:g} are used up; a higher one goes on.", highlight=False, soft_wrap=True)
    else:
        console.print(f"All {len(file.ledger.trials)} trials of {sweep.run.name!r} have ended; nothing to do.", highlight=False)
    return _finish(sweep, folder, file, console)


def _check_same(sweep: Sweep, file: LedgerFile) -> None:
    """Raises ConfigError where a ledger is there of trials that could not be compared with this sweep's."""
    before, now = file.ledger.sweep.get("fixed") or {}, _fixed(sweep)
    # A key that one of them does not have is another version's, whose default is what was always done.
    if changed := sorted(name for name in {*before} & {*now} if before[name] != now[name]):
        rule = f"is the name of a sweep whose {', '.join(changed)} {'was' if len(changed) == 1 else 'were'} another."
        raise ConfigError("name", sweep.run.name, rule, "Choose a new name, or put back what was changed.")


def _fixed(sweep: Sweep) -> dict[str, Any]:
    """What stays the same over all starts of a sweep, JSON-ready."""
    run, options = vars(sweep.run.redacted()), vars(sweep.options)
    kept = {name: value for name, value in {**run, **options}.items() if name not in _FREE.split()}
    content = {**kept, "objectives": [str(objective) for objective in sweep.objectives], "space": dict(sweep.raw_space)}
    made: dict[str, Any] = json.loads(json.dumps(content))
    return made


def _prepare(sweep: Sweep, key: str) -> Prepared:
    """Every check of a run, made once for all trials that start from the same: data taken in, the starting model made."""
    base = sweep.run
    name = "start" + "".join(f"-{value}" for value in json.loads(key).values() if isinstance(value, int))
    changes = {**json.loads(key), "output_dir": base.run_uri, "name": name, "store_dir": store_dir_of(base)}
    return prepare_run(config_from({**sweep.values, **changes}), runner_of, gpus=cluster_gpus(base))


def _measured(
    folder: RunFolder, jobs: Mapping[str, Job], allotment: TrialResources, sweep: Sweep
) -> tuple[dict[str, Affinity], float | None]:
    """What is measured of the starting models: where a trial asks for it, the text that each one's experts carry; and a step's seconds."""
    splits = next((d.values for d in sweep.space.dimensions if d.name == "expert_split"), ())
    known = _read_affinities(folder) if "affinity" in splits else {}
    wanted = [key for key in jobs if "affinity" in splits and key not in known]
    if allotment.use_gpu:
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
    """As an earlier start has measured them."""
    try:
        return {key: Affinity(**each) for key, each in json.loads(storage.read_bytes(folder.at(AFFINITY)))["starts"].items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _description(sweep: Sweep, job: Job, allotment: TrialResources, file: LedgerFile) -> dict[str, Any]:
    """The ledger's line of a start."""
    before = file.ledger.sweep.get("full")
    return {
        "name": sweep.run.name,
        "objectives": [str(objective) for objective in sweep.objectives],
        "dimensions": [dimension.described() for dimension in sweep.space.dimensions],
        "search": sweep.options.search,
        "scheduler": sweep.options.scheduler,
        "max_trials": sweep.max_trials,
        "max_steps": job.total_steps,
        "concurrent": allotment.concurrent,
        "full": dict(sweep.overruled) if before is None else before,
        "shared": allotment.shared,
        "fixed": _fixed(sweep),
    }


class TimeBudgetStopper(Unsaved, Stopper):
    """Ends the sweep when it is asked to, or when its time is up."""

    def __init__(self, terminated: ShutdownSignal, deadline: float | None) -> None:
        self._terminated, self._deadline = terminated, deadline

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        del trial_id, result
        return False

    def stop_all(self) -> bool:
        return self._terminated.is_set() or self.late

    @property
    def late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline


def _search(
    setting: Setting, job: Job, folder: RunFolder, file: LedgerFile, concurrent: int, console: Console, terminated: ShutdownSignal
) -> bool:
    """Until all trials have ended; whether the time was up before."""
    sweep, options = setting.sweep, setting.sweep.options
    left_s = options.max_hours * 3600 - file.ledger.spent_s if options.max_hours else None
    ending = TimeBudgetStopper(terminated, None if left_s is None else time.monotonic() + left_s)
    tell = _teller(sweep, console)
    recorder, proposals = Recorder(file, tell, job.total_steps), Proposals(setting, file, tell)
    search: dict[str, Any] = {"search_alg": proposals, "num_samples": sweep.max_trials, "max_concurrent_trials": concurrent}
    space: dict[str, Any] = {}
    scheduler: Any = Fifo(recorder, job.total_steps)
    slots = None
    if options.scheduler == "asha":
        scheduler = Asha(recorder, sweep, job.total_steps, file.ledger.trials)
    elif options.scheduler == "pbt":  # which takes no search: its population is there from the beginning
        works = list(iter(proposals.next, None))
        if not works:
            return False
        turns = len(works) > concurrent
        scheduler = Pbt(recorder, setting, job.total_steps, file, folder.uri, turns)
        search, space = {"num_samples": 1}, {"work": tune.grid_search(works)}
        slots = ray.remote(num_cpus=0)(Slots).remote(concurrent) if turns else None
    actor = tune.with_parameters(TrialActor, common={**_common(setting, folder), "slots": slots})
    with _quiet_tune():
        tuner = tune.Tuner(
            tune.with_resources(actor, {"CPU": ACTOR_CPUS}),
            param_space=space,
            tune_config=tune.TuneConfig(scheduler=scheduler, **search),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=folder.uri,
                stop=ending,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=_ACTOR_FAILURES),
            ),
        )
        terminated.install(interrupt=True)
        try:
            with terminated.grace_period():
                tuner.fit()
        except (TuneError, ray.exceptions.RayError) as error:
            rule = f"was cut short ({str(error).strip().splitlines()[-1]})."
            raise RunIncompleteError("sweep", sweep.run.name, rule, "The same command goes on.") from error
        finally:
            if slots is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(slots)
            storage.remove(folder.at("tune"))
    return ending.late and bool(file.ledger.in_state("open"))


def _common(setting: Setting, folder: RunFolder) -> dict[str, Any]:
    """What trials' actors need besides their lines: plain values, for an actor shall start without torch."""
    config = setting.config({}, "trial")
    values = {**setting.sweep.values, **{name: getattr(config, name) for name in ("output_dir", "store_dir", "wandb_group")}}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    patience: dict[str, Any] = {} if "room_timeout_s" in setting.sweep.values else {"room_timeout_s": _PATIENCE_S}
    if setting.sweep.options.scheduler == "pbt":  # a checkpoint stays until its evaluation is in and others have taken it up
        saves = math.ceil(_JUDGED_LATE * (config.eval_steps or 1) / config.save_steps) + _JUDGED_LATE
        patience["keep_last"] = max(config.keep_last, saves)
    return {
        "values": {**plain, **patience, "ray_address": ray.get_runtime_context().gcs_address},
        "sweep_uri": folder.uri,
        "directory": os.getcwd(),
        "environment": {"WANDB_API_KEY": key.reveal()} if (key := wandb_key(setting.sweep.run)) else {},
        "train": TRAIN,
        "objectives": [objective.metric for objective in setting.sweep.objectives],
    }


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its files, tables and advice: the ledger and our own lines say what happens."""
    settings = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air", "ray.train")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _teller(sweep: Sweep, console: Console) -> OnTrialUpdate:
    def tell(trial: Trial) -> None:
        console.print(trial_line(trial, sweep.objectives), highlight=False, soft_wrap=True, markup=False)

    return tell


def _finish(sweep: Sweep, folder: RunFolder, file: LedgerFile, console: Console) -> dict[str, Any]:
    """best.yaml, summary.json and the report."""
    ledger, objective = file.reread(), sweep.objectives[0]
    order = ranked(ledger.trials.values(), objective)
    best = next((trial for trial in order if trial.state == "finished"), None)
    commands: dict[str, str] = {}
    if best:
        value = best.metric(objective.metric)
        why = f"Trial {best.number} of the sweep {sweep.run.name}: {objective.metric} = {value!r} after {best.step} steps."
        storage.write_bytes(folder.at(BEST), Setting(sweep, {}, {}).best_yaml(best, why).encode())
        commands = commands_of(ledger, folder.uri, best.runs[-1])
    _forget_kept(folder, file)
    summary = {
        "name": sweep.run.name,
        "objectives": [str(each) for each in sweep.objectives],
        "trials": {state: len(ledger.in_state(state)) for state in ("finished", "stopped", "failed", "open")},
        "best": best
        and {"trial": best.number, "run": best.runs[-1], "values": best.values, "step": best.step, "metrics": best.results[-1].metrics},
        "commands": commands,
        "hours": round(ledger.spent_s / 3600, 4),
        "report": storage.redact(folder.at("report.html")),
    }
    storage.write_bytes(folder.at("summary.json"), json.dumps(summary, indent=1, ensure_ascii=False).encode())
    try:
        write_report([folder.uri], folder.local / "report.html")
        folder.push("report.html")
    except Exception as error:  # noqa: BLE001 - the sweep is on disk: a picture of it may fail, and can be made again
        logger.warning("report.html could not be made (%s); `most-ray report` tries again", error)
    last_screen(ledger, sweep.objectives, summary, console)
    if ledger.trials and not best and not ledger.in_state("open", "stopped"):
        rule = f"failed, all {len(ledger.trials)} of them, at last so: {list(ledger.trials.values())[-1].reason}"
        raise RunIncompleteError("trials", None, rule, "Their logs are in trials/*/train.log.")
    return summary


def _forget_kept(folder: RunFolder, file: LedgerFile) -> None:
    """Checkpoints that trials were to go on from stay only where a trial's last run began with them: best.yaml may name one."""
    parents = [trial.parents[-1] for trial in file.ledger.trials.values() if trial.parents]
    wanted = {kept_uri(folder.uri, parent["run"], parent["step"]) for parent in parents if parent}
    kept = folder.at(KEPT)
    if file.ledger.in_state("open"):
        return
    if not wanted:
        storage.remove(kept)
    uris = {storage.parent(entry.uri) for entry in storage.list_files(kept, ("commit.json",))} if storage.exists(kept) else set()
    for uri in uris - wanted:
        storage.remove(uri)
