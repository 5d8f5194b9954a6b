"""The ledger of a sweep: what its lines add up to, who may write it, and which trials are best."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from most_ray.errors import ConfigError
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.schema import check_line
from most_ray.sweep import ledger
from most_ray.sweep.ledger import LedgerFile, Objective, Result, Trial, intervals_of, metric_at, metrics_of, pareto, ranked, replay

WER = Objective("wer/takes")


def sweep(time: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"kind": "sweep", "time": time, "name": "s", **more}


def began(trial: int, time: float = 0.0, run: str = "", **more: Any) -> dict[str, Any]:
    line = {"kind": "trial", "time": time, "trial": trial, "run": run or f"{trial:03d}", "values": {"a": trial}, "settings": {"b": trial}}
    return {**line, "parent": None, **more}


def told(trial: int, step: int, wer: float = 0.5, time: float = 0.0, run: str = "", **more: Any) -> dict[str, Any]:
    line = {"kind": "result", "time": time, "trial": trial, "run": run or f"{trial:03d}", "step": step}
    return {**line, "metrics": {"wer/takes": wer}, "intervals": {"wer/takes": [0.4, 0.6]}, **more}


def ended(trial: int, state: str = "finished", time: float = 0.0, reason: str | None = None) -> dict[str, Any]:
    return {"kind": "end", "time": time, "trial": trial, "step": 8, "state": state, "reason": reason}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def trial_of(number: int, state: Any = "finished", **metrics: float) -> Trial:
    return Trial(number, ["r"], results=[Result("r", 8, dict(metrics), {})], state=state)


# What lines add up to


def test_a_trial_is_put_together_from_its_lines() -> None:
    lines = [sweep(1), began(2, 2), told(2, 4, 0.5), told(2, 8, 0.25), ended(2, "stopped", 9.5, "asha")]
    found = replay([*lines, began(1, 3)])
    assert list(found.trials) == [1, 2]
    first, second = found.trials.values()
    assert (first.state, first.step, first.metric("wer/takes"), first.ended, first.began) == ("open", 0, None, None, 3)
    assert (second.state, second.reason, second.ended, second.began) == ("stopped", "asha", 9.5, 2)
    assert (second.runs, second.values, second.settings, second.parents) == (["002"], {"a": 2}, {"b": 2}, [None])
    assert second.results == [Result("002", step, {"wer/takes": wer}, {"wer/takes": (0.4, 0.6)}) for step, wer in ((4, 0.5), (8, 0.25))]
    assert (second.step, second.metric("wer/takes"), second.metric("other")) == (8, 0.25, None)
    assert found.in_state("open") == [first] and found.in_state("stopped", "open") == [first, second]
    assert found.sweep == sweep(1)


def test_a_trial_of_an_earlier_version_has_todays_words() -> None:
    """A search compares its values with the space's, which is read in today's words."""
    line = began(1, values={"weight_unit": "rows", "audio_experts": 2}, settings={"weight_unit": "rows", "name": "rows"})
    trial = replay([line]).trials[1]
    assert trial.values == {"weight_unit": "records", "audio_experts": 2}
    assert trial.settings == {"weight_unit": "records", "name": "rows"}


def test_a_metric_is_that_of_the_last_result() -> None:
    """One that had a value once and has none at the end, as a loss that is not finite, has none."""
    lines = [began(1), told(1, 4, metrics={"a": 1, "b": 2}), told(1, 8, metrics={"a": 3})]
    trial = replay(lines).trials[1]
    assert (trial.metric("a"), trial.metric("b")) == (3, None)


def test_later_lines_add_to_earlier_ones() -> None:
    """A copy of a better trial takes a trial's place with its run, values and parent; a line that is told again changes nothing but
    those; of several starts the newest line of the sweep counts."""
    parent = {"trial": 1, "run": "001", "step": 4}
    copy = began(2, 5, run="002-1", values={"a": 9}, settings={"b": 9}, parent=parent)
    lines = [
        sweep(max_trials=2),
        began(1),
        began(2, 1),
        told(2, 4),
        copy,
        told(2, 8, run="002-1"),
        sweep(max_trials=4),
        began(2, 7, "002-1"),
    ]
    found = replay(lines)
    trial = found.trials[2]
    assert (trial.runs, trial.parents) == (["002", "002-1"], [None, parent])
    assert (trial.values, trial.settings, trial.began) == ({"a": 2}, {"b": 2}, 1)
    assert [(result.run, result.step) for result in trial.results] == [("002", 4), ("002-1", 8)]
    assert found.sweep["max_trials"] == 4
    assert replay(lines[:6]).trials[2].values == {"a": 9}


def test_a_result_counts_once() -> None:
    """What a restart tells again is the first; another run's result of the same step is one of its own."""
    lines = [began(1), told(1, 4, 0.5), told(1, 4, 0.7), told(1, 8, 0.3), told(1, 4, 0.9, run="001-1")]
    assert [(r.run, r.step, r.metrics["wer/takes"]) for r in replay(lines).trials[1].results] == [
        ("001", 4, 0.5),
        ("001", 8, 0.3),
        ("001-1", 4, 0.9),
    ]


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_an_end(state: str) -> None:
    found = replay([began(1), ended(1, state, 7, "why")])
    assert (found.trials[1].state, found.trials[1].reason, found.trials[1].ended) == (state, "why", 7)


def test_what_is_incomplete_is_passed_over() -> None:
    """Whatever is missing from a line, it leaves no half of a trial."""
    whole = [sweep(), began(1), told(1, 4), ended(1, "finished")]
    broken = [
        {},
        {"time": 1},
        {"kind": "result", "trial": 7, "run": "007", "step": 1, "metrics": {}},
        {"kind": "other", "trial": 1},
        {"kind": "end", "trial": 1, "state": "open"},
        {"kind": "end", "trial": 1, "state": "lost"},
        {**told(1, 8), "metrics": None},
        {**told(1, 8), "step": "x"},
        {**told(1, 8), "intervals": {"wer/takes": 3}},
        {**began(5), "trial": "x"},
        {**sweep(), "time": "x"},
        *({key: value for key, value in told(1, 8).items() if key != name} for name in ("run", "step", "metrics", "trial", "kind")),
        *({key: value for key, value in began(5).items() if key != name} for name in ("run", "values", "settings", "trial", "kind")),
        *({key: value for key, value in ended(1, "failed").items() if key != name} for name in ("state", "trial", "kind")),
    ]
    found = replay([*whole, *broken])
    assert list(found.trials) == [1]
    assert [result.step for result in found.trials[1].results] == [4]
    assert (found.trials[1].state, found.sweep) == ("finished", sweep())
    assert replay([]).trials == {} and replay([]).sweep == {}


def test_lines_without_parent_intervals_reason_or_time() -> None:
    short = [{"kind": "trial", "trial": 1, "run": "1", "values": {}, "settings": {}}, {"kind": "end", "trial": 1, "state": "failed"}]
    found = replay([short[0], {"kind": "result", "trial": 1, "run": "1", "step": 2, "metrics": {"a": 1}}, short[1]])
    trial = found.trials[1]
    assert (trial.parents, trial.reason, trial.results[0].intervals, trial.began) == ([None], None, {}, 0.0)


def test_time_spent_is_that_of_all_starts() -> None:
    """From each start to its last line; what lies between two starts is nobody's."""
    first = [sweep(100), began(1, 101), told(1, 4, time=160)]
    second = [sweep(1000), told(1, 8, time=1007), ended(1, time=1003)]
    assert replay(first).spent_s == 60
    assert replay([*first, *second]).spent_s == 67
    assert replay([*first, *second, sweep(5000)]).spent_s == 67
    assert replay([sweep(100)]).spent_s == 0


# The file


def test_what_is_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory at once, in the file, and by whoever opens it next."""
    monkeypatch.setattr(ledger.time, "time", iter([10.12345, 11.0, 12.0, 14.0]).__next__)
    file = LedgerFile(RunFolder(str(tmp_path)))
    assert file.ledger.trials == {}
    file.write("sweep", name="s", shared={"x": 1})
    file.write("trial", trial=1, run="001", values={"a": "ä"}, settings={}, parent=None)
    file.write("result", trial=1, run="001", step=4, metrics={"wer/takes": 0.5}, intervals={})
    file.write("end", trial=1, step=4, state="failed", reason="why")
    assert (file.ledger.sweep["shared"], file.ledger.trials[1].state, file.ledger.trials[1].step) == ({"x": 1}, "failed", 4)
    assert file.ledger.trials[1].began == 11.0
    again = file.reread()
    assert again.trials == file.ledger.trials and again.sweep == file.ledger.sweep
    assert again.spent_s == pytest.approx(14.0 - 10.123)
    file.close()
    assert "ä" in (tmp_path / "trials.jsonl").read_text(encoding="utf-8")
    assert lines_of(tmp_path)[0] == {"kind": "sweep", "time": 10.123, "name": "s", "shared": {"x": 1}}
    reopened = LedgerFile(RunFolder(str(tmp_path)))
    assert reopened.ledger.trials == again.trials
    reopened.close()
    read = ledger.read_ledger(str(tmp_path))
    assert read is not None and read.trials == again.trials
    assert ledger.read_ledger(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize("torn", ['{"kind": "end", "trial": 1, "sta', json.dumps(ended(1)), '{"kind"\ufffd'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: str) -> None:
    """What is written next stands on a line of its own."""
    whole = json.dumps(began(1)) + "\n"
    (tmp_path / "trials.jsonl").write_text(whole + torn)
    file = LedgerFile(RunFolder(str(tmp_path)))
    assert file.ledger.trials[1].state == "open"
    assert (tmp_path / "trials.jsonl").read_text() == whole
    file.write("end", trial=1, step=0, state="stopped", reason=None)
    file.close()
    assert [line["kind"] for line in lines_of(tmp_path)] == ["trial", "end"]


def test_a_second_process_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    script = "import sys; from most_ray.sweep.ledger import *; f = LedgerFile(RunFolder(sys.argv[1])); print('open', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"open\n"
    with pytest.raises(ConfigError, match=rf"^name = '{tmp_path}': is being swept by another process\. Wait"):
        LedgerFile(RunFolder(str(tmp_path)))
    other.kill()  # as a crash: nothing is left to be cleaned up
    other.communicate()
    LedgerFile(RunFolder(str(tmp_path))).close()
    LedgerFile(RunFolder(str(tmp_path))).close()


def test_behind_a_uri_every_line_goes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever goes on, on whichever machine, begins with what is there."""
    uri = "memory://sweeps/s"
    for machine in ("one", "two"):
        monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / machine))
        file = LedgerFile(RunFolder(uri))
        number = len(file.ledger.trials) + 1
        file.write("trial", trial=number, run=f"{number:03d}", values={}, settings={}, parent=None)
        found = ledger.read_ledger(uri)
        assert found is not None and list(found.trials) == list(range(1, number + 1))
        file.close()
    assert number == 2


def test_a_place_that_is_taken_is_told_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path))
    uri = "memory://key:hunter2@bucket/sweep"
    held = LedgerFile(RunFolder(uri))
    with pytest.raises(ConfigError, match="another process") as caught:
        LedgerFile(RunFolder(uri))
    assert "hunter2" not in str(caught.value)
    held.close()


def test_a_sweep_that_was_refused_leaves_no_ledger(tmp_path: Path) -> None:
    LedgerFile(RunFolder(str(tmp_path))).close()
    assert not (tmp_path / "trials.jsonl").exists()
    file = LedgerFile(RunFolder(str(tmp_path)))
    file.write("sweep", name="mine")
    file.close()
    assert (tmp_path / "trials.jsonl").read_text().startswith('{"kind": "sweep"')


def test_a_sweep_that_another_machine_has_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks do not work across machines: the sweep names its owner, and a driver that has lost it writes nothing more."""
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path))
    file = LedgerFile(folder := RunFolder("memory://bucket/taken-over"))
    file.write("sweep", name="mine")
    folder.claim("another")
    with pytest.raises(ConfigError, match="taken over by a newer start"):
        file.write("sweep", name="mine")
    file.close()


# Figures


def rate(value: float | None, low: float = 0.1, high: float = 0.9) -> dict[str, Any]:
    counts = {"substitutions": 1, "deletions": 1, "insertions": 1, "reference": 4}
    return {"rate": value, **counts, "interval": None if value is None else [low, high]}


def evaluation() -> dict[str, Any]:
    """A line as it is documented (checked by its own test)."""
    common = {"records": 3, "perplexity": 2.5, "supervised_tokens": 12, "rejected": 0}
    heard = {"task": "asr", **common, "empty_rate": 0.0, "confusions": [], "loop_rate": 0.0, "length_cap_rate": 0.0, "foreign_rate": 0.0}
    spoken = {"task": "tts", **common, "loop_rate": 0.0, "length_cap_rate": 0.0, "end_of_audio_rate": 1.0, "foreign_rate": 0.0}
    sets: dict[str, Any] = {
        "asr/takes": {**heard, "loss": 1.0, "words": rate(0.5), "characters": rate(0.25)},
        "asr/empty": {**heard, "loss": None, "words": rate(None), "characters": rate(None)},
        "asr/b/takes": {**heard, "loss": 2.0, "words": rate(0.1, 0.05, 0.2), "characters": rate(0.0)},
        "tts/takes": {**spoken, "loss": 6.0, "units": rate(0.7), "cycle": rate(0.6), "outside": rate(0.8), "duration_ratio": 1.1},
        "text/books": {"task": "text", **common, "loss": 3.0},
    }
    line = {"kind": "evaluation", "step": 8, "time": 1.0, "seconds": 2.0, "wer": {"takes": 0.5}, "overall": {}, "samples": []}
    return {**line, "validation_loss": {name: figures["loss"] for name, figures in sets.items()}, "sets": sets}


def test_the_line_is_one_of_those_that_runs_write() -> None:
    assert check_line(evaluation()) == []


def test_figures_of_an_evaluation_by_name() -> None:
    """Null is no figure; wer and loss are means over the sets that have one. An ASR and a TTS set may be called alike."""
    plain = {f"perplexity/{name}": 2.5 for name in evaluation()["sets"]}
    assert metrics_of(evaluation()) == {
        **plain,
        "wer/takes": 0.5,
        "cer/takes": 0.25,
        "wer/b/takes": 0.1,
        "cer/b/takes": 0.0,
        "wer": pytest.approx(0.3),
        "unit_error_rate/takes": 0.7,
        "cycle_wer/takes": 0.6,
        "outside_wer/takes": 0.8,
        "duration_ratio/tts/takes": 1.1,
        "loss/asr/takes": 1.0,
        "loss/asr/b/takes": 2.0,
        "loss/tts/takes": 6.0,
        "loss/text/books": 3.0,
        "loss": 3.0,
    }
    assert metrics_of({"sets": {"text/x": {"loss": None}}}) == {} == metrics_of({})
    assert metrics_of({"sets": {"asr/x": {"loss": 2, "words": None}}}) == {"loss/asr/x": 2.0, "loss": 2.0}


def test_figures_of_the_steps_training_are_added() -> None:
    """Numbers alone, without what says where the line stands."""
    train = {"kind": "train", "step": 8, "time": 5.0, "loss": 1.5, "grad_norm": None, "samples": 3, "ok": True, "mix": {"a": 1}}
    found = metrics_of({"sets": {}}, train)
    assert found == {"train/loss": 1.5, "train/samples": 3.0}
    assert all(type(value) is float for value in found.values())


def test_intervals_of_the_figures_that_have_one() -> None:
    assert intervals_of(evaluation()) == {
        **dict.fromkeys(("wer/takes", "cer/takes", "cer/b/takes"), (0.1, 0.9)),
        **dict.fromkeys(("unit_error_rate/takes", "cycle_wer/takes", "outside_wer/takes"), (0.1, 0.9)),
        "wer/b/takes": (0.05, 0.2),
    }
    assert intervals_of({}) == {} == intervals_of({"sets": {"asr/x": {"words": None}}})


# Which is best


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("wer/takes", Objective("wer/takes")),
        ("max:duration_ratio/tts/takes", Objective("duration_ratio/tts/takes", True)),
        (" max : loss ", Objective("loss", True)),
        ("wer/a:b", Objective("wer/a:b")),
        ("max:wer/a:b", Objective("wer/a:b", True)),
        ("mx:loss", Objective("mx:loss")),
        ("min:loss", Objective("loss")),
        ("max", Objective("max")),
    ],
)
def test_an_objective_as_it_is_written(text: str, objective: Objective) -> None:
    """Only max: turns it round: a slip in it is part of a name, which then nobody knows. What it is written as is read again."""
    assert Objective.parse(text) == objective == Objective.parse(str(objective))


def test_the_smaller_key_is_the_better() -> None:
    assert (Objective("a").key(2.0), Objective("a", True).key(2.0)) == (2.0, -2.0)


def test_trials_in_order() -> None:
    """Those that made all their steps come first, by the value; failed ones and those without a value are none; ties by number."""
    trials = [
        trial_of(1, a=0.5),
        trial_of(2, "stopped", a=0.1),
        trial_of(3, "failed", a=0.0),
        trial_of(4, a=0.2),
        trial_of(5, "open", a=0.05),
        trial_of(6, b=0.1),
        trial_of(8, a=0.2),
        trial_of(7, a=0.2),
        trial_of(9, a=0.0),
    ]
    assert [trial.number for trial in ranked(trials, Objective("a"))] == [9, 4, 7, 8, 1, 5, 2]
    assert [trial.number for trial in ranked(trials, Objective("a", True))] == [1, 4, 7, 8, 9, 2, 5]


POINTS = st.lists(
    st.tuples(
        st.sampled_from(["finished", "finished", "finished", "stopped", "failed", "open"]),
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 3).map(float)),
    ),
    max_size=12,
)
OBJECTIVES = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.tuples(*(st.builds(Objective, st.just(name), st.booleans()) for name in names))
)


def dominates(own: Mapping[str, float], other: Mapping[str, float], objectives: tuple[Objective, ...]) -> bool:
    gains = [(other[o.metric] - own[o.metric]) * (-1 if o.largest else 1) for o in objectives]
    return min(gains) >= 0 and max(gains) > 0


@given(points=POINTS, objectives=OBJECTIVES)
def test_no_trial_is_better_than_one_of_the_front(points: list[tuple[str, dict[str, float]]], objectives: tuple[Objective, ...]) -> None:
    """By brute force over all pairs; in the order of the first objective."""
    trials = [trial_of(number, state, **metrics) for number, (state, metrics) in enumerate(points)]
    whole = [t for t in trials if t.state == "finished" and all(o.metric in t.results[0].metrics for o in objectives)]
    front = [t for t in whole if not any(dominates(o.results[0].metrics, t.results[0].metrics, objectives) for o in whole)]
    found = pareto(trials, objectives)
    assert sorted(trial.number for trial in found) == [trial.number for trial in front]
    keys = [objectives[0].key(trial.results[0].metrics[objectives[0].metric]) for trial in found]
    assert keys == sorted(keys)
    if len(objectives) == 1 and whole:
        best = ranked(whole, objectives[0])
        assert found[0] is best[0]


def test_a_metric_at_a_step() -> None:
    """The newest run's where several made the step."""
    results = [Result("001", step, {"a": float(step)}, {}) for step in (2, 4)] + [Result("001-1", 4, {"a": 9.0}, {})]
    trial = Trial(1, ["001", "001-1"], results=results)
    assert [metric_at(trial, "a", step) for step in (2, 3, 4)] == [2.0, None, 9.0]
    assert metric_at(trial, "b", 2) is None


def test_places_in_a_sweeps_folder() -> None:
    assert ledger.trial_uri("/x", "001-1") == "/x/trials/001-1"
    assert ledger.kept_uri("s3://b/x?region=r", "001", 60) == "s3://b/x/kept/001/step-000000060?region=r"
