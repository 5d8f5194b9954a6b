"""Errors that a user can fix. Each names the field at fault, its value, the rule that it breaks, and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_STOPPED = 75  # exit code (EX_TEMPFAIL of sysexits.h) of a run that was stopped before its end: the same command resumes it


class RecordError(ValueError):
    """One record breaks a rule. The message is the reason that is written to rejected.jsonl."""


class UserError(ValueError):
    """Base of the errors that the command line reports in one paragraph, without a traceback.

    The message is "FIELD = VALUE: RULE REMEDY", in one line.

    Args:
        field: the flag, key, file or quantity at fault.
        value: its value; None where the field itself is at fault, which leaves " = VALUE" out.
        rule: what the field breaks, a sentence that continues its name ("must be positive.").
        remedy: what the user can do, a sentence; may be empty.
    """

    kind = "error"  # what the command line calls the error, before its message
    exit_code = 2  # of the command line

    def __init__(self, field: str, value: object, rule: str, remedy: str = "") -> None:
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        shown = "" if value is None else f" = {value!r}"
        super().__init__(f"{field}{shown}: {rule}" + (f" {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # Errors are pickled from Ray workers to the driver: rebuild from the four parts, not from the joined message.
        return type(self), (self.field, self.value, self.rule, self.remedy)


class ConfigError(UserError):
    """A flag, a configuration key or a combination of them is wrong."""

    kind = "configuration error"


class DataError(UserError):
    """A directory, file or record cannot be used."""

    kind = "data error"


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or belongs to another run, model or format."""

    kind = "checkpoint error"


class TopologyError(UserError):
    """The number of workers does not fit the requested layout of replicas, shards and expert-parallel groups."""

    kind = "topology error"


def one_line(error: BaseException) -> str:
    """The message of a library's error on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300]


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the most similar known name, or all known names where none is similar."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(choices)}."
