"""A sweep: proposals and early stopping by Ray Tune, every trial a run of its own, everything that happens in the ledger.

Tune's own state is never read back: whoever goes on replays the ledger, so that a sweep whose driver was killed ends as it would have.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from most_ray.errors import UserError
from most_ray.io import storage
from most_ray.io.run_folder import COMMIT
from most_ray.sweep.ledger import LedgerFile, Trial, kept_uri
from most_ray.sweep.options import Sweep, mutable
from most_ray.sweep.space import Dimension, Space, Values
from most_ray.sweep.trials import Setting, run_name

OnTrialUpdate = Callable[[Trial], None]  # called with a trial of whom something is new
_WORST = 1e30  # finite, for means are taken of it
_PERTURBATIONS = 20  # that are tried for one that can be trained
_STARTUP_TRIALS = 10  # of Optuna's TPE that are drawn at random, of many trials; of few, a quarter


class Unsaved:
    """Tune pickles what drives it, for a restart that never happens here: the ledger is what counts, and credentials stay in memory."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class Proposals(Unsaved, Searcher):
    """Which trial is next: those that an earlier start has left open, then new ones until there are `max_trials`. A proposal that cannot be
    trained is written down as failed, with its reason, and takes no room."""

    def __init__(self, setting: Setting, ledger: LedgerFile, tell: OnTrialUpdate) -> None:
        super().__init__(metric="objective_0", mode="min")
        self._setting, self._file, self._tell = setting, ledger, tell
        self._open = collections.deque(ledger.ledger.in_state("open"))
        options = setting.sweep.options
        self._tpe = Tpe(setting.sweep, ledger) if options.search == "tpe" else None
        self._numbers: dict[str, int] = {}  # of trials, by Tune's ids

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        work = self.next(trial_id)
        if work is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = work["trial"]
        return {"work": work}

    def next(self, trial_id: str = "") -> dict[str, Any] | None:
        """A trial's line of the ledger, with `after`, the step whose result it has told already; None behind the last one."""
        if self._open:
            trial = self._open.popleft()
            if self._tpe:
                self._tpe.adopt(trial_id, trial)
            return _work(trial)
        while (number := max(self._file.ledger.trials, default=0) + 1) <= self._setting.sweep.max_trials:
            values = self._propose(number, trial_id)
            if values is None:
                return None
            try:
                settings, reason = self._setting.settings_of(values), None
            except UserError as error:
                settings, reason = {}, str(error)
            # In one line: a kill between two would leave a trial open that cannot be.
            invalid = {"invalid": reason} if reason else {}
            self._file.write("trial", trial=number, run=run_name(number), values=values, settings=settings, parent=None, **invalid)
            trial = self._file.ledger.trials[number]
            if reason is None:
                return _work(trial)
            self._tell(trial)
            if self._tpe:
                self._tpe.on_trial_complete(trial_id, trial)
        return None

    def _propose(self, number: int, trial_id: str) -> Values | None:
        if self._tpe:
            return self._tpe.values(trial_id)
        options = self._setting.sweep.options
        return self._setting.sweep.space.proposal(options.search, options.search_seed, number - 1)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: see `Unsaved`."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._tpe:
            self._tpe.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        del result  # the last one, which ends a run, has no figures: the ledger has
        if self._tpe:
            self._tpe.on_trial_complete(trial_id, self._file.ledger.trials[self._numbers[trial_id]], error)


def _work(trial: Trial) -> dict[str, Any]:
    run = trial.runs[-1]
    told = [result.step for result in trial.results if result.run == run]
    return {
        "trial": trial.number,
        "run": run,
        "settings": trial.settings,
        "values": trial.values,
        "parent": trial.parents[-1],
        "after": max(told, default=0),
    }


class Tpe:
    """Optuna's tree-structured Parzen estimator by Ray's integration, told first what an earlier start has found out."""

    def __init__(self, sweep: Sweep, ledger: LedgerFile) -> None:
        self._space, self._objectives, self._count = sweep.space, sweep.objectives, itertools.count()
        modes = ["max" if objective.largest else "min" for objective in self._objectives]
        several = len(modes) > 1
        self._asked: dict[str, str] = {}  # Optuna's names of proposals by Tune's ids: of one, several where proposals cannot be trained
        known = [trial for trial in ledger.ledger.trials.values() if trial.state != "open"]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            # Another seed at each start: else the random draws at its beginning would be those of the first start again.
            seed=sweep.options.search_seed + len(ledger.ledger.trials),
            n_startup_trials=min(_STARTUP_TRIALS, max(3, sweep.max_trials // 4)),
            multivariate=not several,
            constant_liar=not several,  # several trials at once shall not crowd at one place
        )
        memory = optuna.storages.InMemoryStorage()
        study = optuna.create_study(
            storage=memory, study_name="sweep", directions=["maximize" if mode == "max" else "minimize" for mode in modes]
        )
        distributions = {d.name: _distribution(d) for d in self._space.dimensions}
        for trial in known:
            study.add_trial(_told(trial, self._space, distributions, [o.metric for o in self._objectives]))
        names = [f"objective_{index}" for index in range(len(modes))]
        metric, mode = (names, modes) if several else (names[0], modes[0])
        self._search = OptunaSearch(distributions, metric=metric, mode=mode, sampler=sampler, storage=memory, study_name="sweep")

    def values(self, trial_id: str) -> Values:
        name = self._asked[trial_id] = f"{trial_id}/{next(self._count)}"
        found: Mapping[str, Any] = self._search.suggest(name) or {}
        return {d.name: d.values[found[d.name]] if d.values else found[d.name] for d in self._space.dimensions}

    def adopt(self, trial_id: str, trial: Trial) -> None:
        """A trial that an earlier start has proposed."""
        point = {d.name: d.values.index(trial.values[d.name]) if d.values else trial.values[d.name] for d in self._space.dimensions}
        self._search._ot_study.enqueue_trial(point)
        self.values(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "objective_0" in result:
            self._search.on_trial_result(self._asked[trial_id], {**result, "training_iteration": result["step"]})

    def on_trial_complete(self, trial_id: str, trial: Trial, error: bool = False) -> None:
        """What was stopped early has no final value: Optuna ranks it by what it had come to."""
        values = [trial.metric(objective.metric) for objective in self._objectives]
        finished = trial.state == "finished" and None not in values
        result = {f"objective_{index}": value for index, value in enumerate(values)} if finished else None
        failed = error or trial.state != "stopped"
        self._search.on_trial_complete(self._asked[trial_id], result, error=failed)


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Choices go by their places in the list: Optuna wants them to be plain."""
    if dimension.values:
        return optuna.distributions.CategoricalDistribution(tuple(range(len(dimension.values))))
    if dimension.kind == "randint":
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high))
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "loguniform")


def _told(trial: Trial, space: Space, distributions: Mapping[str, Any], metrics: list[str]) -> optuna.trial.FrozenTrial:
    states = optuna.trial.TrialState
    values = [value for name in metrics if (value := trial.metric(name)) is not None]
    complete = trial.state == "finished" and len(values) == len(metrics)
    params = {d.name: d.values.index(trial.values[d.name]) if d.values else trial.values[d.name] for d in space.dimensions}
    steps = {result.step: result.metrics[metrics[0]] for result in trial.results if metrics[0] in result.metrics}
    return optuna.trial.create_trial(
        state=states.COMPLETE if complete else states.PRUNED if trial.state == "stopped" else states.FAIL,
        values=values if complete else None,
        params=params,
        distributions=dict(distributions),
        intermediate_values=steps if len(metrics) == 1 else None,
    )


class Recorder:
    """What all schedulers do besides: write down what trials tell and how they end."""

    def __init__(self, ledger: LedgerFile, tell: OnTrialUpdate, total_steps: int) -> None:
        self._file, self._tell, self._total_steps = ledger, tell, total_steps

    def result(self, work: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        trial = self._file.ledger.trials[work["trial"]]
        if "details" not in result or any((told.run, told.step) == (work["run"], result["step"]) for told in trial.results):
            return  # no news; or told by an actor that was lost
        self._file.write("result", trial=work["trial"], run=work["run"], step=result["step"], **json.loads(result["details"]))
        if result["step"] < self._total_steps:  # else its end is told next
            self._tell(trial)

    def end(self, work: Mapping[str, Any], step: int, state: str, reason: str | None = None) -> None:
        self._file.write("end", trial=work["trial"], step=step, state=state, reason=reason)
        self._tell(self._file.ledger.trials[work["trial"]])

    def complete(self, work: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """The run is over; or the trial was stopped, which is written down already."""
        if self._file.ledger.trials[work["trial"]].state != "open":
            return
        self.result(work, result)
        failed = result.get("failed")
        self.end(work, int(result.get("step", 0)), "failed" if failed else "finished", failed)

    def error(self, work: Mapping[str, Any]) -> None:
        """The trial's actor was lost more often than Tune starts it again."""
        step = self._file.ledger.trials[work["trial"]].step
        self.end(work, step, "failed", "its actor was lost, as when a node goes or memory runs out")


def judged(result: dict[str, Any], mode: str | None) -> dict[str, Any]:
    """An evaluation whose objective has no value, as of a loss that is not finite, is worse than any other."""
    if "details" not in result or "objective_0" in result:
        return result
    return {**result, "objective_0": -_WORST if mode == "max" else _WORST}


class _Recording(Unsaved, TrialScheduler):
    """Mixed into Tune's schedulers. Nothing is decided on a trial that has made its last step: it has only its export left to write."""

    recorder: Recorder
    total_steps: int
    _mode: str | None = None

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.recorder.result(trial.config["work"], result)
        if result["step"] >= self.total_steps:
            return TrialScheduler.CONTINUE
        result = judged(result, self._mode)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.recorder.complete(trial.config["work"], result)
        super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if trial.status != TuneTrial.ERROR:  # else Tune has taken note of the loss already, and is about to start the trial again
            self.recorder.error(trial.config["work"])
        super().on_trial_error(tune_controller, trial)


class Fifo(_Recording, FIFOScheduler):
    """No early stopping."""

    def __init__(self, recorder: Recorder, total_steps: int) -> None:
        super().__init__()
        self.recorder, self.total_steps = recorder, total_steps


class _Named:
    """What ASHA knows of a trial: a name that holds over starts, where Tune's own ids do not."""

    def __init__(self, number: int) -> None:
        self.trial_id = str(number)


class Asha(_Recording, AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), which knows what trials of earlier starts had come to."""

    def __init__(self, recorder: Recorder, sweep: Sweep, total_steps: int, known: Mapping[int, Trial]) -> None:
        objective = sweep.objectives[0]
        super().__init__(
            time_attr="step",
            metric="objective_0",
            mode="max" if objective.largest else "min",
            max_t=total_steps,
            grace_period=min(sweep.grace_steps, total_steps),
            reduction_factor=sweep.options.reduction_factor,
        )
        self.recorder, self.total_steps = recorder, total_steps
        for trial in known.values():
            AsyncHyperBandScheduler.on_trial_add(self, None, _Named(trial.number))
            for result in trial.results:
                known_value = {"objective_0": result.metrics[objective.metric]} if objective.metric in result.metrics else {}
                told = judged({"step": result.step, "details": "", **known_value}, self._mode)
                AsyncHyperBandScheduler.on_trial_result(self, None, _Named(trial.number), told)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _Named(trial.config["work"]["trial"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        work = trial.config["work"]
        self.recorder.result(work, result)
        if result["step"] >= self.total_steps:
            return TrialScheduler.CONTINUE
        result = judged(result, self._mode)
        decision: str = AsyncHyperBandScheduler.on_trial_result(self, tune_controller, _Named(work["trial"]), result)
        if decision == TrialScheduler.STOP:
            self.recorder.end(work, result["step"], "stopped", f"asha, at step {result['step']}")
        return decision

    def on_trial_complete(self, _tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.recorder.complete(trial.config["work"], result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Its results stay: they tell what others are worth."""


class Pbt(_Recording, PopulationBasedTraining):
    """Population based training (Jaderberg et al., arXiv 1711.09846). A trial that is replaced gets a new run, which begins with a
    checkpoint of the better trial and its settings, perturbed within their ranges.

    Args:
        turns: there is room for a part of the trials only. They then stop at each comparison, and it comes when all have come to it; else
            every trial is compared with what the others have come to, and only those that are replaced stop.
    """

    def __init__(
        self, recorder: Recorder, setting: Setting, total_steps: int, ledger: LedgerFile, sweep_uri: str, turns: bool = False
    ) -> None:
        sweep = setting.sweep
        self._dimensions = {d.name: d for d in sweep.space.dimensions if d.name in mutable(sweep.space)}
        self._setting, self._file, self._uri = setting, ledger, sweep_uri
        self._draw = random.Random(f"{sweep.options.search_seed}/{sum(len(trial.runs) for trial in ledger.ledger.trials.values())}")
        super().__init__(
            time_attr="step",
            metric="objective_0",
            mode="max" if sweep.objectives[0].largest else "min",
            perturbation_interval=sweep.perturb_steps,
            custom_explore_fn=lambda config: config,  # settings are made in _get_new_config
            log_config=False,
            require_attrs=False,
            synch=turns,
        )
        self.recorder, self.total_steps = recorder, total_steps

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """One that goes on is compared where it would have been next."""
        super().on_trial_add(tune_controller, trial)
        step = self._file.ledger.trials[trial.config["work"]["trial"]].step
        self._trial_state[trial].last_perturbation_time = step - step % int(self._perturbation_interval)

    def perturbed(self, values: Values) -> Values:
        """Each mutable setting drawn anew, one time in four, else times 1.2 or 0.8, as far as its range goes."""
        made = dict(values)
        for name, dimension in self._dimensions.items():
            if self._draw.random() < 0.25:
                made[name] = dimension.at(self._draw.random())
            else:
                made[name] = min(dimension.high, max(dimension.low, values[name] * self._draw.choice((0.8, 1.2))))
        return made

    def _trainable(self, values: Values) -> tuple[Values, dict[str, Any]]:
        """Perturbed values and their settings; those that are there, where the range holds too many values that no run takes."""
        for _ in range(_PERTURBATIONS):
            with contextlib.suppress(UserError):
                made = self.perturbed(values)
                return made, self._setting.settings_of(made)
        return values, self._setting.settings_of(values)

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        """Only where the better trial's checkpoint could be kept; else the worse one goes on as it is."""
        other, step = trial_to_clone.config["work"], self._trial_state[trial_to_clone].last_train_time
        if storage.exists(storage.join(kept_uri(self._uri, other["run"], step), COMMIT)):
            super()._exploit(tune_controller, trial, trial_to_clone)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        own, other = trial.config["work"], trial_to_clone.config["work"]
        step = self._trial_state[trial_to_clone].last_train_time
        values, settings = self._trainable(other["values"])
        generation = len(self._file.ledger.trials[own["trial"]].runs)
        parent = {"trial": other["trial"], "run": other["run"], "step": step}
        line = {
            "trial": own["trial"],
            "run": run_name(own["trial"], generation),
            "values": values,
            "settings": settings,
            "parent": parent,
        }
        self._file.write("trial", **line)
        return {"work": {**line, "after": 0}}, {}
