"""Spoken and heard again: units of real recordings made to sound, and the sound transcribed by a trained model.

    python -m tests.benchmarks.round_trip [--model runs/digits/export] [--records jobs/data/digits/test_takes]

The recordings are held out: neither the model nor the vocoder has heard them. Beside it, the same utterances from their own units.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from most_ray.cli import main as most_ray
from most_ray.records.files import read_raw, record_files
from tests.benchmarks.common import ROOT, show, write


def heard(model: str, speech: str, waves: list[str], output: Path, *flags: str) -> list[str]:
    assert most_ray(["transcribe", "--model", model, "--speech", speech, *waves, "--output", str(output), *flags]) == 0
    return [json.loads(line)["text"].strip() for line in output.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.round_trip", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--model", default=str(ROOT / "runs/digits/export"))
    parser.add_argument("--records", default=str(ROOT / "jobs/data/digits/test_takes"))
    parser.add_argument("--speech", default=str(ROOT / "jobs/data/digits/train_asr"))
    args = parser.parse_args()
    texts = [raw["output"] for entry in record_files(args.records) for _, raw in read_raw(entry.uri) if isinstance(raw, dict)]
    with tempfile.TemporaryDirectory() as uri:
        folder = Path(uri)
        assert most_ray(["synthesize", "--speech", args.speech, "--records", args.records, "--output", str(folder / "waves")]) == 0
        waves = sorted((folder / "waves").glob("*.wav"), key=lambda path: path.stat().st_mtime_ns)  # as they were made
        figures = {
            "each by itself": heard(args.model, args.speech, list(map(str, waves)), folder / "alone.jsonl"),
            "as one speaker": heard(args.model, args.speech, list(map(str, waves)), folder / "one.jsonl", "--one_speaker"),
        }
        report = folder / "evaluation.json"
        assert most_ray(["evaluate", "--model", args.model, "--asr_dirs", args.records, "--output", str(report)]) == 0
        own = next(iter(json.loads(report.read_text())["sets"].values()))["words"]["rate"]
    rates = {name: sum(a == b for a, b in zip(texts, found, strict=True)) / len(texts) for name, found in figures.items()}
    rows = [[f"vocoded, transcribed {name}", len(texts), rate] for name, rate in rates.items()]
    show("Recognised", ["how", "recordings", "share"], [*rows, ["their own units (1 - WER)", len(texts), 1 - own]])
    write("round_trip", {"recordings": len(texts), **rates, "own_units": 1 - own})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
