from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from most_ray.errors import DataError
from most_ray.report import write_report
from most_ray.report.page import sweep_page
from most_ray.report.sweep_figures import against, front, parallel, progress, text_share
from most_ray.report.sweep_tables import is_sweep, read_sweep, states, steps_trained, tiles
from most_ray.sweep.effects import dimensions_of
from most_ray.sweep.ledger import Ledger, Objective, Result, Trial, pareto, ranked
from tests.support.report_data import write_run
from tests.support.report_html import EVIL, Elements
from tests.support.sweep_data import DIMENSIONS, OBJECTIVES, REASON, write_ledger, write_population, write_sweep

WER = Objective(OBJECTIVES[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two objectives that has ended."""
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "splits", objectives=OBJECTIVES)


@pytest.fixture(scope="module")
def made(folder: Path) -> str:
    return page_of(folder)


def page_of(folder: Path) -> str:
    return sweep_page(read_sweep(str(folder)))


def content_of(made: str, title: str) -> str:
    """A part's markup."""
    found = re.search(rf'<h2 id="[a-z-]+">{re.escape(title)}</h2>(.*?)\n</section>\s*(?=<section aria|</main>)', made, re.DOTALL)
    assert found, title
    return found[1]


def titles_of(made: str) -> list[str]:
    return re.findall(r"<h2 [^>]*>([^<]*)</h2>", made)


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", markup))


def rows_of(markup: str) -> list[list[str]]:
    """The cells of a table's rows, as text."""
    body = markup.split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    return [[" ".join(plain(cell).split()) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in body.split("</tr>")[:-1]]


def figures_of(folder: Path) -> dict[str, dict[str, Any]]:
    return Elements(page_of(folder)).figures


def test_a_sweeps_page_has_its_parts_in_order(made: str) -> None:
    wanted = ["The winner", "Trials", "Progress", "Settings", "Does it matter?", "Objectives", "Experts", "Failed trials"]
    assert titles_of(made) == wanted
    assert "<title>splits: sweep report</title>" in made
    links = re.findall(r'<a href="#([^"]*)">', made)
    assert links == re.findall(r'<h2 id="([^"]*)">', made)
    assert all(re.fullmatch("[a-z]+(-[a-z]+)*", link) for link in links)
    assert content_of(made, "Settings").count('<div class="grid small">') == 1


def test_the_heading_counts_trials_by_state(folder: Path) -> None:
    looks = [("complete", "12 of 12 trials ended"), ("", "7 finished"), ("", "4 stopped early"), ("failed", "1 failed")]
    assert states(read_sweep(str(folder))) == looks


def test_tiles_tell_the_best_trial_its_interval_and_what_was_spent(folder: Path) -> None:
    """7 trials of 200 steps and 4 that were stopped at 100; the ledger's lines are a minute apart."""
    sweep = read_sweep(str(folder))
    best = sweep.best[0]
    result = best.results[-1]
    value, (low, high) = result.metrics[WER.metric], result.intervals[WER.metric]
    found = {what: (shown, more) for what, shown, more in tiles(sweep)}
    assert found[f"trial {best.number}, best wer/dev_clean"] == (f"{value:.1%}", f"95%: {low:.1%} to {high:.1%}")
    assert found["trials"] == ("12", "random, asha")
    assert found["steps trained in all"][0] == "1,800"
    lines = len((folder / "trials.jsonl").read_text().splitlines())
    assert found["time spent"][0] == f"{(lines - 1) // 60} h {(lines - 1) % 60:02d} min"


def test_the_winner_comes_with_its_configuration_and_the_command(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "a sweep; rm", trials=3, failed=())
    shown = content_of(page_of(folder), "The winner")
    best = read_sweep(str(folder)).best[0]
    settings, command, config = re.findall(r"<dl.*?</dl>|<pre.*?</pre>", shown, re.DOTALL)
    assert plain(config).strip() == (folder / "best.yaml").read_text().strip()
    assert shlex.split(plain(command)) == ["most-ray", "train", "--config", f"{folder}/best.yaml"]
    for name, value in best.values.items():
        assert name in settings
        assert (f"{value:.4g}" if isinstance(value, float) else str(value)) in settings
    assert f"{folder}/trials/{best.runs[-1]}" in settings


def test_the_command_names_the_sweep_as_it_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert "most-ray train --config splits/best.yaml</pre>" in sweep_page(read_sweep("splits/"))


def test_credentials_in_a_place_are_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = dataclasses.replace(read_sweep(str(folder)), uri="s3://key:hush-hush@bucket/sweep?session_token=hushed")
    monkeypatch.setattr("most_ray.io.storage.exists", lambda uri: False)
    made = sweep_page(sweep)
    assert "bucket/sweep/best.yaml" in made
    assert [word for word in ("hush", "session_token=") if word in made] == []


def test_trials_are_listed_the_best_first_and_failed_ones_behind(made: str, folder: Path) -> None:
    sweep = read_sweep(str(folder))
    rows = rows_of(content_of(made, "Trials"))
    assert [int(row[0]) for row in rows] == [*(trial.number for trial in ranked(sweep.trials, WER)), 4]
    best = sweep.best[0]
    result = best.results[-1]
    cells = [f"{best.number}", f"{best.number:03d}", best.values["expert_split"], str(best.values["audio_experts"])]
    cells += [f"{best.values['asr_tts_mix_ratio']:.4g}", f"{best.values['learning_rate']:.4g}", "finished", "200"]
    bounds = [(result.metrics[name], *result.intervals[name]) for name in OBJECTIVES]
    cells += [f"{value:.1%} [{low:.1%}, {high:.1%}]" for value, low, high in bounds]
    assert rows[0] == [*cells, "5 min 00 s"]
    stopped = next(row for row in rows if row[0] == "3")
    assert stopped[6:8] == ["stopped early worse than two thirds at step 100", "100"]
    assert rows[-1][6:] == ["failed DataError: shards/00003.arrow: is damaged.", "0", "–", "–", "60.0 s"]


def test_a_trial_that_failed_after_results_is_listed_and_compared_with_none(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "late", trials=5, failed=(), objectives=OBJECTIVES)
    gone = read_sweep(str(folder)).best[0]
    with (folder / "trials.jsonl").open("a") as ledger:
        ledger.write(json.dumps({"kind": "end", "trial": gone.number, "step": 200, "state": "failed", "reason": "late"}) + "\n")
    made = page_of(folder)
    rows = rows_of(content_of(made, "Trials"))
    assert rows[-1][0] == str(gone.number) and rows[-1][8].startswith(f"{gone.metric(WER.metric):.1%}")
    assert content_of(made, "Trials").count('class="key"') == 4  # those that Progress draws in colour
    drawn = figures_of(folder)
    for name in ("fig-progress", "fig-parallel", "fig-against-1", "fig-front"):
        shown = [text for trace in drawn[name]["data"] for text in trace["hovertext"]]
        assert shown and not any(re.match(rf"trial {gone.number}\b", text) for text in shown), name


def test_failures_are_told_in_full(made: str) -> None:
    shown = content_of(made, "Failed trials")
    assert f"<pre>{html.escape(REASON)}</pre>" in shown
    assert "trial 4" in plain(shown)


def test_a_replaced_trial_says_where_it_went_on_from(tmp_path: Path) -> None:
    folder = write_population(tmp_path / "pbt")
    made = page_of(folder)
    rows = rows_of(content_of(made, "Trials"))
    assert [row[1] for row in rows] == ["001", "002 002-1 from trial 1, step 50"]
    assert "no result belongs to one setting alone" in content_of(made, "Does it matter?")
    assert steps_trained(read_sweep(str(folder)).trials) == 200  # the first 50 of the second run are the first trial's


def test_progress_shows_the_best_in_colour_and_failed_trials_not_at_all(folder: Path) -> None:
    best = read_sweep(str(folder)).best
    figure = progress(best, WER)
    assert figure
    traces = {trace["name"]: trace for trace in figure.spec["data"]}
    assert list(traces) == ["6 others", *(f"trial {trial.number}" for trial in best[4::-1])]
    own = traces[f"trial {best[0].number}"]
    assert own["x"] == [50, 100, 150, 200]
    assert own["y"] == pytest.approx([result.metrics[WER.metric] for result in best[0].results], rel=1e-5)
    assert own["line"]["width"] > traces[f"trial {best[1].number}"]["line"]["width"] > traces["6 others"]["line"]["width"]
    assert traces["6 others"]["x"].count(None) == 5  # a gap between two trials
    assert not any("trial 4," in text for trace in figure.spec["data"] for text in trace["hovertext"])


def test_the_line_of_a_replaced_trial_begins_at_its_parent(tmp_path: Path) -> None:
    figure = progress(read_sweep(str(write_population(tmp_path / "pbt"))).best, WER)
    assert figure
    second = next(trace for trace in figure.spec["data"] if trace["name"] == "trial 2")
    assert list(zip(second["x"], second["y"], strict=True)) == [(50, 0.4), (None, None), (50, 0.2), (100, 0.2)]


def scaled(kind: dict[str, Any], values: list[Any]) -> tuple[list[Any], dict[str, float]]:
    """Where trials with these values stand on their dimension's axis, and where its ticks are."""
    entry = {"name": "x", **kind}
    ledger = Ledger({"dimensions": [entry]}, {})
    trials = [
        Trial(number, ["1"], {"x": value}, {}, [None], [Result("1", 1, {"wer": number / 10}, {})], "finished")
        for number, value in enumerate(values, 1)
    ]
    (figure,) = against(trials, dimensions_of(ledger), Objective("wer"))
    axis = figure.spec["layout"]["xaxis"]
    return figure.spec["data"][0]["x"], dict(zip(axis["ticktext"], axis["tickvals"], strict=True))


def test_categories_are_ticks_in_the_order_of_the_space() -> None:
    places, ticks = scaled({"kind": "choice", "values": ["b", "a"]}, ["a", "b", "a"])
    assert places == [0.75, 0.25, 0.75]
    assert ticks == {"b": 0.25, "a": 0.75}
    places, ticks = scaled({"kind": "grid", "values": [0.1, 1, 10]}, [10, 0.1])
    assert places == pytest.approx([5 / 6, 1 / 6], abs=1e-5)
    assert list(ticks) == ["0.1", "1", "10"]
    assert list(scaled({"kind": "choice", "values": ["a" * 17, "b" * 16]}, ["b" * 16])[1]) == ["a" * 15 + "…", "b" * 16]
    assert list(scaled({"kind": "choice", "values": list(range(30))}, [4])[1]) == [str(3 * index) for index in range(10)]


def test_log_uniform_dimensions_have_logarithmic_axes() -> None:
    places, ticks = scaled({"kind": "loguniform", "low": 1e-4, "high": 1e-2}, [1e-3, 1e-4, 1e-2])
    assert places == pytest.approx([0.5, 0, 1])
    assert ticks == pytest.approx({"0.0001": 0, "0.001": 0.5, "0.01": 1})
    places, ticks = scaled({"kind": "loguniform", "low": 0.002, "high": 0.05}, [0.01])
    assert list(ticks) == ["0.003", "0.01", "0.03"]


def test_whole_numbers_and_fractions_have_round_ticks() -> None:
    places, ticks = scaled({"kind": "randint", "low": 2, "high": 6}, [2, 5])
    assert places == pytest.approx([0, 0.75])
    assert ticks == pytest.approx({"2": 0, "3": 0.25, "4": 0.5, "5": 0.75, "6": 1})
    assert list(scaled({"kind": "randint", "low": 0, "high": 12}, [3])[1]) == ["0", "3", "6", "9", "12"]
    assert list(scaled({"kind": "randint", "low": 0, "high": 64}, [3])[1]) == ["0", "20", "40", "60"]
    assert list(scaled({"kind": "uniform", "low": 0.2, "high": 0.8}, [0.3])[1]) == ["0.2", "0.4", "0.6", "0.8"]
    assert scaled({"kind": "uniform", "low": 0.5, "high": 0.5}, [0.5]) == ([0.5], {"0.5": 0.5})
    assert scaled({"kind": "uniform", "low": 0.0, "high": 1.0}, [2.0, "x"])[0] == [1.0, None]  # the space was another one before


def test_parallel_lines_end_at_the_objective(folder: Path) -> None:
    sweep = read_sweep(str(folder))
    figure = parallel(sweep.best, sweep.dimensions, WER)
    assert figure
    best = figure.spec["data"][-1]
    assert best["x"] == [0, 1, 2, 3, 4, None]
    assert best["hovertext"][0] == f"trial {sweep.best[0].number}, expert_split: {sweep.best[0].values['expert_split']}"
    assert best["y"][4] == min(value for trace in figure.spec["data"] for value in trace["y"][4::6])
    worst = next(trace for trace in figure.spec["data"] if f"trial {sweep.best[-1].number}, expert_split" in " ".join(trace["hovertext"]))
    colours = [colour for colour, _ in figure.keys]
    assert (best["line"]["color"], worst["line"]["color"]) == (colours[0], colours[-1])
    assert sum(len(trace["x"]) // 6 for trace in figure.spec["data"]) == len(sweep.best)
    assert best["line"]["width"] > max(trace["line"]["width"] for trace in figure.spec["data"][:-1])
    titles = [note["text"] for note in figure.spec["layout"]["annotations"] if note["text"].startswith("<b>")]
    assert titles == [f"<b>{n}</b>" for n in ("expert_split", "audio_experts", "asr_tts_mix_<br>ratio", "learning_rate", "wer/dev_clean")]


def test_the_objective_stands_against_each_dimension_with_its_intervals(folder: Path) -> None:
    sweep = read_sweep(str(folder))
    figures = against(sweep.best, sweep.dimensions, WER)
    assert [figure.title for figure in figures] == [dimension.name for dimension in sweep.dimensions]
    mix = figures[2].spec
    by_split = [sorted(t.number for t in sweep.best if t.values["expert_split"] == s) for s in ("contiguous", "interleaved", "affinity")]
    hovered = [sorted(int(text.split(",")[0].split()[1]) for text in trace["hovertext"]) for trace in mix["data"]]
    assert hovered == by_split  # each split has a colour of its own
    assert len({trace["marker"]["color"] for trace in mix["data"]}) == 3
    assert len({tuple(figure.spec["layout"]["yaxis"]["range"]) for figure in figures}) == 1
    first = mix["data"][0]
    assert first["error_y"]["array"] == pytest.approx([0.13 * value for value in first["y"]], rel=1e-4)
    assert first["error_y"]["arrayminus"] == pytest.approx([0.12 * value for value in first["y"]], rel=1e-4)
    for trace in mix["data"]:
        numbers = [int(text.split(",")[0].split()[1]) for text in trace["hovertext"]]
        assert [symbol.endswith("-open") for symbol in trace["marker"]["symbol"]] == [number % 3 == 0 for number in numbers]


def test_effects_are_told_in_words(made: str) -> None:
    shown = content_of(made, "Does it matter?")
    text = " ".join(plain(shown).split())
    assert "wer/dev_clean at step 100, the last that all trials reached" in text
    assert re.findall("<h4>([^<]*)</h4>", shown) == [entry["name"] for entry in DIMENSIONS]
    levels = rows_of(shown)
    assert [row[0] for row in levels] == ["contiguous", "interleaved", "affinity"]
    assert sum(int(row[1]) for row in levels) == 11
    assert all(re.fullmatch(r"[\d.]+% \[[\d.]+%, [\d.]+%\]", row[2]) for row in levels)
    assert re.search(r"affinity is better than contiguous by [\d.]+ points \(95%: [\d.]+ to [\d.]+\), zero is outside\.", text)
    assert "zero is inside: it may be chance." in text


def test_what_is_to_be_large_is_the_best_where_it_is_largest(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "large", trials=6, objectives=["max:score"], failed=())
    sweep = read_sweep(str(folder))
    values = [trial.metric("score") or 0.0 for trial in sweep.best if trial.state == "finished"]
    assert len(values) == 4 and values == sorted(values, reverse=True)
    made = page_of(folder)
    assert "larger is better" in made
    shown = plain(content_of(made, "Does it matter?"))
    means = {row[0]: float(row[2].split()[0]) for row in rows_of(content_of(made, "Does it matter?"))}
    best = max(means, key=lambda name: means[name])
    assert f"{best}  is better than" in shown
    assert "points" not in shown


def test_several_objectives_have_a_pareto_front(folder: Path, made: str) -> None:
    sweep = read_sweep(str(folder))
    best = pareto(sweep.trials, sweep.objectives)
    assert [int(row[0]) for row in rows_of(content_of(made, "Objectives"))] == [trial.number for trial in best]
    figure = front(sweep.trials, best, sweep.objectives)
    assert figure
    others, marked = figure.spec["data"]
    assert (others["mode"], marked["mode"]) == ("markers", "lines+markers")
    assert [text.split(":")[0] for text in marked["hovertext"]] == [f"trial {trial.number}" for trial in best]
    assert len(others["x"]) + len(marked["x"]) == 11


def test_one_objective_has_no_front(tmp_path: Path) -> None:
    assert "Objectives" not in titles_of(page_of(write_sweep(tmp_path / "one", trials=2, failed=())))


def test_experts_are_those_of_the_best_and_the_worst_that_have_metrics(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", failed=())
    order = read_sweep(str(folder)).best
    shutil.rmtree(folder / "trials" / order[-1].runs[-1])
    (folder / "trials" / order[0].runs[-1] / "metrics.jsonl").unlink()
    titles = [note["text"] for note in figures_of(folder)["fig-experts"]["layout"]["annotations"]]
    chosen = (order[1].number, order[-2].number)
    assert titles == [f"<b>{kind} tokens, trial {number}</b>" for number in chosen for kind in ("text", "audio")]
    assert f"trial {chosen[0]}, place 2 of 12 and trial {chosen[1]}, place 11 of 12" in content_of(page_of(folder), "Experts")


def test_texts_share_stands_in_the_order_that_affinity_made() -> None:
    figure = text_share({"order": [2, 0, 1], "share": [0.3, 0.1, 0.6], "tokens": 5})
    assert figure
    (bars,) = figure.spec["data"]
    assert (bars["x"], bars["y"]) == (["2", "0", "1"], [0.6, 0.3, 0.1])
    assert figure.spec["layout"]["shapes"][0]["y0"] == pytest.approx(1 / 3)
    for torn in ({}, {"share": [0.5, 0.5]}, {"share": [1.0], "order": [3]}, {"share": "x", "order": {}}):
        assert text_share(torn) is None


def test_affinity_is_read_by_the_names_it_is_written_with() -> None:
    from most_ray.sweep.measure import Affinity  # seconds to import

    assert text_share(dataclasses.asdict(Affinity([1, 0], [0.4, 0.6], 9)))


def test_a_live_sweep_shows_what_there_is(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "live", trials=8, live=True)
    made = page_of(folder)
    assert "The winner" not in titles_of(made)
    (folder / "summary.json").write_text("{}")  # of an earlier start
    assert states(read_sweep(str(folder)))[0] == ("going", "5 of 8 trials ended")
    assert ("going", "3 open") in states(read_sweep(str(folder)))
    assert [row[6] for row in rows_of(content_of(made, "Trials"))].count("open") == 3
    (folder / "best.yaml").write_text("name: x\n")  # of an earlier start
    assert "another trial may win" in page_of(folder)


def test_a_sweep_that_gave_up_some_trials_is_not_going_on(tmp_path: Path) -> None:
    """A grid has fewer points than max_trials: summary.json says that this was all."""
    folder = write_sweep(tmp_path / "grid", trials=3, failed=())
    content = (folder / "trials.jsonl").read_text().replace('"max_trials": 3', '"max_trials": 9')
    (folder / "trials.jsonl").write_text(content)
    assert states(read_sweep(str(folder)))[0] == ("complete", "3 of 9 trials ended")
    (folder / "summary.json").unlink()
    assert states(read_sweep(str(folder)))[0] == ("going", "3 of 9 trials ended")


def test_the_same_folder_gives_the_same_page_that_asks_for_nothing(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report([str(folder)], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    elements = Elements((tmp_path / "a").read_text())
    assert not {tag for tag, _ in elements.found} & {"link", "img", "iframe", "object", "embed", "base", "form"}
    assert all("src" not in attributes and (attributes.get("href") or "#").startswith("#") for _, attributes in elements.found)
    policy = next(attributes["content"] or "" for tag, attributes in elements.found if tag == "meta" and "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy


def test_what_others_wrote_never_becomes_markup(tmp_path: Path) -> None:
    named = [{**DIMENSIONS[0], "name": name, "values": [EVIL, f"{EVIL}3"]} for name in (EVIL, "expert_split")]
    named.append({**DIMENSIONS[3], "name": f"{EVIL}2"})
    folder = write_sweep(tmp_path / "sweep <i>", trials=8, objectives=[EVIL, f"{EVIL}2"], dimensions=named, failed=(2,))
    text = (folder / "trials.jsonl").read_text()
    for old in (REASON, "worse than two thirds at step 100", "random", "asha", folder.name):
        text = text.replace(json.dumps(old), json.dumps(EVIL))
    text = text.replace('"run": "003"', f'"run": {json.dumps(EVIL)}').replace('"parent": null', f'"parent": {json.dumps({"trial": EVIL})}')
    (folder / "trials.jsonl").write_text(text)
    (folder / "best.yaml").write_text(EVIL)
    made = page_of(folder)
    elements = Elements(made)
    specs = list(elements.figures.values())
    assert "Pareto front" in made and len(specs) >= 6
    assert made.count("{{ 7 * 7 }}{% raw %}{# ") > 20  # no template either
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in elements.found)
    assert [tag for tag, _ in elements.found].count("script") == len(specs) + 3
    assert "<img" not in made.split("<script>/**")[0]
    shown = " ".join(_texts(specs))
    assert not re.findall(r"<(?!/?b>|br>|/?extra>).{40}", shown)  # plotly reads markup, too


def _texts(value: Any) -> list[str]:
    """Every text in a figure but colours' and forms' names."""
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def test_a_sweep_stands_alone_on_its_page(folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    for uris in ([str(folder), str(run)], [str(run), str(folder)], [str(folder), str(folder)]):
        with pytest.raises(DataError, match="one sweep at a time, or") as caught:
            write_report(uris, tmp_path / "report.html")
        assert caught.value.value == str(folder)
        assert "SWEEP/trials/001" in caught.value.remedy
    assert not (tmp_path / "report.html").exists()
    write_report([f"{folder}/trials/001", f"{folder}/trials/002"], tmp_path / "report.html")
    assert "<title>001, 002: run report</title>" in (tmp_path / "report.html").read_text()


def test_a_sweep_behind_a_uri_is_read_where_it_lies(folder: Path, tmp_path: Path) -> None:
    assert is_sweep(f"file://{folder}") and not is_sweep(str(tmp_path))
    write_report([f"file://{folder}"], tmp_path / "report.html")
    assert "<title>splits: sweep report</title>" in (tmp_path / "report.html").read_text()


def test_a_ledger_alone_is_enough(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "bare", trials=5, runs=())
    for path in folder.iterdir():
        if path.is_file() and path.name != "trials.jsonl":
            path.unlink()
    assert titles_of(page_of(folder)) == ["Trials", "Progress", "Settings", "Does it matter?", "Failed trials"]


def test_a_sweep_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "trials.jsonl").write_bytes(b"")
    assert "No trial has begun." in page_of(folder)
    write_ledger(folder, [{"kind": "sweep", "name": "n", "objectives": ["wer"], "dimensions": DIMENSIONS, "max_trials": 3}])
    assert "0 of 3 trials ended" in page_of(folder)
    begun = {"kind": "trial", "trial": 1, "run": "001", "values": {"learning_rate": 0.1}, "settings": {}, "parent": None}
    write_ledger(folder, [{"kind": "sweep", "objectives": ["wer"], "dimensions": DIMENSIONS}, begun])
    assert rows_of(content_of(page_of(folder), "Trials")) == [["1", "001", "–", "–", "–", "0.1", "open", "0", "–", "–"]]


def test_what_does_not_fit_the_format_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    trial = {"kind": "trial", "values": {}, "settings": {}, "parent": 3}
    result = {"kind": "result", "run": "1"}
    lines: list[Any] = [
        {"kind": "sweep", "name": "\ud800", "objectives": ["wer", 3], "dimensions": [None, *DIMENSIONS], "max_trials": "x"},
        {**trial, "trial": 1, "run": "../../up", "values": {"expert_split": {"a": [1]}, "learning_rate": -1, "audio_experts": "x"}},
        {**result, "trial": 1, "step": 1, "metrics": {"wer": float("nan"), "loss": None}, "intervals": {"wer": [float("nan"), 1]}},
        {**result, "trial": 1, "step": 2, "metrics": {"wer": 0.5}, "intervals": {"wer": [float("nan"), 1]}, "time": float("nan")},
        {"kind": "trial", "trial": 2, "values": {}},
        {**result, "trial": 2, "step": 2, "metrics": {"wer": 0.4}},
        {**trial, "trial": 3, "run": 3},
        {**result, "trial": 3, "step": 2, "metrics": {"wer": "high"}},
        {"kind": "end", "trial": 3, "step": 2, "state": "failed", "reason": {"a": 1}, "time": float("nan")},
        {"kind": "end", "trial": 9},
    ]
    write_ledger(folder, lines)
    with (folder / "trials.jsonl").open("ab") as ledger:
        ledger.write(b'[1]\nnull\n\xff\n{"kind": "resu')
    for name in ("affinity.json", "summary.json", "sweep.yaml", "best.yaml"):
        (folder / name).write_bytes(b"[{\xff")
    write_report([str(folder)], tmp_path / "report.html")
    rows = rows_of(content_of((tmp_path / "report.html").read_text(), "Trials"))
    assert [(row[0], row[-2]) for row in rows] == [("1", "50.0%"), ("3", "–")]


def test_a_hundred_and_twenty_trials_stay_few_traces(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "many", trials=120, runs=(1,))
    specs = figures_of(folder)
    assert len(specs["fig-progress"]["data"]) == 6
    assert specs["fig-progress"]["data"][0]["name"] == "114 others"
    assert len(specs["fig-parallel"]["data"]) == 6
    made = page_of(folder)
    assert len(rows_of(content_of(made, "Trials"))) == 120
    assert '<div class="tall">' in made  # a table that scrolls
