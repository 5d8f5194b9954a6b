"""Players of synthesised speech, the model's and the recordings' own units, through the run's vocoder."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from most_ray.errors import UserError
from most_ray.io import storage
from most_ray.records.files import UNITS_MANIFEST, VOCODER
from most_ray.report.cells import Cell, Content, Player, Row
from most_ray.report.collect import RunData, SpeechSample, read_file
from most_ray.report.run_tables import run_names

_LONGEST = 10.0  # seconds of a player
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
    return [Player(f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}", label), Cell(small=about)]
