"""Recordings to units: seconds of audio per second and core, and what memory does when there are ten times as many.

    python -m tests.benchmarks.speech [--mfcc 1200] [--hubert 120] [--rounds 2] [--memory]

MFCC with 500 centroids, and layer 9 of a randomly initialised HuBERT-base (no download), each by one plain loop (read, features,
nearest centroid; nothing else), by `prepare units`' second pass in this process, and by 1 and 2 Ray Data actors, by turns. Ray's and its
actors' start are left out of the rate (each actor's first part warms it up); `start` is until the first part is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transformers

from most_ray.service.cluster.connection import start_local_ray
from most_ray.service.tasks.unit_tasks import run_in_actors
from most_ray.speech.corpora.audio import audio_seconds, load_audio
from most_ray.speech.corpora.corpus import CorpusOptions
from most_ray.speech.units import corpus_parts as parts_module
from most_ray.speech.units.clustering import assign, remove_repeats
from most_ray.speech.units.corpus_parts import Part, json_digest, read_chunk, run_in_process, scan_corpus
from most_ray.speech.units.extractors import open_extractor
from most_ray.speech.units.features import EncoderSettings, FeatureSettings
from most_ray.speech.units.mfcc import MfccSettings
from most_ray.speech.units.stages import EncodeUnits, summary_path
from tests.benchmarks.common import SHARED, show, write

UNITS = 500


def corpus_of(folder: Path, seconds: float) -> Path:
    """Real utterances of LibriSpeech under as many names as it takes to make up so many seconds."""
    files = sorted((SHARED / "data" / "LibriSpeech").glob("*/*/*/*.flac"))
    folder.mkdir(parents=True)
    rows, total = ["path\tspeaker\ttext"], 0.0
    while total < seconds:
        file = files[(len(rows) - 1) % len(files)]
        name = f"{len(rows):06d}.flac"
        (folder / name).symlink_to(file)
        rows.append(f"{name}\t{file.parent.parent.name}\tsome words")
        total += audio_seconds(file) or 0.0
    (folder / "transcripts.tsv").write_text("\n".join(rows) + "\n")
    return folder


def hubert(folder: Path) -> EncoderSettings:
    torch.manual_seed(0)
    transformers.HubertModel(transformers.HubertConfig()).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return EncoderSettings("hubert", str(folder), 9)


def encode_work(features: FeatureSettings, scratch: Path, speakers: Sequence[str]) -> EncodeUnits:
    extractor = open_extractor(features, "cpu")
    centroids = np.random.default_rng(0).normal(size=(UNITS, extractor.width)).astype(np.float32)
    scratch.mkdir()
    zeros, ones = np.zeros((len(speakers), extractor.width)), np.ones((len(speakers), extractor.width))
    np.savez(scratch / "book.npz", centroids=centroids, speakers=np.array(speakers), means=zeros, deviations=ones)
    return EncodeUnits(
        features=features,
        features_key=json_digest(extractor.identity),
        speaker_column="speaker",
        max_seconds=120.0,
        codebook=str(scratch / "book.npz"),
        codebook_key="",
        keep_repeats=False,
        name="bench",
        form="jsonl.gz",
        scratch=str(scratch),
    )


def plain_loop(features: FeatureSettings, found: Sequence[Part], centroids: np.ndarray) -> float:
    """One recording after the other, with nothing around. Returns seconds of audio."""
    extractor, seconds = open_extractor(features), 0.0
    for part in found:
        for item in read_chunk(part.chunk):
            wave = load_audio(Path(item["path"]), extractor.sample_rate)
            remove_repeats(assign(extractor([wave])[0].values, centroids))
            seconds += len(wave) / extractor.sample_rate
    return seconds


def rates(name: str, features: FeatureSettings, seconds: float, rounds: int, scratch: Path, part: int) -> dict[str, Any]:
    """Seconds of audio per second by each way, medians over rounds by turns; in parts of `part` utterances: few, for the end counts too."""
    parts_module.PART = part
    scan = scan_corpus(CorpusOptions("folder", corpus_of(scratch / "corpus", seconds)), [], [1.0], "speaker", scratch / "scan")
    speakers = sorted({str(item["columns"]["speaker"]) for part in scan.parts for item in read_chunk(part.chunk)})
    work = encode_work(features, scratch / "work", speakers)
    with np.load(work.codebook) as book:
        centroids = book["centroids"]
    torch.set_num_threads(1)
    number = iter(range(10**6))

    def fresh() -> EncodeUnits:
        """Its own files, so that nothing is there already."""
        folder = scratch / f"try-{next(number)}"
        folder.mkdir()
        return replace(work, scratch=str(folder))

    def by_actors(actors: int) -> float:
        """By the times at which parts were put in place: rows come back from Ray Data some at a time."""
        job, began = fresh(), time.time()
        for _ in run_in_actors(job, scan.parts, actors, 0.0):
            pass
        done = sorted((job.target(part).stat().st_mtime, summary_path(job.target(part))) for part in scan.parts)
        ready = done[actors - 1][0]  # every actor is up and has made one
        starts.append(done[0][0] - began)
        return sum(json.loads(about.read_text())["seconds"] for _, about in done[actors:]) / (done[-1][0] - ready)

    def timed(run: Callable[[], float]) -> float:
        began = time.perf_counter()
        return run() / (time.perf_counter() - began)

    starts: list[float] = []
    ways: dict[str, Callable[[], float]] = {
        "plain loop": lambda: timed(lambda: plain_loop(features, scan.parts, centroids)),
        "one process": lambda: timed(lambda: sum(row["seconds"] for row in run_in_process(fresh(), scan.parts))),
        "1 actor": lambda: by_actors(1),
        "2 actors": lambda: by_actors(2),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            found[way].append(run())
    medians = {way: statistics.median(values) for way, values in found.items()}
    return {"features": name, "audio_seconds": seconds, **medians, "start": statistics.median(starts)}


def peak_of(folder: Path, output: Path) -> float:
    """Peak memory, MiB, of a process that prepares units of a corpus."""
    # Of VmHWM, not of ru_maxrss: that one begins with what the parent held when it forked.
    code = (
        "import re, sys; from most_ray.cli import main; code = main(sys.argv[1:]); "
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024); sys.exit(code)"
    )
    words = ["prepare", "units", "--input", str(folder), "--output", str(output), "--fit_kmeans", "100", "--num_actors", "0"]
    words += ["--fit_frames", "20000"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.speech", description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--mfcc", type=float, default=7200.0, help="seconds of audio")
    parser.add_argument("--hubert", type=float, default=240.0, help="seconds of audio")
    parser.add_argument("--memory", type=float, default=1200.0, help="seconds of audio, and ten times as many")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as uri:
        folder = Path(uri)
        start_local_ray(4)
        found = [
            rates("MFCC", MfccSettings(), args.mfcc, args.rounds, folder / "mfcc", 8),
            rates("HuBERT-base, layer 9", hubert(folder / "model"), args.hubert, args.rounds, folder / "hubert", 1),
        ]
        ray.shutdown()
        once, tenfold = (
            peak_of(corpus_of(folder / name, seconds), folder / f"{name}-out")
            for name, seconds in (("once", args.memory), ("tenfold", 10 * args.memory))
        )
    ways = ["plain loop", "one process", "1 actor", "2 actors"]
    show(
        "Seconds of audio per second",
        ["features", "audio, s", *ways, "2 actors / plain", "per core", "start, s"],
        [
            [r["features"], r["audio_seconds"], *(r[way] for way in ways), r["2 actors"] / r["plain loop"], r["2 actors"] / 2, r["start"]]
            for r in found
        ],
        [f"Peak memory of `prepare units`: {once:.0f} MiB with {args.memory:g} s of audio, {tenfold:.0f} MiB with ten times as much."],
    )
    write(
        "speech",
        {"rates": found, "peak_mib": once, "peak_mib_tenfold": tenfold},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
