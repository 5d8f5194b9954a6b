"""gloo on the network by which Ray reaches a node."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import psutil
import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from most_ray.service.cluster import process_group
from most_ray.service.cluster.process_group import OnNodeAddress, choose_interface, interface_of, open_store


def test_the_interface_of_an_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert interface_of("192.0.2.254") is None


def test_gloo_is_told_the_interface_of_the_node_and_a_users_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: "192.0.2.254")
    choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface_of("127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen0")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen0"


def test_the_store_listens_on_the_nodes_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own listens on every address, and asks nobody who it is."""
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(process_group, "_store", [])
    address, port = open_store()
    ours = [each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN and each.laddr.port == port]
    assert [tuple(each) for each in ours] == [("127.0.0.1", port)]
    other = TCPStore(address, port, is_master=False)
    other.set("key", "value")
    assert process_group._store[0].get("key") == b"value"


def test_a_group_meets_at_that_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of Ray Train's steps, in this process: the group of one worker comes up over the store, and no other is opened."""
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(process_group.ray, "get", lambda done: done)
    monkeypatch.setattr(process_group, "_set_torch_distributed_env_vars", lambda: None)
    monkeypatch.setattr(process_group, "_store", [])
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)

    class Group:
        def __len__(self) -> int:
            return 1

        def execute(self, what: Callable[..., object], *args: object) -> object:
            return what(*args)

        def execute_single(self, rank: int, what: Callable[..., object]) -> object:
            return what()

        def execute_single_async(self, rank: int, what: Callable[..., object], **about: object) -> object:
            return what(**about)

        def get_resources_per_worker(self) -> dict[str, float]:
            return {"CPU": 1}

    before = {each.laddr.port for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN}
    OnNodeAddress().backend_cls().on_start(Group(), OnNodeAddress())
    try:
        assert dist.get_backend() == "gloo"
        assert os.environ["MASTER_ADDR"] == "127.0.0.1"
        new = [
            each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN and each.laddr.port not in before
        ]
        assert {each.ip for each in new} == {"127.0.0.1"}
    finally:
        dist.destroy_process_group()
