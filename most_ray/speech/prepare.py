"""`most-ray prepare units`: a corpus to ASR records and the units manifest."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from most_ray import storage
from most_ray.errors import ConfigError, DataError, RecordError
from most_ray.records import (
    ASR_INSTRUCTION,
    N_UNITS,
    asr_to_tts,
    parse_record,
    read_raw,
    record_files,
    units_to_text,
)
from most_ray.speech.audio import load_audio
from most_ray.speech.corpora import Condition, Utterance, read_folder, select
from most_ray.speech.features import MfccSettings, mfcc
from most_ray.speech.units import (
    SpeakerStatistics,
    assign,
    fit_kmeans,
    load_kmeans,
    manifest_of,
    remove_repeats,
    speaker_statistics,
)


@dataclass(frozen=True)
class UnitsJob:
    """What `prepare units` is asked for."""

    input: Path
    output: Path
    kmeans: Path | None = None
    fit_kmeans: int | None = None
    where: Sequence[Condition] = ()
    perturb: Sequence[float] = (1.0,)
    speaker_column: str = "speaker"
    name: str | None = None
    keep_repeats: bool = False
    seed: int = 0
    settings: MfccSettings = field(default_factory=MfccSettings)


def prepare_units(job: UnitsJob, progress: Callable[[Iterable[Any], str, int], Iterable[Any]]) -> dict[str, Any]:
    """Write `records.jsonl.gz`, `units.json` and `kmeans.npy` to the output folder; bad recordings go to `rejected.jsonl`.

    Each speaker's statistics are taken over all recordings of the corpus, before `where` selects; a perturbed copy is another
    speaker. k-means, where it is fitted, hears the selected recordings only.

    Returns:
        Counts: records, rejected, speakers, hours.

    Raises:
        ConfigError, DataError: a wrong option, or a corpus that cannot be read.
    """
    _check(job)
    name = job.name or job.input.name
    utterances = read_folder(job.input, name)
    chosen = {utterance.id for utterance in select(utterances, job.where)}
    centroids = load_kmeans(job.kmeans) if job.kmeans else None
    if any(job.speaker_column not in utterance.columns for utterance in utterances) and job.speaker_column != "speaker":
        raise ConfigError("speaker_column", job.speaker_column, "is no column of the transcripts.")
    copies = [(utterance, speed) for speed in job.perturb for utterance in utterances]
    rejected: list[dict[str, Any]] = []
    features: dict[tuple[str, float], np.ndarray] = {}
    speakers: dict[tuple[str, float], list[tuple[str, float]]] = defaultdict(list)
    with ThreadPoolExecutor() as pool:
        frames = pool.map(lambda copy: _features(copy[0], copy[1], job.settings), copies)
        for index, ((utterance, speed), result) in enumerate(progress(zip(copies, frames, strict=True), "features", len(copies))):
            if isinstance(result, str):
                rejected.append({"file": str(utterance.path), "index": index, "reason": result, "id": utterance.id})
                continue
            features[utterance.id, speed] = result
            speakers[utterance.columns.get(job.speaker_column, ""), speed].append((utterance.id, speed))
    if not features:
        raise DataError("input", str(job.input), f"holds no usable recording; the first one {rejected[0]['reason']}.")
    normalised: dict[tuple[str, float], np.ndarray] = {}
    for keys in speakers.values():
        statistics: SpeakerStatistics = speaker_statistics([features[key] for key in keys])
        normalised |= {key: statistics.apply(features[key]) for key in keys if key[0] in chosen}
    if not normalised:
        raise DataError("where", str(job.input), f"selects no usable recording; the first one set aside {rejected[0]['reason']}.")
    if centroids is None:
        centroids = fit_kmeans(np.concatenate(list(normalised.values())), job.fit_kmeans or 0, job.seed)
    elif centroids.shape[1] != next(iter(normalised.values())).shape[1]:
        raise DataError("kmeans", str(job.kmeans), f"was fitted on {centroids.shape[1]} features, the settings give another number.")
    records = []
    for utterance, speed in copies:
        if (utterance.id, speed) in normalised:
            units = assign(normalised[utterance.id, speed], centroids)
            records.append(_record(utterance, speed, units if job.keep_repeats else remove_repeats(units), len(units), job, name))
    manifest = manifest_of(job.settings, centroids, not job.keep_repeats)
    _write(job.output, records, rejected, manifest, centroids)
    seconds = sum(record["metadata"]["duration"] for record in records)
    return {"records": len(records), "rejected": len(rejected), "speakers": len(speakers), "hours": seconds / 3600.0}


def _check(job: UnitsJob) -> None:
    if (job.kmeans is None) == (job.fit_kmeans is None):
        raise ConfigError("kmeans", job.kmeans and str(job.kmeans), "or fit_kmeans, exactly one of them, says which units to use.")
    if job.fit_kmeans is not None and not 2 <= job.fit_kmeans <= N_UNITS:
        raise ConfigError("fit_kmeans", job.fit_kmeans, f"must lie in 2..{N_UNITS}.")
    if not job.perturb or any(not 0.5 <= speed <= 2.0 for speed in job.perturb) or len(set(job.perturb)) != len(job.perturb):
        raise ConfigError("perturb", list(job.perturb), "must hold different speeds between 0.5 and 2.")


def _features(utterance: Utterance, speed: float, settings: MfccSettings) -> np.ndarray | str:
    """Features, or the reason why there are none."""
    try:
        frames = mfcc(load_audio(utterance.path, settings.sample_rate, speed), settings)
    except DataError as error:
        return error.rule
    return frames if len(frames) else "is shorter than one frame"


def _record(utterance: Utterance, speed: float, units: np.ndarray, n_frames: int, job: UnitsJob, name: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        **utterance.columns,
        "dataset": name,
        "duration": round(n_frames / job.settings.rate_hz, 3),
        "unit_rate_hz": job.settings.rate_hz,
        "deduplicated": not job.keep_repeats,
    }
    if speed != 1.0:
        metadata["speed"] = speed
    return {
        "id": utterance.id if speed == 1.0 else f"{utterance.id}_sp{speed:g}",
        "instruction": ASR_INSTRUCTION,
        "input": units_to_text(units.tolist()),
        "output": utterance.text,
        "metadata": metadata,
    }


def _write(
    output: Path,
    records: Sequence[Mapping[str, Any]],
    rejected: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    centroids: np.ndarray,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl_gz(output / "records.jsonl.gz", records)
    np.save(output / "kmeans.npy", centroids)
    (output / "units.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    _write_rejected(output, rejected)


def write_jsonl_gz(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """JSON Lines, gzipped, in place in one move; the same records always give the same bytes. Returns their number."""
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    with temporary.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as sink:
        for record in records:
            sink.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    temporary.replace(path)
    return count


def prepare_tts(input_dir: Path, output_dir: Path, dataset: str, pattern: str = "*") -> dict[str, int]:
    """TTS records of a directory's ASR records, a file for each file, with the units manifest beside them. Records that are no good
    ASR records go to rejected.jsonl.

    Running it again gives the same files: the conversion's time stamp is the source file's.

    Raises:
        DataError: no record files, or one that is not JSON.
    """
    counts = {"records": 0, "rejected": 0, "files": 0}
    written: set[Path] = set()
    rejected: list[dict[str, Any]] = []
    root = input_dir if input_dir.is_dir() else input_dir.parent
    for entry in record_files(input_dir, pattern):
        path, relative = storage.local(entry.place), Path(entry.name)
        stamp = dt.datetime.fromtimestamp(int(path.stat().st_mtime), tz=dt.UTC)

        def converted(path: Path = path, stamp: dt.datetime = stamp) -> Iterable[dict[str, Any]]:
            for index, raw in read_raw(path):
                try:
                    if isinstance(raw, RecordError):
                        raise raw
                    if parse_record(raw).task != "asr":
                        raise RecordError("is no ASR record")
                except RecordError as error:
                    rejected.append({"file": str(path), "index": index, "reason": str(error)})
                else:
                    assert isinstance(raw, dict)
                    yield asr_to_tts(raw, dataset, stamp)

        target = output_dir / relative.parent / f"{relative.name.removesuffix('.gz').removesuffix('.jsonl').removesuffix('.json')}.jsonl.gz"
        if target in written:
            raise DataError("input_dir", str(path), f"would be written to {target}, which another file was written to.", "Rename one.")
        written.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        counts["records"] += write_jsonl_gz(target, converted())
        counts["files"] += 1
    if (root / "units.json").exists():
        shutil.copy(root / "units.json", output_dir / "units.json")
    _write_rejected(output_dir, rejected)
    counts["rejected"] = len(rejected)
    if counts["records"] == 0:
        raise DataError("input_dir", str(input_dir), f"holds no ASR record; {len(rejected)} others are in {output_dir / 'rejected.jsonl'}.")
    return counts


def _write_rejected(output: Path, rejected: Sequence[Mapping[str, Any]]) -> None:
    (output / "rejected.jsonl").unlink(missing_ok=True)
    if rejected:
        (output / "rejected.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rejected), encoding="utf-8")
