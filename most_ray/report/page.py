"""The page: one file that needs nothing else and asks for nothing else."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.report import run_tables
from most_ray.report import sweep_sections as sweeps
from most_ray.report.collect import RunData, collect
from most_ray.report.curves import Figure
from most_ray.report.figures import figures
from most_ray.report.run_tables import text
from most_ray.report.speech_samples import speech
from most_ray.report.style import SCRIPT, STYLE


def write_report(uris: Sequence[str], output: Path) -> None:
    """Make the page about the runs, or the one sweep, at these places (paths or URIs) and put it to `output`, whole or not at all.

    Raises:
        DataError: a place holds neither metrics.jsonl nor trials.jsonl, or a sweep's stands beside others.
    """
    storage.write_bytes(output, _page_of(uris).encode(errors="replace"))  # JSON can hold halves of characters


def _page_of(uris: Sequence[str]) -> str:
    found = [uri for uri in uris if sweeps.is_sweep(uri)]
    if not found:
        return page(collect(uris))
    if len(uris) > 1:
        rule = "is a sweep's, and a page is about one sweep at a time, or about runs."
        raise DataError("run", storage.redact(found[0]), rule, "Give it alone, or its trials, which are runs: SWEEP/trials/001 ...")
    return sweep_page(sweeps.read_sweep(found[0]))


def page(runs: Sequence[RunData]) -> str:
    """The page about runs; the same runs give the same."""
    names = ", ".join(run.name for run in runs)
    states = [("complete" if run.complete else "going", (f"{run.name}: " if len(runs) > 1 else "") + run_tables.state(run)) for run in runs]
    heading = " ".join(f'<span class="run">{name}</span>' for name in run_tables.run_names(runs))
    tiles = run_tables.highlights(runs[0]) if len(runs) == 1 else []
    return _shell(f"{names}: run report", heading, states, tiles, _parts(runs, figures(runs)))


def sweep_page(sweep: sweeps.Sweep) -> str:
    """The page about a sweep; the same folder gives the same."""
    parts = [(title, "".join(map(_piece, pieces))) for title, pieces in sweeps.parts(sweep)]
    heading = f'<span class="run">{text(sweep.name)}</span>'
    return _shell(f"{sweep.name}: sweep report", heading, sweeps.states(sweep), sweeps.tiles(sweep), parts)


def _shell(
    title: str,
    heading: str,
    states: Sequence[tuple[str, str]],
    tiles: Sequence[tuple[str, str, str]],
    parts: Sequence[tuple[str, str]],
) -> str:
    """The whole page. `heading`, `tiles` (what, value, more) and the contents of `parts` are markup; `states` are classes and texts."""
    links = "".join(f'<a href="#{_slug(name)}">{name}</a>' for name, _ in parts)
    body = "".join(
        f'<section aria-labelledby="{_slug(name)}"><h2 id="{_slug(name)}">{name}</h2>\n{inner}\n</section>\n' for name, inner in parts
    )
    shown = "".join(f'<span class="{kind}">{text(state)}</span>' for kind, state in states)
    scripts = (_library(), SCRIPT)
    # Only these two scripts may run, and nothing may be fetched: even markup that slipped through could neither act nor call out.
    allowed = (
        "default-src 'none'",
        f"script-src {' '.join(map(_digest, scripts))}",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "media-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{"; ".join(allowed)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
<div class="states">{shown}</div>
<nav aria-label="Parts">{links}</nav>
</header>
<main>
{_tiles(tiles)}{body}</main>
<footer>Made by most-ray report. Charts by plotly.js (MIT licence), which is part of this file.</footer>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def embed(value: Any) -> str:
    """JSON that can stand inside a script element: no "<" in it can end the element or open another."""
    found = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        found = found.replace(character, f"\\u{ord(character):04x}")
    return found


@functools.cache
def _library() -> str:
    source: str = get_plotlyjs()
    # As the browser's parser hands it to its digest: with plain line ends; and nothing in it may look like the element's end.
    return source.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def _tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """The most important numbers."""
    tiles = "".join(
        f'<div class="tile"><div class="what">{what}</div><div class="value">{value}</div><div class="more">{more}</div></div>'
        for what, value, more in entries
    )
    return f'<div class="tiles">{tiles}</div>\n' if tiles else ""


def _parts(runs: Sequence[RunData], drawn: dict[str, list[Figure]]) -> list[tuple[str, str]]:
    """Titles and contents, in the page's order."""
    parts = [("Summary", run_tables.summary(runs) + _absent(runs))]
    evaluation = "".join(
        f'<div class="card"><h3>{title}</h3>{found}</div>'
        for task, title in (
            ("asr", "Recognition, last evaluation"),
            ("tts", "Synthesis, last evaluation"),
            ("text", "Text, last evaluation"),
        )
        if (found := run_tables.last_figures(runs, task))
    )
    if confused := run_tables.confusion_tables(runs):
        note = '<p class="note">The most frequent words that were not recognised as themselves, at the last evaluation.</p>'
        evaluation += f'<div class="card" id="confusions"><h3>Confusions</h3>{note}<div class="columns">{"".join(confused)}</div></div>'
    if shown := run_tables.samples(runs):
        classes = "halves" if len(runs) == 1 else ""
        inner = f'<div class="{classes}">{"".join(shown)}</div>'
        evaluation += f'<div class="card" id="samples"><h3>Samples</h3>{_LEGEND}{inner}</div>'
    evaluation += speech(runs)
    for title in ("Loss", "Evaluation", "Speed", "Data", "Experts"):
        inner = _grid(drawn.get(title, ())) + (evaluation if title == "Evaluation" else "")
        if inner:
            parts.append(("Training" if title == "Loss" else title, inner))
    parts += [("Configuration", found)] if (found := run_tables.configuration(runs)) else []
    parts += [("Environment", found)] if (found := run_tables.surroundings(runs)) else []
    return parts


_LEGEND = (
    '<p class="note">The model\'s words; <span class="sub"><del>the reference\'s</del> <ins>its own</ins></span> where it took one for '
    'another, <del class="gone">left out</del>, <ins class="added">added</ins>. What is wrong comes first.</p>'
)


def _absent(runs: Sequence[RunData]) -> str:
    """What the page cannot show, and of which run."""
    wanted = {
        "steps": lambda run: run.train,
        "evaluations": lambda run: run.evaluations,
        "transcriptions": lambda run: run.hypotheses,
        "starts and restarts": lambda run: run.starts,
        "experts by layer": lambda run: run.experts,
        "the configuration": lambda run: run.config,
        "the environment": lambda run: run.environment,
    }
    lines = []
    for run in runs:
        missing = [name for name, has in wanted.items() if not has(run)]
        if missing:
            lines.append(f'<p class="note">Not written down{f" by {text(run.name)}" if len(runs) > 1 else ""}: {", ".join(missing)}.</p>')
    return "".join(lines)


def _grid(found: Sequence[Figure]) -> str:
    """Two beside each other where there is room; one that would be left alone takes both places."""
    markup, alone = [], True
    for index, figure in enumerate(found):
        following = found[index + 1] if index + 1 < len(found) else None
        wide = figure.wide or (alone and (following is None or following.wide))
        alone = wide or not alone
        markup.append(_figure(dataclasses.replace(figure, wide=wide)))
    return f'<div class="grid">{"".join(markup)}</div>' if found else ""


def _piece(piece: sweeps.Piece) -> str:
    if isinstance(piece, str):
        return piece
    drawn = f'<div class="grid small">{"".join(map(_figure, piece.figures))}</div>' if piece.small else _grid(piece.figures)
    return f'<div class="stretch" style="--least: {piece.least}px">{drawn}</div>' if piece.least else drawn


def _figure(figure: Figure) -> str:
    keys = "".join(
        f'<span class="entry"><span class="swatch" style="background:{colour}"></span>{text(name)}</span>' for colour, name in figure.keys
    )
    note = f'<p class="note">{text(" ".join(figure.notes))}{keys}</p>' if figure.notes or keys else ""
    button = f'<button type="button" data-log="{figure.id}" aria-pressed="false">log scale</button>' if figure.log else ""
    return (
        f'<section class="figure{" wide" if figure.wide else ""}" id="{figure.id}">'
        f'<div class="top"><h3>{text(figure.title)}</h3>{button}</div>'
        f'<div class="plot" data-figure="{figure.id}" style="height:{figure.spec["layout"]["height"]}px"></div>{note}'
        f'<script type="application/json" id="data-{figure.id}">{embed(figure.spec)}</script></section>\n'
    )
