"""Error rates by the columns of the records' metadata, and confusions of words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from most_ray.evaluation.wer import error_rate, word_counts, word_pairs
from most_ray.report.cells import Cell
from most_ray.report.collect import RunData, collect
from most_ray.report.page import page
from most_ray.report.words import Confusions, by_columns, confusions
from tests.support.report_data import describe_records, write_run
from tests.support.report_html import EVIL, Elements

DIGITS = ["zero", "one", "two", "three"]


def row(index: int, reference: str, hypothesis: str, **metadata: Any) -> dict[str, Any]:
    about = {"kind": "hypothesis", "set": "asr/dev", "task": "asr", "id": f"u{index}", "row": index}
    return {**about, "reference": reference, "hypothesis": hypothesis, **({"metadata": metadata} if metadata else {})}


def run_of(folder: Path, rows: list[dict[str, Any]]) -> RunData:
    write_run(folder, steps=4)
    (folder / "hypotheses.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [{"kind": "settings", "format": 1}, *rows]))
    return collect([str(folder)])[0]


def cells(table: Any) -> dict[str, list[str]]:
    """The texts of each row, by its first one."""
    shown = [
        [each.text + (f" {each.interval}" if each.interval else "") if isinstance(each, Cell) else str(each) for each in line]
        for line in table.rows
    ]
    return {line[0]: line[1:] for line in shown}


def digits(draw: random.Random, count: int = 80) -> list[dict[str, Any]]:
    """Recordings of four speakers, of whom the last is recognised badly."""
    rows = []
    for index in range(count):
        said, speaker = DIGITS[index % 4], index // 4 % 4
        heard = draw.choice(DIGITS) if speaker == 3 else said
        rows.append(row(index, said, heard, speaker=f"s{speaker}", take=index, seconds=index / 10, set_="same"))
    return rows


def test_rates_of_each_speaker_are_those_of_its_records_alone(tmp_path: Path) -> None:
    rows = digits(random.Random(0))
    (choice,) = by_columns([run_of(tmp_path / "run", rows)])
    assert choice.title == "WER of dev"
    table = choice.tables[0]
    assert table.title == "speaker" and next(iter(cells(table))) == "s3"  # the worst first
    for speaker, (rate, words, records) in cells(table).items():
        own = [each for each in rows if each["metadata"]["speaker"] == speaker]
        wanted = error_rate(word_counts([each["reference"] for each in own], [each["hypothesis"] for each in own]))
        low, high = wanted["interval"]
        assert (words, records) == ("20", "20")
        assert rate == (f"{wanted['rate']:.1%} [{low:.1%}, {high:.1%}]" if wanted["rate"] else "0.00% [0.00%, 0.00%]")


def test_columns_that_tell_no_groups_apart_are_left_out(tmp_path: Path) -> None:
    """One value for all, or another one for nearly each; many different numbers are quarters of the records, in order."""
    rows = digits(random.Random(0))
    for index, each in enumerate(rows):
        each["metadata"]["name"] = f"name {index}"
    (choice,) = by_columns([run_of(tmp_path / "run", rows)])
    assert [table.title for table in choice.tables] == ["speaker", "take", "seconds"]
    assert list(cells(choice.tables[2])) == ["0 to 1.9", "2 to 3.9", "4 to 5.9", "6 to 7.9"]
    assert [line[-1] for line in cells(choice.tables[2]).values()] == ["20"] * 4


def test_numbers_that_some_records_lack_are_ranges_all_the_same(tmp_path: Path) -> None:
    rows = [row(index, "a", "a", **({"seconds": index / 2} if index % 5 else {"other": 1})) for index in range(40)]
    (choice,) = by_columns([run_of(tmp_path / "run", rows)])
    assert list(cells(choice.tables[0])) == ["0.5 to 4.5", "5.5 to 9.5", "10.5 to 14.5", "15.5 to 19.5", "not stated"]


def test_flags_texts_and_missing_values_are_groups_too(tmp_path: Path) -> None:
    rows = [row(index, "a", "a" if index % 3 else "b", **({"clean": index % 2 == 0} if index < 8 else {"other": 1})) for index in range(12)]
    (choice,) = by_columns([run_of(tmp_path / "run", rows)])
    assert [table.title for table in choice.tables] == ["clean"]  # and not the column that has one value, or none
    assert set(cells(choice.tables[0])) == {"true", "false", "not stated"}


def test_without_metadata_nothing_is_guessed(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [row(index, "a", "b") | {"id": f"speaker{index % 2}_{index}"} for index in range(8)])
    assert by_columns([run]) == []
    assert 'id="by-column"' not in page([run])


def test_a_column_of_many_values_shows_those_with_most_words_and_says_so(tmp_path: Path) -> None:
    rows = [row(index, "a b" if index % 50 < 40 else "a", "a", room=f"room {index % 50:02d}") for index in range(200)]
    (choice,) = by_columns([run_of(tmp_path / "run", rows)])
    (table,) = choice.tables
    assert len(table.rows) == 40 and table.about == "the 40 of 50 values with most words"
    assert set(cells(table)) == {f"room {index:02d}" for index in range(40)}


def test_runs_are_compared_value_by_value(tmp_path: Path) -> None:
    one, two = (run_of(tmp_path / name, digits(random.Random(seed))) for seed, name in enumerate(("one", "two")))
    (choice,) = by_columns([one, two])
    head = choice.tables[0].head
    assert [each.text if isinstance(each, Cell) else each for each in head] == ["speaker", "one", "two", "words", "records"]
    assert cells(choice.tables[0])["s0"] == ["0.00% [0.00%, 0.00%]"] * 2 + ["20", "20"]
    assert [each.title for each in confusions([one, two]) if "dev," in each.title] == ["dev, one", "dev, two"]


def only(run: RunData) -> Confusions:
    """The confusions of the set `dev`: those of the made up run's evaluation are known beside it."""
    (found,) = (each for each in confusions([run]) if each.title == "dev")
    return found


def test_a_small_vocabulary_has_a_grid_of_all_pairs(tmp_path: Path) -> None:
    said = [("zero", "zero"), ("zero", "one"), ("one", "one"), ("two", ""), ("two", "too"), ("one", "one three"), ("zero", "zero")]
    grid = only(run_of(tmp_path / "run", [row(index, *pair) for index, pair in enumerate(said)])).grid
    assert grid
    assert [each.text if isinstance(each, Cell) else each for each in grid.head] == [
        *("", "zero", "one", "two", "other words", "nothing", "times"),
    ]
    found = {line[0].text if isinstance(line[0], Cell) else line[0]: line[1:] for line in grid.rows}
    shares = {word: [round(each.heat, 3) if isinstance(each, Cell) else 0 for each in line[:-1]] for word, line in found.items()}
    assert shares["zero"] == [0.667, 0.333, 0, 0, 0] and shares["two"] == [0, 0, 0, 0.5, 0.5]
    assert shares["inserted"] == [0, 0, 0, 1, 0] and [line[-1] for line in found.values()] == ["3", "2", "2", "1"]
    assert [each.right for each in found["zero"][:2] if isinstance(each, Cell)] == [True, False]
    assert only(run_of(tmp_path / "other", [row(index, *pair) for index, pair in enumerate(said)])).note == "Other words: three, too."


def test_a_large_vocabulary_has_lists(tmp_path: Path) -> None:
    words = [f"w{index}" for index in range(60)]
    rows = [row(index, " ".join(words), " ".join(["wrong", *words[1:]])) for index in range(3)]
    rows += [row(3, " ".join(words), " ".join(words[1:])), row(4, " ".join(words), " ".join([*words, "more"]))]
    found = only(run_of(tmp_path / "run", rows))
    assert found.grid is None
    shown = {
        table.title: [[each.text if isinstance(each, Cell) else each for each in line] for line in table.rows] for table in found.lists
    }
    assert shown == {"substitutions": [["w0", "wrong", "3"]], "deletions": [["w0", "1"]], "insertions": [["more", "1"]]}
    (cell,) = (line[-1] for line in found.lists[0].rows)
    assert isinstance(cell, Cell) and cell.small == "60.0% of 5"


def test_without_hypotheses_the_most_frequent_confusions_are_listed(tmp_path: Path) -> None:
    """As of runs of which a few samples are kept: no share is known, and no grid."""
    write_run(tmp_path / "run", steps=4)
    (tmp_path / "run" / "hypotheses.jsonl").unlink()
    found = confusions(collect([str(tmp_path / "run")]))
    assert [each.title for each in found] == ["dev_clean", "dev_other"] and not any(each.grid for each in found)
    assert [[line[0] for line in table.rows] for table in found[0].lists] == [["the", "dark"], ["an"], ["uh"]]
    assert all(not line[-1].small for table in found[0].lists for line in table.rows if isinstance(line[-1], Cell))


def test_a_set_without_an_error_has_no_confusions(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [row(0, "a", "a"), row(1, "b", "b")])
    assert not [found for found in confusions([run]) if found.title == "dev"]


def test_pairs_of_words_are_counted_with_those_that_are_right() -> None:
    assert word_pairs(["a b", "c"], ["a x", ""]) == {("a", "a"): 1, ("b", "x"): 1, ("c", ""): 1}
    assert word_pairs([], []) == {}


def test_values_and_words_never_become_markup(tmp_path: Path) -> None:
    rows = [row(index, EVIL, f"{EVIL} b" if index % 2 else EVIL, **{EVIL: EVIL if index % 3 else "x"}) for index in range(12)]
    made = page([run_of(tmp_path / "run", rows)])
    elements = Elements(made)
    assert 'id="by-column"' in made and not any("onerror" in attributes for _, attributes in elements.found)
    assert not any(tag == "img" for tag, _ in elements.found)


@pytest.mark.parametrize("several", [False, True])
def test_the_page_has_a_choice_for_each_set(tmp_path: Path, several: bool) -> None:
    runs = [describe_records(write_run(tmp_path / name, steps=8)) for name in ("one", "two")[: 1 + several]]
    made = page(collect([str(run) for run in runs]))
    names = [attributes.get("id") for tag, attributes in Elements(made).found if tag == "div" and attributes.get("class") == "choice"]
    assert names == ["choice-1", "choice-2", "choice-3"]
    assert made.count('<option value="0">speaker</option>') == 3 and "made up" not in made  # the same for all records
