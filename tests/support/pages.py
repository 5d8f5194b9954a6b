"""A report in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright


def chromium() -> Iterator[Browser]:
    """A running Chromium; the test is skipped where there is none."""
    program = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium, and CI always has it (.ci/chromium.sh)")
        pytest.skip("needs Chromium: apt-get install chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root otherwise
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=arguments)
        yield running
        running.close()


class Opened:
    """A page that has drawn its figures, with all that it said and asked for on the way."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.page: Page = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options}).new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]")

    def traces(self) -> set[str]:
        """The types of traces that the page's plotly.js draws."""
        return set(self.page.evaluate("Object.keys(Plotly.PlotSchema.get().traces)"))

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript. (Playwright's own wait evaluates text in the page, which its policy forbids.)"""
        self.page.evaluate(
            f"""() => new Promise((done, failed) => {{
              const last = performance.now() + 20000;
              const late = () => performance.now() > last;
              const look = () => {condition} ? done() : late() ? failed(new Error("not within 20 s")) : requestAnimationFrame(look);
              look();
            }})"""
        )
