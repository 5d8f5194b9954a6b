"""Good inputs, which the cases spoil: a model, records, recordings, made once for all cases."""

from __future__ import annotations

import functools
import gzip
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

DIGITS = ROOT / "jobs" / "data" / "digits"
FSDD = ROOT.parent / "shared" / "data" / "fsdd" / "recordings"  # real recordings of digits
KINDS = ("train_asr", "train_tts", "test_takes")


@functools.cache
def base() -> Path:
    """A folder that cases only read: `model`, and 40 records of each of `KINDS` with their manifest; removed by nobody but the system."""
    from most_ray.cli import main

    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    for kind in KINDS:
        (folder / kind).mkdir()
        with gzip.open(DIGITS / kind / "records.jsonl.gz", "rb") as stream:
            (folder / kind / "records.jsonl").write_bytes(b"".join(itertools.islice(stream, 40)))
        shutil.copy(DIGITS / kind / "units.json", folder / kind)
    for name in ("kmeans.npy", "vocoder.safetensors"):
        shutil.copy(DIGITS / "train_asr" / name, folder / "train_asr")
    # In a process of its own: torch's threads, once there are any, do not survive the fork of a case.
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = main(["init-model", "--preset", "tiny", "--records", str(folder / "train_asr"), "--output", str(folder / "model")])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return folder


def run_yaml(**changes: Any) -> str:
    """A good configuration of a small run, with changes; `...` leaves a key out."""
    good: dict[str, Any] = {"name": "r", "model_name_or_path": str(base() / "model"), "train_asr_dirs": [str(base() / "train_asr")]}
    good |= {"max_steps": 4, "global_batch_size": 4, "train_batch_size": 2, "max_seq_length": 256, "output_dir": "runs"}
    return yaml.safe_dump({key: value for key, value in {**good, **changes}.items() if value is not ...})


def plan(text: str | bytes | Callable[[], str | bytes], *flags: str) -> Callable[[Path], Sequence[str]]:
    """Makes `most-ray plan` with a configuration of this content (or what a function returns, as those that need `base()`) and flags."""

    def make(folder: Path) -> Sequence[str]:
        content = text() if callable(text) else text
        (folder / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return ["plan", "--config", "c.yaml", "--trace", "t.jsonl", "--steps", "1:3", *flags]

    return make
