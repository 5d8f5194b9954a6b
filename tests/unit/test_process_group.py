"""gloo on the network by which Ray reaches a node."""

from __future__ import annotations

import os
import socket

import pytest

from most_ray.service import process_group
from most_ray.service.process_group import OnNodeAddress, choose_interface, interface_of


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


def test_every_worker_chooses_before_the_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []

    class Group:
        def execute(self, what: object) -> None:
            done.append(what)

    backend = OnNodeAddress().backend_cls
    monkeypatch.setattr(backend.__mro__[1], "on_start", lambda *args: done.append("group"))
    backend().on_start(Group(), OnNodeAddress())
    assert done == [choose_interface, "group"]
