"""Ingest as tasks of Ray Data, and stores on an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from most_ray.data.batch import rank_batch
from most_ray.data.feed import StreamSpec
from most_ray.data.ingest import Recipe, ingest_directory
from most_ray.data.plan import Plan, PlanSpec
from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.service.tasks.batch_stream import stream_batches
from most_ray.service.tasks.ingest_tasks import run_in_tasks
from tests.support.builders import asr, char_vocabulary, write_records
from tests.unit.test_plan import LAYOUT

RECIPE = Recipe("asr", char_vocabulary(), 200, "reject")


def same(one: Any, two: Any) -> bool:
    return len(one) == len(two) and all(
        one.record_id(row) == two.record_id(row) and np.array_equal(one.input_ids(row), two.input_ids(row)) for row in range(len(one))
    )


def test_tasks_make_the_same_store_as_one_process(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("most_ray.data.ingest_plan.RANGE", 4000)
    records = [asr(i, units=1 + i % 50) for i in range(120)]
    folder = write_records(tmp_path / "a", [*records[:60], "bad", *records[60:]])
    write_records(tmp_path / "a", [asr(500)], "more.jsonl")
    one = ingest_directory(folder, RECIPE, tmp_path / "one")
    monkeypatch.chdir(tmp_path)  # tasks have another working directory
    two = ingest_directory("a", RECIPE, "two", run_in_tasks)
    assert len(one.manifest["shards"]) > 5 and same(one, two)
    assert one.manifest == two.manifest and one.rejected_lines() == two.rejected_lines()


def test_what_a_user_can_mend_comes_out_of_a_task(ray_cluster: str, tmp_path: Path) -> None:
    folder = write_records(tmp_path / "a", [asr(0)])

    def vanishing(parts: Any, recipe: Recipe) -> None:
        (folder / "records.jsonl").unlink()
        run_in_tasks(parts, recipe)

    with pytest.raises(DataError, match=r"records\.jsonl"):
        ingest_directory(folder, RECIPE, tmp_path / "store", vanishing)


def test_records_and_stores_behind_uris(ray_cluster: str, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from an object store, kept on one, streamed from it by tasks: the same batches as from a disk; fetched once per node."""
    records = [asr(i, units=1 + i % 50) for i in range(60)]
    folder = write_records(tmp_path / "a", records)
    storage.write_bytes(bucket % "data/a/records.jsonl", (folder / "records.jsonl").read_bytes())
    monkeypatch.setattr("most_ray.data.ingest_plan.RANGE", 4000)
    local = ingest_directory(folder, RECIPE, tmp_path / "store")
    remote = ingest_directory(bucket % "data/a", RECIPE, bucket % "store", run_in_tasks)
    assert remote.uri.startswith("s3://") and same(local, remote)
    assert "secret" not in remote.manifest["source"]
    assert not list((tmp_path / "store").rglob(".*"))
    cached = {path: path.stat().st_ino for path in (tmp_path / "cache").iterdir()}

    def untouched(parts: Any, recipe: Recipe) -> None:
        pytest.fail("a second start makes nothing")

    again = ingest_directory(bucket % "data/a", RECIPE, bucket % "store", untouched)
    assert again.uri == remote.uri and same(local, again)
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").iterdir()} == cached
    spec = PlanSpec((remote.uri,), (1,), 0, 8, 200, "records")
    plan = Plan(PlanSpec((local.uri,), (1,), 0, 8, 200, "records"))
    for batch in stream_batches(StreamSpec(spec, LAYOUT, 0, 1, 2, timeout_s=120.0), 1, 10):
        assert np.array_equal(batch.input_ids, rank_batch(plan, batch.step, 0, 1, 2, LAYOUT).input_ids)
