from __future__ import annotations

import pytest

from most_ray.distributed.topology import plan_topologies, plan_topology
from most_ray.errors import TopologyError


@pytest.mark.parametrize(
    ("world", "ep", "replicas", "expected"),
    [(1, 1, 1, (1, 1, 1)), (4, 2, 1, (1, 4, 2)), (8, 2, 2, (2, 4, 2)), (4, 4, 1, (1, 4, 4))],
)
def test_layouts(world: int, ep: int, replicas: int, expected: tuple[int, int, int]) -> None:
    topology = plan_topology(world, ep, replicas, 8)
    assert (topology.dp_replicate, topology.fsdp, topology.ep) == expected and topology.world_size == world


def test_what_does_not_fit_lists_what_does() -> None:
    with pytest.raises(TopologyError, match=r"ep_size = 3.*workers \(4\).*experts \(8\).*\[1, 2, 4\]"):
        plan_topology(4, 3, 1, 8)
    with pytest.raises(TopologyError, match=r"Use one of \[1, 3\]"):
        plan_topology(6, 2, 2, 6)
    with pytest.raises(TopologyError, match=r"dp_replicate_size = 4.*\[1, 2, 3, 6\]"):
        plan_topology(6, 1, 4, 8)


def test_elastic_sizes_come_near_what_is_asked_for() -> None:
    found = {t.world_size: (t.dp_replicate, t.fsdp, t.ep) for t in plan_topologies(1, 8, 4, 2, 8)}
    expected = {1: (1, 1, 1), 2: (2, 1, 1), 3: (1, 3, 1), 4: (2, 2, 2), 5: (1, 5, 1), 6: (2, 3, 1), 7: (1, 7, 1), 8: (2, 4, 4)}
    assert found == expected
    with pytest.raises(TopologyError, match="ep_size = 3"):
        plan_topologies(2, 4, 3, 1, 8)
