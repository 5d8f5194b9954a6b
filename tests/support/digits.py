"""Parts of the digits' records: what is evaluated where the figures themselves do not matter."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import islice
from pathlib import Path

from most_ray.records.files import read_raw


def few_digits(source: Path, folder: Path, records: int = 40) -> Path:
    """Make `folder` a copy of one of jobs/data/digits' folders with about so many of its records, of all words and speakers."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("records.jsonl.gz"))
    every = [raw for _, raw in read_raw(str(source / "records.jsonl.gz"))]
    with gzip.open(folder / "records.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(raw) + "\n" for raw in islice(every, 0, None, len(every) // records))
    return folder
