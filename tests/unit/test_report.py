from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from most_ray.errors import DataError
from most_ray.report import write_report
from most_ray.report.cells import Piece, align
from most_ray.report.collect import RunData, collect, words_of
from most_ray.report.curves import axes
from most_ray.report.figures import figures, mix_of, word_errors
from most_ray.report.page import page
from most_ray.report.run_tables import attempts, checks, difference, highlights, last_evaluations, samples, summary
from most_ray.runs.environment import environment
from tests.support.report_data import EXPERTS, LAYERS, write_run
from tests.support.report_html import EVIL, Elements


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunData]:
    """One that has ended, after a restart, and one that still goes on."""
    folder = tmp_path_factory.mktemp("runs")
    done = write_run(folder / "done")
    going = write_run(folder / "going", seed=1, restart=None, done=False, learning_rate=1e-4)
    return collect([str(done), str(going)])


def drawn(runs: list[RunData]) -> dict[str, dict[str, Any]]:
    return {figure.id: figure.spec for found in figures(runs).values() for figure in found}


def test_a_run_is_read_as_it_was_written(runs: list[RunData]) -> None:
    done, going = runs
    assert (done.name, done.step, done.total_steps, done.complete) == ("done", 400, 400, True)
    assert (going.name, going.step, going.total_steps, going.complete) == ("going", 200, 400, False)
    assert [start["step"] for start in done.restarts] == [150]
    assert not going.restarts
    assert [evaluation.step for evaluation in done.evaluations] == [100, 200, 300, 400]
    assert set(done.hypotheses) == {"asr/dev_clean", "asr/dev_other", "tts/dev_tts"}
    rate = done.evaluations[-1].rate("asr/dev_clean", "words")
    assert rate
    assert rate.low is not None and rate.high is not None
    assert rate.low < rate.value < rate.high
    assert done.column("loss")[76] is None  # all steps of the line were skipped


def test_every_figure_is_there_for_one_run_and_for_two(runs: list[RunData]) -> None:
    wanted = {
        "loss",
        "learning-rate",
        "gradient-norm",
        "wer",
        "cer",
        "tts",
        "throughput",
        "step-time",
        "mfu",
        "memory",
        "mix",
        "experts",
        "balance",
    }
    for chosen in (runs[:1], runs):
        assert set(drawn(chosen)) == {f"fig-{name}" for name in wanted}


def test_rates_carry_their_intervals(runs: list[RunData]) -> None:
    figure = word_errors(runs[:1])
    assert figure
    curves = {trace["name"]: trace for trace in figure.spec["data"]}
    bars = curves["dev_clean"]["error_y"]
    figures_ = runs[0].evaluations[0].sets["asr/dev_clean"]["words"]
    assert bars["array"][0] == pytest.approx(figures_["interval"][1] - figures_["rate"], rel=1e-4)
    assert bars["arrayminus"][0] == pytest.approx(figures_["rate"] - figures_["interval"][0], rel=1e-4)


def test_resumes_are_marked_and_the_first_start_is_none(runs: list[RunData]) -> None:
    done, going = axes(runs)
    (mark,) = done["marks"]
    assert (mark["step"], mark["attempt"], mark["changed"]) == (150, 2, True)
    assert mark["text"] == "done: attempt 2, after step 150, 2 workers, Some GPU, fsdp 2, not exact, changed: data"
    assert going["marks"] == []
    assert "done" not in axes(runs[:1])[0]["marks"][0]["text"]


def test_what_changed_stands_in_a_table_as_well_and_other_attempts_are_folded_away(runs: list[RunData]) -> None:
    found = attempts(runs)
    assert found and found.right
    assert [(row[0], row[2], row[-2:]) for row in found.rows] == [("2", "150", ("no", "data"))]
    assert [row[0] for row in found.right.rows] == ["1"]
    assert found.right.title == "1 attempt with nothing changed"
    assert attempts(runs[1:]) is None


def test_a_page_says_where_each_run_was_by_tokens_and_hours(runs: list[RunData]) -> None:
    done, going = Elements(page(runs)).runs
    assert (done["step"][0], done["step"][-1], going["step"][-1]) == (0, 400, 200)
    assert (done["tokens"][0], done["tokens"][150], done["tokens"][-1]) == (0, 150 * 20000, 400 * 20000)
    # The same clock as the card of the training time: the minute between the attempts does not count.
    assert done["hours"][-1] * 3600 == pytest.approx(runs[0].totals.seconds, abs=0.01)
    assert done["hours"][150] * 3600 == pytest.approx(math.fsum(line["step_time"] for line in runs[0].train[:150]), abs=0.01)


def test_time_between_attempts_is_no_time_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        {"kind": "start", "step": 0, "time": 1000.0},
        *({"kind": "train", "step": step, "time": 1000.0 + 3600 * step, "tokens": 10 * step} for step in (1, 2)),
        {"kind": "start", "step": 2, "time": 900000.0},
        {"kind": "train", "step": 3, "time": 903600.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = axes(collect([str(folder)]))
    assert found["hours"] == [0, 1, 2, 3]
    assert found["tokens"] == [0, 10, 30, 30]


def test_what_a_run_has_not_recorded_is_no_axis(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    made = page(collect([str(folder)]))
    assert [Elements(made).runs[0][kind] for kind in ("step", "tokens", "hours")] == [[0, 1, 2], None, None]
    assert re.search('data-axis="tokens" aria-pressed="false" disabled title="not recorded by old"', made)
    assert re.search('data-axis="step" aria-pressed="true">', made)


def test_many_lines_have_few_knots_and_those_around_resumes(tmp_path: Path) -> None:
    (found,) = axes(collect([str(write_run(tmp_path / "run", steps=5000, restart=1234))]))
    assert len(found["step"]) < 1010
    assert {0, 1234, 1235, 5000} <= set(found["step"])
    assert len(found["step"]) == len(found["tokens"]) == len(found["hours"])


def test_cards_are_not_repeated_below_them(runs: list[RunData]) -> None:
    tiles = highlights(runs[0])
    names = [row[0] for row in summary(runs[:1], tiles)]
    assert not {tile.what for tile in tiles} & set(names)
    assert not {"Tokens trained on", "State"} & set(names)
    assert "CER, dev_clean" in names
    assert {"Steps", "Training time", "Tokens trained on"} <= {row[0] for row in summary(runs)}  # of several runs there are no cards


def test_what_should_be_0_and_is_not_comes_first_and_the_rest_is_folded_away(runs: list[RunData]) -> None:
    found = checks(runs)
    assert found.right
    assert [row[0].text for row in found.rows] == ["Skipped steps", "Restarts"]
    assert (found.right.title, found.right.rows) == ("1 check passed", [("Selections across modalities", "0", "0")])
    text = page(runs[:1])
    first, folded = text.split("1 check passed", 1)
    assert "Skipped steps" in first
    assert "Selections across modalities" not in first
    assert first.rstrip().endswith('<details class="right"><summary>')
    assert "Selections across modalities" in folded.split("</details>")[0]


def test_failures_of_decoding_that_did_not_happen_are_folded_away(runs: list[RunData]) -> None:
    found = last_evaluations(runs[:1], "asr")
    assert found and found.right
    assert found.right.head == ("set", "length cap")  # the others are not 0
    assert "length cap" not in found.head
    assert "looping" in found.head


def test_the_heat_map_holds_shares_of_a_layers_selections(runs: list[RunData]) -> None:
    spec = drawn(runs[:1])["fig-experts"]
    text, audio = (trace["z"] for trace in spec["data"])
    assert (len(text), len(text[0])) == (LAYERS, EXPERTS)
    assert all(sum(value or 0 for value in row) == pytest.approx(1, abs=1e-4) for row in (*text, *audio))
    assert all(value is None for row in text for value in row[4:])
    assert spec["data"][0]["y"][0] == 1  # the first layer is dense
    assert len(spec["layout"]["shapes"]) == 2 * EXPERTS


def test_the_mix_is_shares_beside_what_was_wanted(runs: list[RunData]) -> None:
    achieved, wanted = mix_of(runs[0])["asr/train_asr"]
    assert wanted == 0.5
    assert achieved == pytest.approx(0.5, abs=0.01)


def test_the_page_is_the_same_each_time_and_asks_for_nothing(runs: list[RunData], tmp_path: Path) -> None:
    text = page(runs)
    assert text == page(runs)
    elements = Elements(text)
    assert not {tag for tag, _ in elements.found} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert all("src" not in attributes and not (attributes.get("href") or "#").startswith("http") for _, attributes in elements.found)
    policy = next(attributes["content"] or "" for tag, attributes in elements.found if tag == "meta" and "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in policy
    running = [block for block in elements.blocks if not block.startswith("{")]
    digests = {base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in running}
    assert set(re.findall("'sha256-([^']*)'", policy)) == digests


def test_what_a_model_or_a_user_wrote_never_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run <i>", steps=20, note=EVIL)
    text = (folder / "metrics.jsonl").read_text()
    name = json.dumps("asr/" + EVIL)[1:-1]
    (folder / "metrics.jsonl").write_text(text.replace("asr/dev_clean", name).replace("train_text", json.dumps(EVIL)[1:-1]))
    line = {"kind": "hypothesis", "set": "asr/" + EVIL, "task": "asr", "id": EVIL, "reference": "a b", "hypothesis": EVIL}
    (folder / "hypotheses.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    made = page(collect([str(folder)]))
    elements = Elements(made)
    assert not any(tag in ("img", "b") and "onerror" in attributes for tag, attributes in elements.found)
    assert len(elements.blocks) == len(elements.figures) + 4 and elements.figures
    assert not [block for block in elements.blocks[-2:] if 'alert("1")' in block]
    assert "<img" not in made.split("<script>/**")[0]
    assert made.count("{{ 7 * 7 }}{% raw %}{# ") > 5  # no template either
    names = [trace["name"] for spec in elements.figures.values() for trace in spec["data"] if "name" in trace]
    assert not any("<img" in name for name in names)  # plotly reads markup in names, too


def test_embedded_json_cannot_end_its_element(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20)
    odd = "</script><!--<script>&\u2028"
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("text/train_text", json.dumps(f"text/{odd}")[1:-1]))
    made = page(collect([str(folder)]))
    (block,) = re.findall('<script type="application/json" id="data-fig-mix">(.*?)</script>', made, re.DOTALL)
    assert not set("<>&\u2028") & set(block)
    assert f"text/{html.escape(odd)}" in json.loads(block)["data"][0]["y"]


def test_a_run_with_nothing_but_a_first_line_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "start", "step": 0, "time": 1.0, "workers": 1}\n{"kind": "train", "st')
    write_report([str(folder)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "no step yet" in text
    missing = "steps, evaluations, transcriptions, experts by layer, the configuration, the environment"
    assert f"Not recorded: {missing}." in text


def test_what_does_not_fit_the_format_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    odd = [
        {"kind": "start", "step": 0, "topology": 3, "experts": [], "wanted_mix": None, "changed": 1, "total_steps": None},
        {"kind": "start", "step": 0, "topology": None, "experts": {"text": 1}},
        {"kind": "train", "step": 1, "loss": float("nan"), "mix": {"asr/a": None}, "expert_max_over_mean": 1, "tokens": "x"},
        {"kind": "train", "step": 2, "loss": 1.0, "tokens_per_second": 0},
        {"kind": "train", "step": None},
        {"kind": "experts", "step": 2, "load": {"text": [[1, 2], [3]], "audio": "x"}},
        {
            "kind": "evaluation",
            "step": 2,
            "wer": {"a": None, "b": 0.5},
            "sets": {"asr/a": {"words": {"rate": None, "interval": None}}, "tts/c": 1},
        },
        {"kind": "evaluation", "step": 1, "wer": None, "validation_loss": {"text/t": 1.0}},
        {"kind": "unheard_of", "step": 2},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd) + "[1]\nnull\n")
    for name in ("config.yaml", "summary.json", "evaluation.json", "environment.json", "hypotheses.jsonl"):
        (folder / name).write_text("[{")
    (run,) = collect([str(folder)])
    assert run.column("loss") == [None, 1.0]
    assert "b" in page([run])


def test_lines_without_a_kind_are_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 1 / s, "mix": {"asr/a": 3 * s, "tts/b": s}}) + "\n" for s in (1, 2))
    )
    errors = {"wer": 0.5, "substitutions": 1, "deletions": 0, "insertions": 0, "words": 2, "records": 2}
    said = [{"id": "1", "reference": "One", "hypothesis": "one"}, {"id": "2", "reference": "two", "hypothesis": "three"}]
    section = {"task": "asr", "records": 2, "loss": 0.1, "errors": errors, "hypotheses": said}
    (folder / "evaluation.json").write_text(json.dumps({"wer": {"dev": 0.5}, "sets": {"asr/dev": section}}))
    (run,) = collect([str(folder)])
    assert mix_of(run) == {"asr/a": (0.75, None), "tts/b": (0.25, None)}
    assert run.last_evaluation
    rate = run.last_evaluation.rate("asr/dev", "words")
    assert rate
    assert (run.last_evaluation.step, rate.value, rate.low, rate.reference) == (2, 0.5, None, 2)
    assert run.last_evaluation.sets["asr/dev"]["confusions"] == [["two", "three", 1]]
    assert "1 of which are wrong" in page([run])


def test_a_run_that_goes_on_shows_its_last_evaluations_hypotheses(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=40, done=False)
    (folder / "evaluations").mkdir()
    newer = (folder / "hypotheses.jsonl").read_text().replace('"hypothesis": "', '"hypothesis": "newer ')
    (folder / "evaluations" / "step-000000020.hypotheses.jsonl").write_text(newer)  # hypotheses.jsonl is of a goal that was put off
    shown = collect([str(folder)])[0].hypotheses["asr/dev_clean"]
    assert shown and all(entry.hypothesis[0] == "newer" for entry in shown)


def test_a_place_without_metrics_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run = .*holds no metrics.jsonl") as caught:
        write_report([str(tmp_path / "nothing")], tmp_path / "report.html")
    assert caught.value.field == "run"
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="names no run"):
        write_report([], tmp_path / "report.html")


def test_a_run_behind_a_uri_is_read_where_it_lies(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20)
    assert collect([f"file://{folder}"])[0].step == collect([str(folder)])[0].step == 20


def test_settings_that_differ_come_first(runs: list[RunData]) -> None:
    text = page(runs)
    first = text.split("differ between the runs")[1].split("</details>")[0]
    assert set(re.findall(r'<th scope="row">(\w+)</th>', first)) == {"name", "learning_rate", "seed"}


def test_the_same_folder_names_and_the_same_run_twice_stay_apart(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / parent / "run", steps=4) for parent in ("a", "b"))
    assert [run.name for run in collect([str(a), str(b)])] == ["a/run", "b/run"]
    names = [run.name for run in collect([str(a), str(a)])]
    assert len(set(names)) == 2


def test_samples_show_what_is_wrong_first(runs: list[RunData]) -> None:
    tables = samples(runs[:1])
    shown = [[row[0] for row in (*table.rows, *(table.right.rows if table.right else ()))] for table in tables]
    assert [len(keys) for keys in shown] == [20, 20, 20]
    entries = {entry.id: entry for found in runs[0].hypotheses.values() for entry in found}
    for keys in shown:
        wrong = [entries[key].wrong for key in keys]
        assert wrong == sorted(wrong, reverse=True)


def test_alignments_name_each_kind_of_difference() -> None:
    pieces = align(tuple("abcdef"), tuple("axdefg"))
    assert Piece("equal", ("a",), ("a",)) in pieces
    assert sorted(piece.kind for piece in pieces) == ["delete", "equal", "equal", "insert", "substitute"]
    assert Piece("insert", (), ("g",)) in pieces
    assert align((), ()) == []
    assert align((), ("a",)) == [Piece("insert", (), ("a",))]
    assert align(("a",), ()) == [Piece("delete", ("a",), ())]
    assert align(["a\u00a0b"], ["a\u00a0b"])[0].reference == ("a\u00a0b",)  # one word, whatever jiwer holds for a blank


def test_words_of_texts_and_of_speech() -> None:
    assert words_of(" one  two ") == ("one", "two")
    assert words_of("[Hu7][Hu90]") == words_of([7, 90]) == ("7", "90")
    assert words_of(None) == ()


def test_a_long_hypothesis_is_cut(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20)
    (folder / "hypotheses.jsonl").write_text(json.dumps({"set": "asr/a", "id": "1", "reference": "a " * 500, "hypothesis": "a " * 500}))
    (shown,) = re.findall('<th scope="row">1</th><td>(.*?)</td>', page(collect([str(folder)])))
    assert shown.endswith(" …")
    assert len(shown) < 400
    (entry,) = collect([str(folder)])[0].hypotheses["asr/a"]
    assert difference(entry).cut


def test_the_environment_names_no_machine_and_loads_no_ray() -> None:
    script = "import json, sys; from most_ray.runs.environment import environment; print(json.dumps(environment()))"
    script += "; assert 'ray' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["versions"]["torch"]
    assert found["versions"]["ray"]
    assert found["cores"] >= 1
    shown = json.dumps(environment())
    assert str(Path.home()) not in shown
    assert "/" not in re.sub(r"[^/]*GPU[^/]*", "", shown)
