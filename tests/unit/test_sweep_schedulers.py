"""Schedulers of sweeps, without Ray's cluster: what they decide and write down, also after a restart; and what Tune pickles of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray.cloudpickle
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchGenerator

from most_ray.io import storage
from most_ray.io.run_folder import RunFolder
from most_ray.service.tune.schedulers import Asha, Fifo, Pbt, Recorder, fill_objective
from most_ray.service.tune.search import Proposals
from most_ray.sweep.ledger import LedgerFile, kept_uri
from most_ray.sweep.options import Sweep
from most_ray.sweep.trials import TrialBase
from tests.unit.test_sweep_options import setting_of, sweep_of
from tests.unit.test_sweep_search import TOTAL, Told, add, lines_of, reopened, result_of

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP
SECRET = "s3://key:hunter2@bucket/x"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LedgerFile]:
    opened = LedgerFile(RunFolder(str(tmp_path / "ledger")))
    yield opened
    opened.close()


def tune_trial(number: int, max_failures: int = 0, **spec: Any) -> TuneTrial:
    config = {"spec": {"trial": number, "run": f"{number:03d}", **spec}}
    return TuneTrial("x", config=config, max_failures=max_failures, stub=True)


# What schedulers write down


def test_results_and_ends_are_written_once_and_told(file: LedgerFile) -> None:
    """What holds no figures is none; the last result is told with the end, and nothing is written behind that."""
    told = Told()
    recorder, spec = Recorder(file, told, TOTAL), {"trial": 1, "run": "001"}
    add(file, 1, {})
    recorder.result(spec, result_of(0))
    recorder.result(spec, result_of(4, 0.5))
    recorder.result(spec, result_of(4))
    recorder.result(spec, result_of(TOTAL, 0.25))
    assert told == [(1, "open", 4)]
    recorder.complete(spec, result_of(TOTAL, done=True))
    recorder.complete(spec, result_of(TOTAL, done=True))
    assert told == [(1, "open", 4), (1, "finished", TOTAL)]
    found = [{key: value for key, value in line.items() if key != "time"} for line in lines_of(file, "result", "end")]
    head = {"kind": "result", "trial": 1, "run": "001", "intervals": {}}
    assert found == [
        {**head, "step": 4, "metrics": {"wer/takes": 0.5}},
        {**head, "step": TOTAL, "metrics": {"wer/takes": 0.25}},
        {"kind": "end", "trial": 1, "step": TOTAL, "state": "finished", "reason": None},
    ]


def test_a_result_that_ends_a_run_counts_with_its_reason(file: LedgerFile) -> None:
    told = Told()
    recorder = Recorder(file, told, TOTAL)
    for number in (1, 2, 3):
        add(file, number, {}, s4=0.5)
    recorder.complete({"trial": 1, "run": "001"}, result_of(8, 0.25, done=True, failed="why"))
    recorder.complete({"trial": 2, "run": "002"}, {})
    recorder.error({"trial": 3, "run": "003"})
    found = {trial.number: (trial.state, trial.reason, trial.step) for trial in file.ledger.trials.values()}
    lost = "its actor was lost, as when a node goes or memory runs out"
    assert found == {1: ("failed", "why", 8), 2: ("finished", None, 4), 3: ("failed", lost, 4)}
    assert [line["step"] for line in lines_of(file, "end")] == [8, 0, 4]
    assert told == [(1, "open", 8), (1, "failed", 8), (2, "finished", 4), (3, "failed", 4)]


def test_a_result_that_is_told_again_is_not_written_again(file: LedgerFile) -> None:
    """An actor that was lost and started again tells from where its first one began."""
    add(file, 1, {})
    recorder = Recorder(file, Told(), TOTAL)
    for _ in range(2):
        recorder.result({"trial": 1, "run": "001"}, result_of(4, 0.5))
    assert len(lines_of(file, "result")) == 1


def lose_actor(scheduler: TrialScheduler, trial: TuneTrial) -> None:
    """What Tune's controller does where a trial's actor is lost."""
    controller = MagicMock(_cached_trial_decisions={}, _trials=[trial], _live_trials=set(), _scheduler_alg=scheduler)
    controller._schedule_trial_stop = lambda trial, exception=None: trial.set_status(TuneTrial.ERROR)
    controller._set_trial_status = lambda trial, status: trial.set_status(status)
    for name in ("_try_recover", "_requeue_trial"):
        setattr(controller, name, getattr(TuneController, name).__get__(controller))
    trial.storage = SimpleNamespace(trial_driver_staging_path=None)  # no file for its errors
    trial.set_status(TuneTrial.RUNNING)
    TuneController._process_trial_failure(controller, trial, RuntimeError("lost"))


def test_a_trial_whose_actor_is_lost_for_good_has_failed(file: LedgerFile) -> None:
    add(file, 1, {}, s4=0.5)
    trial = tune_trial(1)
    lose_actor(Fifo(Recorder(file, Told(), TOTAL), TOTAL), trial)
    assert (file.ledger.trials[1].state, [line["step"] for line in lines_of(file, "end")]) == ("failed", [4])


def test_a_trial_whose_actor_tune_starts_again_goes_on(file: LedgerFile) -> None:
    add(file, 1, {}, s4=0.5)
    scheduler = Fifo(Recorder(file, Told(), TOTAL), TOTAL)
    trial = tune_trial(1, max_failures=3)
    lose_actor(scheduler, trial)
    assert trial.status == TuneTrial.PENDING
    assert file.ledger.trials[1].state == "open"
    scheduler.on_trial_complete(None, trial, result_of(TOTAL, done=True))
    assert file.ledger.trials[1].state == "finished" and len(lines_of(file, "end")) == 1


def test_without_early_stopping_everything_goes_on(file: LedgerFile) -> None:
    add(file, 1, {})
    scheduler, trial = Fifo(Recorder(file, Told(), TOTAL), TOTAL), tune_trial(1)
    assert [scheduler.on_trial_result(None, trial, result_of(*each)) for each in ((0,), (4, 0.5), (8, 9.0), (TOTAL, 0.1))] == [CONTINUE] * 4
    scheduler.on_trial_complete(None, trial, result_of(TOTAL, done=True))
    trial_found = file.ledger.trials[1]
    assert (trial_found.state, [result.step for result in trial_found.results]) == ("finished", [4, 8, TOTAL])


# ASHA


def asha_of(sweep: Sweep, file: LedgerFile) -> Asha:
    return Asha(Recorder(file, Told(), TOTAL), sweep, TOTAL, file.ledger.trials)


def feed(scheduler: Asha, file: LedgerFile, events: list[tuple[int, int, float | None]]) -> list[str]:
    """Results (trial, step, WER or None) of trials that are still going; decisions."""
    decisions = []
    for number, step, wer in events:
        if number not in file.ledger.trials:
            add(file, number, {})
        if file.ledger.trials[number].state != "open":
            continue
        trial = tune_trial(number)
        scheduler.on_trial_add(None, trial)
        decision = scheduler.on_trial_result(None, trial, result_of(step, wer))
        decisions.append((number, step, decision))
        if decision == STOP or step == TOTAL:
            scheduler.on_trial_complete(None, trial, result_of(step, done=True))
    return decisions


def test_asha_stops_the_worse_at_each_rung(tmp_path: Path, file: LedgerFile) -> None:
    """Of two, the better half: the first at a rung always goes on, whoever is worse than the median of those before stops. Rungs at 4 and
    8, none at the last step; heartbeats decide nothing."""
    scheduler = asha_of(sweep_of(tmp_path, scheduler="asha", reduction_factor=2.0), file)
    events = [
        (1, 4, 0.5),
        (2, 4, 0.6),
        (3, 4, 0.4),
        (1, 8, 0.3),
        (3, 4, None),
        (3, 8, 0.35),
        (1, 12, 9.0),
        (4, 4, 0.45),
        (4, 8, 0.2),
        (4, 12, 9.0),
    ]
    assert [decision for *_, decision in feed(scheduler, file, events)] == [
        CONTINUE,
        STOP,
        CONTINUE,
        CONTINUE,
        CONTINUE,
        STOP,
        CONTINUE,
        CONTINUE,
        CONTINUE,
        CONTINUE,
    ]
    found = {trial.number: (trial.state, trial.step, trial.reason) for trial in file.ledger.trials.values()}
    assert found == {
        1: ("finished", 12, None),
        2: ("stopped", 4, "asha, at step 4"),
        3: ("stopped", 8, "asha, at step 8"),
        4: ("finished", 12, None),
    }


def test_asha_of_a_figure_to_be_made_large(tmp_path: Path, file: LedgerFile) -> None:
    sweep = sweep_of(tmp_path, scheduler="asha", reduction_factor=2.0, objectives=["max:wer/takes"], grace_steps=100)
    assert [d for *_, d in feed(asha_of(sweep, file), file, [(1, 4, 0.1), (2, 8, 0.9)])] == [CONTINUE] * 2  # grace is the whole trial
    add(file, 3, {}, "stopped", s4=0.5)
    sweep = sweep_of(tmp_path, scheduler="asha", reduction_factor=2.0, objectives=["max:wer/takes"])
    scheduler = asha_of(sweep, file)
    assert [d for *_, d in feed(scheduler, file, [(4, 4, 0.2), (5, 4, 0.9)])] == [STOP, CONTINUE]


def test_asha_knows_every_rung_that_earlier_starts_have_come_to(tmp_path: Path, file: LedgerFile) -> None:
    add(file, 1, {}, s4=0.5, s8=0.9)
    scheduler = asha_of(sweep_of(tmp_path, scheduler="asha", reduction_factor=2.0), file)
    assert [d for *_, d in feed(scheduler, file, [(2, 4, 0.6), (3, 4, 0.1), (3, 8, 0.8)])] == [STOP, CONTINUE, CONTINUE]


EVENTS = st.lists(
    st.tuples(st.integers(1, 6), st.one_of(st.none(), st.floats(0, 1), st.sampled_from([0.25, 0.5]))), min_size=8, max_size=40
)


def told_in_order(drawn: list[tuple[int, float | None]]) -> list[tuple[int, int, float | None]]:
    """Each trial's results with its steps, 2, 4, ... TOTAL; None: without news."""
    steps: dict[int, int] = {}
    events = []
    for number, wer in drawn:
        if steps.get(number, 0) < TOTAL:
            steps[number] = steps.get(number, 0) + (2 if wer is not None else 0)
            events.append((number, steps[number], wer))
    return events


@settings(max_examples=60)
@given(drawn=EVENTS, cut=st.integers(0, 40), factor=st.sampled_from([1.5, 2.0, 3.0]), largest=st.booleans(), grace=st.integers(1, 5))
def test_asha_decides_after_a_restart_as_it_would_have(drawn: Any, cut: int, factor: float, largest: bool, grace: int) -> None:
    """Whatever the results and wherever it is cut: from the ledger alone."""
    events = told_in_order(drawn)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        objective = "max:wer/takes" if largest else "wer/takes"
        changes = {"reduction_factor": factor, "grace_steps": grace, "objectives": [objective], "eval_steps": 2}
        sweep = sweep_of(folder, scheduler="asha", **changes)
        one = LedgerFile(RunFolder(f"{name}/one"))
        uninterrupted = feed(asha_of(sweep, one), one, events)
        two = LedgerFile(RunFolder(f"{name}/two"))
        before = feed(asha_of(sweep, two), two, events[:cut])
        two = reopened(two)
        assert before + feed(asha_of(sweep, two), two, events[cut:]) == uninterrupted
        assert {n: (t.state, t.step) for n, t in one.ledger.trials.items()} == {n: (t.state, t.step) for n, t in two.ledger.trials.items()}
        one.close()
        two.close()


def test_asha_keeps_what_a_trial_told_when_tune_forgets_it(tmp_path: Path, file: LedgerFile) -> None:
    scheduler = asha_of(sweep_of(tmp_path, scheduler="asha", reduction_factor=2.0), file)
    feed(scheduler, file, [(1, 4, 0.1)])
    scheduler.on_trial_remove(None, tune_trial(1))
    assert [d for *_, d in feed(scheduler, file, [(2, 4, 0.5)])] == [STOP]


# Population based training

PBT_SPACE = {
    "learning_rate": {"loguniform": [0.001, 0.1]},
    "asr_tts_mix_ratio": {"uniform": [0.3, 0.8]},
    "train_asr_weights": [{"uniform": [0.5, 2]}],
    "seed": "1..3",
}


def pbt_of(folder: Path, file: LedgerFile, **changes: Any) -> tuple[Pbt, TrialBase]:
    sweep = sweep_of(folder, PBT_SPACE, scheduler="pbt", **changes)
    setting = setting_of(sweep, shared={"max_steps": TOTAL})
    return Pbt(Recorder(file, Told(), TOTAL), setting, TOTAL, file, str(folder)), setting


def test_perturbed_values_stay_in_their_ranges(tmp_path: Path, file: LedgerFile) -> None:
    """Times 0.8 or 1.2, one time in four drawn anew; at its ends they stop; what cannot change in the middle stays."""
    pbt, setting = pbt_of(tmp_path, file)
    start = {"learning_rate": 0.01, "asr_tts_mix_ratio": 0.5, "train_asr_weights[0]": 1.9, "seed": 2}
    drawn = [pbt.perturb(start) for _ in range(800)]
    low = {"learning_rate": 0.001, "asr_tts_mix_ratio": 0.3, "train_asr_weights[0]": 0.5}
    high = {"learning_rate": 0.1, "asr_tts_mix_ratio": 0.8, "train_asr_weights[0]": 2.0}
    factors = {name: [values[name] / start[name] for values in drawn] for name in low}
    for values in drawn:
        assert set(values) == set(start) and values["seed"] == 2
        assert all(low[name] <= values[name] <= high[name] for name in low)
        assert setting.settings_of(values)
    for name in low:
        up = min(1.2, high[name] / start[name])
        shares = [sum(abs(found - wanted) < 1e-9 for found in factors[name]) / 800 for wanted in (0.8, up)]
        assert all(0.3 < share < 0.45 for share in shares)  # three times in eight
    assert start["learning_rate"] == 0.01
    edge = {**start, "learning_rate": 0.001, "asr_tts_mix_ratio": 0.8}
    assert all(pbt.perturb(edge)["learning_rate"] >= 0.001 and pbt.perturb(edge)["asr_tts_mix_ratio"] <= 0.8 for _ in range(50))
    again, _ = pbt_of(tmp_path, file)
    assert [again.perturb(start) for _ in range(3)] == drawn[:3]
    other, _ = pbt_of(tmp_path, file, search_seed=1)
    assert other.perturb(start) != drawn[0]


def test_a_replaced_trial_goes_on_from_the_better(tmp_path: Path, file: LedgerFile) -> None:
    """With a run of its own that begins with the other's checkpoint, and the other's values, perturbed; without credentials."""
    pbt, setting = pbt_of(tmp_path, file, output_dir=SECRET)
    values = {"learning_rate": 0.01, "asr_tts_mix_ratio": 0.5, "train_asr_weights[0]": 1.0, "seed": 2}
    add(file, 1, {**values, "seed": 3}, s4=0.1)
    add(file, 2, values, s4=0.9)
    better, worse = tune_trial(1, values={**values, "seed": 3}), tune_trial(2, values=values)
    pbt._trial_state[better] = SimpleNamespace(last_train_time=4)
    for generation in (1, 2):
        config, _ = pbt._get_new_config(worse, better)
        spec = config["spec"]
        assert (spec["trial"], spec["run"], spec["after"]) == (2, f"002-{generation}", 0)
        assert spec["parent"] == {"trial": 1, "run": "001", "step": 4}
        assert spec["values"]["seed"] == 3 and spec["values"]["learning_rate"] != 0.01
        assert spec["settings"] == setting.settings_of(spec["values"])
        worse.config = config
    line = lines_of(file, "trial")[-1]
    assert {**line, "after": 0} == {"kind": "trial", "time": line["time"], **spec}
    trial = file.ledger.trials[2]
    assert (trial.runs, trial.values, trial.state) == (["002", "002-1", "002-2"], spec["values"], "open")
    assert "hunter2" not in json.dumps(lines_of(file)) + json.dumps(config)


@pytest.mark.parametrize("synchronous", [False, True])
def test_trials_that_take_turns_are_compared_together(tmp_path: Path, file: LedgerFile, synchronous: bool) -> None:
    """Else the first to come would be compared with nobody, and wait for nothing."""
    _, setting = pbt_of(tmp_path, file)
    pbt = Pbt(Recorder(file, Told(), TOTAL), setting, TOTAL, file, str(tmp_path), synchronous)
    values = {"learning_rate": 0.01, "asr_tts_mix_ratio": 0.5, "train_asr_weights[0]": 1.0, "seed": 2}
    trials = [tune_trial(number, values=values) for number in (1, 2)]
    controller = MagicMock(get_trials=lambda: trials, get_live_trials=lambda: trials, search_alg=None)
    for number, trial in enumerate(trials, 1):
        add(file, number, values)
        pbt.on_trial_add(controller, trial)
        trial.set_status(TuneTrial.RUNNING)
    assert pbt.on_trial_result(controller, trials[0], result_of(0)) == CONTINUE
    assert pbt.on_trial_result(controller, trials[0], result_of(4, 0.5)) == (TrialScheduler.PAUSE if synchronous else CONTINUE)


def replace_worse(pbt: Pbt, file: LedgerFile, sweep_uri: Path, values: dict[str, Any], kept: bool = True) -> TuneTrial:
    """The second of two trials is to be replaced by a copy of the first; `kept`: whose checkpoint is there."""
    add(file, 1, values, s4=0.1)
    add(file, 2, values, s4=0.9)
    better, worse = (tune_trial(number, values=values) for number in (1, 2))
    for trial, score in ((better, -0.1), (worse, -0.9)):
        steps = {"last_train_time": 4, "last_perturbation_time": 4}
        pbt._trial_state[trial] = SimpleNamespace(last_score=score, orig_tag="", last_checkpoint=None, last_result={}, **steps)
    if kept:
        storage.write_bytes(f"{kept_uri(str(sweep_uri), '001', 4)}/commit.json", b"{}")
    pbt._exploit(MagicMock(), worse, better)
    return worse


@pytest.mark.parametrize("kept", [False, True])
def test_a_trial_is_replaced_where_the_better_ones_checkpoint_was_kept(tmp_path: Path, file: LedgerFile, kept: bool) -> None:
    pbt, _ = pbt_of(tmp_path, file)
    values = {"learning_rate": 0.01, "asr_tts_mix_ratio": 0.5, "train_asr_weights[0]": 1.0, "seed": 2}
    worse = replace_worse(pbt, file, tmp_path, values, kept)
    assert worse.config["spec"]["run"] == ("002-1" if kept else "002")
    assert len(file.ledger.trials[2].runs) == (2 if kept else 1)


def test_a_perturbed_setting_that_cannot_be_trained_ends_no_sweep(tmp_path: Path, file: LedgerFile) -> None:
    """A range may hold values that no run takes together: others are drawn, and where none is found, the better trial's own stay."""
    space = {"train_asr_weights": [{"uniform": [0.5, 2.0]}], "learning_rate": {"uniform": [0.1, 0.2]}}
    sweep = sweep_of(tmp_path, space, scheduler="pbt", train_asr_dirs=["a"])
    pbt = Pbt(Recorder(file, Told(), TOTAL), setting_of(sweep), TOTAL, file, str(tmp_path))
    values = {"train_asr_weights[0]": 1.0, "learning_rate": 0.15}
    drawn = [{**values, "learning_rate": -1.0}, {**values, "learning_rate": 0.16}]
    pbt.perturb = lambda _: drawn.pop(0)  # type: ignore[method-assign]
    replace_worse(pbt, file, tmp_path, values)
    assert file.ledger.trials[2].values["learning_rate"] == 0.16
    pbt.perturb = lambda _: {**values, "learning_rate": -1.0}  # type: ignore[method-assign]
    assert pbt._perturb_trainable(values)[0] == values


def test_a_trial_that_goes_on_is_compared_where_it_would_have_been_next(tmp_path: Path, file: LedgerFile) -> None:
    pbt, _ = pbt_of(tmp_path, file)
    add(file, 1, {"learning_rate": 0.1}, s4=0.1, s6=0.1)
    trial = tune_trial(1, values={"learning_rate": 0.1})
    controller = MagicMock(search_alg=None)
    trial.run_metadata = MagicMock()
    trial.run_metadata.checkpoint_manager.checkpoint_config.num_to_keep = None
    pbt.on_trial_add(controller, trial)
    every = int(pbt._perturbation_interval)
    assert pbt._trial_state[trial].last_perturbation_time == 6 - 6 % every


def test_an_evaluation_without_a_value_is_the_worst(tmp_path: Path, file: LedgerFile) -> None:
    """As of a loss that is not finite: of a search for the smallest and for the largest; what is no evaluation stays as it is."""
    assert fill_objective({"step": 2}, "min") == {"step": 2}
    assert fill_objective({"step": 2, "details": "", "objective_0": 1.0}, "min")["objective_0"] == 1.0
    assert fill_objective({"step": 2, "details": ""}, "min")["objective_0"] > 1e20
    assert fill_objective({"step": 2, "details": ""}, "max")["objective_0"] < -1e20


# Credentials


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_what_tune_pickles_holds_no_credentials(tmp_path: Path, file: LedgerFile, search: str) -> None:
    """Neither what drives it nor the files that it keeps of a search."""
    secret = {"output_dir": SECRET, "store_dir": SECRET, "train_asr_dirs": [SECRET], "model_name_or_path": SECRET}
    setting = setting_of(sweep_of(tmp_path, {"learning_rate": {"uniform": [0.001, 0.1]}}, search=search, **secret))
    pbt, _ = pbt_of(tmp_path, file, **secret)
    recorder = Recorder(file, Told(), TOTAL)
    proposals = Proposals(setting, file, Told())
    spec = proposals.suggest("a")
    for each in (proposals, Fifo(recorder, TOTAL), Asha(recorder, setting.sweep, TOTAL, {}), pbt):
        pickled = ray.cloudpickle.dumps(each)
        assert b"hunter2" not in pickled
        assert type(ray.cloudpickle.loads(pickled)) is object
    assert "hunter2" not in json.dumps(spec)
    SearchGenerator(ConcurrencyLimiter(proposals, 2)).save_to_dir(str(tmp_path), "session")
    assert any("session" in path.name for path in tmp_path.iterdir())
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name != "sweep.yaml")
