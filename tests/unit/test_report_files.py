"""What reports are made of: templates, style, scripts, and the plotly.js that draws their figures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import most_ray.report
from most_ray.report import write_report
from tests.conftest import ROOT
from tests.support.report_data import write_run
from tests.support.report_html import Elements, check_figure
from tests.support.sweep_data import OBJECTIVES, write_population, write_sweep

FOLDER = Path(most_ray.report.__file__).parent
BUNDLE = (FOLDER / "static" / "plotly.min.js").read_text(encoding="utf-8")
VERSION, TRACES = re.findall(r"^ \* plotly\.js v([\d.]+), reduced to the traces: ([a-z, ]+)$", BUNDLE, re.MULTILINE)[0]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All figures that a report can have, by page and id."""
    folder = tmp_path_factory.mktemp("reports")
    one, two = write_run(folder / "one"), write_run(folder / "two", seed=1, restart=None, done=False)
    write_sweep(folder / "splits", objectives=OBJECTIVES)
    write_population(folder / "population")
    pages = {"one": [one], "two": [one, two], "splits": [folder / "splits"], "population": [folder / "population"]}
    found = {}
    for name, paths in pages.items():
        write_report([str(path) for path in paths], folder / f"{name}.html")
        for key, spec in Elements((folder / f"{name}.html").read_text()).figures.items():
            found[f"{name} {key}"] = spec
    return found


def test_the_page_of_a_run_of_1700_steps_has_less_than_1_6_megabytes(tmp_path: Path) -> None:
    write_report([str(write_run(tmp_path / "run", steps=1700))], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1.6e6


def test_plotly_knows_every_property_of_every_figure(figures: dict[str, dict[str, Any]]) -> None:
    assert len(figures) == 13 + 13 + 9 + 3
    for name, spec in figures.items():
        try:
            check_figure(spec)
        except ValueError as error:
            pytest.fail(f"{name}: {error}")


def test_a_misspelt_property_of_a_figure_is_an_error() -> None:
    with pytest.raises(ValueError, match="hovermod"):
        check_figure({"data": [], "layout": {"hovermod": "x"}})


def test_the_bundle_draws_the_traces_in_use_and_no_others(figures: dict[str, dict[str, Any]]) -> None:
    used = {trace["type"] for spec in figures.values() for trace in spec["data"]}
    assert used == set(TRACES.split(", ")), "change TRACES in .ci/plotly.sh and run it"


def test_the_bundle_is_what_its_script_builds() -> None:
    script = (ROOT / ".ci" / "plotly.sh").read_text()
    assert f"\nPLOTLY={VERSION}\n" in script
    assert f'\nTRACES="{" ".join(TRACES.split(", ")[1:])}" ' in script
    assert f'.version="{VERSION}"' in BUNDLE
    assert len(BUNDLE) < 1.25e6


def test_no_file_ends_the_element_that_holds_it() -> None:
    for name in ("plotly.min.js", "report.js", "first.js"):
        text = (FOLDER / "static" / name).read_bytes()
        assert not re.search(rb"</script|<!--|\r", text, re.IGNORECASE), name
    assert b"<" not in (FOLDER / "static" / "report.css").read_bytes()


def test_a_wheel_holds_templates_and_static_files(tmp_path: Path) -> None:
    """Beside the modules that a wheel holds anyway."""
    source = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(FOLDER, source / "most_ray" / "report", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "most_ray" / "__init__.py", source / "most_ray")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, env=environment, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    wanted = {f"most_ray/report/{path.relative_to(FOLDER).as_posix()}" for path in FOLDER.glob("*/*") if path.suffix != ".pyc"}
    assert len(wanted) >= 7
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())
