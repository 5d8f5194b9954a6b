"""A sweep's page in a real browser: it draws everything, complains of nothing, asks for nothing, and can be read light, dark and narrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from most_ray.report import write_report
from tests.support.pages import Opened
from tests.support.sweep_data import OBJECTIVES, write_population, write_sweep

FIGURES = {
    "splits": ["progress", "parallel", *(f"against-{i}" for i in (1, 2, 3, 4)), "front", "experts", "text-share"],
    "many": ["progress", "parallel", *(f"against-{i}" for i in (1, 2, 3, 4)), "experts", "text-share"],
    "live": ["progress", "parallel", *(f"against-{i}" for i in (1, 2, 3, 4)), "experts", "text-share"],
    "population": ["progress", "parallel", "against-1"],
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a sweep of two objectives, of one of many trials, of one that goes on, and of population based training."""
    folder = tmp_path_factory.mktemp("sweeps-in-a-folder-whose-name-is-wider-than-the-column-that-a-path-stands-in")
    write_sweep(folder / "splits", objectives=OBJECTIVES)
    write_sweep(folder / "many", trials=120, runs=(1, 2))
    write_sweep(folder / "live", trials=8, live=True)
    write_population(folder / "population")
    for name in FIGURES:
        write_report([str(folder / name)], folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in FIGURES}


@pytest.fixture(scope="module")
def open_page(browser: Browser, reports: dict[str, Path]) -> Callable[..., Opened]:
    """A sweep's page by its name, in a window of its own."""
    return lambda name, **options: Opened(browser, reports[name], **options)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", FIGURES)
def test_all_is_drawn_without_a_complaint_or_a_request(
    open_page: Callable[..., Opened], reports: dict[str, Path], name: str, scheme: str
) -> None:
    opened = open_page(name, color_scheme=scheme)
    figures = opened.page.locator("section.figure")
    assert [figure.get_attribute("id") for figure in figures.all()] == [f"fig-{kind}" for kind in FIGURES[name]]
    for figure in figures.all():
        drawn = figure.evaluate(_DRAWN)
        assert drawn["width"] > 10, f"{figure.get_attribute('id')}: {drawn}"
        assert drawn["errors"] == 0
    assert opened.said == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [reports[name].as_uri()]


# How wide all that is drawn is together: marks alone may be narrow.
_DRAWN = """figure => {
  const boxes = [...figure.querySelectorAll(
    ".scatterlayer .lines path.js-line, .scatterlayer .points path, .barlayer .point path, .heatmaplayer .hm image")]
    .map(each => each.getBoundingClientRect()).filter(box => box.width > 0 || box.height > 0);
  const width = boxes.length ? Math.max(...boxes.map(box => box.right)) - Math.min(...boxes.map(box => box.left)) : 0;
  return {width: width, errors: figure.querySelectorAll(".no-webgl").length};
}"""


@pytest.mark.parametrize("width", [1400, 480])
def test_texts_stand_inside_and_apart(open_page: Callable[..., Opened], width: int) -> None:
    """Axis titles, ticks and names lie within their figure, and no two of an axis overlap; the page itself does not scroll sideways."""
    opened = open_page("splits", viewport={"width": width, "height": 1000})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    for figure in opened.page.locator("section.figure").all():
        found = figure.evaluate(_TEXTS)
        assert found == {"outside": [], "overlapping": []}, f"{figure.get_attribute('id')} at {width}: {found}"


_TEXTS = """figure => {
  const frame = figure.querySelector("svg.main-svg").getBoundingClientRect();
  const kinds = [".xtick text", ".ytick text", ".g-xtitle text, .g-ytitle text", ".annotation text", ".legendtext"];
  const outside = [], overlapping = [];
  for (const kind of kinds) {
    const texts = [...figure.querySelectorAll(kind)].map(each => {
      const box = each.getBoundingClientRect();
      return {text: each.textContent, turned: /rotate\\((?!0[,)])/.test(each.getAttribute("transform") || ""), box: box};
    }).filter(each => each.text);
    for (const {text, box} of texts) {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        outside.push(text);
    }
    texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
      if (a.turned || b.turned) return;  // their boxes are wider than they are
      const across = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const down = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      if (across > 2 && down > 2) overlapping.push([a.text, b.text]);
    }));
  }
  return {outside: outside, overlapping: overlapping};
}"""


def test_the_dark_page_has_light_texts_on_dark_ground(open_page: Callable[..., Opened]) -> None:
    opened = open_page("splits", color_scheme="dark")
    for selector, dark in (
        ("#fig-parallel .annotation text", False),
        ("#fig-parallel .annotation .bg[style*='fill-opacity: 1']", True),
        ("#fig-against-1 .xtick text", False),
        ("#fig-progress .legendtext", False),
    ):
        fills = opened.page.locator(selector).evaluate_all("all => all.map(each => getComputedStyle(each).fill)")
        assert fills, selector
        for fill in fills:
            parts = [int(part) for part in fill.removeprefix("rgb(").removesuffix(")").split(",")]
            assert max(parts) < 60 if dark else min(parts) > 130, f"{selector}: {fill}"


def test_the_scale_of_small_figures_can_be_logarithmic(open_page: Callable[..., Opened]) -> None:
    opened = open_page("splits")
    opened.page.locator("#fig-against-3 .top button").click()
    opened.page.evaluate(
        "() => new Promise(done => { const look = () => document.querySelector('#fig-against-3 .plot')._fullLayout.yaxis.type === 'log'"
        " ? done() : requestAnimationFrame(look); look(); })"
    )
    assert opened.said == []


def test_a_long_table_scrolls_in_its_own_frame(open_page: Callable[..., Opened]) -> None:
    opened = open_page("many")
    frame = opened.page.locator(".tall > .scroll")
    heights = frame.evaluate("frame => [frame.clientHeight, frame.scrollHeight]")
    assert heights[0] <= 620 < heights[1]
    frame.evaluate("frame => frame.scrollTop = 1000")
    offset = frame.evaluate("frame => frame.querySelector('thead th').getBoundingClientRect().top - frame.getBoundingClientRect().top")
    assert 0 <= offset <= 2  # the head stays in sight
