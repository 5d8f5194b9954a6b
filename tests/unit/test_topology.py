from __future__ import annotations

import pytest

from most_ray.errors import TopologyError
from most_ray.train.topology import plan_topology


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
