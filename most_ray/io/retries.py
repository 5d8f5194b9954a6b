"""Storage operations repeated while their errors may pass, and errors that will not pass explained."""

from __future__ import annotations

import errno
import io
import logging
import random
import re
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from most_ray.errors import DataError
from most_ray.io.uris import is_remote, redact

T = TypeVar("T")
TRIES = 5
FIRST_WAIT = 0.5  # seconds; doubled after each try
# OSErrors by class that no further try can fix, and errno values of those that may pass.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, io.UnsupportedOperation)
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EREMOTEIO, errno.ENOTCONN, errno.ENETRESET}
_TRANSIENT |= {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_LIBRARIES = ("aiohttp", "azure", "botocore", "gcsfs", "google", "http", "requests", "urllib3")  # fsspec passes their own errors on
_DENIED = (
    "may not be used with these credentials.",
    "Check them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, ...) on every node.",
)
_REFUSALS = {  # pattern of the message of an error without errno: rule and remedy of the DataError
    r"AWS Error (\w*ACCESS_DENIED|INVALID_ACCESS_KEY_ID|\w*SIGNATURE\w*|\w*TOKEN\w*|UNRECOGNIZED_CLIENT)": _DENIED,
    r"HTTP status 40[13]\b|Status\((PERMISSION_DENIED|UNAUTHENTICATED)|OAuth2 access token": _DENIED,
    r"AWS Error NO_SUCH_BUCKET|^Bucket '.*' not found|specified (bucket|container) does not exist": (
        "names a bucket that does not exist.",
        "Create it, or check its name, the region and AWS_ENDPOINT_URL.",
    ),
    r"AWS Error VALIDATION": ("has a malformed bucket name or endpoint.", "Check the URI and AWS_ENDPOINT_URL (http://host:port)."),
    r"libjvm|libhdfs": ("needs Java and Hadoop's libhdfs.", "Install both and set JAVA_HOME, HADOOP_HOME and CLASSPATH."),
}
_random = random.SystemRandom()  # jitter must not draw from a generator that a run has seeded
_logger = logging.getLogger(__name__)


def with_retries(operation: Callable[[], T], what: str) -> T:
    """Return `operation()`, called up to TRIES (5) times while its errors may pass, after 0.5, 1, 2, 4 s plus up to half as much again.

    Args:
        what: the URI that is used, or a description of what is done; shown redacted.

    Raises:
        DataError: all tries failed, or a remote storage refuses for good.
        OSError: one that no further try can fix (missing, not permitted, disk full).
    """
    tries = 0
    while True:
        try:
            return operation()
        except Exception as error:  # each file system has its own: classified below, and raised again where it is none of these
            tries += 1
            shown = redact(str(error))
            reason = (shown.strip().splitlines() or [""])[0][:300] or type(error).__name__
            cause = error if shown == str(error) else None  # a traceback would show what the message hides
            if isinstance(error, FileNotFoundError) and cause is None:
                raise FileNotFoundError(errno.ENOENT, "No such file", redact(what)) from None
            refusal = _refusal(error, what)
            if not refusal and not _is_transient(error):
                raise
            if not refusal and tries == TRIES:
                refusal = (f"failed after {TRIES} tries ({reason}).", "Check the network, the endpoint and the server, then run it again.")
            if refusal:
                raise DataError("storage", redact(what), *refusal) from cause
        wait = FIRST_WAIT * 2 ** (tries - 1) * _random.uniform(1.0, 1.5)
        _logger.warning("%s: try %d of %d failed (%s), the next in %.1f s", redact(what), tries, TRIES, reason, wait)
        sleep(wait)


def _is_transient(error: Exception) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, OSError):  # pyarrow's remote errors have no errno, those of name resolution a negative one
        passing = error.errno is None or error.errno < 0 or error.errno in _TRANSIENT or isinstance(error, (ConnectionError, TimeoutError))
        return passing and not isinstance(error, _FINAL)
    return type(error).__module__.partition(".")[0] in _LIBRARIES


def _refusal(error: Exception, what: str) -> tuple[str, str] | None:
    """Rule and remedy of a refusal by a remote storage; None for other errors."""
    if isinstance(error, PermissionError) and is_remote(what):
        return _DENIED
    silent = isinstance(error, OSError) and error.errno is None
    return next((answer for pattern, answer in _REFUSALS.items() if silent and re.search(pattern, str(error))), None)
