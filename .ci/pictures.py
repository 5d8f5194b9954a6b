"""Makes the pictures of reports in docs/ from the folders of runs, by Chromium without a window.

    .venv/bin/python .ci/pictures.py --run runs/digits --runs runs/digits runs/b runs/c --sweep runs/digits-sweep

Each argument is optional: a picture without its runs is left as it is. Nothing else is written, and no picture is larger than 300 kB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from most_ray.errors import UserError
from most_ray.report import write_report

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 300_000  # bytes
WIDE, PHONE = (1280, 2000), (390, 1700)  # width and height in pixels
_LOWER = 100  # pixels that a picture is cut by until it is small enough


def pictures(run: str | None, runs: Sequence[str], sweep: str | None) -> dict[str, tuple[list[str], tuple[int, int]]]:
    """The pictures that can be made: by name, the folders they are of, and width and height."""
    wanted = {
        "report.png": ([run] if run else [], WIDE),
        "report-phone.png": ([run] if run else [], PHONE),
        "report-three-runs.png": (list(runs), WIDE),
        "sweep.png": ([sweep] if sweep else [], WIDE),
    }
    return {name: (folders, size) for name, (folders, size) in wanted.items() if folders}


def take(browser: Browser, page: Path, size: tuple[int, int], target: Path) -> None:
    """A picture of a report, from its top or, of several runs, from their curves; cut where it would be too large."""
    width, height = size
    window = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light").new_page()
    window.goto(page.as_uri())
    window.wait_for_selector("html[data-drawn]")
    top = window.locator("#training").bounding_box() if window.locator("header .run").count() > 1 else None
    start = top["y"] - 20 if top else 0
    height = min(height, window.evaluate("document.documentElement.scrollHeight") - round(start))
    while True:
        picture = window.screenshot(full_page=True, clip={"x": 0, "y": start, "width": width, "height": height})
        if len(picture) <= LARGEST:
            break
        height -= _LOWER
    target.write_bytes(picture)
    window.context.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pictures of reports for docs/.")
    parser.add_argument("--run", metavar="RUN", help="folder of a run: report.png and report-phone.png")
    parser.add_argument("--runs", metavar="RUN", nargs=3, default=(), help="folders of three runs: report-three-runs.png")
    parser.add_argument("--sweep", metavar="SWEEP", help="folder of a sweep: sweep.png")
    parser.add_argument("--output", metavar="DIR", type=Path, default=ROOT / "docs", help="where the pictures go (default: docs)")
    given = parser.parse_args(arguments)
    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    wanted = pictures(given.run, given.runs, given.sweep)
    if not wanted or program is None:
        parser.error("Name runs or a sweep." if program else "Chromium is not installed: sh .ci/chromium.sh")
    if not given.output.is_dir():
        parser.error(f"--output {given.output} is no folder.")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        browser = None
        for name, (folders, size) in wanted.items():
            page = Path(folder) / f"{name}.html"
            try:
                write_report(folders, page)
            except UserError as error:
                parser.error(str(error))
            if browser is None:
                playwright = stack.enter_context(sync_playwright())
                browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
                stack.callback(browser.close)
            take(browser, page, size, given.output / name)
            print(f"{given.output / name}: {(given.output / name).stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
