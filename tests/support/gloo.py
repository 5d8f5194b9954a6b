"""The one harness of multi-process tests: gloo ranks in fresh processes, a deadline for all of them, the first traceback shown.

A rank that fails or hangs ends the others; nothing waits for a collective that will never complete. Ranks are forked from a server that
has imported the libraries once: importing them anew in each would take longer than most tests.
"""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank_main(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", rank=rank, world_size=world)
        buffer = io.BytesIO()
        torch.save(function(*args), buffer)  # as bytes: tensors in a queue die with the process that made them
        results.put((rank, None, buffer.getvalue()))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
        results.put((rank, traceback.format_exc(), None))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any, deadline: float = 150.0) -> list[Any]:
    """`function(*args)` on every rank of a gloo group; what each rank returned, in rank order.

    Raises:
        AssertionError: a rank failed (its traceback) or did not end in time (which ones).
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.training"])
    results = context.Queue()
    port = _free_port()
    processes = [context.Process(target=_rank_main, args=(rank, world, port, function, args, results)) for rank in range(world)]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    end = time.monotonic() + deadline
    try:
        while len(answers) < world:
            try:
                rank, failure, value = results.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(world)) - set(answers))
                raise AssertionError(f"ranks {missing} of {world} did not end within {deadline:.0f} s") from None
            if failure:
                raise AssertionError(f"rank {rank} of {world} failed:\n{failure}")
            answers[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=5 if len(answers) == world else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [answers[rank] for rank in range(world)]
