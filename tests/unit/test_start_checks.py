"""One list of checks for the run, the dry run and the doctor: its order, and which checks depend on which."""

from __future__ import annotations

import pytest

from most_ray.errors import ConfigError, UserError
from most_ray.runs.start_checks import START_CHECKS, walk


def failing() -> None:
    raise ConfigError("field", None, "is wrong.")


def test_checks_are_made_in_the_order_of_the_list_whatever_that_of_the_caller() -> None:
    made: list[str] = []
    found = walk({name: lambda name=name: made.append(name) or len(made) for name in reversed(START_CHECKS)})  # type: ignore[misc]
    assert made == list(START_CHECKS) == list(found) and list(found.values()) == list(range(1, len(made) + 1))


def test_the_first_failure_ends_a_run() -> None:
    made: list[str] = []
    with pytest.raises(ConfigError):
        walk({"tracking": lambda: made.append("tracking"), "data": failing, "storage": lambda: made.append("storage")})
    assert made == ["storage"]


def test_what_depends_on_a_failure_is_skipped_and_the_rest_is_made() -> None:
    errors: list[tuple[str, UserError]] = []
    found = walk({name: failing if name == "cluster" else lambda: True for name in START_CHECKS}, lambda *error: errors.append(error))
    assert [name for name, _ in errors] == ["cluster"]
    assert list(found) == ["storage", "data", "limits", "tracking"]  # not space, which depends on room, which depends on the cluster


def test_a_check_that_is_not_in_the_list_is_refused() -> None:
    with pytest.raises(AssertionError):
        walk({"weather": lambda: None})
