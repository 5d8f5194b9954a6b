"""`most-ray prepare vocoder`: a vocoder for a folder of records, learned from the recordings that they came from."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from most_ray.errors import CheckpointError, ConfigError, DataError, nearest
from most_ray.records.files import VOCODER
from most_ray.speech.corpora.audio import MAX_SECONDS, load_audio
from most_ray.speech.corpora.corpus import Condition, CorpusOptions, Utterance, check_conditions, matches_all, read_corpus
from most_ray.speech.units.assets import SpeechAssets, open_assets
from most_ray.speech.units.clustering import SpeakerStatistics, assign
from most_ray.speech.units.corpus_parts import json_digest
from most_ray.speech.vocoder.unit_vocoder import Example, UnitVocoder, VocoderSettings, fit_vocoder

_RATE = 16000  # Hz, of what a vocoder hears
_MOST = 20_000  # recordings to draw from
_OF_EACH = 12
_FEWEST_STEPS = 60


def prepare_vocoder(
    corpus: CorpusOptions,
    records: Path,
    conditions: Sequence[Condition],
    speaker_column: str,
    settings: VocoderSettings,
    progress: Callable[[Iterable[Any], str, int], Iterable[Any]],
    max_seconds: float = MAX_SECONDS,
    encoder: str | None = None,
) -> dict[str, Any]:
    """Write vocoder.safetensors to the folder `records` of `prepare units`, whose units it will speak. Which recordings it hears, of a
    large corpus, is drawn by speaker and seed: a dozen of each speaker's, for one alone does not tell what the speaker sounds like. Those
    that cannot be read are passed over.

    Returns:
        recordings and seconds that were heard, and the speaker whose voice it has; unchanged, where it was there already.

    Raises:
        DataError: the folder has no units, or the corpus no recording that can be used.
    """
    kit = open_assets(records, encoder)
    if kit.extractor.sample_rate != _RATE:
        raise DataError("features", kit.extractor.sample_rate, f"Hz: a vocoder is fitted to units of {_RATE} Hz.")
    drawn = _draw(corpus, conditions, speaker_column, settings.seed)
    stamps = ((each.id, each.start, each.duration, each.path.stat().st_size, each.path.stat().st_mtime_ns) for each in drawn)
    made_of = json_digest(list(stamps), asdict(settings), speaker_column, max_seconds)
    known = _known(records / VOCODER)
    if known and known.made_of == made_of and known.units == kit.manifest["identity"]:
        return {"voice": known.voice, "unchanged": True}
    heard = list(progress(_hear(drawn, kit, speaker_column, settings.max_seconds, max_seconds), "recordings", len(drawn)))
    if not heard:
        raise DataError("input", str(corpus.directory), "holds no recording that can be used.", "See rejected.jsonl of the records.")
    seconds = sum(len(wave) for wave, _, _ in heard) / _RATE
    # Little speech is learned by heart in fewer steps.
    settings = replace(settings, steps=min(settings.steps, max(_FEWEST_STEPS, round(seconds))))
    examples = _examples(heard, kit)
    identity = kit.manifest["identity"]
    vocoder = fit_vocoder(examples, identity["n_units"], identity["rate_hz"], identity, identity["repeats_removed"], settings, made_of)
    vocoder.save(records / VOCODER)
    return {"recordings": len(heard), "seconds": seconds, "voice": vocoder.voice}


def _known(path: Path) -> UnitVocoder | None:
    """An earlier command's vocoder, where it is there and can be read."""
    try:
        return UnitVocoder.load(path)
    except CheckpointError:
        return None  # it is made anew


def _draw(corpus: CorpusOptions, conditions: Sequence[Condition], column: str, seed: int) -> list[Utterance]:
    """Utterances in a random order of speakers, a dozen of each and then the others; the same for the same corpus and seed."""
    columns: set[str] = set()

    def keyed() -> Iterator[tuple[str, str, Utterance]]:
        for entry in read_corpus(corpus):
            if isinstance(entry, Utterance):
                columns.update(entry.columns)
                if matches_all(entry, conditions):
                    yield json_digest(seed, str(entry.columns.get(column, ""))), json_digest(seed, entry.id), entry

    lowest = heapq.nsmallest(_MOST, keyed(), key=lambda each: (each[0], each[1], each[2].id))
    check_conditions(conditions, columns)
    if column != "speaker" and column not in columns:
        raise ConfigError("speaker_column", column, "is no column of the corpus.", nearest(column, columns))
    first: list[Utterance] = []
    others: list[Utterance] = []
    for _, group in itertools.groupby(lowest, key=lambda each: each[0]):
        for number, (_, _, utterance) in enumerate(group):
            (first if number < _OF_EACH else others).append(utterance)
    return first + others


def _hear(
    utterances: Sequence[Utterance], kit: SpeechAssets, column: str, total_seconds: float, max_seconds: float
) -> Iterator[tuple[np.ndarray, str, Any]]:
    """Samples, speaker and frames of each, until there is enough speech."""
    seconds = 0.0
    for utterance in utterances:
        if seconds >= total_seconds:
            return
        try:
            wave = load_audio(utterance.path, _RATE, 1.0, utterance.start, utterance.duration, max_seconds)
        except DataError:
            continue  # `prepare units` has said why
        frames = kit.extractor([wave])[0]
        if len(frames.values):
            seconds += len(wave) / _RATE
            yield wave, str(utterance.columns.get(column, "")), frames


def _examples(heard: Sequence[tuple[np.ndarray, str, Any]], kit: SpeechAssets) -> Iterator[Example]:
    """Each recording with its units, normalised as its speaker's where the features are."""
    known: dict[str, SpeakerStatistics] = {}
    if kit.extractor.per_speaker:
        frames_of: dict[str, list[np.ndarray]] = defaultdict(list)
        for _, speaker, frames in heard:
            frames_of[speaker].append(frames.values)
        known = {speaker: SpeakerStatistics.from_frames(np.concatenate(frames)) for speaker, frames in frames_of.items()}
    for wave, speaker, frames in heard:
        values = known[speaker].normalise(frames.values) if known else frames.values
        yield Example(assign(values, kit.centroids), wave, frames.first, speaker)
