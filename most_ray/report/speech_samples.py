"""Players of speech with its spectrograms: what the model synthesised, beside the recordings' own units, through the run's vocoder; and the
recordings that were recognised worst."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from most_ray.errors import UserError
from most_ray.evaluation.hypotheses import SPOKEN, worst
from most_ray.io import storage
from most_ray.records.files import UNITS_MANIFEST, VOCODER
from most_ray.report.cells import Cell, Content, Player, Row
from most_ray.report.collect import Hypothesis, RunData, SpeechSample, read_file, units_in
from most_ray.report.run_tables import difference, run_names
from most_ray.speech.corpora.recordings import load_recording, recordings_folders, spectrogram_png

_LONGEST = 10.0  # seconds of a player
_IN_ALL = 60.0  # seconds of all players of a run's recordings
_RATE = 16_000  # Hz of recordings
Wave = tuple[np.ndarray, int, float]  # float samples, Hz, and the seconds of the whole utterance, which may be longer


@dataclass(frozen=True)
class Voice:
    """Samples of one run's speech: a row for each, or why they cannot be played."""

    run: Cell
    has_vocoder: bool
    rows: Sequence[Row] = ()
    reason: str = ""


def voices(runs: Sequence[RunData]) -> list[Voice]:
    """The voice of each run that synthesised speech.

    A run adds at most ten players of 10 s, 16-bit mono at the vocoder's rate, to the page: at most 4.3 MB at 16 kHz.
    """
    named = zip(runs, run_names(runs), strict=True)
    return [_voice(run, name, f", {run.name}" if len(runs) > 1 else "") for run, name in named if run.speech]


@dataclass(frozen=True)
class _Heard:
    """A record that was recognised with errors, of which there is sound."""

    set: str
    entry: Hypothesis
    wave: Wave
    note: str  # where the sound is from


def recordings(runs: Sequence[RunData], given: Path | None = None) -> list[Voice]:
    """The records of each run that were recognised worst, as far as they can be played: from their recordings where these are at hand, else
    from their units by the run's vocoder. Runs without any are left out.

    Args:
        given: folder of the recordings; None: where the records say.
    """
    found = []
    for run, name in zip(runs, run_names(runs), strict=True):
        suffix = f", {run.name}" if len(runs) > 1 else ""
        if rows := [_heard_row(heard, suffix) for heard in _heard(run, given)]:
            found.append(Voice(name, run.kit is not None, rows))
    return found


def _heard(run: RunData, given: Path | None) -> list[_Heard]:
    """At most ten records of a run, alternating between the sets, the worst of each first, and at most a minute of them."""
    chosen = _worst_recognised(run)
    waves: list[Wave | None] = []
    for name, entry in chosen:
        folders = recordings_folders(run.directories.get(name, "."), given) if given or name in run.directories else []
        loaded = load_recording(entry.id, entry.spoken, entry.metadata, folders, _RATE, _LONGEST)
        waves.append(loaded and (loaded[0], _RATE, loaded[1]))
    again = [entry.spoken.get("units") if wave is None else None for wave, (_, entry) in zip(waves, chosen, strict=True)]
    spoken = _resynthesise(run, [units_in(units) or () for units in again])
    heard, seconds = [], 0.0
    for (name, entry), recorded, made in zip(chosen, waves, spoken, strict=True):
        if (wave := recorded or made) is not None and seconds + len(wave[0]) / wave[1] <= _IN_ALL:
            heard.append(_Heard(name, entry, wave, "" if recorded else "resynthesised from its units"))
            seconds += len(wave[0]) / wave[1]
    return heard


def _worst_recognised(run: RunData) -> list[tuple[str, Hypothesis]]:
    """Records with errors, with their sets."""
    by_set = []
    for name in sorted(name for name in run.hypotheses if name.startswith("asr/")):
        rows = [
            {"entry": entry, "normalised_reference": " ".join(entry.reference), "normalised_hypothesis": " ".join(entry.hypothesis)}
            for entry in run.hypotheses[name]
        ]
        by_set.append([(name, row["entry"]) for row in worst(rows, SPOKEN)])
    turns = [each for turn in itertools.zip_longest(*by_set) for each in turn if each is not None]
    return turns[:SPOKEN]


def _resynthesise(run: RunData, utterances: Sequence[Sequence[int]]) -> list[Wave | None]:
    """The sound of units by the run's vocoder; None for those without units, or where the run has no vocoder that can be used."""
    if run.kit is None or not any(utterances):
        return [None] * len(utterances)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):  # the card of synthesised speech says what is wrong
        return _synthesise(run.kit, Path(folder), utterances)
    return [None] * len(utterances)


def _heard_row(heard: _Heard, suffix: str) -> Row:
    entry = heard.entry
    small = [Cell(small=heard.set.split("/", 1)[1]), *([Cell(small=heard.note)] if heard.note else [])]
    return [entry.id, *small], difference(entry), _player(heard.wave, f"recording of {entry.id}{suffix}")


def _voice(run: RunData, name: Cell, suffix: str) -> Voice:
    """`suffix` ends the players' labels."""
    if run.kit is None:
        return Voice(name, False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            waves = _synthesise(run.kit, Path(folder), [units for sample in run.speech for units in (sample.model, sample.reference)])
        except UserError as error:
            # The page names no folder of this machine, and is the same each time.
            return Voice(name, True, reason=str(error).replace(folder, "speech"))
    return Voice(name, True, [_row(*parts, suffix) for parts in zip(run.speech, waves[::2], waves[1::2], strict=True)])


def _synthesise(kit: str, folder: Path, utterances: Sequence[Sequence[int]]) -> list[Wave | None]:
    """The sound of each utterance, up to what a player holds, None where it has no units. `folder` is empty; the vocoder's files are copied
    there.

    Raises:
        DataError: the vocoder has no manifest, or does not know a unit.
        CheckpointError: the vocoder is damaged, or was trained for other units.
    """
    from most_ray.speech.units.assets import require_units_manifest  # seconds to import, and most pages have nothing to play
    from most_ray.speech.vocoder.spectrogram import RATE
    from most_ray.speech.vocoder.unit_vocoder import UnitVocoder
    from most_ray.speech.vocoder.vocoders import open_vocoder

    for name in (UNITS_MANIFEST, VOCODER):
        if (content := read_file(kit, name)) is not None:
            storage.write_bytes(folder / name, content)
    vocoder = open_vocoder(str(folder / VOCODER), require_units_manifest(folder)["identity"])
    assert isinstance(vocoder, UnitVocoder), "a file is one that `prepare vocoder` made"
    begun = [vocoder.beginning(units, _LONGEST) if units else None for units in utterances]
    return [each and (each[0], RATE, each[1]) for each in begun]


def _row(sample: SpeechSample, model: Wave | None, recording: Wave | None, suffix: str) -> Row:
    recognised = f"recognised: {sample.recognised if sample.recognised.strip() else 'nothing'}"
    players = [*_player(model, f"speech of {sample.id}, model{suffix}"), recognised]
    return [sample.text, Cell(small=sample.id)], players, _player(recording, f"speech of {sample.id}, recording's units{suffix}")


def _player(sound: Wave | None, label: str) -> list[Content]:
    """A player and how long it is."""
    if sound is None:
        return [Cell("no units", "none")]
    (wave, rate, seconds), file = sound, io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="PCM_16")
    about = f"{seconds:.2f} s" if round(seconds * rate) <= len(wave) else f"the first {_LONGEST:.0f} s of {seconds:.1f} s"
    picture = spectrogram_png(np.asarray(wave, np.float32), rate)
    audio, image = (base64.b64encode(content).decode() for content in (file.getvalue(), picture))
    return [Player(f"data:audio/wav;base64,{audio}", label, f"data:image/png;base64,{image}"), Cell(small=about)]
