"""Records that a run would be both trained and validated on, or trained on from two sources: found before the start, and reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from most_ray.data.store import TokenStore
from most_ray.errors import printable
from most_ray.records.keys import ID, SPEECH, WHOLE, among, read_keys, share_compared

logger = logging.getLogger(__name__)


def warn_of_overlaps(training: Sequence[TokenStore], validation: Sequence[TokenStore]) -> None:
    """Log a warning for each validation set whose records, ids or speech are in training too, and for each source of training whose records
    another source of its task holds. Stores of earlier versions, which have no keys, are not compared."""
    share = share_compared(sum(map(len, (*training, *validation))))
    keys = {store.uri: _keys(store, share) for store in (*training, *validation)}
    for store in validation:
        shared = {column: _shared(column, store, training, keys) for column in (SPEECH, ID)}
        if len(rows := np.union1d(*(found for found, _ in shared.values()))):
            sources = list(dict.fromkeys(source for _, named in shared.values() for source in named))
            what = "are also in training" if len(shared[SPEECH][0]) else "have ids that records in training have"
            _warn(store, rows, share, what, sources, "figures of them say nothing about new data")
    for index, store in enumerate(training):
        others = [other for other in training[:index] if other.task == store.task]
        rows, sources = _shared(WHOLE, store, others, keys)
        if len(rows):
            _warn(store, rows, share, "are also in another source", sources, "they are trained on from both")


_Keys = dict[int, tuple[np.ndarray, np.ndarray]]  # by column: keys, ascending, and their rows


def _keys(store: TokenStore, share: float) -> _Keys:
    """The keys of a store that are compared; none where it has no file of keys."""
    found: _Keys = {}
    for column in (ID, SPEECH, WHOLE):
        stream = store.open_keys()
        if stream is not None:
            with stream:
                found[column] = read_keys(stream, share, column)
    return found


def _shared(column: int, store: TokenStore, others: Sequence[TokenStore], keys: dict[str, _Keys]) -> tuple[np.ndarray, list[str]]:
    """The rows of a store whose keys others have, ascending, and the sources of those."""
    rows, sources = np.zeros(0, np.int64), []
    for other in others:
        if column in keys[store.uri] and column in keys[other.uri]:
            own, numbers = keys[store.uri][column]
            found = numbers[among(own, keys[other.uri][column][0])]
            if len(found):
                rows = np.union1d(rows, found)
                sources.append(other.manifest["source"])
    return rows, sources


def _warn(store: TokenStore, rows: np.ndarray, share: float, what: str, sources: Sequence[str], why: str) -> None:
    about = "" if share == 1.0 else "about "
    named = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    text = f"{about}{round(len(rows) / share)} of the {len(store)} {store.task} records of {store.manifest['source']} {what} ({named}); "
    logger.warning("%s", printable(f"{text}the first is {store.record_id(int(rows[0]))[:100]!r}; {why}"))
