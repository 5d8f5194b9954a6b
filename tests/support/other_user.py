"""What another user of the machine can do to a local run of Ray: `python -m tests.support.other_user SETTINGS FOLDER`.

To be run as root, in a network namespace of its own. SETTINGS: "rays" (those of `ray.init`) or "ours". Prints one JSON object, see `main`.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - loaded before there is another user, who cannot read this Python
import glob
import json
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

_NOBODY = 65534
_AGENT = "http://127.0.0.1:52365/api/job_agent/jobs/"  # where Ray's agent takes jobs by default
OLD = "0123456789abcdef" * 4  # the token of an earlier run by Ray's own settings
_SOON_S = 60.0
_METHODS = (  # of Ray's services, one of each
    "NodeInfoGcsService/CheckAlive",
    "NodeManagerService/GetNodeStats",
    "CoreWorkerService/GetCoreWorkerStats",
    "ObjectManagerService/Push",
    "ReporterService/GetTraceback",
    "EventAggregatorService/AddEvents",
)


def post_job(home: str, proof: Path) -> str:
    """Read the owner's token and post a job to the agent's port. Returns what came of it; `proof` then holds the job's user."""
    try:
        token = Path(home, ".ray", "auth_token").read_text()
    except OSError as error:
        return type(error).__name__
    return _post({"Authorization": f"Bearer {token}"}, proof)


def post_old_token(home: str, proof: Path) -> str:
    """Post a job with the token that everyone could read before the run began."""
    return _post({"Authorization": f"Bearer {OLD}"}, proof)


def post_without_token(home: str, proof: Path) -> str:
    """Post a job without a token, and one with a made-up token."""
    return f"{_post({}, proof)}, {_post({'Authorization': 'Bearer ' + '0' * 64}, proof)}"


def _post(headers: dict[str, str], proof: Path) -> str:
    job = json.dumps({"entrypoint": f"id -u > {proof}.part && mv {proof}.part {proof}"}).encode()
    try:
        urllib.request.urlopen(urllib.request.Request(_AGENT, job, {**headers, "Content-Type": "application/json"}), timeout=60).read()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    began = time.monotonic()
    while not proof.exists() and time.monotonic() < began + _SOON_S:
        time.sleep(0.1)  # between two looks at what another process writes
    return f"ran as user {proof.read_text().strip()}"


def replace_socket(home: str, proof: Path) -> str:
    """Put a socket of one's own in the place of the one by which workers reach the raylet."""
    (session,) = json.loads(Path(home, "session.json").read_text())
    try:
        sockets = Path(session, "sockets")
        os.rename(sockets / "raylet", sockets / "aside")
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(str(sockets / "raylet"))
        os.unlink(sockets / "raylet")
        os.rename(sockets / "aside", sockets / "raylet")  # it is still needed here
    except OSError as error:
        return type(error).__name__
    return "replaced"


ATTACKS = (post_job, post_old_token, post_without_token, replace_socket)


def as_another_user(attack: Callable[[str, Path], str], home: str, proof: Path) -> Callable[[], str]:
    """Fork a process of another user, which waits with its attack until the returned function is called. Before Ray starts: a process with
    threads should not fork."""
    go, come = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        os.close(go[1])
        if os.read(go[0], 1):
            try:
                result = attack(home, proof)
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the result
                result = repr(error)
            os.write(come[1], result.encode())
        os._exit(0)
    os.close(come[1])

    def run() -> str:
        os.write(go[1], b"1")
        os.close(go[1])
        result = os.read(come[0], 10_000).decode()
        os.waitpid(pid, 0)
        return result

    return run


def start(settings: str) -> Any:
    """Start Ray, with its own settings or with those of a run, both on loopback."""
    import ray

    from most_ray.service.cluster.connection import start_local_ray
    from most_ray.service.cluster.ray_internals import keep_loopback

    if settings == "ours":
        return start_local_ray(4)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    keep_loopback()
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    return ray.init(num_cpus=4, object_store_memory=128 << 20, _node_ip_address="127.0.0.1", **quiet)


def process_group(count: int) -> list[Any]:
    """Workers with a process group, as those of a run."""
    import ray
    import torch.distributed as dist

    from most_ray.service.cluster import process_group as group

    @ray.remote(num_cpus=1)
    class Worker:
        def store(self) -> tuple[str, int]:
            return group.open_store()

        def join(self, address: str, port: int, rank: int) -> None:
            group.choose_interface()
            group.use_store(address, port)
            dist.init_process_group("gloo", rank=rank, world_size=count)
            dist.barrier()

    workers = [Worker.remote() for _ in range(count)]
    address, port = ray.get(workers[0].store.remote())
    ray.get([worker.join.remote(address, port, rank) for rank, worker in enumerate(workers)])
    return workers


def listening() -> list[dict[str, Any]]:
    """Every socket of this network namespace that takes connections or datagrams, with its process and what it answers without a token."""
    found = []
    for each in psutil.net_connections("inet"):
        if each.status == psutil.CONN_LISTEN or each.type == socket.SOCK_DGRAM:
            who = psutil.Process(each.pid).name() if each.pid else "?"
            address, port = each.laddr.ip.removeprefix("::ffff:"), each.laddr.port
            found.append({"process": who, "address": address, "port": port, "answer": _answer(port)})
    return found


def _answer(port: int) -> str:
    """What a port answers to calls of Ray's and to requests by HTTP, without a token."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in _METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}", lambda _: b"", lambda text: text)(None, timeout=3)
                return f"grpc: {method} answers"
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    return "grpc: refused"
                if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                    break
        else:
            return "grpc: no known method"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=3) as answer:
            return "http: metrics" if b"# HELP" in answer.read() else "http: answers"
    except urllib.error.HTTPError as error:
        return "http: refused" if error.code == 401 else f"http: {error.code}"
    except OSError as error:
        return f"neither ({type(error).__name__})"


def main(settings: str, folder: Path) -> dict[str, Any]:
    """Returns what came of each attack, with every listening socket."""
    home = str(folder / "home")
    os.environ |= {"HOME": home, "TMPDIR": str(folder / "t"), "RAY_USAGE_STATS_ENABLED": "0"}
    for name in [name for name in os.environ if name.startswith("RAY_") and name != "RAY_USAGE_STATS_ENABLED"]:
        del os.environ[name]
    attacks = {each.__name__: as_another_user(each, home, folder / "open" / each.__name__) for each in ATTACKS}
    session = start(settings).address_info["session_dir"]
    Path(home, "session.json").write_text(json.dumps([session]))
    workers = process_group(2) if settings == "ours" else []
    result: dict[str, Any] = {"listening": listening() if workers else []}
    result |= {name: attack() for name, attack in attacks.items()}
    result["sockets"] = glob.glob(f"{session}/sockets/*")
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
