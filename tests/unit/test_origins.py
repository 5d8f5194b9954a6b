"""What hypotheses.jsonl keeps of the records: columns of metadata, and of those with most errors how to listen to them."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from most_ray.errors import DataError
from most_ray.evaluation.evaluate import Directories, Evaluation
from most_ray.evaluation.hypotheses import SPOKEN, Row, hypotheses_path, rescore, worst
from tests.support.builders import asr, write_records
from tests.support.evaluation import Scene, evaluate, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def evaluated(scene: Scene) -> Evaluation:
    return evaluate(scene)


def of_records(scene: Scene, folder: Path, metadata: list[dict[str, Any]]) -> Evaluation:
    """The evaluation of recognition alone, of records with these metadata."""
    records = [{**asr(index), "metadata": each} for index, each in enumerate(metadata)]
    return evaluate(replace(scene, directories=Directories((str(write_records(folder / "own", records)),)), stores=str(folder / "stores")))


def test_each_row_has_its_records_metadata(evaluated: Evaluation, scene: Scene) -> None:
    recognised, said = ([row for row in evaluated.rows if row["task"] == task] for task in ("asr", "tts"))
    assert [row["metadata"] for row in recognised] == [{"speaker": index % 3} for index in range(7)]
    assert [row["metadata"] for row in said] == [{"speaker": index} for index in range(3)]
    assert not any("metadata" in row for row in evaluated.rows if row["task"] == "text")
    assert evaluated.header["settings"]["directories"]["asr/spoken"] == scene.directories.asr[0]


def test_the_units_of_the_worst_records_are_kept(evaluated: Evaluation) -> None:
    rows = {row["id"]: row for row in evaluated.rows if "spoken" in row}
    assert 0 < len(rows) <= SPOKEN and all(row["task"] == "asr" for row in rows.values())
    for name, row in rows.items():
        record = asr(int(name.removeprefix("utt_")), 3 + 2 * int(name.removeprefix("utt_")))
        assert "".join(f"[Hu{unit}]" for unit in row["spoken"]["units"].split()) == record["input"]


def test_no_figure_follows_from_it(evaluated: Evaluation, tmp_path: Path) -> None:
    """Scored again without it, the numbers are the same; with it, too."""
    evaluated.write(tmp_path / "e.json")
    path = hypotheses_path(tmp_path / "e.json")
    once = rescore(str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    plain = [{key: value for key, value in line.items() if key not in ("metadata", "spoken")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in plain))
    assert rescore(str(path)) == once == json.loads((tmp_path / "e.json").read_text())


@pytest.mark.parametrize("field", ["metadata", "spoken"])
@pytest.mark.parametrize("value", [["a"], {"a": ["b"]}, {"a": float("nan")}, {"a": None}])
def test_a_file_with_something_else_there_is_refused(evaluated: Evaluation, tmp_path: Path, field: str, value: Any) -> None:
    evaluated.write(tmp_path / "e.json")
    path = hypotheses_path(tmp_path / "e.json")
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, json.dumps(json.loads(first) | {field: value}), *rest]) + "\n")
    with pytest.raises(DataError, match=f"in field '{field}'"):
        rescore(str(path))


def test_only_what_can_be_a_group_is_kept_and_not_too_much(scene: Scene, tmp_path: Path) -> None:
    odd = {"a": 1.5, "yes": True, "long": "x" * 300, "list": [1], "deep": {"a": 1}, "none": None, "empty": "", "inf": 1e308}
    many = {f"column {index}": index for index in range(50)}
    first, second, third = of_records(scene, tmp_path, [odd, many, {}]).rows
    assert first["metadata"] == {"a": 1.5, "yes": True}
    assert len(second["metadata"]) == 24 and "metadata" not in third


def test_the_recording_is_where_the_record_says(scene: Scene, tmp_path: Path) -> None:
    said = {"recording": "a/b.flac", "start": 1.5, "duration": 2.0, "channel": 1, "speed": 0.9, "speaker": "x"}
    nemo, silent = {"audio_filepath": "/corpus/c.wav", "start": "none"}, {"recording": 3}
    rows = of_records(scene, tmp_path, [said, nemo, silent]).rows
    kept = {row["id"]: {key: value for key, value in row["spoken"].items() if key != "units"} for row in rows}
    assert kept["utt_0"] == {"recording": "a/b.flac", "start": 1.5, "duration": 2.0, "channel": 1, "speed": 0.9}
    assert (kept["utt_1"], kept["utt_2"]) == ({"recording": "/corpus/c.wav"}, {})
    assert rows[0]["metadata"] == {"start": 1.5, "duration": 2.0, "channel": 1, "speed": 0.9, "speaker": "x"}


def test_records_that_are_gone_cost_their_metadata_alone(scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from most_ray.evaluation import origins

    folder = write_records(tmp_path / "gone", [asr(0), asr(1)])
    origins._columns_of.cache_clear()
    shutil.rmtree(folder)
    with caplog.at_level(logging.WARNING):
        assert origins._columns_of(str(folder), "store") == {}
    assert "errors are not grouped by columns" in caplog.text
    origins._columns_of.cache_clear()


def recognised(reference: str, hypothesis: str) -> Row:
    return {"normalised_reference": reference, "normalised_hypothesis": hypothesis}


def test_the_worst_are_those_with_most_errors_per_word_each_error_once_first() -> None:
    rows = [recognised(*pair.split(":")) for pair in ("a b:a b", "a b:a c", "d:e", "d:e", "f:g h", "i:", "f:g h")]
    assert [rows.index(row) for row in worst(rows, 10)] == [4, 2, 5, 1, 4, 2]  # equal rows have the first one's index
    assert worst(rows, 2) == [rows[4], rows[2]] and worst([], 3) == []
