from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from most_ray.config import config_from
from most_ray.data.batch import forward_shape, rank_batch
from most_ray.data.plan import Cursor, Plan, check_cursor, check_units, make_spec, source_weights
from most_ray.errors import CheckpointError, ConfigError, DataError
from most_ray.records.template import IGNORE, PADDING
from tests.support.builders import IDS, LAYOUT, asr, make_plan, make_store, text, tts, write_records


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(tmp_path)


def test_steps_do_not_depend_on_the_ones_before(plan: Plan) -> None:
    """Promise 2 of docs/promises.md: any step at once. In and out of order, in another process's plan: the same."""
    forward = [plan.record_ids(plan.step(k)) for k in range(1, 40)]
    other = Plan(plan.spec)
    assert [other.record_ids(other.step(k)) for k in range(39, 0, -1)] == forward[::-1]
    assert len(plan.record_ids(plan.step(1_000_000))) == plan.spec.global_batch_size


def test_each_source_is_seen_once_per_epoch(plan: Plan) -> None:
    """Nothing twice, nothing left out, over epoch boundaries (promise 37 of docs/promises.md)."""
    steps = 60
    seen: dict[str, int] = {}
    for k in range(1, steps + 1):
        for record_id in plan.record_ids(plan.step(k)):
            seen[record_id] = seen.get(record_id, 0) + 1
    consumed = plan.consumed(steps)
    for store, (name, count) in zip(plan.stores, consumed.items(), strict=True):
        times = [seen.get(store.record_id(row), 0) for row in range(len(store))]
        assert sum(times) == count, name
        assert max(times) - min(times) <= 1


def test_the_mix_is_exact_after_every_step(plan: Plan) -> None:
    for step in range(1, 50):
        total = step * plan.spec.global_batch_size
        asr_count, tts_count = plan.consumed(step).values()
        assert asr_count + tts_count == total
        assert abs(asr_count - total * 3 / 5) < 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_share_a_step_out_whatever_their_number(plan: Plan, world: int) -> None:
    """The same records in the same packs at any world size; every rank makes the same number of passes (promise 6 of docs/promises.md)."""
    for step in range(1, 12):
        batches = [rank_batch(plan, step, rank, world, 2, LAYOUT) for rank in range(world)]
        assert len({batch.input_ids.shape for batch in batches}) == 1
        assert sorted(i for batch in batches for i in batch.record_ids) == plan.record_ids(plan.step(step))
        supervised = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        assert supervised == sum(batches[0].n_supervised)
        assert sum(int((batch.modality != PADDING).sum()) for batch in batches) == batches[0].n_tokens


def test_a_batch_holds_its_records_as_they_are(plan: Plan) -> None:
    batch = rank_batch(plan, 3, 0, 1, 3, LAYOUT)
    ids = batch.input_ids.reshape(-1, plan.spec.max_seq_length)
    positions = batch.positions.reshape(ids.shape)
    tokens = {tuple(store.input_ids(row).tolist()) for store in plan.stores for row in range(len(store))}
    count = 0
    for row, position, mark in zip(ids, positions, batch.modality.reshape(ids.shape), strict=True):
        starts = [*np.flatnonzero(position == 0).tolist(), len(row)]
        for start, stop in pairwise(starts):
            if mark[start] != PADDING:
                assert tuple(row[start:stop].tolist()) in tokens
                assert position[start:stop].tolist() == list(range(stop - start))
                count += 1
            else:
                assert stop == len(row), "padding only at the end"
    assert count == plan.spec.global_batch_size
    audio = (batch.input_ids >= IDS.unit_base) & (batch.input_ids <= IDS.end_audio)
    assert ((batch.modality == 1) == audio).all()


@pytest.mark.parametrize(
    ("packs", "world", "rows", "expected"), [(13, 1, 8, (2, 7)), (12, 4, 8, (1, 3)), (1, 4, 2, (1, 1)), (9, 2, 2, (3, 2))]
)
def test_forward_passes_are_few_and_full(packs: int, world: int, rows: int, expected: tuple[int, int]) -> None:
    assert forward_shape(packs, world, rows) == expected


def test_a_changed_ingredient_is_named(plan: Plan, tmp_path: Path) -> None:
    ingredients = plan.ingredients
    assert (plan.spec.weight_unit, ingredients["weight_unit"]) == ("records", "rows"), "checkpoints of all versions have the same word"
    check_cursor(plan, plan.cursor(7), ingredients)
    other = Plan(replace(plan.spec, seed=1, global_batch_size=8))
    with pytest.raises(CheckpointError, match="global_batch_size, seed"):
        check_cursor(other, Cursor(plan.fingerprint, 0.0, 7), ingredients)


def test_what_changed_is_named_and_may_be_accepted(plan: Plan, tmp_path: Path) -> None:
    """Data set, tokenizer, template, packer: each by its name; with accept_data_change the run goes on, and is told what changed."""
    before = json.loads(json.dumps(plan.ingredients))
    cursor = Cursor("another", 0.5, 7)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"sources": [["a", "asr", "0"], before["sources"][1]]}, "sources (asr/a)"),
        ({"sources": before["sources"][::-1]}, "sources (their order)"),
        ({"vocabulary": {**before["vocabulary"], "tokenizer": "0"}}, "tokenizer"),
        ({"vocabulary": {**before["vocabulary"], "template": "0"}}, "template"),
        ({"vocabulary": {**before["vocabulary"], "ids": "0"}}, "token ids"),
        ({"packer": 0}, "packer"),
        ({"mixture": 0, "weight_unit": "tokens"}, "mixture, weight_unit"),
    ]
    for change, name in changes:
        with pytest.raises(CheckpointError, match=rf"data = '{re.escape(name)}'.*--accept_data_change"):
            check_cursor(plan, cursor, {**before, **change})
        assert ", ".join(check_cursor(plan, cursor, {**before, **change}, accept_change=True)) == name
    assert check_cursor(plan, plan.cursor(3), before) == []


def test_epochs(plan: Plan) -> None:
    """Of the slowest source, or of a named one."""
    steps = plan.steps_for_epochs(1.0)
    assert plan.cursor(steps).epoch >= 1.0 > plan.cursor(steps - 1).epoch
    for name, size in (("a", 23), ("asr/a", 23), ("tts/b", 17)):
        steps = plan.steps_for_epochs(2.0, name)
        full = name if "/" in name else f"asr/{name}"
        assert plan.consumed(steps)[full] >= 2 * size > plan.consumed(steps - 1)[full]
    with pytest.raises(ConfigError, match=r"epochs_of = 'asr/b'.*is no training source"):
        plan.steps_for_epochs(1.0, "asr/b")


def test_the_mix_in_tokens(plan: Plan) -> None:
    """Promise 11 of docs/promises.md: each source within one record's tokens of its share after every step, as metrics report."""
    by_tokens = Plan(replace(plan.spec, weight_unit="tokens"))
    longest = max(int(store.lengths.max()) for store in plan.stores)
    for step in range(1, 60):
        mix = by_tokens.mix(step)
        total = sum(part["tokens"] for part in mix.values())
        assert all(abs(part["tokens"] - part["target"] * total) <= longest for part in mix.values())
        assert sum(part["records"] for part in mix.values()) == step * plan.spec.global_batch_size
    taken = [by_tokens.step(k) for k in range(1, 60)]
    for source, part in enumerate(mix.values()):
        rows = np.concatenate([p.rows[p.sources == source] for p in taken])
        assert int(plan.stores[source].lengths[rows].sum()) == part["tokens"] and len(rows) == part["records"]
    assert [part["target"] for part in mix.values()] == [0.6, 0.4]


def test_weights_by_size_count_what_the_unit_counts(tmp_path: Path) -> None:
    short = make_store(tmp_path, "short", [asr(i, units=5, text="x") for i in range(30)])
    long = make_store(tmp_path, "long", [asr(i, units=95, text="x") for i in range(10)])
    assert source_weights(config_from({}), [short, long]) == (3, 1)
    tokens = source_weights(config_from({"weight_unit": "tokens"}), [short, long])
    assert tokens[0] * long.manifest["n_tokens"] == tokens[1] * short.manifest["n_tokens"]


def test_weights_of_kinds_and_sources(tmp_path: Path) -> None:
    a = make_store(tmp_path, "a", [asr(i) for i in range(10)])
    b = make_store(tmp_path, "b", [asr(i) for i in range(30)])
    t = make_store(tmp_path, "t", [tts(i) for i in range(5)], "tts")
    x = make_store(tmp_path, "x", [text(i) for i in range(5)], "text")
    assert source_weights(config_from({}), [a, b, t]) == (1, 3, 4)
    assert source_weights(config_from({"asr_tts_mix_ratio": 0.8}), [a, b, t]) == (1, 3, 1)
    stage1 = config_from({"text_mix_ratio": 0.2})
    assert source_weights(stage1, [a, t, x]) == (2, 2, 1)
    given = config_from({"train_asr_dirs": ["a", "b"], "train_asr_weights": [1, 1]})
    assert source_weights(given, [a, b, t]) == (1, 1, 2)
    assert source_weights(config_from({}), [a]) == (1,)
    assert source_weights(config_from({}), [x]) == (1,)
    with pytest.raises(ConfigError, match="text_mix_ratio"):
        source_weights(stage1, [a, t])
    with pytest.raises(ConfigError, match="text_mix_ratio"):
        source_weights(config_from({}), [a, t, x])
    with pytest.raises(ConfigError, match="asr_tts_mix_ratio"):
        source_weights(config_from({"asr_tts_mix_ratio": 0}), [a, t])
    with pytest.raises(ConfigError, match="no training data"):
        make_spec(config_from({}), [], 1)


def test_sources_with_different_units_are_not_mixed(tmp_path: Path) -> None:
    """Promise 27 of docs/promises.md."""
    stores = []
    for name, hash_ in (("a", "1"), ("b", "2")):
        write_records(tmp_path / name, [asr(1)])
        (tmp_path / name / "units.json").write_text(f'{{"identity": {{"kmeans": "{hash_}"}}}}')
        stores.append(make_store(tmp_path, name, [asr(1)]))
    with pytest.raises(DataError, match="made differently"):
        check_units(stores)
    assert check_units(stores[:1]) == check_units([stores[0], stores[0]])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"asr_tts_mix_ratio": 1e-300}, "asr_tts_mix_ratio"),
        ({"train_asr_dirs": ["a", "c"], "train_asr_weights": [1, 1e-300]}, "train_asr_weights"),
    ],
)
def test_a_share_that_reaches_no_record_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    stores = [make_store(tmp_path, "a", [asr(0)]), make_store(tmp_path, "c", [asr(1)]), make_store(tmp_path, "b", [tts(0)], "tts")]
    stores = stores if len(changes) > 1 else [stores[0], stores[2]]
    with pytest.raises(ConfigError, match=f"^{field} = "):
        source_weights(config_from(changes), stores)
