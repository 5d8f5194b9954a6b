"""A report in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page


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

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript. (Playwright's own wait evaluates text in the page, which its policy forbids.)"""
        self.page.evaluate(
            f"() => new Promise(done => {{ const look = () => {condition} ? done() : requestAnimationFrame(look); look(); }})"
        )
