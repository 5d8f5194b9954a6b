"""Errors that a user can fix. Each names the field at fault, its value, the rule that it breaks, and a remedy."""

from __future__ import annotations

import difflib
import errno
import os
import re
import reprlib
from collections.abc import Iterable

_MOST = 1200  # characters of a rule or a remedy in a message
# What a terminal acts on instead of showing it: control characters, line ends of Unicode, marks that turn the direction of text around;
# and half surrogate pairs, which cannot be written.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

EXIT_STOPPED = 75  # exit code (EX_TEMPFAIL of sysexits.h) of a run that was stopped before its end: the same command resumes it
EXIT_INTERRUPTED = 130  # exit code of shells for a process that Ctrl-C has ended


def printable(text: str) -> str:
    """Text of users, files and models as it may go to a terminal or a log: in one line, with escapes (`\\x1b`) for what is not shown but
    acted on. (rich's markup is another matter: print with `markup=False`.)"""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def redact(text: str) -> str:
    """Replace the credentials and the options of all URIs in `text` by `***`."""
    text = re.sub(r"://(?:[^/@:\s]*:[^\s'\"]*|[^/@\s'\"]*)@", "://***@", text)
    text = re.sub(r":/(?!/)[^/@:\s]+:[^\s'\"]*@", ":/***@", text)  # a URI that was a Path has lost one slash
    return re.sub(r"\?[\w.-]+=[^\s'\"]*", "?***", text)


class _Shown(reprlib.Repr):
    """Values in messages: the beginning and the end of long ones, the outer levels of deep ones."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 300, 300, 40
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 12

    def repr_int(self, number: int, level: int) -> str:
        # Python refuses to write numbers of thousands of digits.
        return super().repr_int(number, level) if number.bit_length() <= 10_000 else f"<a number of {number.bit_length()} bits>"


def shown(value: object) -> str:
    """The `repr` of any value, of bounded length and time."""
    return _cut(_Shown().repr(value), 700)


def _cut(text: str, most: int) -> str:
    """A text, or the beginning and the end of a longer one."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


_REMEDIES = {  # by errno, of errors of the system
    (errno.ENOSPC, errno.EDQUOT): "Free some space there, or name another place.",
    (errno.EFBIG,): "Raise the limit on the size of files (ulimit -f), or name another place.",
    (errno.EACCES, errno.EPERM, errno.EROFS): "Check its permissions, or name another place.",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTEMPTY): "Check the path.",
    (errno.EMFILE, errno.ENFILE): "Raise the limit on open files (ulimit -n).",
    (errno.ENOMEM,): "Free some memory.",
}


class RecordError(ValueError):
    """One record breaks a rule. The message is the reason that is written to rejected.jsonl."""


class UserError(ValueError):
    """Base of the errors that the command line reports in one paragraph, without a traceback.

    The message is "FIELD = VALUE: RULE REMEDY", in one line of bounded length, without credentials or control characters.

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
        what = field[:300] + ("" if value is None else f" = {shown(value)}")
        sentences = " ".join(_cut(" ".join(each.split()), _MOST) for each in (rule, remedy) if each)
        super().__init__(printable(redact(f"{what}: {sentences}")))

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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what it leaves: a text that continues "interrupted; "."""


def explain_os_error(error: OSError, field: str = "file") -> UserError:
    """An error of the system, as one that names the file, what is wrong with it, and a remedy.

    Args:
        field: the flag or key that the file is of, where it is known.
    """
    rule = f"cannot be used ({error.strerror or one_line(error) or type(error).__name__})."
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
    remedy = next((remedy for codes, remedy in _REMEDIES.items() if error.errno in codes), "Check it.")
    return DataError(field, name, rule, remedy)


def one_line(error: BaseException) -> str:
    """The message of a library's error on one line, cut to 300 characters, as it may be shown."""
    return printable(redact(" ".join(str(error).split())))[:300]


def count_of(number: float, what: str) -> str:
    """A number with its noun, as `1 file` or `2,000 entries`, for every text that is shown. `what`: the noun of one, which may have words
    before it."""
    shown_number = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{shown_number} {what if number == 1 else _plural(what)}"


def _plural(noun: str) -> str:
    """A regular plural: of `entry` entries, of `pass` passes, of `key` keys."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the most similar known name, or all known names where none is similar."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(choices)}."
