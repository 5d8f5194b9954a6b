"""`most-ray prepare units` and `prepare kmeans`: a corpus to ASR records, the units manifest, and centroids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from most_ray.errors import ConfigError, DataError, UserError, nearest
from most_ray.records import N_UNITS
from most_ray.speech.audio import MAX_SECONDS
from most_ray.speech.corpora import Condition, CorpusOptions, check_conditions, data_set_name
from most_ray.speech.features import Extractor, FeatureSettings, MfccSettings, open_extractor
from most_ray.speech.parts import (
    Encode,
    Measure,
    Runner,
    Scan,
    Work,
    about_beside,
    digest,
    run_here,
    scan_corpus,
)
from most_ray.speech.units import (
    FIT_FRAMES,
    Algorithm,
    SpeakerStatistics,
    assign,
    fit_kmeans,
    kmeans_hash,
    load_kmeans,
    manifest_of,
    save_kmeans,
    units_for,
)

SHARD_BYTES = 64 << 20
DONE = "prepared.json"  # what was made with which settings from which recordings: the same again is not made again
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
MakeRunner = Callable[[int], Runner]  # bytes of audio -> who makes the parts


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
class Measured:
    """What the first pass over a corpus found: speakers' statistics, and frames to fit k-means to, float32 (frames, features)."""

    speakers: dict[str, SpeakerStatistics]
    sample: np.ndarray
    frames: int
    reason: str = ""  # why the first recording that gave no frames did not


def here(_bytes: int) -> Runner:
    return run_here


def prepare_units(job: UnitsJob, progress: Progress, runner: MakeRunner = here) -> dict[str, Any]:
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
    extractor = open_extractor(job.features)
    centroids = _known_centroids(job, extractor)
    scratch = job.output.absolute() / ".work"
    scan = _scan(job, scratch)
    name, features_key = data_set_name(job.corpus), digest(extractor.identity)
    key = _job_key(job, scan, features_key, centroids)
    if done := _done(job.output, key):
        shutil.rmtree(scratch, ignore_errors=True)
        return {**done, "unchanged": True}
    run = _Run(job, scan, scratch, runner(scan.bytes), progress)
    measured = run.measure(extractor, features_key, fit=centroids is None)
    if centroids is None:
        sample = measured.sample
        centroids = fit_kmeans(sample, job.fit_kmeans or units_for(measured.frames), job.seed, job.algorithm)
    codebook = _write_codebook(scratch / "codebook.npz", centroids, measured.speakers)
    work = Encode(
        job.features,
        features_key,
        job.speaker_column,
        job.max_seconds,
        str(codebook),
        digest(kmeans_hash(centroids), _statistics_key(measured.speakers)),
        job.keep_repeats,
        name,
        job.form,
        str(scratch),
    )
    run.do(work, "units")
    manifest = manifest_of(extractor.identity, extractor.rate_hz, centroids, not job.keep_repeats, getattr(extractor, "place", None))
    if measured.speakers:
        manifest["reference"] = _reference(measured.speakers)
    result = {**_finish(job, scan, work, manifest, centroids), "speakers": len(measured.speakers), "units": len(centroids)}
    (job.output / DONE).write_text(json.dumps({"key": key, **result}) + "\n", encoding="utf-8")
    shutil.rmtree(scratch, ignore_errors=True)
    return result


def prepare_kmeans(job: UnitsJob, output: Path, progress: Progress, runner: MakeRunner = here) -> dict[str, Any]:
    """Fit centroids to the selected recordings and write them to `output` (.npy, or .safetensors that says what it was fitted on).

    Returns:
        Counts: units, frames (of which at most `fit_frames` were used), inertia (mean squared distance to the nearest centroid).

    Raises:
        ConfigError, DataError: a wrong option, or a corpus that cannot be read.
    """
    if output.suffix not in (".npy", ".safetensors"):
        raise ConfigError("output", str(output), "is neither a .npy nor a .safetensors file.")
    _check(job)
    extractor = open_extractor(job.features)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = output.absolute().with_name(f".{output.name}.work")
    scan = _scan(job, scratch)
    run = _Run(job, scan, scratch, runner(scan.bytes), progress)
    measured = run.measure(extractor, digest(extractor.identity), fit=True)
    centroids = fit_kmeans(measured.sample, job.fit_kmeans or units_for(measured.frames), job.seed, job.algorithm)
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


def _scan(job: UnitsJob, scratch: Path) -> Scan:
    """What there is to do; a command that was wrong leaves nothing behind."""
    new = [folder for folder in (scratch, scratch.parent) if not folder.exists()]
    try:
        return _checked_scan(job, scratch)
    except UserError:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _checked_scan(job: UnitsJob, scratch: Path) -> Scan:
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
    return digest(
        [(part.key, part.speed) for part in scan.parts],
        scan.unusable.read_text(encoding="utf-8"),
        features_key,
        kmeans_hash(centroids) if centroids is not None else [job.fit_kmeans, job.algorithm, job.fit_frames, job.seed],
        [job.speaker_column, job.keep_repeats, job.max_seconds, job.form, data_set_name(job.corpus)],
    )


def _done(output: Path, key: str) -> dict[str, Any] | None:
    """What an earlier command has made, where it is what this one would make and is still there."""
    try:
        done = json.loads((output / DONE).read_text(encoding="utf-8"))
        whole = all((output / name).stat().st_size == size for name, size in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {name: value for name, value in done.items() if name != "key"} if done.get("key") == key and whole else None


@dataclass(frozen=True)
class _Run:
    """A job on its way."""

    job: UnitsJob
    scan: Scan
    scratch: Path
    runner: Runner
    progress: Progress

    def do(self, work: Work, what: str) -> None:
        """Make the parts that are not there."""
        todo = [part for part in self.scan.parts if not work.target(part).exists()]
        for _ in self.progress(self.runner(work, todo) if todo else (), what, len(todo)):
            pass

    def measure(self, extractor: Extractor, features_key: str, fit: bool) -> Measured:
        """The first pass, where one is needed: to know the speakers, or to fit k-means."""
        if not fit and not extractor.per_speaker:
            return Measured({}, np.zeros((0, extractor.width), np.float32), 0)
        # Each part keeps four times its even share, so that the sample over all of them is as good as an even one.
        share = max(2000, -(-4 * self.job.fit_frames // len(self.scan.parts))) if fit else 0
        job = self.job
        work = Measure(job.features, features_key, job.speaker_column, job.max_seconds, share, job.seed, str(self.scratch))
        self.do(work, "features")
        measured = self._merge(work, extractor.width)
        if fit and not measured.frames:
            reason = f"holds no usable recording; the first one {measured.reason}."
            raise DataError("input", str(job.corpus.directory), reason)
        return measured

    def _merge(self, work: Measure, width: int) -> Measured:
        speakers: dict[str, SpeakerStatistics] = {}
        sample, owners, priorities = np.zeros((0, width), np.float32), np.zeros(0, np.str_), np.zeros(0)
        frames, reason = 0, ""
        for part in self.scan.parts:
            with np.load(work.target(part), allow_pickle=False) as found:
                for name, count, total, squares in zip(*(found[key] for key in ("speakers", "counts", "totals", "squares")), strict=True):
                    known, new = speakers.get(str(name)), SpeakerStatistics(int(count), total, squares)
                    speakers[str(name)] = known + new if known else new
                frames, reason = frames + int(found["frames"]), reason or str(found["reason"])
                sample = np.concatenate([sample, found["sample"]])
                owners, priorities = np.concatenate([owners, found["owners"]]), np.concatenate([priorities, found["priorities"]])
            if len(sample) > 2 * self.job.fit_frames or part is self.scan.parts[-1]:
                keep = np.sort(np.argsort(priorities, kind="stable")[: self.job.fit_frames])
                sample, owners, priorities = sample[keep], owners[keep], priorities[keep]
        for owner in np.unique(owners) if speakers else ():
            rows = owners == owner
            sample[rows] = speakers[str(owner)].apply(sample[rows])
        return Measured(speakers, sample, frames, reason)


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
    return digest(
        [(name, speakers[name].count, speakers[name].total.tolist(), speakers[name].squares.tolist()) for name in sorted(speakers)]
    )


def _reference(speakers: Mapping[str, SpeakerStatistics]) -> dict[str, list[float]]:
    """Mean and deviation of a speaker's frames, averaged over the speakers: what is expected of one whom nobody has heard."""
    means, deviations = (np.mean([getattr(each, what) for each in speakers.values()], axis=0) for what in ("mean", "deviation"))
    return {"mean": np.round(means, 6).tolist(), "deviation": np.round(deviations, 6).tolist()}


def _inertia(sample: np.ndarray, centroids: np.ndarray) -> float:
    chosen = np.concatenate([assign(sample[start : start + 10_000], centroids) for start in range(0, len(sample), 10_000)])
    return float(((sample - centroids[chosen]) ** 2).sum(axis=1, dtype=np.float64).mean())


def _finish(job: UnitsJob, scan: Scan, work: Encode, manifest: Mapping[str, Any], centroids: np.ndarray) -> dict[str, Any]:
    """Put the parts together in the output folder, in place of what was there. Returns records, rejected, seconds, and sizes of files.

    Raises:
        DataError: there is no record.
    """
    output = job.output
    targets = [work.target(part) for part in scan.parts]
    abouts = [json.loads(about_beside(target).read_text(encoding="utf-8")) for target in targets]
    records = sum(about["records"] for about in abouts)
    rejected = sorted((entry for about in abouts for entry in about["rejected"]), key=lambda entry: entry["index"])
    lines = scan.unusable.read_text(encoding="utf-8") + "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
    (output / DONE).unlink(missing_ok=True)
    (output / "rejected.jsonl").unlink(missing_ok=True)
    if lines:
        (output / "rejected.jsonl").write_text(lines, encoding="utf-8")
    if not records:
        reason = f"holds no usable recording; the first one {json.loads(lines.split(chr(10), 1)[0])['reason']}."
        raise DataError("input", str(job.corpus.directory), reason, f"See {output / 'rejected.jsonl'}.")
    for old in output.glob("records*.json*"):
        old.unlink()
    written = _write_shards(output, job.form, [target for target, about in zip(targets, abouts, strict=True) if about["records"]])
    save_kmeans(output / "kmeans.npy", centroids, {})
    (output / "units.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    files = {path.name: path.stat().st_size for path in (*written, output / "kmeans.npy", output / "units.json")}
    seconds = sum(about["seconds"] for about in abouts)
    longest = max(about["longest"] for about in abouts)
    return {"records": records, "rejected": lines.count("\n"), "hours": seconds / 3600.0, "longest": longest, "files": files}


def _write_shards(output: Path, form: str, parts: Sequence[Path]) -> list[Path]:
    """Parts' bytes one after the other (gzip members make one gzip file), in files of some 64 MiB."""
    shards: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        if size >= SHARD_BYTES and form != "json":  # a JSON list ends with its file
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.stat().st_size
    written = []
    for index, shard in enumerate(shards):
        path = output / (f"records.{form}" if len(shards) == 1 else f"records-{index:05d}.{form}")
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as sink:
            if form == "json":
                sink.writelines(_as_list(shard))
            else:
                for part in shard:
                    with part.open("rb") as source:
                        shutil.copyfileobj(source, sink)
        temporary.replace(path)
        written.append(path)
    return written


def _as_list(parts: Iterable[Path]) -> Iterator[bytes]:
    """Lines of JSON as one JSON list."""
    before = b"[\n"
    for part in parts:
        with part.open("rb") as lines:
            for line in lines:
                yield before + line.rstrip(b"\n")
                before = b",\n"
    yield b"\n]\n"
