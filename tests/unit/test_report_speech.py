"""The report's players."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.errors import DataError
from most_ray.io import storage
from most_ray.report import write_report
from most_ray.report.collect import collect, parse_speech
from most_ray.report.page import page
from most_ray.speech.vocoder.vocoders import open_vocoder
from tests.support.report_data import SENTENCES, write_kit, write_run

EVIL = '</td><script>alert("1")</script><img src=x onerror=alert(2)>&"{{ 7 * 7 }}'


def spoken(folder: Path, lines: list[dict[str, Any]] | None = None, kit: bool = True) -> Path:
    """A run whose last evaluation synthesised."""
    write_run(folder, steps=8)
    if lines is not None:
        (folder / "hypotheses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if kit:
        write_kit(folder)
    return folder


def line(name: str, text: str, model: str = "0 1 2", reference: str = "3 4", **more: Any) -> dict[str, Any]:
    about = {"kind": "hypothesis", "task": "tts", "set": "tts/dev_tts", "id": name, "text": text, "recognised": f"{text} heard"}
    return {**about, "hypothesis": model, "reference": reference, **more}


class Players(HTMLParser):
    """The audio elements of a page by their labels, and the names of all its elements."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found: dict[str, dict[str, str | None]] = {}
        self.feed(made)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "audio":
            attributes = dict(attrs)
            self.found[str(attributes["aria-label"])] = attributes

    def wave(self, label: str) -> tuple[np.ndarray, int]:
        """int16 (samples,) and Hz."""
        head, content = str(self.found[label]["src"]).split(",")
        assert head == "data:audio/wav;base64"
        file = io.BytesIO(base64.b64decode(content))
        about = soundfile.info(file)
        assert (about.format, about.subtype, about.channels) == ("WAV", "PCM_16", 1)
        file.seek(0)
        return soundfile.read(file, dtype="int16")


def card(made: str) -> str:
    return made.split('id="speech"')[1].split("</section>")[0]


def test_five_utterances_are_played_from_both_sides(tmp_path: Path) -> None:
    run = spoken(tmp_path / "run")
    (data,) = collect([str(run)])
    made = page([data])
    players = Players(made)
    assert len(data.speech) == 5 and len({sample.text for sample in data.speech}) == 5
    assert list(players.found) == [f"speech of {sample.id}, {side}" for sample in data.speech for side in ("model", "recording's units")]
    for attributes in players.found.values():
        assert "controls" in attributes and attributes["preload"] in ("none", "metadata")
    (wanted, _), rate = open_vocoder(str(run / "speech"), None)([data.speech[0].model, data.speech[0].reference])
    wave, found = players.wave(f"speech of {data.speech[0].id}, model")
    assert found == rate and np.abs(wave / 32768 - wanted).max() < 1e-4 and wave.any()
    shown = card(made)
    assert shown.count("0.04 s") == 5 and shown.count("0.06 s") == 5  # two units, and three, of 20 ms
    assert all(sample.text in shown and f"recognised: {sample.recognised}" in shown for sample in data.speech)


def test_the_policy_lets_in_what_the_page_holds_and_nothing_else(tmp_path: Path) -> None:
    made = page(collect([str(spoken(tmp_path / "run"))]))
    policy = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', made)[0]
    assert policy.startswith("default-src 'none'; ") and "; media-src data:; " in policy
    assert all(str(player["src"]).startswith("data:audio/wav;base64,") for player in Players(made).found.values())


@pytest.mark.parametrize("damaged", [False, True])
def test_the_same_run_gives_the_same_bytes_wherever_it_lies(tmp_path: Path, damaged: bool) -> None:
    run = spoken(tmp_path / "a" / "run")
    if damaged:
        (run / "speech" / "vocoder.safetensors").write_bytes(b"nothing of the kind")
    shutil.copytree(run, tmp_path / "b" / "run")
    once, again, elsewhere = (page(collect([str(tmp_path / name / "run")])) for name in "aab")
    assert once == again == elsewhere
    assert str(tmp_path) not in card(once)


def test_sets_take_turns_and_a_text_is_said_once() -> None:
    digits = ("zero", "one", "two")
    lines = [line(f"{name}-{text}-{take}", text, set=f"tts/{name}") for name in "ba" for text in digits for take in range(3)]
    assert [sample.id for sample in parse_speech(lines)] == ["a-zero-0", "b-one-0", "a-two-0"]
    many = lines + [line(f"c-{text}", text, set="tts/c") for text in SENTENCES]
    wanted = ["a-zero-0", "b-one-0", f"c-{SENTENCES[0]}", "a-two-0", f"c-{SENTENCES[1]}"]
    assert [sample.id for sample in parse_speech(many)] == wanted == [sample.id for sample in parse_speech(many)]


def test_what_holds_no_units_is_no_utterance() -> None:
    others = [
        line("empty", "a", "", ""),
        line("words", "b", "one two"),
        line("long", "c", "1" * 5000),
        line("recognition", "d", task="asr"),
        {"kind": "hypothesis", "task": "tts", "set": "tts/x", "id": "sample", "hypothesis": "1", "reference": "2"},
    ]
    assert parse_speech(others) == []
    assert [(s.model, s.reference) for s in parse_speech([line("x", "e", "[Hu7][Hu90]", "")])] == [((7, 90), ())]


def test_players_end_after_ten_seconds_and_say_so(tmp_path: Path) -> None:
    run = spoken(tmp_path / "run", [line("long", "a", " ".join(["0 1 2 3"] * 150)), line("fits", "b", " ".join(["0 1"] * 250))])
    made = page(collect([str(run)]))
    players = Players(made)
    for name in ("long", "fits"):
        wave, rate = players.wave(f"speech of {name}, model")
        assert len(wave) == 10 * rate
    assert "the first 10 s of 12.0 s" in made and "10.00 s" in made and made.count("the first 10 s") == 1


def test_speech_without_a_unit_has_no_player(tmp_path: Path) -> None:
    made = page(collect([str(spoken(tmp_path / "run", [line("mute", "a", "", "1 2", recognised="")]))]))
    assert list(Players(made).found) == ["speech of mute, recording's units"]
    assert "no units" in card(made) and "recognised: nothing" in card(made)


def test_without_a_vocoder_a_note_says_how_to_get_one(tmp_path: Path) -> None:
    made = page(collect([str(spoken(tmp_path / "run", kit=False))]))
    assert "most-ray prepare vocoder" in made and 'id="speech"' not in made and "<audio" not in made


@pytest.mark.parametrize("kit", [False, True])
def test_a_run_that_said_nothing_has_neither_card_nor_note(tmp_path: Path, kit: bool) -> None:
    run = spoken(tmp_path / "run", [line("words", "a", "some words")], kit)
    made = page(collect([str(run)]))
    assert 'id="speech"' not in made and "most-ray prepare vocoder" not in made


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda kit: (kit / "vocoder.safetensors").write_bytes(b"cut"), "vocoder.safetensors.*cannot be read as a vocoder"),
        (lambda kit: (kit / "units.json").unlink(), "holds no units.json"),
        (lambda kit: (kit / "units.json").write_text("["), "is not a units manifest"),
        (lambda kit: change_units(kit, kmeans="other"), "speaks the units .*abc.*, not .*other"),
        (lambda kit: change_hypothesis(kit.parent, "1 6"), "units = 6: is not a unit of this vocoder"),
    ],
    ids=["vocoder", "no manifest", "manifest", "other units", "unknown unit"],
)
def test_what_cannot_be_played_is_a_note_with_the_reason(tmp_path: Path, damage: Any, reason: str) -> None:
    """The rest of the page is as ever, and names no folder of this machine."""
    run = spoken(tmp_path / "run")
    damage(run / "speech")
    made = page(collect([str(run)]))
    assert re.search(f"Its speech cannot be played: .*{reason}", card(made))
    assert "<audio" not in made and 'id="samples"' in made and tempfile.gettempdir() not in card(made)


def change_units(kit: Path, **changes: Any) -> None:
    manifest = json.loads((kit / "units.json").read_text())
    manifest["identity"] |= changes
    (kit / "units.json").write_text(json.dumps(manifest))


def change_hypothesis(run: Path, units: str) -> None:
    content = (run / "hypotheses.jsonl").read_text()
    (run / "hypotheses.jsonl").write_text(content.replace('"hypothesis": "1 3"', f'"hypothesis": "{units}"'))


def test_texts_and_names_never_become_markup(tmp_path: Path) -> None:
    run = spoken(tmp_path / 'run "<i>', [line(EVIL, EVIL, recognised=EVIL), line("b", "b")])
    plain = spoken(tmp_path / "plain", [line("a", "a"), line("b", "b")])
    for others in ([], [str(plain)]):
        players = Players(page(collect([str(run), *others])))
        # A spectrogram beside each player, and no picture of anybody else's.
        assert players.tags.count("img") == players.tags.count("audio") == 4 + 4 * len(others)
        assert any(label.startswith(f"speech of {EVIL}, model") for label in players.found)


def test_several_runs_speak_beside_each_other(tmp_path: Path) -> None:
    """Each through its own vocoder, or with its own note, under labels that tell them apart."""
    lines = [line("x", "a")]
    good, other = (spoken(tmp_path / name, lines) for name in ("good", "other"))
    mute, damaged = spoken(tmp_path / "mute", lines, kit=False), spoken(tmp_path / "damaged", lines)
    (damaged / "speech" / "vocoder.safetensors").write_bytes(b"")
    made = page(collect([str(uri) for uri in (good, mute, damaged, other)]))
    sides = ("model", "recording's units")
    assert list(Players(made).found) == [f"speech of x, {side}, {run}" for run in ("good", "other") for side in sides]
    assert made.count('id="speech"') == 1
    assert card(made).count("most-ray prepare vocoder</code>") == 1 and card(made).count("cannot be read as a vocoder") == 1
    notes = page(collect([str(mute), str(mute)]))
    assert notes.count("most-ray prepare vocoder</code>") == 2 and 'id="speech"' not in notes


def test_a_kit_behind_a_uri_is_read_through_storage(tmp_path: Path) -> None:
    run, uri = spoken(tmp_path / "run", [line("x", "a")]), f"memory://{tmp_path.name}-speech/run"
    for path in (path for path in run.rglob("*") if path.is_file()):
        storage.write_bytes(storage.join(uri, path.relative_to(run).as_posix()), path.read_bytes())
    assert page(collect([uri])) == page(collect([str(run)]))


# The recordings that were recognised worst.


def recognised(name: str, said: str, heard: str, set_: str = "asr/dev", **spoken: Any) -> dict[str, Any]:
    about = {"kind": "hypothesis", "task": "asr", "set": set_, "id": name, "reference": said, "hypothesis": heard}
    return {**about, "spoken": {"units": "0 1 2", **spoken}}


def with_recordings(folder: Path, lines: list[dict[str, Any]], records: Path, kit: bool = True) -> Path:
    """A run whose last evaluation recognised the records in a directory."""
    head = {"kind": "settings", "format": 1, "settings": {"directories": {"asr/dev": str(records)}}}
    return spoken(folder, [head, *lines], kit)


def save(path: Path, seconds: float, hertz: float = 440.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 8000)) / 8000), 8000)


def test_the_worst_recordings_are_played_from_their_files(tmp_path: Path) -> None:
    """Mono, 16 kHz, 16 bits; what is right is not shown, and what has no file is made of its units, and says so."""
    records = tmp_path / "records"
    save(records / "recordings" / "a.wav", 0.5)
    lines = [recognised("a", "x y", "x z"), recognised("b", "x y", "w z", recording="b.wav"), recognised("c", "x y", "x y")]
    made = page(collect([str(with_recordings(tmp_path / "run", lines, records))]))
    players = Players(made)
    assert list(players.found) == ["recording of b", "recording of a"]  # the worst first
    wave, rate = players.wave("recording of a")
    assert (len(wave), rate) == (8000, 16_000) and abs(int(wave.max()) - 0.3 * 32767) < 200
    card_ = made.split('id="recordings"')[1].split("</section>")[0]
    assert card_.count("resynthesised from its units") == 1 and card_.count("<img ") == 2


def test_a_folder_that_is_named_comes_before_where_the_records_say(tmp_path: Path) -> None:
    save(tmp_path / "records" / "a.wav", 0.5)
    save(tmp_path / "given" / "a.wav", 0.25)
    run = with_recordings(tmp_path / "run", [recognised("a", "x", "y", recording="a.wav")], tmp_path / "records", kit=False)
    (data,) = collect([str(run)])
    seconds = [len(Players(page([data], given)).wave("recording of a")[0]) / 16_000 for given in (None, tmp_path / "given")]
    assert seconds == [0.5, 0.25]


def test_without_recordings_and_vocoder_nothing_is_shown(tmp_path: Path) -> None:
    made = page(collect([str(with_recordings(tmp_path / "run", [recognised("a", "x", "y")], tmp_path / "none", kit=False))]))
    assert "<audio" not in made and 'id="recordings"' not in made


def test_records_of_earlier_versions_are_played_where_a_folder_is_named(tmp_path: Path) -> None:
    """Their rows say nothing of units and recordings, but their ids name the files."""
    save(tmp_path / "given" / "a.wav", 0.25)
    line_ = {key: value for key, value in recognised("a", "x", "y").items() if key != "spoken"}
    (data,) = collect([str(spoken(tmp_path / "run", [line_], kit=False))])
    assert "<audio" not in page([data])
    assert list(Players(page([data], tmp_path / "given")).found) == ["recording of a"]


def test_at_most_ten_recordings_and_a_minute_sets_by_turns(tmp_path: Path) -> None:
    long = " ".join(["0 1 2 3"] * 150)  # 12 s
    lines = [recognised(f"{name}{index}", f"x{index}", "y", f"asr/{name}", units=long) for name in "ab" for index in range(8)]
    players = Players(page(collect([str(spoken(tmp_path / "run", lines))])))
    assert list(players.found) == [f"recording of {name}{index}" for index in range(3) for name in "ab"]  # six of 10 s
    short = [recognised(f"{name}{index}", f"x{index}", "y", f"asr/{name}") for name in "ab" for index in range(8)]
    assert len(Players(page(collect([str(spoken(tmp_path / "short", short))]))).found) == 10


def test_units_that_the_vocoder_does_not_know_are_not_played(tmp_path: Path) -> None:
    made = page(collect([str(spoken(tmp_path / "run", [recognised("a", "x", "y", units="7"), recognised("b", "x", "z", units="x")]))]))
    assert "<audio" not in made


def test_a_folder_of_recordings_that_is_none_is_refused(tmp_path: Path) -> None:
    run = spoken(tmp_path / "run")
    with pytest.raises(DataError, match=r"audio = .*is no folder"):
        write_report([str(run)], tmp_path / "report.html", tmp_path / "nowhere")
    assert not (tmp_path / "report.html").exists()
