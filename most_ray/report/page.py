"""Writes reports: HTML files that need no other file and no network. templates/ holds their markup, static/ style and scripts."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from most_ray.errors import DataError, redact
from most_ray.io import storage
from most_ray.io.outputs import Kind, begins_with
from most_ray.report import run_tables, sweep_tables, words
from most_ray.report.cards import cards
from most_ray.report.collect import RunData, collect
from most_ray.report.curves import axes
from most_ray.report.figures import figures
from most_ray.report.speech_samples import recordings, voices

REPORT = Kind("report of a run or a sweep", begins_with(rb"\s*<!DOCTYPE html>.*<title>[^<]*: (run|sweep) report</title>"))


def write_report(uris: Sequence[str], output: Path, audio: Path | None = None) -> None:
    """Write a report about the runs, or the one sweep, at these paths or URIs; `output` is written completely or not at all.

    Args:
        audio: folder with the recordings of the evaluated records (None: where the records say), to play the worst recognised ones.

    Raises:
        DataError: a folder holds neither metrics.jsonl nor trials.jsonl, or a sweep was given together with others; `audio` is no folder.
    """
    if audio is not None and not audio.is_dir():
        raise DataError("audio", str(audio), "is no folder.", "Name the folder of the recordings that were evaluated.")
    sweeps = [uri for uri in uris if sweep_tables.is_sweep(uri)]
    if sweeps and len(uris) > 1:
        rule = "is a sweep's, and a page is about one sweep at a time, or about runs."
        raise DataError("run", storage.redact(sweeps[0]), rule, "Give it alone, or its trials, which are runs: SWEEP/trials/001 ...")
    made = sweep_page(sweep_tables.read_sweep(uris[0])) if sweeps else page(collect(uris), audio)
    storage.write_bytes(output, made.encode(errors="replace"))  # JSON may hold half a surrogate pair


def page(runs: Sequence[RunData], audio: Path | None = None) -> str:
    """The page about runs. The same runs, with the same recordings at hand, always give the same page."""
    title = f"{', '.join(run.name for run in runs)}: run report"
    spoken = {"voices": voices(runs), "recordings": recordings(runs, audio)}
    said = {"by_columns": words.by_columns(runs), "confusions": words.confusions(runs)}
    drawn = {"runs": {"runs": axes(runs)}, "figures": figures(runs)}
    return _render("run.html", title=title, cards=cards(runs), **drawn, **spoken, **said, **run_tables.content(runs))


def sweep_page(sweep: sweep_tables.Sweep) -> str:
    """The page about a sweep. The same folder always gives the same page."""
    return _render("sweep.html", title=f"{sweep.name}: sweep report", runs=None, **sweep_tables.content(sweep))


def _render(template: str, **content: Any) -> str:
    return _environment().get_template(template).render(content)


@functools.cache
def _environment() -> Environment:
    """Jinja2 set up so that every value is escaped and shown without credentials, and a misspelt name in a template is an error."""
    loader, extensions = PackageLoader("most_ray.report"), ["jinja2.ext.do"]
    found = Environment(loader=loader, extensions=extensions, autoescape=True, undefined=StrictUndefined, finalize=_finalize)
    found.trim_blocks = found.lstrip_blocks = True
    found.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}  # of the filter tojson
    found.filters |= {"anchor": _anchor, "sha256": _sha256}
    found.globals["static"] = _static
    return found


def _finalize(value: Any) -> Any:
    """A value as the page shows it: texts without credentials. (Markup, which the templates make, is another type.)"""
    return redact(value) if type(value) is str else value


def _static(name: str) -> str:
    """The text of a file in static/."""
    return (resources.files("most_ray.report") / "static" / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    """The digest of a script, as a Content-Security-Policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _anchor(title: str) -> str:
    """A heading's id, which links of the page name."""
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
