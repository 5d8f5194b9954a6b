"""The process group of a run's workers, on the network by which Ray reaches them, and on no other."""

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
from ray.train.torch.config import (  # no public way in Ray 2.60 to say where a group meets
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from torch.distributed import TCPStore

_ASK_ADDRESS = 0x8915  # SIOCGIFADDR of Linux: an interface's IPv4 address


@dataclass
class OnNodeAddress(TorchConfig):
    """Ray Train's process group on the address that the nodes have in Ray, and on no other.

    By itself gloo takes the address that the machine's own name stands for. On Debian that is 127.0.1.1, where no other machine can
    reach it: a group over several machines would never come up. And torch's store, by which the ranks find each other, listens on every
    address, to whoever comes.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        address, port = worker_group.execute_single(0, open_store)
        worker_group.execute(name_store, address, port)
        worker_group.execute(_set_torch_distributed_env_vars)
        kind = backend_config.backend or ("nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo")
        about = {"backend": kind, "world_size": len(worker_group), "init_method": "env://", "timeout_s": backend_config.timeout_s}
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(i, _setup_torch_process_group, world_rank=i, **about) for i in ranks])


logger = logging.getLogger(__name__)
_store: list[TCPStore] = []  # a worker's own, for as long as its process lives


def open_store() -> tuple[str, int]:
    """The store of a process group on this node's address alone, and where it is; runs in rank 0's worker."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listening = socket.create_server((address, 0), family=family)
    except OSError:  # as behind address translation, where no interface of this machine has it
        logger.warning("no interface has this node's address %s: the workers' store listens on all of them", address)
        listening = socket.create_server(("", 0), family=family)
    with listening:
        port = int(listening.getsockname()[1])
        _store.append(TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()))
    return address, port


def name_store(address: str, port: int) -> None:
    """Let torch find the store that is there, rather than open one (`TORCHELASTIC_USE_AGENT_STORE`); runs in every worker."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


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
