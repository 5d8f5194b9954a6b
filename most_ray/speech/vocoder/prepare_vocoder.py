"""`most-ray prepare vocoder`: fits a vocoder for the units of a folder of records to the recordings that they were made from."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import CheckpointError, DataError
from most_ray.io.outputs import check_file
from most_ray.records.files import VOCODER
from most_ray.speech.corpora import corpus as corpora
from most_ray.speech.corpora.audio import MAX_SECONDS, load_audio
from most_ray.speech.corpora.corpus import Condition, CorpusOptions, Utterance
from most_ray.speech.units.assets import SpeechAssets, open_assets
from most_ray.speech.units.clustering import SpeakerStatistics, assign
from most_ray.speech.units.corpus_parts import Progress, file_stamp, json_digest
from most_ray.speech.units.features import Frames
from most_ray.speech.vocoder.fit import Example, VocoderSettings, fit_vocoder
from most_ray.speech.vocoder.spectrogram import RATE
from most_ray.speech.vocoder.unit_vocoder import VOCODER_FILE, UnitVocoder

_MOST_DRAWN = 20_000  # recordings
_OF_EACH_SPEAKER = 12  # recordings that come before all further ones
_FEWEST_STEPS = 60


@dataclass(frozen=True)
class _Recording:
    wave: np.ndarray  # float32 (samples,) at 16 kHz
    speaker: str
    frames: Frames


def prepare_vocoder(
    corpus: CorpusOptions,
    records: Path,
    conditions: Sequence[Condition],
    speaker_column: str,
    settings: VocoderSettings,
    progress: Progress,
    max_seconds: float = MAX_SECONDS,
    encoder: str | None = None,
) -> dict[str, Any]:
    """Write vocoder.safetensors to a folder that `prepare units` made.

    The recordings of a large corpus are drawn by speaker and seed: twelve of each speaker first, because a single one does not represent a
    speaker's voice. Recordings that cannot be read are skipped.

    Args:
        corpus, records: the recordings that the records were made from; the folder.
        conditions, max_seconds: the utterances to use; longer ones are skipped.
        progress: wraps the recordings to show how far the work is.
        encoder: folder or name on the hub of the units' speech encoder; None: the one that the units manifest names.

    Returns:
        recordings and seconds that were used, and the voice's speaker; `unchanged` if such a vocoder existed already.

    Raises:
        ConfigError: a condition or the speaker's column is unknown.
        DataError: the folder has no units, or the corpus no recording that can be used.
    """
    assets = open_assets(records, encoder)
    check_file("records", records / VOCODER, VOCODER_FILE)
    if assets.extractor.sample_rate != RATE:
        raise DataError("features", assets.extractor.sample_rate, f"Hz: a vocoder is fitted to units of {RATE} Hz.")
    drawn = _draw(corpus, conditions, speaker_column, settings.seed)
    stamps = [(each.id, each.start, each.duration, *(file_stamp(each.path) or (0, 0))) for each in drawn]
    channels = {each.id: each.channel for each in drawn if each.channel is not None}
    made_of = json_digest(stamps, asdict(settings), speaker_column, max_seconds, *([channels] if channels else []))
    identity = assets.manifest["identity"]
    known = None
    with contextlib.suppress(CheckpointError):  # one that cannot be read is replaced
        known = UnitVocoder.load(records / VOCODER)
    if known and known.made_of == made_of and known.units == identity:
        return {"voice": known.voice, "unchanged": True}
    recordings = list(progress(_read(drawn, assets, speaker_column, settings.max_seconds, max_seconds), "recordings", len(drawn)))
    if not recordings:
        raise DataError("input", str(corpus.directory), "holds no recording that can be used.", "See rejected.jsonl of the records.")
    seconds = sum(len(each.wave) for each in recordings) / RATE
    # Little speech needs few steps.
    settings = replace(settings, steps=min(settings.steps, max(_FEWEST_STEPS, round(seconds))))
    examples = _examples(recordings, assets)
    vocoder = fit_vocoder(examples, identity["n_units"], identity["rate_hz"], identity, identity["repeats_removed"], settings, made_of)
    vocoder.save(records / VOCODER)
    return {"recordings": len(recordings), "seconds": seconds, "voice": vocoder.voice}


def _draw(corpus: CorpusOptions, conditions: Sequence[Condition], column: str, seed: int) -> list[Utterance]:
    """Utterances in a random order of speakers, twelve of each and then the others; equal for equal corpora and seeds."""
    columns: set[str] = set()

    def keyed() -> Iterator[tuple[str, str, Utterance]]:
        for entry in corpora.read_corpus(corpus):
            if isinstance(entry, Utterance):
                columns.update(entry.columns)
                if corpora.matches_all(entry, conditions):
                    yield json_digest(seed, str(entry.columns.get(column, ""))), json_digest(seed, entry.id), entry

    lowest = heapq.nsmallest(_MOST_DRAWN, keyed(), key=lambda each: (each[0], each[1], each[2].id))
    corpora.check_conditions(conditions, columns)
    corpora.check_speaker_column(column, columns)
    groups = (enumerate(group) for _, group in itertools.groupby(lowest, key=lambda each: each[0]))
    numbered = [(number >= _OF_EACH_SPEAKER, utterance) for group in groups for number, (_, _, utterance) in group]
    return [utterance for _, utterance in sorted(numbered, key=lambda each: each[0])]


def _read(
    utterances: Sequence[Utterance], assets: SpeechAssets, column: str, total_seconds: float, max_seconds: float
) -> Iterator[_Recording]:
    """Yield recordings with their frames until there are `total_seconds` of speech."""
    seconds = 0.0
    for utterance in utterances:
        if seconds >= total_seconds:
            return
        try:
            part = (utterance.start, utterance.duration, max_seconds, utterance.channel, utterance.length)
            wave = load_audio(utterance.path, RATE, 1.0, *part)
        except DataError:
            continue  # rejected.jsonl of the records has the reason
        frames = assets.extractor([wave])[0]
        if len(frames.values) and np.isfinite(frames.values).all():
            seconds += len(wave) / RATE
            yield _Recording(wave, str(utterance.columns.get(column, "")), frames)


def _examples(recordings: Sequence[_Recording], assets: SpeechAssets) -> Iterator[Example]:
    """Yield each recording with its units; if features are normalised per speaker, by its speaker's recordings among these."""
    frames_of: dict[str, list[np.ndarray]] = defaultdict(list)
    for each in recordings if assets.extractor.per_speaker else ():
        frames_of[each.speaker].append(each.frames.values)
    known = {speaker: SpeakerStatistics.from_frames(np.concatenate(frames)) for speaker, frames in frames_of.items()}
    for each in recordings:
        values = known[each.speaker].normalise(each.frames.values) if known else each.frames.values
        yield Example(assign(values, assets.centroids), each.wave, each.frames.first, each.speaker)
