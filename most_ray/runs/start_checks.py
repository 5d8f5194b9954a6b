"""The checks before a run starts, in order: `most-ray train`, `most-ray train --dry_run` and `most-ray doctor` all walk this list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from most_ray.errors import UserError

# Name -> the checks that it depends on.
START_CHECKS: dict[str, tuple[str, ...]] = {
    "cluster": (),  # the named cluster can be joined
    "storage": (),  # this machine can write to the run's folders
    "data": (),  # directories of records exist
    "limits": (),  # this machine allows enough open files
    "room": ("cluster",),  # there are devices for the workers
    "nodes": ("cluster",),  # every node of the cluster can write, read and run the same versions
    "space": ("room",),  # the disk has space for the checkpoints
    "tracking": (),  # trackers have their keys
    "safety": ("cluster",),  # other machines cannot use the cluster
}


def walk(checks: Mapping[str, Callable[[], Any]], on_error: Callable[[str, UserError], None] | None = None) -> dict[str, Any]:
    """Make checks in the order of START_CHECKS. Returns what they returned, by name.

    Args:
        checks: by name, those to make; each raises UserError if it fails.
        on_error: called with the name and error of a check that fails. The walk then continues with those that do not depend on it; by
            default it ends with the error.
    """
    assert checks.keys() <= START_CHECKS.keys()
    results: dict[str, Any] = {}
    failed: set[str] = set()
    for name in filter(checks.__contains__, START_CHECKS):
        if failed.intersection(START_CHECKS[name]):
            failed.add(name)
            continue
        try:
            results[name] = checks[name]()
        except UserError as error:
            if on_error is None:
                raise
            on_error(name, error)
            failed.add(name)
    return results
