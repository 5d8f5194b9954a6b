"""Small corpora for the tests of their readers."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from most_ray.speech.corpora.corpus import CorpusOptions, Unusable, Utterance, read_corpus


def read(layout: str, directory: Path, **options: Any) -> tuple[list[Utterance], list[Unusable]]:
    items = list(read_corpus(CorpusOptions(layout, directory, **options)))
    return [item for item in items if isinstance(item, Utterance)], [item for item in items if isinstance(item, Unusable)]


def reasons(unusable: Iterable[Unusable]) -> list[tuple[str, int, str]]:
    return [(os.path.basename(item.file), item.index, item.reason) for item in unusable]


def put(path: Path, text: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def librispeech(root: Path, lines: dict[str, str], files: Iterable[str]) -> Path:
    for chapter, text in lines.items():
        put(root / chapter / f"{chapter.split('/')[-2]}-{chapter.split('/')[-1]}.trans.txt", text)
    for name in files:
        put(root / name)
    return root


def libriheavy(folder: Path, cuts: Sequence[dict[str, Any] | str], name: str = "libriheavy_cuts_small.jsonl.gz") -> Path:
    lines = "".join((cut if isinstance(cut, str) else json.dumps(cut)) + "\n" for cut in cuts).encode()
    return put(folder / name, gzip.compress(lines) if name.endswith("gz") else lines)


def cut_of(name: str = "small/1/a_0", **changes: Any) -> dict[str, Any]:
    supervision = {"start": 0, "duration": 2.5, "speaker": "1", "language": "English", "custom": {"texts": ["One.", "ONE"]}}
    recording = {"id": "small/1/a", "sources": [{"type": "file", "source": "download/librilight/small/1/a.flac"}]}
    return {"id": name, "start": 10.25, "duration": 2.5, "supervisions": [supervision], "recording": recording, "type": "MonoCut"} | changes
