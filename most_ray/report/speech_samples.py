"""The page's players: what a model says, and the recordings' own units, through the run's vocoder."""

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
from most_ray.report.collect import RunData, SpeechSample
from most_ray.report.run_tables import run_names, table, text

_LONGEST = 10.0  # seconds of a player
_LEGEND = (
    '<p class="note">Both sides are units through the same vocoder, so what differs between them is the model\'s part; '
    "“heard” is what the model recognises in its own speech.</p>"
)
_NO_VOCODER = (
    "Its speech cannot be heard: the run's folder holds no speech/vocoder.safetensors. <code>most-ray prepare vocoder</code> makes one: "
    "for the training records (runs that start from them carry it), or for this run, with <code>--records</code> naming its folder speech/."
)


@dataclass(frozen=True)
class _Player:
    """An audio element's content, and how many seconds of how many it holds."""

    uri: str
    held: float
    whole: float


def speech(runs: Sequence[RunData]) -> str:
    """Players of the runs' samples of speech, as markup: a card where some run has a vocoder, else a note for each run that spoke
    without one, and nothing where no run spoke.

    A run adds ten players of at most 10 s, 16-bit mono at the vocoder's rate, to the page: 4.3 MB at most at 16 kHz. A vocoder that
    cannot be used is a note, too.
    """
    if not any(run.kit for run in runs):
        lacking = [name for name, run in zip(run_names(runs), runs, strict=True) if run.speech]
        return "".join(f'<p class="note">{f"{name}: " if len(runs) > 1 else ""}{_NO_VOCODER}</p>' for name in lacking)
    blocks = [
        f"<div>{f'<h4>{name}</h4>' if len(runs) > 1 else ''}{_block(run, f', {run.name}' if len(runs) > 1 else '')}</div>"
        for name, run in zip(run_names(runs), runs, strict=True)
        if run.speech
    ]
    inner = f'<div class="{"halves" if len(runs) > 1 else ""}">{"".join(blocks)}</div>'
    return f'<div class="card" id="speech"><h3>Speech, last evaluation</h3>{_LEGEND}{inner}</div>'


def _block(run: RunData, suffix: str) -> str:
    """A run's utterances, or why they cannot be heard; `suffix` ends the players' labels."""
    if run.kit is None:
        return f'<p class="note">{_NO_VOCODER}</p>'
    with tempfile.TemporaryDirectory() as folder:
        try:
            players = _players(run.kit, Path(folder), [units for sample in run.speech for units in (sample.model, sample.reference)])
        except UserError as error:
            reason = str(error).replace(folder, "speech")  # the page names no machine's folders, and is the same each time
            return f'<p class="note">Its speech cannot be heard: {text(reason)}</p>'
    rows = [_row(sample, said, recorded, suffix) for sample, said, recorded in zip(run.speech, players[::2], players[1::2], strict=True)]
    return table(("text", "model", "recording's units"), rows, "speech")


def _row(sample: SpeechSample, said: _Player | None, recorded: _Player | None, suffix: str) -> tuple[str, str, str]:
    title = f'{text(sample.text)}<br><span class="counts">{text(sample.id)}</span>'
    heard = f"heard: {text(sample.recognised)}" if sample.recognised.strip() else "heard: nothing"
    label = f"speech of {sample.id}"
    return title, f"{_audio(said, f'{label}, model{suffix}')}<br>{heard}", _audio(recorded, f"{label}, recording's units{suffix}")


def _audio(player: _Player | None, label: str) -> str:
    if player is None:
        return '<i class="none">no units</i>'
    seconds = f"{player.whole:.2f} s" if player.held == player.whole else f"the first {player.held:.0f} s of {player.whole:.1f} s"
    audio = f'<audio controls preload="metadata" aria-label="{text(label)}" src="{player.uri}"></audio>'
    return f'{audio}<br><span class="counts">{seconds}</span>'


def _players(kit: str, folder: Path, utterances: Sequence[Sequence[int]]) -> list[_Player | None]:
    """A player of each utterance, None of one without units. `folder` is empty: the kit's files are brought there from their place.

    Raises:
        DataError: the kit has no manifest, or the vocoder does not know a unit. CheckpointError: the vocoder is damaged, or of other units.
    """
    from most_ray.speech.units.assets import read_units_manifest  # seconds to import, and most pages have nothing to play
    from most_ray.speech.vocoder.unit_vocoder import open_vocoder

    for name in (UNITS_MANIFEST, VOCODER):
        if storage.exists(storage.join(kit, name)):
            storage.write_bytes(folder / name, storage.read_bytes(storage.join(kit, name)))
    identity = read_units_manifest(folder)["identity"]
    waves, rate = open_vocoder(str(folder / VOCODER), identity)(utterances)
    return [_player(wave, rate) if units else None for units, wave in zip(utterances, waves, strict=True)]


def _player(wave: np.ndarray, rate: int) -> _Player:
    held, file = wave[: round(_LONGEST * rate)], io.BytesIO()
    soundfile.write(file, held, rate, format="WAV", subtype="PCM_16")
    return _Player(f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}", len(held) / rate, len(wave) / rate)
