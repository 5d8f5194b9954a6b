"""`most-ray prepare units` and `prepare kmeans`: from a corpus to ASR records, the units manifest, and centroids."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from most_ray.errors import ConfigError, DataError, UserError, count_of
from most_ray.io.json_values import parse_json
from most_ray.io.outputs import check_file
from most_ray.records.record import N_UNITS
from most_ray.speech.corpora.audio import MAX_SECONDS
from most_ray.speech.corpora.corpus import LAYOUTS, Condition, CorpusOptions, check_conditions, check_speaker_column, dataset_name
from most_ray.speech.units import clustering
from most_ray.speech.units.clustering import Algorithm, SpeakerStatistics, kmeans_hash
from most_ray.speech.units.corpus_parts import VERSION, PartTask, Progress, Runner, Scan, json_digest, run_in_process, scan_corpus
from most_ray.speech.units.extractors import open_extractor
from most_ray.speech.units.features import Extractor, FeatureSettings
from most_ray.speech.units.mfcc import MfccSettings
from most_ray.speech.units.output import check_records_folder, check_rejected, find_prepared, mark_prepared, publish_records
from most_ray.speech.units.stages import CollectStatistics, EncodeUnits, lowest, write_codebook

_MOST_SPEEDS = 100  # at which each recording is used
_ROWS = 10_000  # frames that are computed on together
_FEWEST_OF_A_PART = 256  # frames that a part may keep for k-means, however many parts there are
ChooseRunner = Callable[[int], Runner]  # bytes of audio -> who makes the parts


@dataclass(frozen=True)
class UnitsJob:
    """A corpus to convert to units. Exactly one of `kmeans` and `fit_kmeans` is given."""

    corpus: CorpusOptions
    output: Path  # folder of the records
    features: FeatureSettings = field(default_factory=MfccSettings)
    kmeans: Path | None = None  # file of the centroids to use
    fit_kmeans: int | None = None  # number of centroids to fit; 0: as many as the frames are enough for
    algorithm: Algorithm = "minibatch"  # of k-means
    fit_frames: int = clustering.FIT_FRAMES  # frames to fit k-means to, at most
    where: Sequence[Condition] = ()  # the utterances to convert
    perturb: Sequence[float] = (1.0,)  # speeds at which each recording is used
    speaker_column: str = "speaker"
    keep_repeats: bool = False  # keep runs of equal units
    max_seconds: float = MAX_SECONDS  # longer utterances are rejected
    form: Literal["jsonl.gz", "jsonl", "json"] = "jsonl.gz"  # of the records
    seed: int = 0  # of k-means and of the sample of frames
    max_rejected_fraction: float | None = None  # of the corpus' entries; with more the command fails. None: see output.check_rejected
    licence: str | None = None  # of the recordings and texts; None: that of a published corpus


@dataclass(frozen=True)
class CorpusStatistics:
    """What the first stage found."""

    speakers: dict[str, SpeakerStatistics]
    sample: np.ndarray  # frames to fit k-means to, normalised, float32 (frames, features)
    frames: int  # of all chosen utterances
    reason: str = ""  # why the first recording that gave no frames gave none


def prepare_units(job: UnitsJob, progress: Progress, runner: ChooseRunner = lambda _: run_in_process) -> dict[str, Any]:
    """Write records (records.jsonl.gz, or numbered files of some 64 MiB), `units.json` and `kmeans.npy` to the output folder, and
    entries and recordings that cannot be used to `rejected.jsonl`, with a reason each.

    If the features are normalised, a speaker's statistics are taken over all the recordings of the corpus, before `where` selects; a
    perturbed copy counts as another speaker. k-means, if it is fitted, sees the selected recordings only. A command that was stopped
    continues where it was; one that was finished, and whose corpus has not changed, is not repeated.

    Args:
        progress: wraps the parts to show how far the work is.
        runner: chooses who makes the parts; by default this process.

    Returns:
        Counts: records, rejected, speakers, hours, units; `unchanged` if nothing had to be done.

    Raises:
        ConfigError, DataError: a wrong option, or a corpus that cannot be read.
    """
    check_records_folder(job.output, job.kmeans)
    extractor = _check(job)
    centroids = _known_centroids(job, extractor)
    with _locked_folder(job.output.absolute() / ".work") as scratch:
        scan = _scan(job, scratch)
        features_key = json_digest(extractor.identity)
        key = _job_key(job, scan, features_key, centroids)
        if (done := find_prepared(job.output, key)) and done.get("rejected_share", 0.0) <= _limit(job):
            shutil.rmtree(scratch, ignore_errors=True)
            return {**done, "speakers": scan.speakers, "unchanged": True}
        stages = _Stages(job, scan, scratch, runner(scan.bytes), progress)
        statistics = stages.collect(extractor, features_key, fit=centroids is None)
        if centroids is None:
            centroids = _fit(job, statistics)
        task = stages.encode(features_key, centroids, statistics.speakers)
        manifest = clustering.build_manifest(extractor.identity, extractor.rate_hz, centroids, not job.keep_repeats, extractor.source)
        if licence := job.licence or LAYOUTS[job.corpus.layout].licence:
            manifest["licence"] = licence
        if statistics.speakers:
            manifest["reference"] = _reference(statistics.speakers)
        written = publish_records(job.corpus.directory, job.output, scan, task, manifest, centroids, job.max_rejected_fraction)
        result = {**written, "speakers": scan.speakers, "units": len(centroids), "corpus": task.corpus}
        mark_prepared(job.output, {"key": key, **result})
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def prepare_kmeans(job: UnitsJob, output: Path, progress: Progress, runner: ChooseRunner = lambda _: run_in_process) -> dict[str, Any]:
    """Fit centroids to the selected recordings and write them to `output` (.npy, or .safetensors that says what it was fitted on).

    Arguments and errors are those of `prepare_units`. Returns counts: units, frames (of which at most `fit_frames` were used), inertia
    (mean squared distance to the nearest centroid)."""
    check_file("output", output, clustering.CENTROIDS)
    if output.suffix not in (".npy", ".safetensors"):
        raise ConfigError("output", str(output), "is neither a .npy nor a .safetensors file.")
    extractor = _check(job)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _locked_folder(output.absolute().with_name(f".{output.name}.work")) as scratch:
        scan = _scan(job, scratch)
        stages = _Stages(job, scan, scratch, runner(scan.bytes), progress)
        statistics = stages.collect(extractor, json_digest(extractor.identity), fit=True)
        centroids = _fit(job, statistics)
        clustering.save_kmeans(output, centroids, extractor.identity)
        shutil.rmtree(scratch, ignore_errors=True)
    return {"units": len(centroids), "frames": statistics.frames, "inertia": _inertia(statistics.sample, centroids)}


def _check(job: UnitsJob) -> Extractor:
    """Check a job's options. Returns the extractor, which here only describes the features: who makes the parts opens its own."""
    if (job.kmeans is None) == (job.fit_kmeans is None):
        raise ConfigError("kmeans", job.kmeans and str(job.kmeans), "or fit_kmeans, exactly one of them, says which units to use.")
    speeds = list(job.perturb)
    for name, value, allowed, rule in (
        ("fit_kmeans", job.fit_kmeans, not job.fit_kmeans or 2 <= job.fit_kmeans <= N_UNITS, f"must be in 2..{N_UNITS}."),
        (
            "perturb",
            speeds,
            0 < len(speeds) == len({s for s in speeds if 0.5 <= s <= 2.0}) <= _MOST_SPEEDS,
            f"must hold different speeds between 0.5 and 2, at most {_MOST_SPEEDS}.",
        ),
        ("fit_frames", job.fit_frames, job.fit_frames >= 1, "must be at least 1."),
        ("seed", job.seed, 0 <= job.seed < 1 << 32, "must be in 0..4294967295."),
        ("max_seconds", job.max_seconds, job.max_seconds > 0, "must be above 0."),
        ("max_rejected_fraction", job.max_rejected_fraction, 0 <= (job.max_rejected_fraction or 0) <= 1, "must be in 0..1."),
    ):
        if not allowed:
            raise ConfigError(name, value, rule)
    return open_extractor(job.features, "cpu")


def _known_centroids(job: UnitsJob, extractor: Extractor) -> np.ndarray | None:
    if job.kmeans is None:
        return None
    centroids = clustering.load_kmeans(job.kmeans, extractor.identity)
    if centroids.shape[1] != extractor.width:
        reason = f"was fitted on {count_of(centroids.shape[1], 'feature')}, the settings give {extractor.width}."
        raise DataError("kmeans", str(job.kmeans), reason, "Name the --features that it was fitted on.")
    return centroids


@contextlib.contextmanager
def _locked_folder(scratch: Path) -> Iterator[Path]:
    """A folder for intermediate files, for one command at a time; DataError if another one works there. A command that fails before a part
    is made leaves no new folder."""
    new = [folder for folder in (scratch, scratch.parent) if not folder.exists()]
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            rule = "is being worked in by another command."
            raise DataError("output", str(scratch.parent), rule, "Wait for it, or name another folder.") from error
        try:
            yield scratch
        except UserError:
            if not any(scratch.glob("*-*.*")):  # a part's file: the next command continues from it
                for folder in new:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def _scan(job: UnitsJob, scratch: Path) -> Scan:
    scan = scan_corpus(job.corpus, job.where, job.perturb, job.speaker_column, scratch)
    if not scan.utterances:
        first = scan.unusable.read_text(encoding="utf-8").split("\n", 1)[0]
        reason = f"; the first entry, {parse_json(first)['file']}, {parse_json(first)['reason']}" if first else ""
        raise DataError("input", str(job.corpus.directory), f"holds no utterance{reason}.", "See `most-ray prepare units --help`.")
    check_conditions(job.where, set(scan.columns))
    if not scan.chosen:
        shown = [f"{c.column}{'!' * c.negated}={','.join(c.values)}" for c in job.where]
        raise ConfigError("where", shown, "leaves no recording.")
    check_speaker_column(job.speaker_column, scan.columns)
    check_rejected(scan, [], job.max_rejected_fraction)
    return scan


def _limit(job: UnitsJob) -> float:
    """The share of entries that a finished command may have rejected: where none is given, it was within the usual one."""
    return 1.0 if job.max_rejected_fraction is None else job.max_rejected_fraction


def _job_key(job: UnitsJob, scan: Scan, features_key: str, centroids: np.ndarray | None) -> str:
    """Hash of everything that the records depend on."""
    parts = [(part.key, part.speed) for part in scan.parts]
    units = kmeans_hash(centroids) if centroids is not None else [job.fit_kmeans, job.algorithm, job.fit_frames, job.seed]
    settings = [job.speaker_column, job.keep_repeats, job.max_seconds, job.form, dataset_name(job.corpus)]
    settings += [job.licence] if job.licence else []
    return json_digest(parts, scan.unusable_key, VERSION, features_key, units, settings)


def _fit(job: UnitsJob, statistics: CorpusStatistics) -> np.ndarray:
    count = job.fit_kmeans or clustering.default_unit_count(len(statistics.sample))
    return clustering.fit_kmeans(statistics.sample, count, job.seed, job.algorithm)


@dataclass(frozen=True)
class _Stages:
    """The two stages of a job."""

    job: UnitsJob
    scan: Scan
    scratch: Path
    runner: Runner
    progress: Progress

    def collect(self, extractor: Extractor, features_key: str, fit: bool) -> CorpusStatistics:
        """The first stage, if one is needed: for the speakers' statistics, or for a sample to `fit` k-means to."""
        job = self.job
        if not fit and not extractor.per_speaker:
            return CorpusStatistics({}, np.zeros((0, extractor.width), np.float32), 0)
        # Each part keeps four times its even share, so that the sample over all of them is as good as an even one.
        share = max(_FEWEST_OF_A_PART, -(-4 * job.fit_frames // len(self.scan.parts))) if fit else 0
        task = CollectStatistics(**self._common(features_key), sample=share, seed=job.seed)
        self._make_parts(task, "features")
        found = self._merge(task, extractor.width)
        if fit and not found.frames:
            raise DataError("input", str(job.corpus.directory), f"holds no usable recording; the first one {found.reason}.")
        return found

    def encode(self, features_key: str, centroids: np.ndarray, speakers: Mapping[str, SpeakerStatistics]) -> EncodeUnits:
        """The second stage. Returns its task, which names the parts' files."""
        job = self.job
        sums = [(name, speakers[name].count, speakers[name].total.tolist(), speakers[name].squares.tolist()) for name in sorted(speakers)]
        codebook = write_codebook(self.scratch / "codebook.npz", centroids, speakers)
        key = json_digest(kmeans_hash(centroids), json_digest(sums))
        settings = self._common(features_key) | {"codebook": str(codebook), "codebook_key": key}
        root = Path(os.path.abspath(job.corpus.directory))
        settings |= {"keep_repeats": job.keep_repeats, "name": dataset_name(job.corpus), "form": job.form}
        task = EncodeUnits(**settings, corpus=str(root if root.is_dir() else root.parent))
        self._make_parts(task, "units")
        return task

    def _common(self, features_key: str) -> dict[str, Any]:
        job = self.job
        settings = {"features": job.features, "speaker_column": job.speaker_column, "max_seconds": job.max_seconds}
        return {**settings, "features_key": features_key, "scratch": str(self.scratch)}

    def _make_parts(self, task: PartTask, what: str) -> None:
        """Make the parts that do not exist yet."""
        todo = [part for part in self.scan.parts if not task.target(part).exists()]
        for _ in self.progress(self.runner(task, todo) if todo else (), what, len(todo)):
            pass

    def _merge(self, task: CollectStatistics, width: int) -> CorpusStatistics:
        speakers: dict[str, SpeakerStatistics] = {}
        drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(np.zeros((0, width), np.float32), np.zeros(0, np.str_), np.zeros(0))]
        frames, waiting, reason = 0, 0, ""
        for part in self.scan.parts:
            with np.load(task.target(part), allow_pickle=False) as found:
                for name, count, total, squares in zip(*(found[key] for key in ("speakers", "counts", "totals", "squares")), strict=True):
                    new = SpeakerStatistics(int(count), total, squares)
                    speakers[str(name)] = speakers[str(name)] + new if str(name) in speakers else new
                frames, reason = frames + int(found["frames"]), reason or str(found["reason"])
                drawn.append((found["sample"], found["owners"], found["priorities"]))
                waiting += len(found["sample"])
            if waiting > 2 * self.job.fit_frames:
                drawn, waiting = [self._lowest(drawn)], self.job.fit_frames
        sample, owners, _ = self._lowest(drawn)
        names, rows = np.unique(owners, return_inverse=True)
        if speakers and len(sample):
            means, deviations = (np.array([getattr(speakers[str(name)], what) for name in names]) for what in ("mean", "deviation"))
            for start in range(0, len(sample), _ROWS):
                chosen = rows[start : start + _ROWS]
                sample[start : start + _ROWS] = (sample[start : start + _ROWS] - means[chosen]) / deviations[chosen]
        return CorpusStatistics(speakers, sample, frames, reason)

    def _lowest(self, drawn: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The (frames, owners, priorities) of the `fit_frames` frames with the lowest priorities, in their order."""
        sample, owners, priorities = (np.concatenate(each) for each in zip(*drawn, strict=True))
        keep = lowest(priorities, self.job.fit_frames)
        return sample[keep], owners[keep] if len(owners) else owners, priorities[keep]


def _reference(speakers: Mapping[str, SpeakerStatistics]) -> dict[str, list[float]]:
    """Mean and deviation of a speaker's frames, averaged over the speakers: the expectation for an unseen speaker."""
    means, deviations = (np.mean([getattr(each, what) for each in speakers.values()], axis=0) for what in ("mean", "deviation"))
    return {"mean": np.round(means, 6).tolist(), "deviation": np.round(deviations, 6).tolist()}


def _inertia(sample: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance of the frames (frames, features) to their nearest centroid."""
    chosen = np.concatenate([clustering.assign(sample[start : start + _ROWS], centroids) for start in range(0, len(sample), _ROWS)])
    return float(((sample - centroids[chosen]) ** 2).sum(axis=1, dtype=np.float64).mean())
