"""Which trial of a sweep runs next: Ray Tune asks, the ledger records each answer.

Tune's own state is never read back. A start that resumes a sweep replays the ledger, so that a sweep whose driver was killed ends as it
would have without the kill.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from most_ray.errors import UserError
from most_ray.sweep.ledger import LedgerFile, Trial
from most_ray.sweep.options import Sweep
from most_ray.sweep.space import Dimension, Space, Values
from most_ray.sweep.trials import TrialBase, run_name

OnTrialUpdate = Callable[[Trial], None]  # called with a trial that has a new result or has ended
_STARTUP_TRIALS = 10  # trials that Optuna's TPE draws at random, where there are many; of few, a quarter


class NotPickled:
    """Pickles as an empty object. Tune pickles its searcher and scheduler for a restart that never happens here: the ledger is what a
    sweep resumes from, and credentials stay in memory."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class Proposals(NotPickled, Searcher):
    """Proposes first the trials that an earlier start has left open, then new ones until there are `max_trials`. A proposal that cannot be
    trained is recorded in the ledger as failed, with the reason, given to `on_update`, and the next one is tried."""

    def __init__(self, setting: TrialBase, ledger: LedgerFile, on_update: OnTrialUpdate) -> None:
        super().__init__(metric="objective_0", mode="min")
        self._setting, self._file, self._on_update = setting, ledger, on_update
        self._open = collections.deque(ledger.ledger.in_state("open"))
        self._tpe = Tpe(setting.sweep, ledger) if setting.sweep.options.search == "tpe" else None
        self._numbers: dict[str, int] = {}  # of trials, by Tune's ids

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        spec = self.next(trial_id)
        if spec is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = spec["trial"]
        return {"spec": spec}

    def next(self, trial_id: str = "") -> dict[str, Any] | None:
        """The next trial's specification (see `_spec_of`); None after the last trial."""
        if self._open:
            trial = self._open.popleft()
            if self._tpe:
                self._tpe.enqueue(trial_id, trial)
            return _spec_of(trial)
        while (number := max(self._file.ledger.trials, default=0) + 1) <= self._setting.sweep.max_trials:
            sweep = self._setting.sweep
            search = sweep.options.search
            values = self._tpe.propose(trial_id) if self._tpe else sweep.space.proposal(search, sweep.options.search_seed, number - 1)
            if values is None:
                return None
            try:
                settings, reason = self._setting.settings_of(values), None
            except UserError as error:
                settings, reason = {}, str(error)
            # In one line: a kill between two would leave a trial open that cannot be trained.
            invalid = {"invalid": reason} if reason else {}
            self._file.write("trial", trial=number, run=run_name(number), values=values, settings=settings, parent=None, **invalid)
            trial = self._file.ledger.trials[number]
            if reason is None:
                return _spec_of(trial)
            self._on_update(trial)
            if self._tpe:
                self._tpe.on_trial_complete(trial_id, trial)
        return None

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Writes nothing, see `NotPickled`."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._tpe:
            self._tpe.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        del result  # the last result of a run has no metrics: they are in the ledger
        if self._tpe:
            self._tpe.on_trial_complete(trial_id, self._file.ledger.trials[self._numbers[trial_id]], error)


def _spec_of(trial: Trial) -> dict[str, Any]:
    """A trial's line of the ledger, with `after`, the step of its last result (0 without one), for its actor and the schedulers."""
    run = trial.runs[-1]
    return {
        "trial": trial.number,
        "run": run,
        "settings": trial.settings,
        "values": trial.values,
        "parent": trial.parents[-1],
        "after": max((result.step for result in trial.results if result.run == run), default=0),
    }


class Tpe:
    """Optuna's tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) by Ray's integration, which begins with the results of
    the trials that ended in earlier starts."""

    def __init__(self, sweep: Sweep, ledger: LedgerFile) -> None:
        self._space, self._objectives, self._count = sweep.space, sweep.objectives, itertools.count()
        modes = ["max" if objective.largest else "min" for objective in self._objectives]
        names = [f"objective_{index}" for index in range(len(modes))]
        several = len(modes) > 1
        self._names: dict[str, str] = {}  # Optuna's name of each trial's newest proposal, by Tune's id: some proposals cannot be trained
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            # Another seed at each start: else its first random draws would be those of the first start again.
            seed=sweep.options.search_seed + len(ledger.ledger.trials),
            n_startup_trials=min(_STARTUP_TRIALS, max(3, sweep.max_trials // 4)),
            multivariate=not several,
            constant_liar=not several,  # so that trials that run at the same time do not crowd at one point
        )
        memory = optuna.storages.InMemoryStorage()
        study = optuna.create_study(
            storage=memory, study_name="sweep", directions=["maximize" if m == "max" else "minimize" for m in modes]
        )
        distributions = {d.name: _distribution(d) for d in self._space.dimensions}
        for trial in ledger.ledger.trials.values():
            if trial.state != "open":
                study.add_trial(to_frozen_trial(trial, self._space, distributions, [o.metric for o in self._objectives]))
        metric, mode = (names, modes) if several else (names[0], modes[0])
        self._search = OptunaSearch(distributions, metric=metric, mode=mode, sampler=sampler, storage=memory, study_name="sweep")

    def propose(self, trial_id: str) -> Values:
        """Values for a trial, by dimension."""
        name = self._names[trial_id] = f"{trial_id}/{next(self._count)}"
        found: Mapping[str, Any] = self._search.suggest(name) or {}
        return {d.name: d.values[found[d.name]] if d.values else found[d.name] for d in self._space.dimensions}

    def enqueue(self, trial_id: str, trial: Trial) -> None:
        """Take over a trial that an earlier start has proposed."""
        self._search._ot_study.enqueue_trial(_params_of(trial, self._space))
        self.propose(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if "objective_0" in result:
            self._search.on_trial_result(self._names[trial_id], {**result, "training_iteration": result["step"]})

    def on_trial_complete(self, trial_id: str, trial: Trial, error: bool = False) -> None:
        """A trial that was stopped early has no final value: Optuna ranks it by its last one."""
        values = [trial.metric(objective.metric) for objective in self._objectives]
        finished = trial.state == "finished" and None not in values
        result = {f"objective_{index}": value for index, value in enumerate(values)} if finished else None
        self._search.on_trial_complete(self._names[trial_id], result, error=error or trial.state != "stopped")


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """A dimension as Optuna's. Choices are given by their index: Optuna takes plain values only."""
    if dimension.values:
        return optuna.distributions.CategoricalDistribution(tuple(range(len(dimension.values))))
    if dimension.kind == "randint":
        return optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high))
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.kind == "loguniform")


def _params_of(trial: Trial, space: Space) -> dict[str, Any]:
    """A trial's values as Optuna's parameters, choices by their index."""
    return {d.name: d.values.index(trial.values[d.name]) if d.values else trial.values[d.name] for d in space.dimensions}


def to_frozen_trial(trial: Trial, space: Space, distributions: Mapping[str, Any], metrics: list[str]) -> optuna.trial.FrozenTrial:
    """A trial that has ended as Optuna's: complete with a value of each metric, pruned where the scheduler stopped it, else failed."""
    states = optuna.trial.TrialState
    values = [value for name in metrics if (value := trial.metric(name)) is not None]
    complete = trial.state == "finished" and len(values) == len(metrics)
    steps = {result.step: result.metrics[metrics[0]] for result in trial.results if metrics[0] in result.metrics}
    return optuna.trial.create_trial(
        state=states.COMPLETE if complete else states.PRUNED if trial.state == "stopped" else states.FAIL,
        values=values if complete else None,
        params=_params_of(trial, space),
        distributions=dict(distributions),
        intermediate_values=steps if len(metrics) == 1 else None,
    )
