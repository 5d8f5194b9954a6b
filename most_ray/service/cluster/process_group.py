"""The process group of a run's workers, on the network by which Ray reaches them and on no other."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import ray
import ray.util
from ray.train.torch import TorchConfig

# No public way in Ray 2.60 to say where a group meets.
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from torch.distributed import TCPStore

logger = logging.getLogger(__name__)
_SIOCGIFADDR = 0x8915  # Linux's request for an interface's IPv4 address, netdevice(7)
_store: list[TCPStore] = []  # kept by rank 0's worker for as long as its process lives


@dataclass
class OnNodeAddress(TorchConfig):
    """Ray Train's process group, on the addresses that the nodes have in Ray and on no other.

    By default gloo uses the address that the machine's host name resolves to. On Debian that is 127.0.1.1, which no other machine can
    reach, so a group over several machines would never start. And torch's store, by which the ranks find each other, listens on every
    address by default, to any client.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    """Sets the group up in all workers, as Ray Train's own backend does, but with `choose_interface` and `open_store` first."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        address, port = worker_group.execute_single(0, open_store)
        worker_group.execute(use_store, address, port)
        worker_group.execute(_set_torch_distributed_env_vars)
        kind = backend_config.backend or ("nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo")
        settings = {"backend": kind, "world_size": len(worker_group), "init_method": "env://", "timeout_s": backend_config.timeout_s}
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(i, _setup_torch_process_group, world_rank=i, **settings) for i in ranks])


def open_store() -> tuple[str, int]:
    """Start the store of a process group, on this node's address alone; runs in rank 0's worker. Returns its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listening = socket.create_server((address, 0), family=family)
    except OSError:  # no interface of this machine has the address, as where a router translates addresses
        logger.warning("no interface has this node's address %s: the workers' store listens on all of them", address)
        listening = socket.create_server(("", 0), family=family)
    with listening:
        port = int(listening.getsockname()[1])
        _store.append(TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()))
    return address, port


def use_store(address: str, port: int) -> None:
    """Let torch connect to the store of `open_store` rather than start one (`TORCHELASTIC_USE_AGENT_STORE`); runs in every worker."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


def choose_interface() -> None:
    """Let gloo use the interface that has this node's address, unless GLOO_SOCKET_IFNAME is set; runs in every worker."""
    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(query, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # the interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
