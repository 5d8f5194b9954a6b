"""Which trial of a sweep is next, without Ray's cluster: proposals, and TPE's through Optuna, also after a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher

from most_ray.io.run_folder import RunFolder
from most_ray.service.tune.schedulers import Recorder
from most_ray.service.tune.search import Proposals, Tpe
from most_ray.sweep.ledger import LedgerFile, Trial
from most_ray.sweep.options import Sweep
from tests.unit.test_sweep_options import setting_of, sweep_of

TOTAL = 12  # steps of a trial, evaluated every fourth


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LedgerFile]:
    opened = LedgerFile(RunFolder(str(tmp_path / "ledger")))
    yield opened
    opened.close()


class Told(list[tuple[int, str, int]]):
    """What was told of trials: number, state, step."""

    def __call__(self, trial: Trial) -> None:
        self.append((trial.number, trial.state, trial.step))


def lines_of(file: LedgerFile, *kinds: str) -> list[dict[str, Any]]:
    path = file._folder.local / "trials.jsonl"
    return [line for raw in path.read_text().splitlines() if (line := json.loads(raw))["kind"] in kinds or not kinds]


def reopened(file: LedgerFile) -> LedgerFile:
    """As the next start has it."""
    file.close()
    return LedgerFile(file._folder)


def add(file: LedgerFile, number: int, values: Mapping[str, Any], state: str = "open", **results: float) -> None:
    """A trial with word error rates as s4=0.5."""
    file.write("trial", trial=number, run=f"{number:03d}", values=dict(values), settings=dict(values), parent=None)
    for step, wer in results.items():
        tell(file, number, int(step[1:]), wer)
    if state != "open":
        file.write("end", trial=number, step=0, state=state, reason=None)


def tell(file: LedgerFile, number: int, step: int, wer: float) -> None:
    file.write("result", trial=number, run=f"{number:03d}", step=step, metrics={"wer/takes": wer}, intervals={})


def result_of(step: int, wer: float | None = None, **more: Any) -> dict[str, Any]:
    """As a trial's actor tells it; without a figure, that of a step without news."""
    if wer is None:
        return {"step": step, **more}
    return {"step": step, "details": json.dumps({"metrics": {"wer/takes": wer}, "intervals": {}}), "objective_0": wer, **more}


# Proposals


def test_open_trials_come_first_then_new_ones(tmp_path: Path, file: LedgerFile) -> None:
    """With the step behind which they go on, which is that of the run that counts; then the k-th proposals, until there are enough."""
    sweep = sweep_of(tmp_path, max_trials=6)
    add(file, 1, {"learning_rate": 0.002}, "finished", s4=0.5)
    add(file, 2, {"learning_rate": 0.003}, s8=0.4, s4=0.5)
    add(file, 3, {"learning_rate": 0.004}, s8=0.5)
    parent = {"trial": 2, "run": "002", "step": 4}
    file.write("trial", trial=3, run="003-1", values={"learning_rate": 0.005}, settings={"x": 1}, parent=parent)
    add(file, 4, {"learning_rate": 0.001}, "failed")
    before, told = lines_of(file), Told()
    proposals = Proposals(setting_of(sweep, shared={"max_steps": TOTAL}), file, told)
    assert proposals.suggest("a") == {
        "spec": {
            "trial": 2,
            "run": "002",
            "values": {"learning_rate": 0.003},
            "settings": {"learning_rate": 0.003},
            "parent": None,
            "after": 8,
        }
    }
    third = {"trial": 3, "run": "003-1", "values": {"learning_rate": 0.005}, "settings": {"x": 1}, "parent": parent, "after": 0}
    assert proposals.suggest("b") == {"spec": third}
    assert lines_of(file) == before
    for number in (5, 6):
        values = sweep.space.proposal("random", 0, number - 1)
        assert values is not None
        line = {"trial": number, "run": f"{number:03d}", "values": values, "settings": {**values, "max_steps": TOTAL}, "parent": None}
        assert proposals.suggest(str(number)) == {"spec": {**line, "after": 0}}
        (written,) = lines_of(file)[len(before) + number - 5 :]
        assert written == {"kind": "trial", "time": written["time"], **line}
    assert proposals.suggest("c") == Searcher.FINISHED == proposals.suggest("d")
    assert not told and list(file.ledger.trials) == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_trained_is_written_down_and_the_next_is_tried(tmp_path: Path, file: LedgerFile) -> None:
    """A grid's points in their order, to its end."""
    told = Told()
    setting = setting_of(sweep_of(tmp_path, {"audio_experts": [8, 4, 7, 9]}, search="grid"))
    proposals = Proposals(setting, file, told)
    spec = proposals.next()
    assert spec is not None and spec["trial"] == 2 and spec["settings"]["audio_expert_indices"] == [4, 5, 6, 7]
    assert proposals.next() is None and proposals.next() is None
    found = {trial.number: (trial.state, trial.values["audio_experts"], trial.settings) for trial in file.ledger.trials.values()}
    failed = {1: 8, 3: 7, 4: 9}
    assert {number: found[number] for number in failed} == {number: ("failed", value, {}) for number, value in failed.items()}
    assert file.ledger.trials[1].reason == "audio_experts = 8: must be in 1..7: text needs experts too."
    assert told == [(1, "failed", 0), (3, "failed", 0), (4, "failed", 0)]
    # One line for each: none that a kill could leave open without settings.
    assert [(line["kind"], line["trial"], "invalid" in line) for line in lines_of(file)] == [
        ("trial", 1, True),
        ("trial", 2, False),
        ("trial", 3, True),
        ("trial", 4, True),
    ]


def test_a_restart_proposes_as_if_there_had_been_none(tmp_path: Path, file: LedgerFile) -> None:
    """Open trials are served again, none is skipped or made twice."""
    setting = setting_of(sweep_of(tmp_path, max_trials=5))
    first = Proposals(setting, file, Told())
    before = [first.next() for _ in range(2)]
    file.write("end", trial=1, step=TOTAL, state="finished", reason=None)
    second = Proposals(setting, reopened(file), Told())
    specs = [before[0], *iter(second.next, None)]
    assert specs[1] == before[1]
    assert [spec and spec["trial"] for spec in specs] == [1, 2, 3, 4, 5]
    assert [spec and spec["values"] for spec in specs] == [setting.sweep.space.proposal("random", 0, k) for k in range(5)]


# TPE

TPE_SPACE = {"learning_rate": {"loguniform": [0.001, 0.1]}, "lr_scheduler": ["linear", "cosine"], "audio_experts": "2..6"}
POINT = {"learning_rate": 0.01, "lr_scheduler": "cosine", "audio_experts": 3}
SPEC = {"trial": 1, "run": "001", "values": POINT, "settings": POINT, "parent": None}


def tpe_sweep(folder: Path, **changes: Any) -> Sweep:
    return sweep_of(folder, TPE_SPACE, **{"search": "tpe", "max_trials": 40, **changes})


def study_of(tpe: Tpe) -> optuna.Study:
    study = tpe._search._ot_study
    assert isinstance(study, optuna.Study)
    return study


def states(study: optuna.Study) -> list[tuple[str, list[float] | None]]:
    return [(trial.state.name, trial.values) for trial in study.trials]


def test_tpe_knows_what_an_earlier_start_has_found(tmp_path: Path, file: LedgerFile) -> None:
    """Ended trials with their values and steps; a stopped one without a final value; open ones it is told of as they go on."""
    add(file, 1, POINT, "finished", s4=0.6, s12=0.3)
    add(file, 2, {**POINT, "lr_scheduler": "linear"}, "stopped", s4=0.9)
    add(file, 3, {**POINT, "audio_experts": 6}, "failed", s4=0.5)
    add(file, 4, {**POINT, "learning_rate": 0.1}, "finished")
    add(file, 5, {**POINT, "audio_experts": 2}, s4=0.5)
    tpe = Tpe(tpe_sweep(tmp_path), reopened(file))
    study = study_of(tpe)
    assert study.direction.name == "MINIMIZE"
    assert states(study) == [("COMPLETE", [0.3]), ("PRUNED", None), ("FAIL", None), ("FAIL", None)]
    assert [trial.intermediate_values for trial in study.trials] == [{4: 0.6, 12: 0.3}, {4: 0.9}, {4: 0.5}, {}]
    assert study.trials[0].params == {"learning_rate": 0.01, "lr_scheduler": 1, "audio_experts": 3}
    assert study.best_trial.number == 0
    assert study.trials[0].distributions == {
        "learning_rate": optuna.distributions.FloatDistribution(0.001, 0.1, log=True),
        "lr_scheduler": optuna.distributions.CategoricalDistribution((0, 1)),
        "audio_experts": optuna.distributions.IntDistribution(2, 6),
    }
    tpe.enqueue("a", file.ledger.trials[5])
    assert [trial.params["audio_experts"] for trial in study.trials] == [3, 3, 6, 3, 2]
    assert study.trials[4].state.name == "RUNNING"
    values = tpe.propose("b")
    assert len(study.trials) == 6 and set(values) == set(TPE_SPACE)


def test_tpe_with_several_objectives(tmp_path: Path, file: LedgerFile) -> None:
    sweep = tpe_sweep(tmp_path, objectives=["max:loss", "wer/takes"])
    file.write("trial", trial=1, run="001", values=POINT, settings={}, parent=None)
    file.write("result", trial=1, run="001", step=4, metrics={"wer/takes": 0.5, "loss": 2.0}, intervals={})
    file.write("end", trial=1, step=4, state="finished", reason=None)
    add(file, 2, {**POINT, "audio_experts": 6}, "finished", s4=0.5)
    study = study_of(Tpe(sweep, file))
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert states(study) == [("COMPLETE", [2.0, 0.5]), ("FAIL", None)]


def test_tpe_values_are_those_of_the_space(tmp_path: Path, file: LedgerFile) -> None:
    """Plain ones, in their ranges, choices as they were written; other seeds give others."""
    tpe = Tpe(tpe_sweep(tmp_path), file)
    found = [tpe.propose(str(k)) for k in range(12)]
    for values in found:
        assert list(values) == list(TPE_SPACE)
        assert 0.001 <= values["learning_rate"] <= 0.1 and values["lr_scheduler"] in ("linear", "cosine")
        assert values["audio_experts"] in range(2, 7) and type(values["audio_experts"]) is int
    assert len({json.dumps(values) for values in found}) == 12
    assert Tpe(tpe_sweep(tmp_path), file).propose("0") == found[0]
    assert Tpe(tpe_sweep(tmp_path, search_seed=1), file).propose("0") != found[0]


def run_trials(proposals: Proposals, recorder: Recorder, ids: list[str]) -> list[dict[str, Any]]:
    """Trials from their proposal to their end, as Tune leads them."""
    values = []
    for trial_id in ids:
        suggested = proposals.suggest(trial_id)
        assert isinstance(suggested, dict)
        spec = suggested["spec"]
        values.append(spec["values"])
        for step in (4, 8, TOTAL):
            result = result_of(step, abs(spec["values"]["learning_rate"] - 0.02))
            recorder.result(spec, result)
            proposals.on_trial_result(trial_id, result)
        proposals.on_trial_result(trial_id, result_of(TOTAL))
        recorder.complete(spec, result_of(TOTAL, done=True))
        proposals.on_trial_complete(trial_id, result_of(TOTAL, done=True))
    return values


def test_tpe_goes_on_with_what_was_found(tmp_path: Path, file: LedgerFile) -> None:
    """No proposal of an earlier start is repeated; its study counts every trial once."""
    setting = setting_of(tpe_sweep(tmp_path))
    found = []
    for start in range(3):
        file = reopened(file)
        proposals = Proposals(setting, file, Told())
        assert proposals._tpe is not None and len(study_of(proposals._tpe).trials) == 3 * start
        found += run_trials(proposals, Recorder(file, Told(), TOTAL), [f"{start}-{k}" for k in range(3)])
    assert len({json.dumps(values) for values in found}) == 9
    file.close()


def test_tpe_learns_from_a_trial_that_an_earlier_start_has_begun(tmp_path: Path, file: LedgerFile) -> None:
    add(file, 1, POINT, s4=0.8)
    proposals = Proposals(setting_of(tpe_sweep(tmp_path)), file, Told())
    assert proposals.suggest("a") == {"spec": {**SPEC, "after": 4}}
    proposals.on_trial_result("a", result_of(8, 0.7))
    file.write("end", trial=1, step=8, state="stopped", reason=None)
    proposals.on_trial_complete("a", result_of(8, 0.7))
    assert proposals._tpe is not None
    (trial,) = study_of(proposals._tpe).trials
    assert (trial.state.name, trial.intermediate_values) == ("PRUNED", {8: 0.7})
    assert trial.params == {"learning_rate": 0.01, "lr_scheduler": 1, "audio_experts": 3}


def test_tpe_ranks_a_stopped_trial_by_what_it_had_come_to(tmp_path: Path, file: LedgerFile) -> None:
    proposals = Proposals(setting_of(tpe_sweep(tmp_path)), file, Told())
    assert isinstance(proposals.suggest("a"), dict) and isinstance(proposals.suggest("b"), dict)
    proposals.on_trial_result("a", result_of(4, 0.7))
    proposals.on_trial_result("a", result_of(4))
    file.write("end", trial=1, step=4, state="stopped", reason=None)
    proposals.on_trial_complete("a", result_of(4, 0.7))
    file.write("end", trial=2, step=4, state="failed", reason="why")
    proposals.on_trial_complete("b", result_of(0, done=True, failed="why"))
    assert proposals._tpe is not None
    study = study_of(proposals._tpe)
    assert states(study) == [("PRUNED", [0.7]), ("FAIL", None)]
    assert study.trials[0].intermediate_values == {4: 0.7}


@pytest.mark.parametrize("objectives", [["wer/takes"], ["wer/takes", "max:loss"]])
def test_tpe_is_told_the_values_of_a_finished_trial(tmp_path: Path, file: LedgerFile, objectives: list[str]) -> None:
    """The last result of a trial is that its run has ended: without figures, which were told before."""
    proposals = Proposals(setting_of(tpe_sweep(tmp_path, objectives=objectives)), file, Told())
    suggested = proposals.suggest("a")
    assert isinstance(suggested, dict)
    details = json.dumps({"metrics": {"wer/takes": 0.25, "loss": 2.0}, "intervals": {}})
    result = {"step": TOTAL, "details": details, "objective_0": 0.25, **({"objective_1": 2.0} if len(objectives) > 1 else {})}
    recorder = Recorder(file, Told(), TOTAL)
    recorder.result(suggested["spec"], result)
    proposals.on_trial_result("a", result)
    recorder.complete(suggested["spec"], result_of(TOTAL, done=True))
    proposals.on_trial_complete("a", result_of(TOTAL, done=True))
    assert proposals._tpe is not None
    assert states(study_of(proposals._tpe)) == [("COMPLETE", [0.25, 2.0][: len(objectives)])]


def test_tpe_proposes_anew_where_a_proposal_cannot_be_trained(tmp_path: Path, file: LedgerFile) -> None:
    space = {"audio_experts": "6..8", "learning_rate": {"uniform": [0.1, 0.2]}}
    proposals = Proposals(setting_of(sweep_of(tmp_path, space, search="tpe", max_trials=30)), file, Told())
    specs = [proposals.suggest(str(k)) for k in range(4)]
    points = [json.dumps(trial.values) for trial in file.ledger.trials.values()]
    assert all(isinstance(spec, dict) for spec in specs)
    assert len(set(points)) == len(points) > 4


def test_tpe_does_not_repeat_what_is_still_open(tmp_path: Path, file: LedgerFile) -> None:
    """A start that was stopped before any trial had ended."""
    setting = setting_of(tpe_sweep(tmp_path))
    first = Proposals(setting, file, Told())
    before = [first.next(str(k)) for k in range(2)]
    second = Proposals(setting, reopened(file), Told())
    after = [second.next(f"again{k}") for k in range(4)]
    assert after[:2] == before
    assert len({json.dumps(spec and spec["values"]) for spec in after}) == 4
