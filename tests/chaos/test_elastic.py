"""A cluster that loses and gains nodes under a run: as many workers as there is room for, the same records, the same losses."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from most_ray.service.cluster.ray_internals import draining_nodes
from tests.end_to_end.faults.harness import Report, by_itself, compare, end_all, finish, ray_workers, steps_done, under_ray

STEPS = 60
# At the digits run's own rate, 3e-3, rounding grows: uninterrupted runs of one and of two workers part by 3e-4 within 60 steps, at this
# one by 2e-7. What is looked for here is far larger.
RATE = 5e-4
DEADLINE_S = 240.0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Room for two workers and the data tasks on the first node."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "object_store_memory": 200 << 20, "include_dashboard": False},
    )
    ray.init(address=made.address, log_to_driver=False)
    yield made
    end_all()
    ray.shutdown()
    made.shutdown()


def add_node(cluster: Cluster) -> Any:
    node = cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    return node


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not what():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.05)  # between two looks at another process: nothing depends on how long


def straight(folder: Path, **changes: Any) -> None:
    finish(by_itself(folder, "straight", 1, **changes), folder, "straight")


def test_four_workers_then_two_then_four(cluster: Cluster, tmp_path: Path) -> None:
    """A node is lost without a word, another one comes: 4 -> 2 -> 4, the same trace, losses to 1e-4, nobody is asked."""
    changes = {"max_steps": STEPS, "save_steps": 4, "learning_rate": RATE}
    straight(tmp_path, **changes)
    node = add_node(cluster)
    process = under_ray(tmp_path, "elastic", cluster.address, **changes, num_workers="2,4", ep_size=2)
    log = tmp_path / "elastic.log"
    wait_for(lambda: steps_done(tmp_path, "elastic") >= 6, process, log)
    assert len(ray_workers(cluster.address)) == 4
    cluster.remove_node(node, allow_graceful=False)
    wait_for(lambda: len(ray_workers(cluster.address)) == 2 and steps_done(tmp_path, "elastic") >= 10, process, log)
    add_node(cluster)
    wait_for(lambda: len(ray_workers(cluster.address)) == 4, process, log)
    finish(process, tmp_path, "elastic")
    report = compare(Report(), tmp_path, "straight", "elastic")
    assert report.passed, (report, log.read_text()[-3000:])
    text = log.read_text()
    assert "The workers were lost" in text and "stopped after a checkpoint (resized)" in text


def test_a_node_that_will_be_taken_away_is_left_behind_a_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """A preemption notice: checkpoint now, go on elsewhere. No step is made twice, and nothing counts as a failure."""
    changes = {"max_steps": STEPS, "save_steps": 1000, "learning_rate": RATE}
    straight(tmp_path, **changes)
    node = add_node(cluster)
    process = under_ray(tmp_path, "warned", cluster.address, **changes, num_workers="2,4", ep_size=2, max_failures=0)
    log = tmp_path / "warned.log"
    wait_for(lambda: steps_done(tmp_path, "warned") >= 6, process, log)
    drain(node.node_id)
    wait_for(lambda: len(ray_workers(cluster.address)) == 2 and "stopped after a checkpoint (preempted)" in log.read_text(), process, log)
    kept = steps_done(tmp_path, "warned")
    cluster.remove_node(node, allow_graceful=False)
    assert kept >= 6
    finish(process, tmp_path, "warned")
    report = compare(Report(), tmp_path, "straight", "warned")
    assert report.passed, (report, log.read_text()[-3000:])


def drain(node_id: str) -> None:
    """What an autoscaler does when the cloud has told it."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node_id, reason, "preemption", int((time.time() + 600) * 1000))
    assert accepted, why
    assert node_id in draining_nodes()


def test_sigterm_leaves_a_checkpoint_and_says_so(cluster: Cluster, tmp_path: Path) -> None:
    changes = {"max_steps": STEPS, "save_steps": 1000, "learning_rate": RATE}
    straight(tmp_path, **changes)
    process = under_ray(tmp_path, "ended", cluster.address, **changes, num_workers=2, ep_size=2)
    log = tmp_path / "ended.log"
    wait_for(lambda: steps_done(tmp_path, "ended") >= 5, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=DEADLINE_S) == 75, log.read_text()[-3000:]
    done = steps_done(tmp_path, "ended")
    marker = json.loads((tmp_path / "ended" / "checkpoints" / f"step-{done:09d}" / "commit.json").read_text())
    assert marker["step"] == done and "a checkpoint was written" in log.read_text()
    finish(under_ray(tmp_path, "ended", cluster.address, **changes, num_workers=2, ep_size=2), tmp_path, "ended")
    assert compare(Report(), tmp_path, "straight", "ended").passed
    assert f"Resuming after step {done}" in log.read_text()
