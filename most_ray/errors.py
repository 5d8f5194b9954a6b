"""Errors that a user can mend. Each says which field, what it held, the rule it broke and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_STOPPED = 75  # exit code, EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on


class RecordError(ValueError):
    """One record breaks a rule. The message is the reason that is kept in rejected.jsonl."""


class UserError(ValueError):
    """Base of everything that the command line reports in one paragraph, without a traceback, with `exit_code`.

    Attributes:
        field: the flag, key, file or quantity at fault.
        value: what it held (None where the field itself is the fault).
        rule: what was expected of it.
        remedy: what the user can do.
    """

    kind = "error"
    exit_code = 2

    def __init__(self, field: str, value: object, rule: str, remedy: str = "") -> None:
        self.field, self.value, self.rule, self.remedy = field, value, rule, remedy
        shown = "" if value is None else f" = {value!r}"
        super().__init__(f"{field}{shown}: {rule}" + (f" {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str, str]]:
        # Errors cross process borders (Ray workers): rebuild from the four parts, not from the joined message.
        return type(self), (self.field, self.value, self.rule, self.remedy)


class ConfigError(UserError):
    """A flag, a configuration key or a combination of them is wrong."""

    kind = "configuration error"


class DataError(UserError):
    """A directory, file or record cannot be used."""

    kind = "data error"


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or belongs to something else."""

    kind = "checkpoint error"


class TopologyError(UserError):
    """The number of workers cannot be laid out as asked."""

    kind = "topology error"


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names the nearest known spelling, or lists what there is when nothing is near."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(choices)}."
