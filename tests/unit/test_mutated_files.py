"""Files that come from elsewhere, mutated: each is read, or refused by the one error that its reader has for it."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from most_ray.checkpoint import content
from most_ray.checkpoint.files import DamagedFileError, read_header
from most_ray.checkpoint.shards import index_tensors
from most_ray.model.configuration import MostConfig, parse_config
from most_ray.records.units_manifest import check_units_manifest, neighbours_of
from tests.conftest import ROOT

STORED = ROOT / "tests" / "fixtures" / "run-0.1" / "stored"
CHECKPOINT = STORED / "checkpoints" / "step-000000003"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


T = TypeVar("T")


def json_of(name: str) -> Any:
    return json.loads((STORED / name).read_text())


def paths_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, inner in items for path in paths_in(inner, (*at, key)))]


@st.composite
def mutated(draw: st.DrawFn, good: Any) -> Any:
    """A good value, in which up to three values at any depth are others, or gone."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_in(value)))
        if not path:
            return draw(VALUES)
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()) and isinstance(inner, dict):
            del inner[path[-1]]
        else:
            inner[path[-1]] = draw(VALUES)
    return value


def outcome(call: Callable[[], T], *refusals: type[Exception]) -> tuple[T | None, str]:
    """What a call returns, or the message of the error by which it refuses its input; any other error fails the test."""
    try:
        return call(), ""
    except refusals as error:
        return None, str(error) or type(error).__name__


MANIFEST = {
    "version": 1,
    "neighbours": [[1, 2], [0, 2], [1, 0]],
    "reference": {"mean": [0.0, 1.0], "deviation": [1.0, 0.5]},
    "identity": {"features": "mfcc", "settings": {}, "kmeans": "ab", "n_units": 3, "rate_hz": 50.0, "repeats_removed": True},
}


@given(mutated(MANIFEST))
def test_units_manifests(manifest: Any) -> None:
    checked, refusal = outcome(lambda: check_units_manifest(manifest), ValueError)
    assert len(refusal) < 1000
    if checked is not None:
        table = neighbours_of(checked)
        assert table is None or (table.ndim == 2 and table.min(initial=0) >= 0 and table.max(initial=0) < len(table) <= 500)


@settings(deadline=None)
@given(mutated(json_of("init/config.json")))
def test_configurations(values: Any) -> None:
    """What is wrong in what is left, as `loading` turns it into an error of the user's, must only be found soon."""
    found, refusal = outcome(lambda: parse_config(values if isinstance(values, dict) else {}), ValueError)
    assert len(refusal) < 2000
    config, _ = outcome(lambda: MostConfig(**found[0]) if found else None, Exception)
    assert config is None or (1 <= config.num_hidden_layers <= 1024 and 1 <= config.n_routed_experts <= 1 << 14)


@given(mutated(json_of("checkpoints/step-000000003/state.json")), mutated(json_of("checkpoints/step-000000003/commit.json")))
def test_states_and_markers_of_checkpoints(state: Any, marker: Any) -> None:
    _, refusal = outcome(lambda: content.check_state(content.parse_state(json.dumps(state).encode()), 3), DamagedFileError)
    assert not refusal or refusal.startswith("state.json")
    _, refusal = outcome(lambda: content.check_files(content.parse_marker(json.dumps(marker).encode())), DamagedFileError)
    assert not refusal or refusal.startswith("commit.json")


def _header() -> Any:
    data = (CHECKPOINT / "rank-00000.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    chunks = json.loads(header["__metadata__"]["rectangles"])
    kept = sorted(chunks)[:3]
    return {"entries": {key: header[key] for key in kept}, "chunks": {key: chunks[key] for key in kept}}


@given(mutated(_header()))
def test_headers_of_checkpoints(parts: Any) -> None:
    entries, chunks = (parts.get(key) if isinstance(parts, dict) else None for key in ("entries", "chunks"))
    header = {**(entries if isinstance(entries, dict) else {}), "__metadata__": {"rectangles": json.dumps(chunks)}}
    text = json.dumps(header).encode()
    outcome(lambda: index_tensors({"a": read_header(io.BytesIO(len(text).to_bytes(8, "little") + text))}), DamagedFileError)
