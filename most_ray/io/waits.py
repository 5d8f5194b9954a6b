"""Says what is waited for while something remote does not answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from most_ray.io.uris import redact

_FIRST_S, _EVERY_S = 3.0, 5.0  # seconds until the first line, and between two
_LATER_S, _RARELY_S = 60.0, 30.0  # after so many seconds, as of a large download: the seconds between two lines
_logger = logging.getLogger(__name__)
_active = threading.local()  # `waiting`: this thread says already what it waits for


@contextlib.contextmanager
def waiting_for(what: str, limit_s: float | None = None, say: Callable[[str], Any] = _logger.warning) -> Iterator[None]:
    """While the block runs, say every few seconds what it waits for, how long it has, and until when it will; nothing where it is done at
    once. A wait within a wait of the same thread is silent: the outer one says it.

    Args:
        what: that is waited for, as "the dashboard at http://HOST:8265"; shown without credentials.
        limit_s: seconds after which the block gives up; None: it does not, or what it calls knows.
        say: takes each line, on a thread of its own (default: a warning).
    """
    if getattr(_active, "waiting", False):
        yield
        return
    ended, began = threading.Event(), time.monotonic()
    until = f", until {limit_s:.0f} s" if limit_s is not None else ""

    def speak() -> None:
        pause = _FIRST_S
        while not ended.wait(pause):
            waited = time.monotonic() - began
            pause = _EVERY_S if waited < _LATER_S else _RARELY_S
            with contextlib.suppress(OSError):  # the reader has gone: the block's own output finds that
                say(f"waiting for {redact(what)}: {waited:.0f} s{until}")

    speaker = threading.Thread(target=speak, name="waiting", daemon=True)
    _active.waiting = True
    speaker.start()
    try:
        yield
    finally:
        _active.waiting = False
        ended.set()
        speaker.join(timeout=1.0)  # so that no line comes after what the block's end has said
