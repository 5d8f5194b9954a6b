"""Recordings, tables and cuts that are damaged, hostile or easily misread, through `prepare units`: each costs itself, with its reason, and
no text is ever kept with audio that is not its own."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.bad_inputs.harness import Case, Outcome
from tests.bad_inputs.inputs import DIGITS, base

Setup = Callable[[Path], object]
Check = Callable[[Path, Outcome], None]
RATE = 16000


def wave(seconds: float, pitch: float = 300.0) -> np.ndarray:
    """A tone with noise, float32 (samples,)."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(round(pitch)).standard_normal(len(time))
    return (0.3 * np.sin(2 * np.pi * pitch * time * (1 + 0.2 * time)) + 0.02 * noise).astype(np.float32)


def encoded(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    with io.BytesIO() as sink:
        soundfile.write(sink, samples, rate, format=form, subtype=subtype)
        return sink.getvalue()


def good(folder: Path, count: int = 3, texts: bool = True) -> None:
    """g0.wav, g1.wav, ... of 0.5, 0.6, ... seconds, each with its text beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        soundfile.write(folder / f"g{index}.wav", wave(0.5 + 0.1 * index, 200 + 90 * index), RATE)
        if texts:
            (folder / f"g{index}.txt").write_text(f"good {index}")


def units(setup: Setup, *flags: str, layout: str = "folder", source: str = "c") -> Callable[[Path], Sequence[str]]:
    """Makes `prepare units` of the corpus that `setup` puts into the folder `c`."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c").mkdir()
        setup(folder / "c")
        words = ["prepare", "units", "--corpus", layout, "--input", source, "--output", "o", "--num_actors", "0", "--form", "jsonl"]
        return [*words, "--kmeans", str(DIGITS / "train_asr" / "kmeans.npy"), *flags]  # which takes less time than to fit some

    return make


def beside(name: str, content: bytes | Callable[[Path], object], text: str = "seven") -> Setup:
    """Good recordings, and one that is not, with a text beside it."""

    def setup(folder: Path) -> None:
        good(folder)
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
        path.with_suffix(".txt").write_text(text)

    return setup


def transcribe(name: str, content: bytes | Callable[[Path], object]) -> Callable[[Path], Sequence[str]]:
    """Makes `transcribe` of a recording."""

    def make(folder: Path) -> Sequence[str]:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
        return ["transcribe", "--model", str(base() / "model"), "--speech", str(base() / "train_asr"), name]

    return make


def kmeans(setup: Setup) -> Callable[[Path], Sequence[str]]:
    """Makes `prepare kmeans` of a corpus."""

    def make(folder: Path) -> Sequence[str]:
        (folder / "c").mkdir()
        setup(folder / "c")
        return ["prepare", "kmeans", "--input", "c", "--output", "k.npy", "--k", "2", "--num_actors", "0"]

    return make


def table(text: str | bytes, name: str = "transcripts.tsv") -> Setup:
    """Three good recordings and a table."""

    def setup(folder: Path) -> None:
        good(folder, texts=False)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))

    return setup


def json_table(*rows: Mapping[str, Any] | str, name: str = "transcripts.jsonl") -> Setup:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return table("".join(f"{line}\n" for line in lines), name)


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "o" / "records.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def keeps(texts: Sequence[str] | None, *reasons: str, seconds: Mapping[str, float] | None = None) -> Check:
    """The texts of the records (None: the three good ones), a reason for each rejected entry, in order, and how long some records are."""

    def check(folder: Path, outcome: Outcome) -> None:
        found = {record["output"]: record["metadata"]["duration"] for record in records(folder)}
        assert list(found) == (["good 0", "good 1", "good 2"] if texts is None else list(texts)), list(found)
        assert len({record["id"] for record in records(folder)}) == len(records(folder))
        path = folder / "o" / "rejected.jsonl"
        rejected = [json.loads(line)["reason"] for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        assert len(rejected) == len(reasons), rejected
        for reason, pattern in zip(rejected, reasons, strict=True):
            assert re.search(pattern, reason), reason
            assert "\n" not in reason and len(reason) < 500
        for text, length in (seconds or {}).items():
            assert abs(found[text] - length) < 0.02, found

    return check


def told(name: str, setup: Setup, check: Check, *flags: str, says: str = "", layout: str = "folder", source: str = "c") -> Case:
    """A corpus of which the good part becomes records."""
    return Case(name, units(setup, *flags, layout=layout, source=source), says, 0, may_change=("o", "o/*"), check=check)


def refused(name: str, setup: Setup, says: str, *flags: str, layout: str = "folder") -> Case:
    """A corpus that gives an error; what was rejected may be listed."""
    return Case(name, units(setup, *flags, layout=layout), says, may_change=("o", "o/rejected.jsonl", "o/.work*"))


def wav(samples: bytes, announced: int | None = None, rate: int = RATE, channels: int = 1, form: int = 1, bits: int = 16) -> bytes:
    """A WAV whose header says what it is told to."""
    size = len(samples) if announced is None else announced
    width = channels * bits // 8
    form_chunk = struct.pack("<IHHIIHH", 16, form, channels, rate, rate * width & 0xFFFFFFFF, width & 0xFFFF, bits)
    return b"RIFF" + struct.pack("<I", (36 + size) & 0xFFFFFFFF) + b"WAVEfmt " + form_chunk + b"data" + struct.pack("<I", size) + samples


PCM = (wave(1.0) * 32767).astype("<i2").tobytes()
WAV, FLAC, OGG, MP3 = (encoded(wave(1.0), form) for form in ("WAV", "FLAC", "OGG", "MP3"))
XING = max(MP3.find(b"Xing"), MP3.find(b"Info"))


def flac_of(samples: int) -> bytes:
    """A FLAC of one second whose header announces so many samples."""
    content = bytearray(FLAC)
    content[18:26] = (int.from_bytes(content[18:26], "big") >> 36 << 36 | samples).to_bytes(8, "big")
    return bytes(content)


def mp3_of(frames: int) -> bytes:
    return MP3[: XING + 8] + frames.to_bytes(4, "big") + MP3[XING + 12 :]


def floats(samples: np.ndarray) -> Callable[[Path], object]:
    return lambda path: soundfile.write(path, samples, RATE, format="WAV", subtype="FLOAT")


STEREO = np.stack([wave(1.0, 200), wave(1.0, 500)], axis=1)
SPOILT = wave(1.0)
RECORDINGS = [  # a recording beside three good ones: its name and content, why it is rejected
    ("samples of 1e29", "x.wav", floats(wave(1.0) * 1e29), "samples up to .*e\\+28"),
    ("samples of 1e38", "x.wav", floats(wave(1.0) * 1e38), "samples up to"),
    ("one sample of 1e30", "x.wav", floats(np.where(np.arange(RATE) == 99, np.float32(1e30), SPOILT)), "samples up to 1e\\+30"),
    ("nan", "x.wav", floats(np.where(np.arange(RATE) == 99, np.float32("nan"), SPOILT)), "not finite"),
    ("infinity", "x.wav", floats(np.where(np.arange(RATE) == 99, np.float32("inf"), SPOILT)), "not finite"),
    ("nan in one channel", "x.wav", floats(np.where(np.arange(2) == 1, np.float32("nan"), STEREO)), "not finite"),
    ("opposite channels of 1e30", "x.wav", floats(np.stack([SPOILT, -SPOILT], axis=1) * 1e30), "samples up to"),
    ("opposite phase", "x.wav", floats(np.stack([SPOILT, -SPOILT], axis=1)), "2 channels that cancel"),
    ("nearly opposite phase", "x.wav", floats(np.stack([SPOILT, -0.999 * SPOILT], axis=1)), "2 channels that cancel"),
    ("silence", "x.wav", floats(np.zeros(RATE, np.float32)), "is silence"),
    ("a constant", "x.wav", floats(np.full(RATE, 0.5, np.float32)), "is silence"),
    ("empty", "x.wav", b"", "is an empty file"),
    ("html", "x.wav", b"<html>" * 99, "cannot be read as audio"),
    ("a header alone", "x.wav", WAV[:44], "no samples|cut off|cannot be read"),
    ("half of a wav", "x.wav", WAV[: len(WAV) // 2], "cut off"),
    ("half of a flac", "x.flac", FLAC[: len(FLAC) // 2], "cut off"),
    ("half of an ogg", "x.ogg", OGG[: len(OGG) // 2], "cut off|cannot be read"),
    ("half of an mp3", "x.mp3", MP3[: len(MP3) // 2], "cut off"),
    ("a wav that announces half", "x.wav", wav(PCM, len(PCM) // 2), "holds 1.00 s of audio, but its header announces 0.50 s"),
    ("a wav that announces nothing", "x.wav", wav(PCM, 0), "no samples"),
    ("two wavs", "x.wav", WAV + WAV, "joined|cannot be read"),
    ("a flac that announces half", "x.flac", flac_of(RATE // 2), "holds 1.00 s of audio, but its header announces 0.50 s"),
    ("a flac that announces double", "x.flac", flac_of(RATE * 2), "cut off"),
    ("a flac that announces nothing", "x.flac", flac_of(0), "does not say how long"),
    ("two flacs", "x.flac", FLAC + FLAC, "several recordings joined"),
    ("two flacs, the second shorter", "x.flac", FLAC + encoded(wave(0.3, 440), "FLAC"), "several recordings joined"),
    ("two oggs", "x.ogg", OGG + OGG, "several recordings joined"),
    ("two opus", "x.opus", 2 * encoded(wave(1.0), "OGG", "OPUS"), "several recordings joined"),
    ("two mp3s", "x.mp3", MP3 + MP3, "of audio, but its header announces 1.08 s"),
    ("an mp3 that announces half", "x.mp3", mp3_of(15), "of audio, but its header announces"),
    ("an mp3 that announces double", "x.mp3", mp3_of(60), "cut off"),
    ("two aus", "x.au", 2 * encoded(wave(1.0), "AU"), "holds 2.00 s of audio|of audio, but its header announces 1.00 s"),
    ("two aiffs", "x.aiff", 2 * encoded(wave(1.0), "AIFF"), "joined|cannot be read"),
    ("two cafs", "x.caf", 2 * encoded(wave(1.0), "CAF"), "joined"),
    ("half of a sphere file", "x.sph", encoded(wave(1.0), "NIST")[:17000], "cut off"),
    ("a rate of 7 Hz", "x.wav", wav(PCM[:1600], rate=7), "1 channel at 7 Hz"),
    ("a rate of 2 GHz", "x.wav", wav(PCM, rate=0x7FFFFFFF), "channel at 2147483647 Hz|cannot be read"),
    ("1,000 channels", "x.wav", wav(PCM * 4, channels=1000), "1,000 channels at 16000 Hz"),
    ("no channels", "x.wav", wav(PCM, channels=0), "cannot be read"),
    ("a form that nobody knows", "x.wav", wav(PCM, form=0x9999), "cannot be read"),
    ("130 seconds", "x.flac", lambda path: soundfile.write(path, np.zeros(130 * RATE, np.int16), RATE), "is 130.0 s long"),
    ("a pipe", "x.wav", os.mkfifo, "not there"),
    ("a link to itself", "x.wav", lambda path: path.symlink_to("x.wav"), "not there"),
    ("m4a", "x.m4a", b"\0\0\0\x20ftypM4A ", "\\.m4a, a format that is not read"),
    ("webm", "x.WEBM", b"\x1aE\xdf\xa3", "\\.webm, a format that is not read"),
]


def two_folders(folder: Path) -> None:
    """One stem in three folders, as TIMIT has it; the same recording again; another format of it."""
    rows = ["path\ttext"]
    for speaker in range(3):
        (folder / f"s{speaker}").mkdir()
        for sentence in range(2):
            soundfile.write(folder / f"s{speaker}" / f"SA{sentence}.wav", wave(0.5, 200 + 90 * speaker), RATE)
            rows.append(f"s{speaker}/SA{sentence}.wav\tspeaker {speaker} sentence {sentence}")
    rows.append("s0/../s0/SA0.wav\tagain")
    (folder / "transcripts.tsv").write_text("\n".join(rows) + "\n")


def audiofolder(folder: Path) -> None:
    """Hugging Face's audiofolder with splits: the same names in each."""
    for split in ("train", "test"):
        good(folder / split, 2, texts=False)
        (folder / split / "metadata.csv").write_text("file_name,transcription\n" + "".join(f"g{i}.wav,{split} {i}\n" for i in range(2)))


def split_columns(folder: Path, _: Outcome) -> None:
    found = {record["id"]: record["metadata"].get("split") for record in records(folder)}
    assert found == {f"c_{split}_g{index}": split for split in ("test", "train") for index in range(2)}, found


def long_recording(folder: Path) -> None:
    soundfile.write(folder / "long.wav", np.concatenate([wave(1.0, 200), wave(1.5, 700), wave(1.0, 400)]), RATE)


def stretches(header: str, *rows: str, name: str = "transcripts.tsv") -> Setup:
    """A table of parts of a recording of 3.5 s."""

    def setup(folder: Path) -> None:
        long_recording(folder)
        (folder / name).write_text("\n".join([header, *rows]) + "\n")

    return setup


def json_stretches(*rows: Mapping[str, Any]) -> Setup:
    return stretches(json.dumps(rows[0]), *(json.dumps(row) for row in rows[1:]), name="transcripts.jsonl")


def by_pandas(*texts: str) -> str:
    """A table as pandas and csv write it."""
    with io.StringIO() as sink:
        rows = [[f"g{index}.wav", text] for index, text in enumerate(texts)]
        csv.writer(sink, delimiter="\t", lineterminator="\n").writerows([["path", "text"], *rows])
        return sink.getvalue()


def cut_of(name: str, **changes: Any) -> dict[str, Any]:
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}]}
    words = [{"start": 0, "duration": 0.9, "channel": 0, "text": name}]
    return {
        "id": name,
        "type": "MonoCut",
        "start": 0,
        "duration": 0.9,
        "channel": 0,
        "recording": recording,
        "supervisions": words,
    } | changes


def cuts(*others: Mapping[str, Any]) -> Setup:
    """A good cut and others, of a.wav (mono), two.wav (stereo), left.wav and right.wav (its channels)."""

    def setup(folder: Path) -> None:
        soundfile.write(folder / "a.wav", wave(1.0), RATE)
        soundfile.write(folder / "two.wav", STEREO, RATE)
        for index, name in enumerate(("left", "right")):
            soundfile.write(folder / f"{name}.wav", STEREO[:, index], RATE)
        lines = [json.dumps(each) for each in (cut_of("first"), *others)]
        (folder / "libriheavy_cuts_small.jsonl").write_text("\n".join(lines) + "\n")

    return setup


def of_channel(name: str, channel: Any, *sources: tuple[str, Sequence[int] | None], **changes: Any) -> dict[str, Any]:
    files = [{"type": "file", "source": file} | ({"channels": list(own)} if own is not None else {}) for file, own in sources]
    words = [{"start": 0, "duration": 0.9, "channel": channel, "text": name}]
    return cut_of(name, channel=channel, recording={"id": "r", "sources": files}, supervisions=words) | changes


def transformed(name: str, **settings: Any) -> dict[str, Any]:
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}]}
    return cut_of("x", recording={**recording, "transforms": [{"name": name, "kwargs": settings}]})


def same_units(one: str, two: str) -> Check:
    """Two records have the same units, and not those of the first cut."""

    def check(folder: Path, _: Outcome) -> None:
        found = {record["output"]: record["input"] for record in records(folder)}
        assert found[one] == found[two] != found["other"], found

    return check


TSV = "path\ttext\tspeaker\n" + "".join(f"g{index}.wav\tgood {index}\ts{index}\n" for index in range(3))
ROWS = [{"path": f"g{index}.wav", "text": f"good {index}"} for index in range(3)]
DEEP = '{"path": "g0.wav", "text": "x", "deep": ' + "[" * 990 + "]" * 990 + "}"
QUOTED = ['He said "hi"', "two\nlines", "a\ttab", 'both "a"\nand "b"']
HALVES = (
    {"path": "long.wav", "text": "one", "offset": 0, "duration": 1},
    {"path": "long.wav", "text": "two", "offset": 1.0, "duration": 1.5},
)
CLIP = "client_id\tpath\tsentence\tup_votes\n"


def common_voice(text: str) -> Setup:
    return lambda folder: (good(folder / "clips", texts=False), (folder / "validated.tsv").write_text(text))


def voxpopuli(folder: Path) -> None:
    (folder / "en" / "2012").mkdir(parents=True)
    for index in range(3):
        soundfile.write(folder / "en" / "2012" / f"2012-{index}.ogg", wave(0.5, 200 + 90 * index), RATE)
    rows = [
        ["id", "raw_text", "normalized_text", "split"],
        *([f"2012-{i}", 'A "b".', t, "train"] for i, t in enumerate(("a", 'b "c"', "d\ne"))),
    ]
    with (folder / "en" / "asr_train.tsv").open("w", newline="") as sink:
        csv.writer(sink, delimiter="\t", lineterminator="\n").writerows(rows)


def captions(folder: Path) -> None:
    for index, text in enumerate(("[Humming] la la", "hello [Hums]", "[Hugh:] good morning", "[HUM] no")):
        soundfile.write(folder / f"u{index}.wav", wave(0.5, 200 + 90 * index), RATE)
        (folder / f"u{index}.txt").write_text(text)


def mostly_bad(folder: Path) -> None:
    good(folder, 4)
    for index in range(8):
        (folder / f"x{index}.wav").write_bytes(b"no audio")
        (folder / f"x{index}.txt").write_text("text")


def converted(folder: Path) -> None:
    """Recordings beside what they were converted from."""
    good(folder)
    for index in range(3):
        (folder / f"g{index}.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")


TWO = ("two.wav", [0, 1])
ALL = ("one", "two")
CASES = [
    *(told(f"recording: {name}", beside(file, content), keeps(None, reason)) for name, file, content, reason in RECORDINGS),
    told("formats not read are counted", beside("x.m4a", b"x"), keeps(None, "m4a"), says="formats that are not read: 1 .m4a"),
    told("what recordings were converted from", converted, keeps(None)),
    refused(
        "formats not read alone", lambda c: [(c / f"{i}.{s}").write_bytes(b"x") for i, s in enumerate(("m4a", "mp4"))], r"1 \.m4a, 1 \.mp4"
    ),
    # Good recordings that look odd
    told("loud floats", beside("x.wav", floats(wave(1.0) * 8)), keeps(["good 0", "good 1", "good 2", "seven"])),
    told("integers in floats", beside("x.wav", floats(wave(1.0) * 32768)), keeps(["good 0", "good 1", "good 2", "seven"])),
    told(
        "a wav from a pipe", beside("x.wav", wav(PCM, 0xFFFFFFFF)), keeps(["good 0", "good 1", "good 2", "seven"], seconds={"seven": 1.0})
    ),
    told("tags behind a wav", beside("x.wav", WAV + b"LIST\x04\0\0\0INFO"), keeps(["good 0", "good 1", "good 2", "seven"])),
    told("a tag behind an mp3", beside("x.mp3", MP3 + b"TAG" + bytes(125)), keeps(["good 0", "good 1", "good 2", "seven"])),
    told("a folder that is a link to itself", lambda c: (good(c), (c / "loop").symlink_to("loop")), keeps(None)),
    told("a folder in itself", lambda c: (good(c), (c / "loop").symlink_to(".")), keeps(None)),
    told("brackets", lambda c: good(c / "[b]x[/b]"), keeps(None)),
    # Ids
    told(
        "one stem in three folders",
        two_folders,
        keeps([f"speaker {a} sentence {b}" for a in range(3) for b in range(2)], "'c_SA0' a second time"),
    ),
    told(
        "a_b and a/b",
        lambda c: (good(c / "a", 1), shutil.copy(c / "a/g0.wav", c / "a_g0.wav"), (c / "a_g0.txt").write_text("it")),
        keeps(["it", "good 0"]),
    ),
    told("an audiofolder with splits", audiofolder, split_columns),
    # Stretches
    told(
        "start and end",
        stretches("path\ttext\tstart\tend", "long.wav\tone\t0\t1", "long.wav\ttwo\t1\t2.5"),
        keeps(ALL, seconds={"one": 1, "two": 1.5}),
    ),
    told("offset and duration", json_stretches(*HALVES), keeps(ALL, seconds={"one": 1, "two": 1.5})),
    told(
        "a manifest of NeMo",
        json_stretches(*({"audio_filepath": row["path"], **row} for row in HALVES)),
        keeps(ALL, seconds={"one": 1, "two": 1.5}),
    ),
    told(
        "end before start",
        stretches("path\ttext\tstart\tend", "long.wav\tone\t1\t2", "long.wav\ttwo\t2\t1"),
        keeps(["one"], "an end that is not"),
    ),
    told(
        "end that contradicts",
        stretches("path\ttext\tstart\tend\tduration", "long.wav\tone\t1\t2\t1", "long.wav\ttwo\t2\t3\t2"),
        keeps(["one"], "contradict"),
    ),
    told(
        "start of 5,000 digits",
        stretches("path\ttext\tstart", "long.wav\tone\t1", f"long.wav\ttwo\t{'9' * 5000}"),
        keeps(["one"], "not a number of seconds"),
    ),
    told("a clock", stretches("path\ttext\tstart", "long.wav\tone\t1", "long.wav\ttwo\t0:02"), keeps(["one"], "not a number of seconds")),
    refused("end without start", stretches("path\ttext\tend", "long.wav\tone\t1"), "holds no utterance.*an end that is not"),
    refused("start and offset", stretches("path\ttext\tstart\toffset", "long.wav\tone\t1\t2"), "a start and an offset"),
    refused(
        "start_time and end_time",
        stretches("path\ttext\tstart_time\tend_time", "long.wav\tone\t0\t1"),
        "'start_time' with a time, '0', that is not understood",
    ),
    refused("Start and End", stretches("path\ttext\tStart\tEnd", "long.wav\tone\t0\t1"), "'Start' with a time"),
    refused("startMs", stretches("path\ttext\tstartMs\tlengthMs", "long.wav\tone\t0\t1000"), "'startMs' with a time"),
    refused("begin", stretches("path,text,begin,stop", "long.wav,one,0.5,1", name="metadata.csv"), "'begin' with a time"),
    refused("timestamps", json_stretches({"path": "long.wav", "text": "one", "timestamp": [0.5, 1.5]}), "'timestamp' with a time"),
    refused("a segment in one cell", stretches("path\ttext\tsegment", "long.wav\tone\t0.5-1.5"), "'segment' with a time"),
    refused("start and duration_ms", stretches("path\ttext\tstart\tduration_ms", "long.wav\tone\t1\t500"), "'duration_ms' with a time"),
    refused(
        "a length that is another's", stretches("path\ttext\tduration", "long.wav\tone\t1.0"), "is 3.50 s long, but its table gives it 1 s"
    ),
    told(
        "columns that are no times",
        stretches(
            "path\ttext\tduration\tgender\tend_date\ttimestamp\ttext_start", "long.wav\tone\t3.5\tfemale\t2020-01-02\t2020-01-02 10:00\t7"
        ),
        keeps(["one"], seconds={"one": 3.5}),
    ),
    told("a channel of a mono file", table(TSV.replace("speaker", "channel").replace("\ts", "\t")), keeps(None)),
    refused(
        "a channel of a stereo file",
        lambda c: (soundfile.write(c / "s.wav", STEREO, RATE), (c / "transcripts.tsv").write_text("path\ttext\tchannel\ns.wav\tone\t1\n")),
        "2 channels, and its row means one",
    ),
    # Tables
    told("quotes by pandas", table(by_pandas(*QUOTED[:3])), keeps(['He said "hi"', "two lines", "a\ttab"])),
    told(
        "quotes by pandas, in csv",
        table(by_pandas(*QUOTED[:2]).replace("\t", ","), "metadata.csv"),
        keeps(['He said "hi"', "two lines"], "no row"),
    ),
    told(
        "quotes that are text",
        table('path\ttext\ng0.wav\t"Yes," he said.\ng1.wav\t"No"\ng2.wav\t"Open\n'),
        keeps(['"Yes," he said.', '"No"', '"Open']),
    ),
    refused(
        "a quote over two rows", table('path\ttext\ng0.wav\t"Open\ng1.wav\tclosed"\ng2.wav\tx\n'), "ends a quote that begins in another row"
    ),
    told("quotes of VoxPopuli", voxpopuli, keeps(["a", 'b "c"', "d e"]), layout="voxpopuli"),
    told(
        "quotes of Common Voice",
        common_voice(CLIP + 'x\tg0.wav\t"""Yes,"" he said."\t2\nx\tg1.wav\t"two\nlines"\t2\n'),
        keeps(['"Yes," he said.', "two lines"]),
        layout="common_voice",
    ),
    told(
        "votes of 5,000 digits",
        common_voice(CLIP + f"x\tg0.wav\tgood\t2\nx\tg1.wav\tbad\t{'9' * 5000}\n"),
        keeps(["good"], "up_votes of 5,000 digits"),
        layout="common_voice",
    ),
    told(
        "a number of 5,000 digits",
        json_table(*ROWS, '{"path": "g0.wav", "text": "x", "n": ' + "9" * 5000 + "}"),
        keeps(None, "digits|long"),
    ),
    told("depth", json_table(*ROWS, DEEP), keeps(None, "nested")),
    told("depth of 97", json_table(*ROWS, DEEP.replace("[" * 990, "[" * 97).replace("]" * 990, "]" * 97)), keeps(None, "nested too deep")),
    told("a number that is not finite", json_table(*ROWS, '{"path": "g0.wav", "text": "x", "n": NaN}'), keeps(None, "not finite")),
    told("half a surrogate pair", json_table(*ROWS, '{"path": "g0.wav", "text": "\\ud800"}'), keeps(None, "surrogate")),
    told(
        "rows of another kind",
        json_table(*ROWS, "[1]", "null", '{"path": 3, "text": "x"}'),
        keeps(None, "list", "NoneType", "no recording"),
    ),
    told("outside", table(TSV + "../../../etc/passwd\tx\ty\n"), keeps(None, "outside the folder")),
    told("a name of 5,000 letters", table(TSV + f"{'x' * 5000}\tx\ty\n"), keeps(None, "not there")),
    told("a name with a NUL", table(TSV + "a\0b.wav\tx\ty\n"), keeps(None, "not there")),
    told("too many cells", table(TSV + "g0.wav\ta\tb\tc\n"), keeps(None, "4 cells for 3 columns")),
    refused("not UTF-8", table(TSV.encode() + b"g0.wav\tcaf\xe9\ts\n"), "is not UTF-8"),
    refused(
        "two tables", lambda c: (table(TSV)(c), (c / "metadata.csv").write_text("path,text\n")), "holds transcripts.tsv and metadata.csv"
    ),
    refused(
        "two tables of a split",
        lambda c: (audiofolder(c), (c / "test" / "transcripts.tsv").write_text(TSV)),
        "test.*holds transcripts.tsv and metadata.csv",
    ),
    refused("a table that is a link to itself", lambda c: (c / "transcripts.tsv").symlink_to("transcripts.tsv"), "no recording"),
    # Texts
    told("captions", captions, keeps(["[Humming] la la", "hello [Hums]", "[Hugh:] good morning", "[HUM] no"])),
    told("units as text", beside("x.wav", WAV, text="[Hu7][Hu9]"), keeps(None, "speech units")),
    # Cuts
    told("a good cut", cuts(), keeps(["first"]), layout="libriheavy"),
    told(
        "the second channel",
        cuts(of_channel("x", 1, TWO), of_channel("y", 0, ("right.wav", [0])), of_channel("other", 0, TWO)),
        same_units("x", "y"),
        layout="libriheavy",
    ),
    told(
        "a file for each channel",
        cuts(
            of_channel("x", 1, ("left.wav", [0]), ("right.wav", [1])), of_channel("y", 0, ("right.wav", [0])), of_channel("other", 0, TWO)
        ),
        same_units("x", "y"),
        layout="libriheavy",
    ),
    *(
        told(f"cut: {name}", cuts(cut), keeps(["first"], reason), layout="libriheavy")
        for name, cut, reason in [
            ("no such channel", of_channel("x", 2, TWO), "channel 2 of a recording with the channels 0, 1"),
            ("no such channel in the file", of_channel("x", 1, ("a.wav", [0, 1])), "no channel 1"),
            ("two files of a channel", of_channel("x", 0, ("left.wav", [0]), ("right.wav", [0])), "is of channel 0"),
            ("a channel in words", of_channel("x", "left", TWO), "no number"),
            ("no channel of two", of_channel("x", None, TWO), "channel None of a recording with the channels 0, 1"),
            ("no channel of a stereo file", of_channel("x", None, ("two.wav", None)), "2 channels, and"),
            ("all channels", of_channel("x", [0, 1], TWO, type="MultiCut"), "not a MonoCut"),
            ("another's words", of_channel("x", 0, TWO, supervisions=[{"text": "x", "channel": 1}]), "supervision of channel 1"),
            ("Speed", transformed("Speed", factor=1.1), "changed by Speed"),
            ("Volume", transformed("Volume", factor=9.0), "changed by Volume"),
            ("Tempo", transformed("Tempo", factor=1.1), "changed by Tempo"),
            ("Reverb", transformed("ReverbWithImpulseResponse"), "changed by Reverb"),
            ("Resample to less", transformed("Resample", source_sampling_rate=16000, target_sampling_rate=8000), "changed by Resample"),
            (
                "a transform that is a text",
                cut_of("x", recording={"sources": [{"type": "file", "source": "a.wav"}], "transforms": "Speed"}),
                "changed by Speed",
            ),
            ("a command", cut_of("x", recording={"sources": [{"type": "command", "source": "touch PWNED"}]}), "of type 'command'"),
            ("outside", cut_of("x", recording={"sources": [{"type": "file", "source": "../../etc/passwd"}]}), "outside the folder"),
            ("beyond the end", cut_of("x", start=0.5), "has no part 0.5 to 1.4 s"),
        ]
    ),
    told(
        "cut: Resample to as much",
        cuts(transformed("Resample", source_sampling_rate=16000, target_sampling_rate=24000)),
        keeps(["first", "x"]),
        layout="libriheavy",
    ),
    # The share that is rejected
    refused("two thirds are no audio", mostly_bad, "max_rejected_fraction = 0.5: is exceeded: 8 entries.*cannot be read as audio"),
    told(
        "two thirds, allowed",
        mostly_bad,
        keeps(["good 0", "good 1", "good 2", "good 3"], *["cannot be read"] * 8),
        "--max_rejected_fraction",
        "0.7",
    ),
    refused(
        "one of four, not allowed",
        beside("x.wav", b"x"),
        "max_rejected_fraction = 0.1: is exceeded: 1 entry",
        "--max_rejected_fraction",
        "0.1",
    ),
    refused(
        "one row of four, not allowed", table(TSV + "x.wav\ta\tb\n"), "is exceeded: 1 entry.*not there", "--max_rejected_fraction", "0.1"
    ),
    refused("a share of nan", good, "max_rejected_fraction", "--max_rejected_fraction", "nan"),
    refused("a share above 1", good, "max_rejected_fraction", "--max_rejected_fraction", "7"),
    refused("a share of a word", good, "max_rejected_fraction", "--max_rejected_fraction", "x"),
    told(
        "a table of some of a folder",
        lambda c: (good(c, 12, texts=False), (c / "transcripts.tsv").write_text(TSV)),
        keeps(None, *["named by no row"] * 9),
    ),
    *(
        Case(f"transcribe: {name}", transcribe(file, content), ["recording", reason])
        for name, file, content, reason in RECORDINGS
        if name in ("samples of 1e29", "opposite phase", "two flacs", "two mp3s", "half of an mp3", "m4a", "a link to itself", "a pipe")
    ),
    Case("transcribe: a long name", lambda _: [*transcribe("x.wav", WAV)(_)[:-1], "y" * 5000 + ".wav"], "recording.*not there"),
    Case("kmeans: one is none", kmeans(beside("x.wav", b"x")), code=0, may_change=["k.npy"]),
    Case(
        "kmeans: none",
        kmeans(lambda c: (beside("x.wav", b"x")(c), [path.unlink() for path in c.glob("g*.wav")])),
        "no usable recording|no utterance",
        may_change=[".k.npy.work*"],
    ),
    refused("nothing but noise", lambda c: beside("x.wav", b"x")(c) or [path.unlink() for path in c.glob("g*.wav")], "recording"),
]
