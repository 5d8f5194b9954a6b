"""Lines of metrics.jsonl as rows of scalars for trackers, under the names that `schema` declares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from most_ray.errors import printable
from most_ray.metrics.figures import ERRORS
from most_ray.metrics.keys import leaves, nested
from most_ray.metrics.schema import EXPERTS, KINDS, TRAIN

Row = dict[str, float]
AXES = {kind: keys["step"].tracker for kind, keys in KINDS.items() if keys["step"].tracker}  # the step of each kind of line that has a row
# The first part of each name, as `train` of train/loss, and the kind of line that it is of.
GROUPS = {key.tracker.split("/")[0]: kind for kind in AXES for key in nested(KINDS[kind]) if key.tracker}
_MOST_EXPERTS = 16  # above this number an expert's load is no scalar of its own; nor is a layer's, above _MOST_LAYERS
_MOST_LAYERS = 32


def kind_of(line: Mapping[str, Any]) -> str:
    """The kind of a line; lines without one are of training: early versions wrote no others."""
    return str(line.get("kind", "train"))


def row_of(line: Mapping[str, Any], start: Mapping[str, Any]) -> Row:
    """The scalars of a line by name, without those that are null.

    Args:
        start: the newest line of kind `start`, for the experts of each modality and the index of the first layer with experts.
    """
    row: dict[str, Any] = {}
    for key, parts, value in leaves(_with_overall(line), KINDS.get(kind_of(line), {})):
        if not key.tracker:
            continue
        if key is TRAIN["expert_load"]:
            if len(value) <= _MOST_EXPERTS:
                row |= {_name(key.tracker, (*parts, str(expert))): value[expert] for expert in _group(start, parts[0], value)}
        elif key is EXPERTS["load"]:
            row |= _layer_ratios(key.tracker, parts[0], value, start)
        elif key.type is ERRORS:
            name, (low, high) = _name(key.tracker, parts), value.get("interval") or (None, None)
            row |= {name: value.get("rate"), f"{name}_low": low, f"{name}_high": high}
        else:
            row[_name(key.tracker, parts)] = value
    axis = AXES.get(kind_of(line))
    return {name: value for name, value in row.items() if isinstance(value, int | float) and name != axis}


def _with_overall(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """An evaluation's line with the figures over all sets of a task as a set named overall/TASK."""
    overall = {f"overall/{task}": figures for task, figures in line.get("overall", {}).items()}
    return {**line, "sets": {**line.get("sets", {}), **overall}, "overall": {}} if overall else line


def _name(template: str, parts: tuple[str, ...]) -> str:
    """A declared name with the names of items in it, as trackers can take and show them."""
    for part in map(printable, parts):
        template = re.sub(r"\{\w+\}", lambda _, part=part: part, template, count=1)  # type: ignore[misc]
    return template


def _group(start: Mapping[str, Any], modality: str, load: list[float]) -> list[int]:
    """The experts of a modality; without a `start` line, all."""
    return list(start.get("experts", {}).get(modality) or range(len(load)))


def _layer_ratios(template: str, modality: str, by_layer: list[list[float]], start: Mapping[str, Any]) -> Row:
    """The busiest expert's load over its group's mean, layer by layer if there are few, and in the worst layer."""
    ratios: dict[int, float] = {}
    for layer, load in enumerate(by_layer, int(start.get("first_expert_layer", 0))):
        used = [load[expert] for expert in _group(start, modality, load)]
        if sum(used):
            ratios[layer] = max(used) * len(used) / sum(used)
    row = {f"layers/{modality}/worst_max_over_mean": max(ratios.values())} if ratios else {}
    if len(by_layer) <= _MOST_LAYERS:
        row |= {_name(template, (modality, f"{layer:02d}")): ratio for layer, ratio in ratios.items()}
    return row
