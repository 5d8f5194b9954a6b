"""The HTML of reports, taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import plotly.graph_objects as go

EVIL = (
    '</script><script>alert("1")</script><img src=x onerror=alert(2)>&<b>\'{{ 7 * 7 }}{% raw %}{# '  # means something to HTML and to Jinja2
)


class Elements(HTMLParser):
    """The page's elements with their attributes, and the text of its script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}  # data and layout by the figure's id
        self.runs: list[dict[str, Any]] = []  # tokens, hours and marks of each run
        self._inside = False
        self.feed(text)
        data = [attributes for tag, attributes in self.found if tag == "script"]
        for attributes, block in zip(data, self.blocks, strict=True):
            if str(attributes.get("id")).startswith("data-"):
                self.figures[str(attributes["id"]).removeprefix("data-")] = json.loads(block)
            elif attributes.get("id") == "runs":
                self.runs = json.loads(block)["runs"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.blocks[-1] += data


def check_figure(spec: dict[str, Any]) -> None:
    """A property that plotly does not know, or a value that it does not take, is a ValueError."""
    go.Figure(data=spec["data"], layout=spec["layout"])
