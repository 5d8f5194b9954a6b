"""The page in a real browser: it draws everything, complains of nothing and asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from most_ray.report import write_report
from tests.support.pages import Opened
from tests.support.report_data import describe_records, write_kit, write_run
from tests.support.report_html import Elements


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, and of two of which one still goes on; one has a vocoder, and a name and a hypothesis that mean something to
    browsers."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(folder / "one <i>run")
    two = write_run(folder / "two", seed=1, restart=None, done=False)
    write_kit(describe_records(one))
    line = {"set": "asr/dev_clean", "id": "evil", "reference": "a", "hypothesis": "</script><img src=x onerror=document.title=1>"}
    (one / "hypotheses.jsonl").write_text(json.dumps(line) + "\n" + (one / "hypotheses.jsonl").read_text())
    made = {"one": [str(one)], "two": [str(one), str(two)]}
    for name, uris in made.items():
        write_report(uris, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def opened(browser: Browser, reports: dict[str, Path]) -> dict[str, Opened]:
    return {name: Opened(browser, path) for name, path in reports.items()}


@pytest.mark.parametrize("name", ["one", "two"])
def test_all_is_drawn_without_a_complaint_or_a_request(
    opened: dict[str, Opened], reports: dict[str, Path], name: str, tmp_path: Path
) -> None:
    assert opened[name].said == []
    assert [url for url in opened[name].requests if not url.startswith("data:")] == [reports[name].as_uri()]
    used = [trace["type"] for spec in Elements(reports[name].read_text()).figures.values() for trace in spec["data"]]
    assert set(used) <= opened[name].traces() <= {"scatter", "bar", "heatmap"}
    figures = opened[name].page.locator("section.figure")
    assert figures.count() == 13
    for index in range(figures.count()):
        figure = figures.nth(index)
        identity = figure.get_attribute("id")
        sizes = figure.evaluate(_SIZES)
        assert sizes, f"{identity} has no traces"
        assert all(size[0] > 1 or size[1] > 1 for size in sizes), f"{identity}: {sizes}"
        assert max(size[0] for size in sizes) > 40, f"{identity}: {sizes}"
        plot = figure.locator(".plot")
        without = plot.screenshot(style=".scatterlayer, .barlayer, .heatmaplayer { visibility: hidden; }")
        assert plot.screenshot(path=tmp_path / f"{name}-{identity}.png") != without, f"{identity} is blank"


_SIZES = """figure => [...figure.querySelectorAll(
  ".scatterlayer .lines path.js-line, .scatterlayer .points path, .barlayer .point path, .heatmaplayer .hm image")]
  .filter(each => getComputedStyle(each).visibility !== "hidden" && getComputedStyle(each).display !== "none")
  .map(each => { const box = each.getBoundingClientRect(); return [box.width, box.height]; })"""


def test_what_a_model_wrote_stays_text(opened: dict[str, Opened]) -> None:
    page = opened["one"].page
    assert page.title() == "one <i>run: run report"
    assert page.locator("#samples").get_by_text("onerror=document.title=1").count() == 1
    assert page.locator("img").count() == page.locator(".sound img[src^='data:image/png;base64,']").count() > 0  # spectrograms


@pytest.mark.parametrize("name", ["one", "two"])
def test_speech_can_be_played(opened: dict[str, Opened], reports: dict[str, Path], name: str) -> None:
    """Each player decodes, is as long as its units, and has gone nowhere for it."""
    page = opened[name].page
    players = page.locator("#speech audio")
    assert players.count() == 10
    loaded = players.evaluate_all(_LOAD)
    assert [round(seconds, 2) for seconds in loaded] == [0.04, 0.06] * 5  # two units of the model's, three of the recording's
    assert page.get_by_label("speech of utterance_002, model").count() == 1
    assert opened[name].said == []
    assert [url for url in opened[name].requests if not url.startswith("data:")] == [reports[name].as_uri()]


_LOAD = """players => Promise.all(players.map(player => new Promise((done, failed) => {
  player.addEventListener("canplaythrough", () => done(player.duration));
  player.addEventListener("error", () => failed(player.error.message));
  player.preload = "auto";
  player.load();
})))"""


def test_the_column_of_error_rates_can_be_chosen(opened: dict[str, Opened]) -> None:
    page = opened["one"].page
    choice = page.locator(".choice").first
    assert choice.locator("select option").all_text_contents() == ["speaker", "checked", "duration"]
    shown = [choice.locator(".option").nth(index) for index in range(3)]
    assert [each.is_visible() for each in shown] == [True, False, False]
    choice.locator("select").select_option(label="duration")
    assert [each.is_visible() for each in shown] == [False, False, True]
    assert page.get_by_label("WER of dev_clean by").count() == 1
    assert opened["one"].said == []


def test_the_worst_recordings_can_be_played_and_seen(opened: dict[str, Opened]) -> None:
    page = opened["one"].page
    players = page.locator("#recordings audio")
    assert 0 < players.count() <= 10
    assert all(round(seconds, 2) == 0.08 for seconds in players.evaluate_all(_LOAD))  # four units of 20 ms
    sizes = page.locator("#recordings img").evaluate_all("images => images.map(each => [each.complete, each.naturalHeight])")
    assert sizes == [[True, 64]] * players.count()


@pytest.mark.parametrize("width", [390, 1280])
def test_cards_and_tables_fit_the_page(browser: Browser, reports: dict[str, Path], width: int) -> None:
    """What is wider scrolls in its own place."""
    for name in ("one", "two"):
        found = Opened(browser, reports[name])
        found.page.set_viewport_size({"width": width, "height": 900})
        found.until(f"document.documentElement.scrollWidth <= {width}")
        outside = found.page.locator(".card, .narrow, .choice, .sound, .heats").evaluate_all(
            "found => found.filter(each => !each.closest('.scroll') && each.getBoundingClientRect().right > innerWidth).length"
        )
        assert outside == 0


def test_scripts_that_slipped_in_would_not_run(browser: Browser, reports: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "tampered.html"
    head = reports["one"].read_text().split("<body>")[0]
    path.write_text(head + "<body><script>document.title = 'ran'</script><img src='http://127.0.0.1:9/x' onerror='document.title = 1'>")
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    assert page.title() == "one <i>run: run report"
    assert sum("Content Security Policy" in text for text in said) >= 3  # the script, the handler, the image


def test_figures_can_be_kept_and_not_sent_away(opened: dict[str, Opened], tmp_path: Path) -> None:
    page = opened["one"].page
    assert page.locator("[data-title*=Share]").count() == 0
    page.locator("#fig-wer .plot").hover()
    with page.expect_download() as download:
        page.locator("#fig-wer [data-title*=Download]").click()
    download.value.save_as(tmp_path / "figure.svg")
    assert "dev_clean" in (tmp_path / "figure.svg").read_text()
    assert opened["one"].said == []


def test_the_scale_can_be_logarithmic(opened: dict[str, Opened]) -> None:
    page = opened["two"].page
    button = page.locator("#fig-loss .top button")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    opened["two"].until("document.querySelector('#fig-loss .plot')._fullLayout.yaxis.type === 'log'")
    layout = "document.querySelector('#fig-loss .plot')._fullLayout"
    assert page.evaluate(f"[{layout}.yaxis.type, {layout}.yaxis2.type, {layout}.xaxis.type]") == ["log", "log", "linear"]
    assert opened["two"].said == []


def test_it_fits_narrow_and_dark_screens(opened: dict[str, Opened]) -> None:
    page = opened["one"].page
    page.set_viewport_size({"width": 420, "height": 800})
    opened["one"].until("document.documentElement.scrollWidth <= 420")  # plotly follows a little later
    page.emulate_media(color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.querySelector('#fig-loss .xtitle')).fill")
    assert min(int(part) for part in ink.removeprefix("rgb(").removesuffix(")").split(",")) > 150
    assert opened["one"].said == []
