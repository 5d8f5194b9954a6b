"""What is stored of scores: by which normaliser, without credentials, as JSON and names that everything can read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from most_ray.config import config_from
from most_ray.evaluation.hypotheses import rescore, write_hypotheses, write_result
from most_ray.evaluation.wer import NORMALISER_VERSION
from most_ray.io.journal import Journal, journal_lines
from most_ray.io.run_folder import RunFolder
from most_ray.metrics.rows import row_of
from most_ray.report import write_report
from most_ray.runs.lifecycle import _warn_of_version
from most_ray.trackers.base import sample_cells

ROW = {"kind": "hypothesis", "set": "asr/a", "task": "asr", "row": 0, "id": "x", "loss": 1.0, "supervised_tokens": 1, "foreign": 0}


def hypotheses(folder: Path, settings: dict[str, Any], reference: str = "हिन्दी", hypothesis: str = "हन्द") -> str:
    about = {"task": "asr", "records": 1, "rejected": 0, "rejected_file": "r"}
    header = {"settings": settings, "sets": {"asr/a": about}, "routing": {"leaked": 0}}
    row = {**ROW, "reference": reference, "hypothesis": hypothesis, "ended": True, "looping": False}
    write_hypotheses(folder / "h.jsonl", header, [row])
    return str(folder / "h.jsonl")


def test_a_file_of_another_normaliser_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = hypotheses(tmp_path, {"normaliser": "basic"})
    result = rescore(old)
    assert result["wer"] == {"a": 1.0} and result["settings"]["normaliser_version"] == NORMALISER_VERSION
    assert [message.split(",")[0] for message in caplog.messages] == [f"{old} was scored by version 1 of the normalisers"]
    rescore(old, "none")
    rescore(hypotheses(tmp_path, result["settings"]))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("settings", "warnings"), [({}, 1), ({"normaliser_version": NORMALISER_VERSION}, 0), (None, 0), ([], 0)])
def test_a_run_that_was_scored_by_another_normaliser_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: Any, warnings: int
) -> None:
    folder = RunFolder(str(tmp_path))
    journal = Journal(tmp_path / "metrics.jsonl", 0)
    journal.write({"kind": "evaluation", "step": 2})
    journal.close()
    if settings is not None:
        (tmp_path / "evaluations").mkdir()
        (tmp_path / "evaluations" / "step-000000002.json").write_text(json.dumps({"settings": settings}))
    with caplog.at_level(logging.WARNING):
        _warn_of_version(folder, config_from({}))
        _warn_of_version(folder, config_from({"normaliser": "none"}))
    assert len(caplog.messages) == warnings


def test_half_surrogate_pairs_are_stored_as_json_can(tmp_path: Path) -> None:
    result = rescore(hypotheses(tmp_path, {"normaliser": "none", "normaliser_version": 2}, "\ud800 日本", "\udfff"))
    write_result(tmp_path / "e.json", result)
    assert json.loads((tmp_path / "e.json").read_bytes().decode()) == json.loads(json.dumps(result))
    journal = Journal(tmp_path / "metrics.jsonl", 0)
    line = {"kind": "evaluation", "step": 1, "samples": [{"id": "\ud800é"}]}
    journal.write(line)
    journal.close()
    assert list(journal_lines(tmp_path / "metrics.jsonl", "evaluation")) == [line]


def test_what_is_written_down_has_no_credentials() -> None:
    given = {"ray_address": "http://user:sekret@h:1", "recogniser": "s3://user:sekret@b/x", "train_asr_dirs": ["s3://user:sekret@b/y"]}
    config = config_from({**given, "name": "run-1", "wandb_project": "p"})
    kept = config.redacted()
    assert "sekret" not in repr(kept) and (kept.name, kept.wandb_project) == ("run-1", "p")
    assert kept.ray_address == "http://***@h:1"


def test_trackers_get_names_and_texts_that_they_can_take() -> None:
    line = {"kind": "evaluation", "step": 1, "wer": {"a\x1b]0;\ud800": 0.5}}
    assert row_of(line, {}) == {r"eval/asr/a\x1b]0;\ud800/wer": 0.5}
    sample = {"set": "asr/a", "id": "\ud800", "reference": "a\nb", "hypothesis": "\x1b[31m"}
    assert sample_cells(sample) == ["asr/a", r"\ud800", "a b", r"\x1b[31m"]


def test_reports_show_no_credentials(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    (tmp_path / "run" / "config.yaml").write_text("name: r\nval_asr_dirs: [s3://user:sekret@b/x]\nray_address: http://user:sekret@h\n")
    write_report([str(tmp_path / "run")], tmp_path / "o.html")
    page = (tmp_path / "o.html").read_text(encoding="utf-8")
    assert "sekret" not in page and "s3://***@b/x" in page
