"""Early stopping of a sweep's trials by Ray Tune's schedulers, with every result and every end recorded in the ledger."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from most_ray.errors import UserError
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import COMMIT
from most_ray.service.tune.search import NotPickled, OnTrialUpdate
from most_ray.sweep.ledger import LedgerFile, Trial, kept_uri
from most_ray.sweep.options import Sweep, mutable
from most_ray.sweep.space import Values
from most_ray.sweep.trials import TrialBase, run_name

_WORST = 1e30  # of an objective without a value; finite, because schedulers take means
_PERTURBATIONS = 20  # tries to perturb a trial's values into ones that can be trained


class Recorder:
    """Records the results and ends of trials of `total_steps` steps in the ledger, whatever the scheduler. `on_update` is called with each
    trial after a result that is not its last, and after its end."""

    def __init__(self, ledger: LedgerFile, on_update: OnTrialUpdate, total_steps: int) -> None:
        self._file, self._on_update, self._total_steps = ledger, on_update, total_steps

    def result(self, spec: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        trial = self._file.ledger.trials[spec["trial"]]
        if "details" not in result or any((known.run, known.step) == (spec["run"], result["step"]) for known in trial.results):
            return  # nothing new: no evaluation, or one that was reported by an actor that is lost
        self._file.write("result", trial=spec["trial"], run=spec["run"], step=result["step"], **parse_json(result["details"]))
        if result["step"] < self._total_steps:  # else the trial's end follows
            self._on_update(trial)

    def end(self, spec: Mapping[str, Any], step: int, state: str, reason: str | None = None) -> None:
        self._file.write("end", trial=spec["trial"], step=step, state=state, reason=reason)
        self._on_update(self._file.ledger.trials[spec["trial"]])

    def complete(self, spec: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Record that the run is over, unless the trial was stopped, which is recorded already."""
        if self._file.ledger.trials[spec["trial"]].state != "open":
            return
        self.result(spec, result)
        failed = result.get("failed")
        self.end(spec, int(result.get("step", 0)), "failed" if failed else "finished", failed)

    def error(self, spec: Mapping[str, Any]) -> None:
        """Record that the trial's actor was lost more often than Tune starts it again."""
        step = self._file.ledger.trials[spec["trial"]].step
        self.end(spec, step, "failed", "its actor was lost, as when a node goes or memory runs out")


def fill_objective(result: dict[str, Any], mode: str | None) -> dict[str, Any]:
    """A result whose evaluation gave the objective no value, as for a loss that is not finite, with a value worse than any other."""
    if "details" not in result or "objective_0" in result:
        return result
    return {**result, "objective_0": -_WORST if mode == "max" else _WORST}


class _Recording(NotPickled, TrialScheduler):
    """Mixed into Tune's schedulers: records what they see. A trial that has made its last step is never stopped, because only its export
    is left to write."""

    recorder: Recorder
    total_steps: int
    _mode: str | None = None

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.recorder.result(trial.config["spec"], result)
        if result["step"] >= self.total_steps:
            return TrialScheduler.CONTINUE
        return self._decide(tune_controller, trial, fill_objective(result, self._mode))

    def _decide(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's decision on a trial: to continue, to pause or to stop it."""
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.recorder.complete(trial.config["spec"], result)
        super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        if trial.status != TuneTrial.ERROR:  # else Tune has counted the loss already, and is about to start the trial again
            self.recorder.error(trial.config["spec"])
        super().on_trial_error(tune_controller, trial)


class Fifo(_Recording, FIFOScheduler):
    """No early stopping."""

    def __init__(self, recorder: Recorder, total_steps: int) -> None:
        super().__init__()
        self.recorder, self.total_steps = recorder, total_steps


class _StableId:
    """Stands for a trial in ASHA, under its number, which is the same in all starts; Tune's own ids are not."""

    def __init__(self, number: int) -> None:
        self.trial_id = str(number)


class Asha(_Recording, AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al., arXiv 1810.05934), which begins with the results of earlier starts, those of the `known`
    trials."""

    def __init__(self, recorder: Recorder, sweep: Sweep, total_steps: int, known: Mapping[int, Trial]) -> None:
        objective = sweep.objectives[0]
        halving = {"grace_period": min(sweep.grace_steps, total_steps), "reduction_factor": sweep.options.reduction_factor}
        super().__init__("step", "objective_0", "max" if objective.largest else "min", max_t=total_steps, **halving)
        self.recorder, self.total_steps = recorder, total_steps
        for trial in known.values():
            stable = _StableId(trial.number)
            AsyncHyperBandScheduler.on_trial_add(self, None, stable)
            for result in trial.results:
                value = {"objective_0": result.metrics[objective.metric]} if objective.metric in result.metrics else {}
                filled = fill_objective({"step": result.step, "details": "", **value}, self._mode)
                AsyncHyperBandScheduler.on_trial_result(self, None, stable, filled)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _StableId(trial.config["spec"]["trial"]))

    def _decide(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        spec = trial.config["spec"]
        decision: str = AsyncHyperBandScheduler.on_trial_result(self, tune_controller, _StableId(spec["trial"]), result)
        if decision == TrialScheduler.STOP:
            self.recorder.end(spec, result["step"], "stopped", f"asha, at step {result['step']}")
        return decision

    def on_trial_complete(self, _tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.recorder.complete(trial.config["spec"], result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Keeps the trial's results, which others are compared with."""


class Pbt(_Recording, PopulationBasedTraining):
    """Population based training (Jaderberg et al., arXiv 1711.09846). A trial that is replaced gets a new run, which begins with a
    checkpoint of the better trial and its settings, perturbed within their ranges.

    Args:
        synchronous: fewer trials fit at once than there are: all stop at each comparison and are compared with each other there. Else a
            trial is compared with the newest results of the others, and only those that are replaced stop.
    """

    def __init__(
        self, recorder: Recorder, setting: TrialBase, total_steps: int, ledger: LedgerFile, sweep_uri: str, synchronous: bool = False
    ) -> None:
        sweep = setting.sweep
        self._dimensions = {d.name: d for d in sweep.space.dimensions if d.name in mutable(sweep.space)}
        self._setting, self._file, self._uri = setting, ledger, sweep_uri
        self._random = random.Random(f"{sweep.options.search_seed}/{sum(len(trial.runs) for trial in ledger.ledger.trials.values())}")
        super().__init__(
            "step",
            "objective_0",
            "max" if sweep.objectives[0].largest else "min",
            perturbation_interval=sweep.perturb_steps,
            custom_explore_fn=lambda config: config,  # `_get_new_config` perturbs the settings
            log_config=False,
            require_attrs=False,
            synch=synchronous,
        )
        self.recorder, self.total_steps = recorder, total_steps

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial that is resumed is compared at the step at which it would have been next."""
        super().on_trial_add(tune_controller, trial)
        step = self._file.ledger.trials[trial.config["spec"]["trial"]].step
        self._trial_state[trial].last_perturbation_time = step - step % int(self._perturbation_interval)

    def perturb(self, values: Values) -> Values:
        """Draw each mutable value again with probability 1/4, else multiply it by 1.2 or 0.8, clipped to its range."""
        perturbed = dict(values)
        for name, dimension in self._dimensions.items():
            if self._random.random() < 0.25:
                perturbed[name] = dimension.quantile(self._random.random())
            else:
                perturbed[name] = min(dimension.high, max(dimension.low, values[name] * self._random.choice((0.8, 1.2))))
        return perturbed

    def _perturb_trainable(self, values: Values) -> tuple[Values, dict[str, Any]]:
        """Perturbed values that can be trained, and their settings; the given ones where `_PERTURBATIONS` tries find none."""
        for _ in range(_PERTURBATIONS):
            with contextlib.suppress(UserError):  # these values cannot be trained: others are drawn
                perturbed = self.perturb(values)
                return perturbed, self._setting.settings_of(perturbed)
        return values, self._setting.settings_of(values)

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        """Replace a trial, unless the better trial's checkpoint could not be kept: then the worse one continues as it is."""
        other, step = trial_to_clone.config["spec"], self._trial_state[trial_to_clone].last_train_time
        if storage.exists(storage.join(kept_uri(self._uri, other["run"], step), COMMIT)):
            super()._exploit(tune_controller, trial, trial_to_clone)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        number, other = trial.config["spec"]["trial"], trial_to_clone.config["spec"]
        values, settings = self._perturb_trainable(other["values"])
        parent = {"trial": other["trial"], "run": other["run"], "step": self._trial_state[trial_to_clone].last_train_time}
        run = run_name(number, len(self._file.ledger.trials[number].runs))
        line = {"trial": number, "run": run, "values": values, "settings": settings, "parent": parent}
        self._file.write("trial", **line)
        return {"spec": {**line, "after": 0}}, {}
