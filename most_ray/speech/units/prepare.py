"""`most-ray prepare units` and `prepare kmeans`: a corpus to ASR records, the units manifest, and centroids."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from most_ray.errors import ConfigError, DataError, nearest
from most_ray.records.record import N_UNITS
from most_ray.speech.corpora.audio import MAX_SECONDS
from most_ray.speech.corpora.corpus import Condition, CorpusOptions, check_conditions, dataset_name
from most_ray.speech.units.clustering import (
    FIT_FRAMES,
    Algorithm,
    SpeakerStatistics,
    assign,
    build_manifest,
    default_unit_count,
    fit_kmeans,
    kmeans_hash,
    load_kmeans,
    save_kmeans,
)
from most_ray.speech.units.corpus_parts import (
    VERSION,
    CollectStatistics,
    EncodeUnits,
    PartTask,
    Runner,
    Scan,
    json_digest,
    run_in_process,
    scan_corpus,
)
from most_ray.speech.units.extractors import open_extractor
from most_ray.speech.units.features import Extractor, FeatureSettings, MfccSettings
from most_ray.speech.units.output import find_prepared, mark_prepared, publish_records

_ROWS = 10_000  # frames at once
_FEWEST_OF_A_PART = 256  # frames that a part keeps for k-means
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
ChooseRunner = Callable[[int], Runner]  # bytes of audio -> who makes the parts


@dataclass(frozen=True)
class UnitsJob:
    """What `prepare units` is asked for. One of `kmeans`, `fit_kmeans` is given; 0 units to fit: as many as the frames can tell apart."""

    corpus: CorpusOptions
    output: Path
    features: FeatureSettings = field(default_factory=MfccSettings)
    kmeans: Path | None = None
    fit_kmeans: int | None = None
    algorithm: Algorithm = "minibatch"
    fit_frames: int = FIT_FRAMES
    where: Sequence[Condition] = ()
    perturb: Sequence[float] = (1.0,)
    speaker_column: str = "speaker"
    keep_repeats: bool = False
    max_seconds: float = MAX_SECONDS
    form: Literal["jsonl.gz", "jsonl", "json"] = "jsonl.gz"
    seed: int = 0


@dataclass(frozen=True)
class CorpusStatistics:
    """What the first pass over a corpus found: speakers' statistics, and frames to fit k-means to, float32 (frames, features)."""

    speakers: dict[str, SpeakerStatistics]
    sample: np.ndarray
    frames: int
    reason: str = ""  # why the first recording that gave no frames did not


def here(_bytes: int) -> Runner:
    return run_in_process


def prepare_units(job: UnitsJob, progress: Progress, runner: ChooseRunner = here) -> dict[str, Any]:
    """Write records (records.jsonl.gz, or numbered files of some 64 MiB), `units.json` and `kmeans.npy` to the output folder; recordings
    and entries that cannot be used go to `rejected.jsonl`, with a reason each.

    Where features are normalised, a speaker's statistics are taken over all the recordings of the corpus, before `where` selects; a
    perturbed copy is another speaker. k-means, where it is fitted, hears the selected recordings only. A command that was stopped goes
    on where it was; one that was finished, and whose corpus has not changed, is not repeated.

    Returns:
        Counts: records, rejected, speakers, hours, units; unchanged, where nothing had to be done.

    Raises:
        ConfigError, DataError: a wrong option, or a corpus that cannot be read.
    """
    _check(job)
    extractor = open_extractor(job.features, "cpu")  # to describe it: whoever makes the parts opens their own
    centroids = _known_centroids(job, extractor)
    with _alone(job.output.absolute() / ".work") as scratch:
        return _prepare_units(job, extractor, centroids, scratch, progress, runner)


def _prepare_units(
    job: UnitsJob, extractor: Extractor, centroids: np.ndarray | None, scratch: Path, progress: Progress, runner: ChooseRunner
) -> dict[str, Any]:
    scan = _scan(job, scratch)
    name, features_key = dataset_name(job.corpus), json_digest(extractor.identity)
    key = _job_key(job, scan, features_key, centroids)
    if done := find_prepared(job.output, key):
        shutil.rmtree(scratch, ignore_errors=True)
        return {**done, "unchanged": True}
    run = _Run(job, scan, scratch, runner(scan.bytes), progress)
    measured = run.measure(extractor, features_key, fit=centroids is None)
    if centroids is None:
        centroids = fit_kmeans(measured.sample, job.fit_kmeans or default_unit_count(len(measured.sample)), job.seed, job.algorithm)
    codebook = _write_codebook(scratch / "codebook.npz", centroids, measured.speakers)
    work = EncodeUnits(
        job.features,
        features_key,
        job.speaker_column,
        job.max_seconds,
        str(codebook),
        json_digest(kmeans_hash(centroids), _statistics_key(measured.speakers)),
        job.keep_repeats,
        name,
        job.form,
        str(scratch),
    )
    run.do(work, "units")
    manifest = build_manifest(extractor.identity, extractor.rate_hz, centroids, not job.keep_repeats, getattr(extractor, "source", None))
    if measured.speakers:
        manifest["reference"] = _reference(measured.speakers)
    result = {
        **publish_records(job.corpus.directory, job.output, scan, work, manifest, centroids),
        "speakers": len(measured.speakers),
        "units": len(centroids),
    }
    mark_prepared(job.output, {"key": key, **result})
    shutil.rmtree(scratch, ignore_errors=True)
    return result


def prepare_kmeans(job: UnitsJob, output: Path, progress: Progress, runner: ChooseRunner = here) -> dict[str, Any]:
    """Fit centroids to the selected recordings and write them to `output` (.npy, or .safetensors that says what it was fitted on).

    Returns:
        Counts: units, frames (of which at most `fit_frames` were used), inertia (mean squared distance to the nearest centroid).

    Raises:
        ConfigError, DataError: a wrong option, or a corpus that cannot be read.
    """
    if output.suffix not in (".npy", ".safetensors"):
        raise ConfigError("output", str(output), "is neither a .npy nor a .safetensors file.")
    _check(job)
    extractor = open_extractor(job.features, "cpu")  # to describe it: whoever makes the parts opens their own
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _alone(output.absolute().with_name(f".{output.name}.work")) as scratch:
        scan = _scan(job, scratch)
        run = _Run(job, scan, scratch, runner(scan.bytes), progress)
        measured = run.measure(extractor, json_digest(extractor.identity), fit=True)
        centroids = fit_kmeans(measured.sample, job.fit_kmeans or default_unit_count(len(measured.sample)), job.seed, job.algorithm)
        save_kmeans(output, centroids, extractor.identity)
        shutil.rmtree(scratch, ignore_errors=True)
    return {"units": len(centroids), "frames": measured.frames, "inertia": _inertia(measured.sample, centroids)}


def _check(job: UnitsJob) -> None:
    if (job.kmeans is None) == (job.fit_kmeans is None):
        raise ConfigError("kmeans", job.kmeans and str(job.kmeans), "or fit_kmeans, exactly one of them, says which units to use.")
    if job.fit_kmeans and not 2 <= job.fit_kmeans <= N_UNITS:
        raise ConfigError("fit_kmeans", job.fit_kmeans, f"must lie in 2..{N_UNITS}.")
    if not job.perturb or any(not 0.5 <= speed <= 2.0 for speed in job.perturb) or len(set(job.perturb)) != len(job.perturb):
        raise ConfigError("perturb", list(job.perturb), "must hold different speeds between 0.5 and 2.")
    if job.fit_frames < 1:
        raise ConfigError("fit_frames", job.fit_frames, "must be at least 1.")
    if not 0 <= job.seed < 1 << 32:
        raise ConfigError("seed", job.seed, "must lie in 0..4294967295.")
    if not job.max_seconds > 0:
        raise ConfigError("max_seconds", job.max_seconds, "must be above 0.")


def _known_centroids(job: UnitsJob, extractor: Extractor) -> np.ndarray | None:
    if job.kmeans is None:
        return None
    centroids = load_kmeans(job.kmeans, extractor.identity)
    if centroids.shape[1] != extractor.width:
        reason = f"was fitted on {centroids.shape[1]} features, the settings give {extractor.width}."
        raise DataError("kmeans", str(job.kmeans), reason, "Name the --features that it was fitted on.")
    return centroids


@contextlib.contextmanager
def _alone(scratch: Path) -> Iterator[Path]:
    """The folder for what is on its way, for one command at a time. A command that was wrong leaves nothing behind.

    Raises:
        DataError: another command is at work there.
    """
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
        except ConfigError:
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _scan(job: UnitsJob, scratch: Path) -> Scan:
    scan = scan_corpus(job.corpus, job.where, job.perturb, job.speaker_column, scratch)
    if not scan.utterances:
        first = scan.unusable.read_text(encoding="utf-8").split("\n", 1)[0]
        reason = f"; the first entry, {json.loads(first)['file']}, {json.loads(first)['reason']}" if first else ""
        raise DataError("input", str(job.corpus.directory), f"holds no utterance{reason}.", "See `most-ray prepare units --help`.")
    check_conditions(job.where, set(scan.columns))
    if not scan.chosen:
        shown = [f"{c.column}{'!' * c.negated}={','.join(c.values)}" for c in job.where]
        raise ConfigError("where", shown, "leaves no recording.")
    if job.speaker_column != "speaker" and job.speaker_column not in scan.columns:
        raise ConfigError("speaker_column", job.speaker_column, "is no column of the corpus.", nearest(job.speaker_column, scan.columns))
    return scan


def _job_key(job: UnitsJob, scan: Scan, features_key: str, centroids: np.ndarray | None) -> str:
    return json_digest(
        [(part.key, part.speed) for part in scan.parts],
        scan.unusable_key,
        VERSION,
        features_key,
        kmeans_hash(centroids) if centroids is not None else [job.fit_kmeans, job.algorithm, job.fit_frames, job.seed],
        [job.speaker_column, job.keep_repeats, job.max_seconds, job.form, dataset_name(job.corpus)],
    )


@dataclass(frozen=True)
class _Run:
    """A job on its way."""

    job: UnitsJob
    scan: Scan
    scratch: Path
    runner: Runner
    progress: Progress

    def do(self, work: PartTask, what: str) -> None:
        """Make the parts that are not there."""
        todo = [part for part in self.scan.parts if not work.target(part).exists()]
        for _ in self.progress(self.runner(work, todo) if todo else (), what, len(todo)):
            pass

    def measure(self, extractor: Extractor, features_key: str, fit: bool) -> CorpusStatistics:
        """The first pass, where one is needed: to know the speakers, or to fit k-means."""
        if not fit and not extractor.per_speaker:
            return CorpusStatistics({}, np.zeros((0, extractor.width), np.float32), 0)
        # Each part keeps four times its even share, so that the sample over all of them is as good as an even one.
        share = max(_FEWEST_OF_A_PART, -(-4 * self.job.fit_frames // len(self.scan.parts))) if fit else 0
        job = self.job
        work = CollectStatistics(job.features, features_key, job.speaker_column, job.max_seconds, share, job.seed, str(self.scratch))
        self.do(work, "features")
        measured = self._merge(work, extractor.width)
        if fit and not measured.frames:
            reason = f"holds no usable recording; the first one {measured.reason}."
            raise DataError("input", str(job.corpus.directory), reason)
        return measured

    def _merge(self, work: CollectStatistics, width: int) -> CorpusStatistics:
        speakers: dict[str, SpeakerStatistics] = {}
        drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(np.zeros((0, width), np.float32), np.zeros(0, np.str_), np.zeros(0))]
        frames, waiting, reason = 0, 0, ""
        for part in self.scan.parts:
            with np.load(work.target(part), allow_pickle=False) as found:
                for name, count, total, squares in zip(*(found[key] for key in ("speakers", "counts", "totals", "squares")), strict=True):
                    known, new = speakers.get(str(name)), SpeakerStatistics(int(count), total, squares)
                    speakers[str(name)] = known + new if known else new
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
        """The frames, owners and priorities of those with the lowest, `fit_frames` of them at most, in their order."""
        sample, owners, priorities = (np.concatenate(each) for each in zip(*drawn, strict=True))
        keep = np.sort(np.argsort(priorities, kind="stable")[: self.job.fit_frames])
        return sample[keep], owners[keep] if len(owners) else owners, priorities[keep]


def _write_codebook(path: Path, centroids: np.ndarray, speakers: Mapping[str, SpeakerStatistics]) -> Path:
    """What the second pass needs of the first. Returns its path."""
    names = sorted(speakers)
    arrays = {
        "centroids": centroids,
        "speakers": np.array(names, dtype=np.str_),
        "means": np.array([speakers[name].mean for name in names]).reshape(len(names), centroids.shape[1]),
        "deviations": np.array([speakers[name].deviation for name in names]).reshape(len(names), centroids.shape[1]),
    }
    with path.open("wb") as sink:
        np.savez(sink, **arrays)  # type: ignore[arg-type]
    return path


def _statistics_key(speakers: Mapping[str, SpeakerStatistics]) -> str:
    return json_digest(
        [(name, speakers[name].count, speakers[name].total.tolist(), speakers[name].squares.tolist()) for name in sorted(speakers)]
    )


def _reference(speakers: Mapping[str, SpeakerStatistics]) -> dict[str, list[float]]:
    """Mean and deviation of a speaker's frames, averaged over the speakers: what is expected of one whom nobody has heard."""
    means, deviations = (np.mean([getattr(each, what) for each in speakers.values()], axis=0) for what in ("mean", "deviation"))
    return {"mean": np.round(means, 6).tolist(), "deviation": np.round(deviations, 6).tolist()}


def _inertia(sample: np.ndarray, centroids: np.ndarray) -> float:
    chosen = np.concatenate([assign(sample[start : start + _ROWS], centroids) for start in range(0, len(sample), _ROWS)])
    return float(((sample - centroids[chosen]) ** 2).sum(axis=1, dtype=np.float64).mean())
