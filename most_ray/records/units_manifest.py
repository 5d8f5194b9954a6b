"""units.json, which says what the speech units of records mean: read and checked here, for all who use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from most_ray.errors import DataError, count_of, one_line, shown
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.records.files import UNITS_MANIFEST
from most_ray.records.record import N_UNITS

# Keys of the identity without which recordings cannot be converted to units and back.
NEEDED_FOR_SPEECH = ("features", "kmeans", "n_units", "rate_hz", "repeats_removed")
_REMEDY = "Make it again (`most-ray prepare units`), or copy the one that was made with these records."


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= N_UNITS


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


# Keys of the identity that are known here: the rule for each, and what holds for a value that follows it. Others belong to the features.
_IDENTITY: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "features": ("a name", lambda value: isinstance(value, str) and bool(value)),
    "kmeans": ("a hash", lambda value: isinstance(value, str) and bool(value)),
    "n_units": (f"a number in 1..{N_UNITS}", _is_count),
    "rate_hz": ("a number above 0", lambda value: _is_number(value) and value > 0),
    "repeats_removed": ("true or false", lambda value: isinstance(value, bool)),
}


def load_units_manifest(folder: str, needed: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """Read the units manifest of a folder, a path or URI; None if it has none.

    Args:
        needed: keys that its identity must have.

    Raises:
        DataError: it is not JSON, or breaks a rule of `check_units_manifest`.
    """
    uri = storage.join(folder, UNITS_MANIFEST)
    if not storage.exists(uri):
        return None
    try:
        data = storage.read_small(uri)
    except OSError as error:
        raise DataError("units manifest", storage.redact(uri), f"cannot be read ({error.strerror or error}).", _REMEDY) from error
    try:
        return check_units_manifest(parse_json(data), needed)
    except ValueError as error:
        raise DataError("units manifest", storage.redact(uri), f"is not a units manifest ({one_line(error)}).", _REMEDY) from error


def check_units_manifest(manifest: object, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The units manifest, if it keeps the rules: units are 0..n_units-1, and each has the same number of neighbours among them. What it
    does not state is not checked, but for the keys `needed` of its identity. Raises ValueError with the rule that is broken."""
    if not isinstance(manifest, dict):
        raise ValueError("is no JSON object")
    identity = manifest.get("identity", {})
    if not isinstance(identity, dict):
        raise ValueError("has an identity that is no object")
    if missing := [key for key in needed if key not in identity]:
        raise ValueError(f"has no {missing[0]!r} in its identity")
    for key, (rule, holds) in _IDENTITY.items():
        if key in identity and not holds(identity[key]):
            raise ValueError(f"has {key} {shown(identity[key])}, which is not {rule}")
    if not isinstance(manifest.get("encoder", ""), str):
        raise ValueError("has an encoder that is no name")
    if not isinstance(manifest.get("licence", ""), str):
        raise ValueError("has a licence that is no text")
    if manifest.get("neighbours") is not None:
        _check_neighbours(manifest["neighbours"], identity.get("n_units"))
    if manifest.get("reference") is not None:
        _check_reference(manifest["reference"])
    return manifest


def neighbours_of(manifest: Mapping[str, Any] | None) -> np.ndarray | None:
    """Near units of each unit, int64 (n_units, k), by a units manifest; None where it states none. Raises ValueError for a wrong manifest,
    as a token store of an earlier version may hold."""
    table = check_units_manifest(manifest or {}).get("neighbours")
    return None if table is None else np.array(table, dtype=np.int64).reshape(len(table), -1)


def seconds_per_unit(manifest: Mapping[str, Any] | None) -> float | None:
    """The seconds that a unit stands for, by a units manifest; None where it does not say it, or where units that repeat are left out."""
    identity = (manifest or {}).get("identity") or {}
    rate = identity.get("rate_hz")
    if identity.get("repeats_removed") is not False or isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
        return None
    return 1.0 / rate


def _check_neighbours(table: object, n_units: int | None) -> None:
    """Raise ValueError unless `table` lists units for each of `n_units` units (None: as many as it has rows), equally many for each."""
    if not isinstance(table, list) or not 1 <= len(table) <= N_UNITS or (n_units is not None and len(table) != n_units):
        found = f"those of {count_of(len(table), 'unit')}" if isinstance(table, list) else "no list"
        raise ValueError(f"has as neighbours {found}, not of {n_units or f'1..{N_UNITS}'}")
    for unit, row in enumerate(table):
        if not isinstance(row, list) or len(row) != len(table[0]) or (not row and len(table) > 1):
            raise ValueError(f"has for unit {unit} the neighbours {shown(row)}, not a list as long as for every unit")
        wrong = next((near for near in row if isinstance(near, bool) or not isinstance(near, int) or not 0 <= near < len(table)), None)
        if wrong is not None or None in row:
            raise ValueError(f"has as neighbour of unit {unit} {shown(wrong)}, not one of the units 0..{len(table) - 1}")


def _check_reference(reference: object) -> None:
    """Raise ValueError unless `reference` has a finite mean and deviation for each feature."""
    parts = [reference.get(key) for key in ("mean", "deviation")] if isinstance(reference, dict) else []
    lists = [part for part in parts if isinstance(part, list) and part and all(map(_is_number, part))]
    if len(lists) != 2 or len(lists[0]) != len(lists[1]) or min(lists[1]) <= 0:
        raise ValueError("has a reference that is not a mean and a deviation above 0 for each feature")
