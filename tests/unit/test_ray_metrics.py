"""Ray's metrics of a run hold the newest of each figure and sums over the whole run, whatever was killed when; training never waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from most_ray.config import config_from
from most_ray.io.journal import Journal, journal_lines
from most_ray.metrics.schema import ALL, check_line
from most_ray.service.cluster import prometheus
from most_ray.service.cluster.prometheus import METRICS, RayMetrics
from most_ray.service.training import worker
from most_ray.trackers.base import Background, Line
from most_ray.trackers.select import trackers_of

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
START = {"total_steps": 100, "workers": 2}


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> Series:
    """What Ray would export, by name and tags; a gauge refuses what Ray's refuses."""
    exported: Series = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            self.name, self.keys = name, set(tag_keys)

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert isinstance(value, float) and set(tags) == self.keys and all(isinstance(tag, str) for tag in tags.values())
            exported[self.name, frozenset(tags.items())] = value

    monkeypatch.setattr(prometheus, "RayGauge", Gauge)
    return exported


def of(series: Series, name: str, **tags: str) -> float | None:
    return series.get((f"most_ray_{name}", frozenset({"run": "r", **tags}.items())))


def train(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "time": 1000.0 + 2 * step,
        "epoch": 0.1 * step,
        "loss": 5.0 / step,
        "asr_loss": 4.0 / step,
        "tts_loss": 6.0 / step,
        "grad_norm": 1.5,
        "learning_rate": 1e-3,
        "skipped_steps": 0,
        "tokens_per_second": 100.0,
        "step_time": 2.0,
        "data_wait": 0.25,
        "save_stall": 0.5,
        "mfu": 0.25,
        "memory_gb": 1.5,
        "leaked": 0,
        "expert_max_over_mean": {"text": 1.5, "audio": 2.5},
        "rank_load_max_over_mean": 1.25,
        "mix": {"asr/a": {"share": 0.625, "target": 0.6}, "tts/b": {"share": 0.375, "target": 0.4}},
        **changed,
    }


def evaluation(step: int, rate: float | None) -> dict[str, Any]:
    asr = {"task": "asr", "loss": 0.5, "perplexity": 1.6, "words": {"rate": rate}}
    tts = {"task": "tts", "loss": 3.0, "perplexity": 20.0, "cycle": {"rate": 0.125}}
    sets, overall = {"asr/near": asr, "asr/far": {**asr, "words": {"rate": 0.5}}, "tts/voice": tts}, {"asr": asr, "tts": tts}
    return {"kind": "evaluation", "step": step, "time": 2000.0, "seconds": 7.0, "sets": sets, "overall": overall}


def past(metrics: Path) -> Iterable[Line]:
    """The lines up to now, whenever they are read."""
    return journal_lines(metrics, size=metrics.stat().st_size)


def started(metrics: Path, step: int = 0, at: float = 900.0) -> tuple[RayMetrics, Journal]:
    """A start behind `step`, as the reporter makes it: the journal is cut back, the trackers begin, the line of kind start is written."""
    journal, tracker = Journal(metrics, step), RayMetrics(config_from({"name": "r"}))
    tracker.begin(step, past(metrics))
    write(journal, tracker, {"kind": "start", "step": step, "time": at, **START})
    return tracker, journal


def write(journal: Journal, tracker: RayMetrics, *lines: dict[str, Any]) -> None:
    for line in lines:
        journal.write(line)
        tracker.log(line)


def test_each_figure_of_training_is_shown_with_its_tags(series: Series, tmp_path: Path) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, train(1), train(2, skipped_steps=3, leaked=4, save_stall=1.0))
    expected = {"step": 2, "total_steps": 100, "workers": 2, "starts": 1, "epoch": 0.2, "learning_rate": 1e-3, "gradient_norm": 1.5}
    expected |= {"tokens_per_second": 100, "step_seconds": 2, "data_wait_seconds": 0.25, "mfu": 0.25, "memory_bytes": 1.5e9}
    expected |= {"save_stall_seconds": 1.5, "skipped_steps": 3, "leaked_selections": 4, "rank_load_max_over_mean": 1.25}
    expected |= {"last_step_timestamp_seconds": 1004, "line_seconds": 2}
    assert {name: of(series, name) for name in expected} == expected
    assert [of(series, "loss", task=task) for task in (ALL, "asr", "tts", "text")] == [2.5, 2.0, 3.0, None]
    assert [of(series, "mix_share", source=source) for source in ("asr/a", "tts/b")] == [0.625, 0.375]
    assert [of(series, "mix_target", source=source) for source in ("asr/a", "tts/b")] == [0.6, 0.4]
    assert [of(series, "expert_max_over_mean", modality=modality) for modality in ("text", "audio")] == [1.5, 2.5]


def test_evaluations_are_shown_by_set_and_over_all_and_an_older_one_that_comes_late_is_not(series: Series, tmp_path: Path) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, evaluation(40, 0.25), evaluation(20, 0.75))
    assert [of(series, "wer", set=name) for name in ("near", "far", ALL)] == [0.25, 0.5, 0.25]
    assert [of(series, "cycle_wer", set=name) for name in ("voice", ALL, "near")] == [0.125, 0.125, None]
    assert of(series, "validation_perplexity", task="tts", set="voice") == of(series, "validation_perplexity", task="tts", set=ALL) == 20.0
    assert of(series, "validation_loss", task="asr", set="near") == 0.5
    assert of(series, "evaluation_step") == 40 and of(series, "evaluation_seconds") == 7.0


def test_a_figure_that_is_none_leaves_the_one_before(series: Series, tmp_path: Path) -> None:
    """A step whose loss is not finite, a set without words."""
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, train(1), train(2, loss=None, grad_norm=None, skipped_steps=1), evaluation(2, None))
    assert of(series, "loss", task=ALL) == 5.0 and of(series, "gradient_norm") == 1.5 and of(series, "wer", set="near") is None
    assert of(series, "step") == 2


def test_sums_are_there_from_the_start_so_that_the_first_event_is_an_increase(series: Series, tmp_path: Path) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")
    names = ("skipped_steps", "leaked_selections", "save_stall_seconds", "failed_evaluations", "checkpoints")
    assert {of(series, name) for name in names} == {0.0}
    write(journal, tracker, {"kind": "failure", "step": 5, "time": 950.0, "what": "evaluation", "reason": "memory"})
    assert of(series, "failed_evaluations") == 1.0


def test_a_restart_shows_sums_over_the_whole_run_and_what_was_last(series: Series, tmp_path: Path) -> None:
    """Steps behind the checkpoint that it goes on from were cut back: they count once, when they are made again."""
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, *(train(step, skipped_steps=1) for step in range(1, 9)), evaluation(4, 0.25))
    series.clear()
    tracker, journal = started(tmp_path / "metrics.jsonl", step=6, at=1500.0)
    assert of(series, "starts") == 2 and of(series, "skipped_steps") == 6 and of(series, "step") == of(series, "checkpoint_step") == 6
    assert of(series, "wer", set="near") == 0.25 and of(series, "loss", task=ALL) == pytest.approx(5 / 6)
    write(journal, tracker, *(train(step, skipped_steps=1) for step in range(7, 9)))
    assert of(series, "skipped_steps") == 8


@pytest.mark.parametrize("step", [0, 6])
def test_lines_that_were_written_before_a_slow_tracker_began_count_once(series: Series, tmp_path: Path, step: int) -> None:
    """On its thread it may begin when the file holds this start's first lines already; a failure of tracking is told to no tracker."""
    metrics = tmp_path / "metrics.jsonl"
    if step:
        tracker, journal = started(metrics)
        write(journal, tracker, *(train(each, skipped_steps=1) for each in range(1, step + 1)))
    journal, tracker = Journal(metrics, step), RayMetrics(config_from({"name": "r"}))
    lines = [{"kind": "start", "step": step, "time": 1400.0, **START}, *(train(step + k, skipped_steps=1) for k in (1, 2))]
    failed = {"kind": "failure", "step": step + 1, "time": 1401.0, "what": "tracking", "reason": "disk"}
    before = past(metrics)
    for line in (*lines[:2], failed, *lines[2:]):
        journal.write(line)
    tracker.begin(step, before)
    for line in (*lines, train(step + 3, skipped_steps=1)):
        tracker.log(line)
    assert of(series, "starts") == (2 if step else 1) and of(series, "skipped_steps") == step + 3


def test_checkpoints_are_counted_and_dated(series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, _ = started(tmp_path / "metrics.jsonl")
    assert of(series, "checkpoint_step") is None
    monkeypatch.setattr(prometheus.time, "time", lambda: 1234.5)
    tracker.checkpoint(20, "s3://user:word@bucket/step-20")
    assert (of(series, "checkpoint_step"), of(series, "checkpoints")) == (20, 1)
    assert of(series, "checkpoint_timestamp_seconds") == 1234.5
    assert "word" not in str(series)


def test_a_start_that_makes_no_step_is_seen_to_stand_still_from_its_start(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, train(1))
    monkeypatch.setattr(prometheus.time, "time", lambda: 5000.0)
    started(tmp_path / "metrics.jsonl", step=1, at=4990.0)
    assert of(series, "last_step_timestamp_seconds") == 5000.0 and of(series, "line_seconds") == 0.0


def test_figures_are_set_anew_while_the_run_lives_and_no_more_behind_its_end(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray forgets a gauge 20 s after it was set, which must not hide a run whose steps hang."""
    monkeypatch.setattr(prometheus, "_REFRESH_S", 0.001)
    before = threading.enumerate()
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, train(1))
    (refresher,) = (thread for thread in threading.enumerate() if thread.name == "Ray's metrics" and thread not in before)
    forgotten = dict(series)
    series.clear()
    deadline = time.monotonic() + 10
    while series != forgotten:
        assert time.monotonic() < deadline
        refresher.join(0.001)
    tracker.close()
    refresher.join(10)
    assert not refresher.is_alive()


def test_the_runs_name_is_shown_without_what_may_be_a_secret(series: Series, tmp_path: Path) -> None:
    RayMetrics(config_from({"name": "r?key=word"})).begin(0, [])
    assert {dict(tags)["run"] for _, tags in series} == {"r?***"}


def test_every_metric_is_fed_by_keys_that_the_schema_has(series: Series, tmp_path: Path) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")
    write(journal, tracker, train(1), train(2), evaluation(2, 0.25))
    tracker.checkpoint(2, "x")
    assert {name for name, _ in series} == set(METRICS)
    unknown = [complaint for line in (train(1), evaluation(2, 0.25)) for complaint in check_line(line) if "unknown" in complaint]
    assert not unknown


def test_workers_of_ray_have_it_on_a_thread_of_its_own_and_other_ranks_do_not(tmp_path: Path) -> None:
    config = config_from({"name": "r"})
    assert trackers_of(config, str(tmp_path), None) == []
    job: Any = SimpleNamespace(config=config, run_uri=str(tmp_path))
    (tracker,) = worker._trackers(worker.WorkerJob(job, None))
    assert isinstance(tracker, Background) and isinstance(tracker._tracker, RayMetrics)


def test_a_failure_of_rays_metrics_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no exporter")

    monkeypatch.setattr(prometheus, "RayGauge", refuse)
    tracker = Background("Ray's metrics", RayMetrics(config_from({"name": "r"})))
    tracker.begin(0, [])
    tracker.log(train(1))
    tracker.close()
    assert tracker.failure and "no exporter" in tracker.failure


@pytest.mark.parametrize(
    ("text", "shown"), [("r-1", "r-1"), ("数据", "\\u6570\\u636e"), ("a\nb\x1b", "a\\nb\\x1b"), ("half \ud800", "half \\ud800"), ("", "")]
)
def test_values_of_tags_are_printable_ascii(text: str, shown: str) -> None:
    assert prometheus.tag_value(text) == shown
    assert len(prometheus.tag_value(text * 400)) <= 255


def test_figures_of_folders_with_other_letters_are_exported_as_all_others(series: Series, tmp_path: Path) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")
    line = train(1)
    line["mix"] = {"asr/数据": next(iter(line["mix"].values()))}
    write(journal, tracker, line, train(2))
    assert all(text.isascii() for _, tags in series for _, text in tags)
    assert of(series, "mix_share", source="asr/\\u6570\\u636e") is not None and of(series, "step") == 2


def test_a_gauge_that_fails_ends_no_other(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, journal = started(tmp_path / "metrics.jsonl")

    def refuse(*_: Any) -> None:
        raise RuntimeError("no such gauge")

    monkeypatch.setattr(tracker._gauges["most_ray_loss"], "set", refuse)
    write(journal, tracker, train(1), train(2))
    assert of(series, "step") == 2 and of(series, "gradient_norm") == 1.5
    assert caplog.text.count("most_ray_loss is not exported to Prometheus: no such gauge") == 1
