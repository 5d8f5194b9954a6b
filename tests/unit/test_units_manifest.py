"""One validator of units.json: what is wrong in it is refused by whoever reads it, and is never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from most_ray.data.plan import unit_neighbours
from most_ray.errors import DataError
from most_ray.records.units_manifest import check_units_manifest, load_units_manifest, neighbours_of

GOOD: dict[str, Any] = {
    "version": 1,
    "neighbours": [[1, 2], [0, 2], [1, 0]],
    "reference": {"mean": [0.0, 1.0], "deviation": [1.0, 0.5]},
    "identity": {"features": "mfcc", "settings": {}, "kmeans": "ab", "n_units": 3, "rate_hz": 50.0, "repeats_removed": True},
}


def changed(*path: str, to: Any) -> dict[str, Any]:
    manifest = json.loads(json.dumps(GOOD))
    inner = manifest
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = to
    return manifest


WRONG = {
    "a negative neighbour": (changed("neighbours", to=[[1, 2], [0, -2], [1, 0]]), "neighbour of unit 1 -2, not one of the units 0..2"),
    "a neighbour out of range": (changed("neighbours", to=[[1, 2], [0, 2], [1, 3]]), "neighbour of unit 2 3, not one"),
    "a fractional neighbour": (changed("neighbours", to=[[1, 2], [0, 1.5], [1, 0]]), "neighbour of unit 1 1.5, not one"),
    "a whole number as a fraction": (changed("neighbours", to=[[1, 2.0], [0, 2], [1, 0]]), "neighbour of unit 0 2.0"),
    "a text": (changed("neighbours", to=[[1, "2"], [0, 2], [1, 0]]), "neighbour of unit 0 '2'"),
    "a truth value": (changed("neighbours", to=[[1, True], [0, 2], [1, 0]]), "neighbour of unit 0 True"),
    "none": (changed("neighbours", to=[[1, None], [0, 2], [1, 0]]), "neighbour of unit 0 None"),
    "too many units": (changed("neighbours", to=[[1], [0], [0], [0]]), "neighbours those of 4 units, not of 3"),
    "too few units": (changed("neighbours", to=[[1], [0]]), "neighbours those of 2 units, not of 3"),
    "rows of two lengths": (changed("neighbours", to=[[1, 2], [0], [1, 0]]), "for unit 1 the neighbours"),
    "empty rows": (changed("neighbours", to=[[], [], []]), "for unit 0 the neighbours"),
    "no rows": (changed("neighbours", to=[1, 2, 0]), "for unit 0 the neighbours 1"),
    "no list": (changed("neighbours", to={"0": [1]}), "neighbours no list"),
    "no units": (changed("identity", "n_units", to=0), "n_units 0, which is not a number in 1..500"),
    "too many for the vocabulary": (changed("identity", "n_units", to=501), "n_units 501"),
    "units as text": (changed("identity", "n_units", to="3"), "n_units '3'"),
    "a rate of 0": (changed("identity", "rate_hz", to=0), "rate_hz 0"),
    "a rate that is no float": (changed("identity", "rate_hz", to=10**400), "rate_hz 1000"),
    "an infinite rate": (changed("identity", "rate_hz", to=float("inf")), "rate_hz inf"),
    "repeats as text": (changed("identity", "repeats_removed", to="no"), "repeats_removed 'no'"),
    "a hash that is a number": (changed("identity", "kmeans", to=7), "kmeans 7"),
    "features that are a list": (changed("identity", "features", to=["mfcc"]), "features"),
    "an identity that is a list": (changed("identity", to=[]), "an identity that is no object"),
    "an encoder that is a list": (changed("encoder", to=[]), "an encoder that is no name"),
    "an infinite mean": (changed("reference", "mean", to=[0.0, float("nan")]), "a reference that is not a mean"),
    "a deviation of 0": (changed("reference", "deviation", to=[0.0, 1.0]), "a reference that is not a mean"),
    "two lengths": (changed("reference", "mean", to=[0.0]), "a reference that is not a mean"),
    "no object": ([GOOD], "is no JSON object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case: str, tmp_path: Path) -> None:
    manifest, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        check_units_manifest(manifest)
    (tmp_path / "units.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"^units manifest = .*units\.json': is not a units manifest \(.*\)\. Make it again"):
        load_units_manifest(str(tmp_path))


def test_good_manifests_and_those_that_say_little_are_read(tmp_path: Path) -> None:
    assert check_units_manifest(GOOD) is GOOD
    for little in ({}, {"identity": {"kmeans": "1"}}, {"about": "made by hand"}, {"neighbours": [[]]}, {"neighbours": None}):
        (tmp_path / "units.json").write_text(json.dumps(little))
        assert load_units_manifest(str(tmp_path)) == little
    assert load_units_manifest(str(tmp_path / "none")) is None
    with pytest.raises(ValueError, match="has no 'features' in its identity"):
        check_units_manifest({"identity": {"kmeans": "1"}}, ("kmeans", "features"))


def test_a_stores_copy_is_checked_as_well() -> None:
    """Stores of earlier versions may hold what is refused today; fractions were cut off, negative units counted from the end."""
    table = neighbours_of(GOOD)
    assert table is not None and table.dtype == np.int64 and table.tolist() == GOOD["neighbours"]
    assert neighbours_of(None) is None and neighbours_of({}) is None
    store: Any = SimpleNamespace(name="s", manifest={"source": "data", "units": WRONG["a negative neighbour"][0]})
    with pytest.raises(DataError, match=r"^units = 's': of data are described by a wrong units\.json \(.*neighbour of unit 1 -2"):
        unit_neighbours(store)
