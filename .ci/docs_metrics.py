"""docs/metrics.md, from the declarations of `schema`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from most_ray.metrics.keys import Each, Fixed, Key, Many, type_words
from most_ray.metrics.schema import KINDS

_HEAD = """\
# metrics.jsonl

One JSON object a line; `kind` says which of the kinds below it is. Rank 0 writes it. However often a run is interrupted, each step has
its line of kind `train`, `experts` or `evaluation` once, without gaps: a run that resumes cuts back the lines after its checkpoint. A
line that a checkpoint divides is continued, so that all but times and memory equals what an uninterrupted run writes. Each start adds a
line of kind `start`. A number that is not finite is null. No value depends on the number of ranks or on how records are packed, except
times, memory and the loads of ranks.

The column *over* says how a value follows from the steps of its line: their sum, the mean over steps (mean) or over supervised tokens
(token mean), a quotient of sums (ratio), the largest (max) or the last step's value (last), or from all steps since the run began (run);
over all ranks and their forward passes unless it says rank 0. *Trackers* is the name in W&B and TensorBoard. *Prometheus* is the name of
the gauge, which Ray exports with `ray_` before it; it is the sum over all lines of the run if it says total.

Generated from most_ray/metrics/schema.py by `.venv/bin/python .ci/docs.py`.
"""


def metrics_markdown(kinds: Mapping[str, Mapping[str, Key]] = KINDS) -> str:
    """The page, of the keys of each kind of line."""
    parts = [_HEAD]
    objects: dict[str, Fixed] = {}
    for kind, keys in kinds.items():
        rest = {name: key for name, key in keys.items() if name != "kind"}
        parts += [f"## `{kind}`: {keys['kind'].meaning}", "", *_table(rest), ""]
        objects |= {found.name: found for key in rest.values() for found in _objects(key.type)}
    parts.append("## Objects\n")
    for name, found in objects.items():
        parts += [f"### {name[0].upper()}{name[1:]}", "", *_table(found.keys), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def _objects(kind: Any) -> list[Fixed]:
    """The objects that a type refers to, itself first, each followed by those in it."""
    if isinstance(kind, Fixed):
        return [kind, *(found for key in kind.keys.values() for found in _objects(key.type))]
    return _objects(kind.value) if isinstance(kind, (Each, Many)) else []


def _table(keys: Mapping[str, Key]) -> list[str]:
    """A table of keys; columns that would be empty are left out."""
    columns = {
        "key": [f"`{name}`" for name in keys],
        "type": [type_words(key.type) for key in keys.values()],
        "unit": [key.unit for key in keys.values()],
        "over": [", ".join(filter(None, (key.over, key.ranks if key.ranks != "all" else ""))) for key in keys.values()],
        "meaning": [f"{key.meaning} (only if {key.condition})" if key.condition else key.meaning for key in keys.values()],
        "trackers": [f"`{key.tracker}`" if key.tracker else "" for key in keys.values()],
        "Prometheus": [_gauge(key) for key in keys.values()],
    }
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    return ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]


def _gauge(key: Key) -> str:
    if key.gauge is None:
        return ""
    tags = ", ".join(f"{tag}={key.labels[tag]}" if tag in key.labels else tag for tag in key.gauge.tags)
    return f"`{key.gauge.name}`" + (f" by {tags}" if tags else "") + (", total" if key.gauge.total else "")
