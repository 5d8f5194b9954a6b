"""The process group of a run's workers, on the network by which Ray reaches them."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # no public way in Ray 2.60 to do something on the workers before their group is made

_ASK_ADDRESS = 0x8915  # SIOCGIFADDR of Linux: an interface's IPv4 address


@dataclass
class OnNodeAddress(TorchConfig):
    """Ray Train's process group, gloo on the interface that has the node's address in Ray.

    By itself gloo takes the address that the machine's own name stands for. On Debian that is 127.0.1.1, where no other machine can
    reach it: a group over several machines would never come up.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: object, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)  # type: ignore[attr-defined]
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Name the interface of this node's address to gloo, where the user has not named one and there is one; runs in a worker."""
    interface = interface_of(ray.util.get_node_ip_address())
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface whose IPv4 address this is; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _ASK_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
