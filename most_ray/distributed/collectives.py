"""Collective operations on Python objects: every rank of a group calls them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from most_ray.distributed.ranks import process_groups


def all_gather_or_raise(work: Callable[[], Any], group: Any = None) -> list[Any]:
    """Call `work` on every rank and gather the results; an error of one rank is raised on all, so that none is left waiting.

    Results and errors are pickled. The results are in the order of ranks (without a process group, this process's alone), the error is that
    of the lowest rank. `group`: a process group of all ranks; None is the default one.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as raised:  # noqa: BLE001 - raised below, on every rank
        error = raised
    answers: list[Any] = [(value, error)]
    if dist := process_groups():
        answers = [None] * dist.get_world_size()
        dist.all_gather_object(object_list=answers, obj=(value, error), group=group)
    for _, failure in answers:
        if failure is not None:
            raise failure
    return [value for value, _ in answers]
