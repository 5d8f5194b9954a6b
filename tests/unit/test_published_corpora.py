"""Published layouts: what each reader gives is what the corpus's own files say, and what is broken is told and left behind."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from most_ray.errors import DataError
from most_ray.speech.corpora.audio import ANY_CHANNEL
from most_ray.speech.corpora.corpus import CorpusOptions, Utterance, read_corpus
from tests.support.corpora import cut_of, libriheavy, librispeech, put, read, reasons


def test_librispeech_is_its_transcripts(shared: Path) -> None:
    """Real recordings: each line of each transcript; the folder above, the root or a split gives the same utterances."""
    root = shared / "data" / "LibriSpeech"
    lines = [line.split(" ", 1) for path in root.glob("*/*/*/*.trans.txt") for line in path.read_text().splitlines()]
    speakers = (line.split("|") for line in (root / "SPEAKERS.TXT").read_text().splitlines() if not line.startswith(";"))
    sexes = {cells[0].strip(): cells[1].strip() for cells in speakers}
    utterances, unusable = read("librispeech", root)
    assert not unusable and len(utterances) == 87
    assert {u.id.removeprefix("librispeech_train-clean-5_"): u.text for u in utterances} == dict(lines)
    for utterance in utterances:
        speaker, chapter, _ = utterance.path.stem.split("-")
        assert utterance.path == root / "train-clean-5" / speaker / chapter / utterance.path.name
        assert utterance.columns == {"speaker": speaker, "chapter": chapter, "split": "train-clean-5", "sex": sexes[speaker]}
    assert read("librispeech", root / "train-clean-5") == (utterances, [])
    assert read("librispeech", root, splits=("train-clean-5",)) == (utterances, [])


def test_librispeech_in_halves_and_splits(tmp_path: Path) -> None:
    lines = {"dev/1/2": "1-2-0 ONE\n1-2-1 TWO\n1-2-2\n../9 NINE\n\n1-2-0 AGAIN\n", "test/3/4": "3-4-0 DREI"}
    files = ("dev/1/2/1-2-0.flac", "dev/1/2/1-2-2.flac", "dev/1/2/1-2-3.flac", "test/3/4/3-4-0.flac", "test/3/5/3-5-0.flac", "notes/x.flac")
    root = librispeech(tmp_path / "LibriSpeech", lines, files)
    utterances, unusable = read("librispeech", tmp_path, name="ls")
    assert [(u.id, u.text, dict(u.columns)) for u in utterances] == [
        ("ls_dev_1-2-0", "ONE", {"speaker": "1", "chapter": "2", "split": "dev"}),
        ("ls_test_3-4-0", "DREI", {"speaker": "3", "chapter": "4", "split": "test"}),
    ]
    assert reasons(unusable) == [
        ("1-2.trans.txt", 2, "has text but no recording"),
        ("1-2.trans.txt", 3, "has no text"),
        ("1-2.trans.txt", 4, "has text but no recording"),
        ("1-2.trans.txt", 6, "gives the id 'ls_dev_1-2-0' a second time"),
        ("1-2-3.flac", 0, "has no text"),
        ("3-5-0.flac", 0, "has no text"),
    ]
    assert [u.id for u in read("librispeech", root, splits=("test",))[0]] == ["librispeech_test_3-4-0"]


def test_reading_is_streaming(tmp_path: Path) -> None:
    """The first utterance is there before the second chapter has its transcript."""
    root = librispeech(tmp_path, {"dev/1/2": "1-2-0 ONE"}, ("dev/1/2/1-2-0.flac", "dev/1/3/1-3-0.flac"))
    items = read_corpus(CorpusOptions("librispeech", root))
    first = next(items)
    librispeech(root, {"dev/1/3": "1-3-0 TWO"}, ())
    assert [item.text for item in itertools.chain([first], items) if isinstance(item, Utterance)] == ["ONE", "TWO"]


@pytest.mark.parametrize("casing", ["cased", "upper"])
@pytest.mark.parametrize("where", ["download/librilight", "librilight", ".", "../download/librilight", "../librilight", ".."])
def test_a_cut_of_libriheavy_finds_its_recording(tmp_path: Path, where: str, casing: Any) -> None:
    """With either text, wherever the recording is stored by the rule; the corpus is given by its folder or by its file of cuts."""
    recording = {"id": "small/100/a_book/01_a_book", "sources": [{"type": "file", "source": "download/librilight/small/100/a/01_a.flac"}]}
    words = {
        "start": 0,
        "duration": 7.36,
        "speaker": "100",
        "language": "English",
        "custom": {"texts": ["“A book,” she said.", "A BOOK SHE SAID"]},
    }
    check_cut(
        tmp_path,
        cut_of("small/100/a_book/01_a_book_3", start=243.919, duration=7.36, recording=recording, supervisions=[words]),
        where,
        casing,
    )


@pytest.mark.parametrize("casing", ["cased", "upper"])
def test_libriheavys_own_cut(shared: Path, tmp_path: Path, casing: Any) -> None:
    """As it is published."""
    check_cut(tmp_path, json.loads((shared / "data/libriheavy/one_cut.json").read_text()), "download/librilight", casing)


def check_cut(root: Path, cut: dict[str, Any], where: str, casing: Any) -> None:
    folder = root / "cuts"
    file = libriheavy(folder, [cut])
    path = put(folder / where / cut["recording"]["sources"][0]["source"].removeprefix("download/librilight/"))
    for place in (folder, file):
        (utterance,), unusable = read("libriheavy", place, casing=casing)
        assert not unusable
        assert utterance.id == f"libriheavy_{cut['id']}" and utterance.path.samefile(path)
        assert utterance.text == cut["supervisions"][0]["custom"]["texts"][casing == "upper"]
        assert (utterance.start, utterance.duration) == (243.919, 7.36)
        assert utterance.columns == {"speaker": "100", "split": "small", "language": "English", "recording_id": cut["recording"]["id"]}


def supervised(*spans: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"start": start, "duration": lasts, "custom": {"texts": [f"Text {i}."]}} for i, (start, lasts) in enumerate(spans)]


def test_libriheavys_supervisions_and_subsets(tmp_path: Path) -> None:
    """Each supervision is an utterance, its start counted from the cut's; subsets are files; a cut twice is told."""
    put(tmp_path / "small/1/a.flac")
    libriheavy(tmp_path, [cut_of(supervisions=supervised((0, 1), (1.1, 1.4), (2.0, 9.0)))])
    libriheavy(tmp_path, [cut_of("dev/x"), cut_of("dev/x")], "libriheavy_cuts_dev.jsonl")
    libriheavy(tmp_path, [{"id": "other"}], "rejected.jsonl")
    utterances, unusable = read("libriheavy", tmp_path, name="lh")
    assert [(u.id, u.text, u.start, u.duration, u.columns["split"]) for u in utterances] == [
        ("lh_dev/x", "One.", 10.25, 2.5, "dev"),
        ("lh_small/1/a_0_0", "Text 0.", 10.25, 1.0, "small"),
        ("lh_small/1/a_0_1", "Text 1.", 11.35, 1.4, "small"),
        ("lh_small/1/a_0_2", "Text 2.", 12.25, 0.5, "small"),
    ]
    assert reasons(unusable) == [("libriheavy_cuts_dev.jsonl", 2, "gives the id 'lh_dev/x' a second time")]
    assert len(read("libriheavy", tmp_path, splits=("small",))[0]) == 3


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ('{"id": "x", ', r"is not JSON at byte .*"),
        ("[1]", "is a JSON list, not an object"),
        (cut_of(type="MixedCut"), "is not a MonoCut with an id and a recording"),
        (cut_of(id=3), "is not a MonoCut with an id and a recording"),
        (cut_of(recording={"sources": []}), "is not a MonoCut with an id and a recording"),
        (cut_of(recording={"sources": [{"type": "url", "source": "http://x"}]}), "has a recording of type 'url', not a file"),
        (cut_of(recording={"sources": [{"type": "command", "source": "touch x"}]}), "has a recording of type 'command', not a file"),
        (cut_of(recording={"sources": [{"type": "file", "source": "../a.flac"}]}), "names a recording outside the folder"),
        (cut_of(recording={"sources": [{"type": "file", "source": "download/../../x"}]}), "names a recording outside the folder"),
        (cut_of(recording={"sources": [{"type": "file", "source": "no.flac"}]}), "names a recording that is not there"),
        (cut_of(recording={"sources": [{"type": "file", "source": "/no.flac"}]}), "names a recording that is not there"),
        (cut_of(supervisions=[]), "has no text"),
        (cut_of(supervisions=[3]), "has no text"),
        (cut_of(supervisions=[{"start": 0, "custom": {"texts": [None, "ONE"]}}]), "has no text"),
        (cut_of(recording={"sources": [{"type": "file", "source": "x" * 300}]}), "names a recording that is not there"),
        (cut_of(start=None), "has a start or a duration that is not a number of seconds"),
        (cut_of(duration=0), "has a start or a duration that is not a number of seconds"),
        (cut_of(supervisions=supervised((3, 1))), "has a supervision outside its cut"),
    ],
)
def test_bad_cuts_are_told_and_the_others_kept(tmp_path: Path, cut: dict[str, Any] | str, reason: str) -> None:
    put(tmp_path / "librilight/small/1/a.flac")
    libriheavy(tmp_path, [cut_of("before"), cut, cut_of("behind")])
    utterances, (unusable,) = read("libriheavy", tmp_path)
    assert [utterance.id for utterance in utterances] == ["libriheavy_before", "libriheavy_behind"]
    assert unusable.index == 2 and re.fullmatch(reason, unusable.reason)


RESAMPLED = {"name": "Resample", "kwargs": {"source_sampling_rate": 8000, "target_sampling_rate": 16000}}
SPED = {"name": "Speed", "kwargs": {"factor": 1.1}}


def recorded(*sources: tuple[str, list[int]], **more: Any) -> dict[str, Any]:
    return {"id": "r", "sources": [{"type": "file", "source": name, "channels": own} for name, own in sources], **more}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"channel": 0, "recording": recorded(("a.flac", [0]))}, ("a.flac", None)),
        ({"channel": 7, "recording": recorded(("a.flac", [7]))}, ("a.flac", None)),
        ({"channel": 1, "recording": recorded(("a.flac", [0, 1]))}, ("a.flac", 1)),
        ({"channel": 4, "recording": recorded(("a.flac", [3, 4]))}, ("a.flac", 1)),
        ({"channel": 1, "recording": recorded(("a.flac", [0]), ("b.flac", [1]))}, ("b.flac", None)),
        ({"recording": recorded(("a.flac", [0]))}, ("a.flac", None)),
        ({"recording": {"sources": [{"type": "file", "source": "a.flac"}]}}, ("a.flac", ANY_CHANNEL)),
        ({"channel": 1, "recording": {"sources": [{"type": "file", "source": "a.flac"}]}}, ("a.flac", 1)),
        ({"recording": recorded(("a.flac", [0]), transforms=None)}, ("a.flac", None)),
        ({"recording": recorded(("a.flac", [0]), transforms=[])}, ("a.flac", None)),
        ({"recording": recorded(("a.flac", [0]), transforms=[RESAMPLED])}, ("a.flac", None)),
        ({"recording": recorded(("a.flac", [0, 1]))}, "is of channel None of a recording with the channels 0, 1"),
        ({"recording": recorded(("a.flac", [0]), ("b.flac", [1]))}, "is of channel None of"),
        ({"channel": 2, "recording": recorded(("a.flac", [0]), ("b.flac", [1]))}, "is of channel 2 of"),
        ({"channel": True, "recording": recorded(("a.flac", [0, 1]))}, "has a channel that is no number of one"),
        ({"channel": 1, "recording": recorded(("a.flac", [0, 1])), "supervisions": [{"channel": 0}]}, "has a supervision of channel 0"),
        ({"channel": 0, "recording": recorded(("a.flac", [0]), transforms=[RESAMPLED, SPED])}, "has a recording that is changed by Speed"),
        (
            {"channel": 0, "recording": recorded(("a.flac", [0]), transforms={"name": "Volume"})},
            "has a recording that is changed by Volume",
        ),
        ({"type": "MultiCut", "channel": [0, 1]}, "is not a MonoCut"),
    ],
)
def test_a_cut_is_of_one_channel_of_a_file_as_it_is(tmp_path: Path, changes: dict[str, Any], expected: Any) -> None:
    """Never another speaker's audio, nor audio that was to be changed."""
    for name in ("a.flac", "b.flac"):
        put(tmp_path / name)
    libriheavy(tmp_path, [cut_of("x", **changes)])
    utterances, unusable = read("libriheavy", tmp_path)
    if isinstance(expected, str):
        assert not utterances and unusable[0].reason.startswith(expected)
    else:
        assert [(u.path.name, u.channel) for u in utterances] == [expected]


def test_extracted_libriheavy_has_one_text(tmp_path: Path) -> None:
    """`text` in place of the texts; cased text is never passed off as upper-case."""
    put(tmp_path / "small/1/a.flac")
    for only in ({"text": "One."}, {"custom": {"texts": ["One."]}}):
        file = libriheavy(tmp_path, [cut_of(supervisions=[{"start": 0, **only}])])
        assert [u.text for u in read("libriheavy", file)[0]] == ["One."]
        assert reasons(read("libriheavy", file, casing="upper")[1]) == [("libriheavy_cuts_small.jsonl.gz", 1, "has no text")]
    file = libriheavy(tmp_path, [cut_of(supervisions=[{"start": 0, "text": "ONE"}])])
    assert [u.text for u in read("libriheavy", file, casing="upper")[0]] == ["ONE"]


def test_a_torn_file_of_cuts_keeps_what_is_whole(tmp_path: Path) -> None:
    put(tmp_path / "small/1/a.flac")
    file = libriheavy(tmp_path, [cut_of(str(i) + os.urandom(40).hex()) for i in range(2000)])
    file.write_bytes(file.read_bytes()[:-9000])
    utterances, unusable = read("libriheavy", tmp_path)
    assert 500 < len(utterances) < 2000 and "gzip" in unusable[-1].reason


def test_common_voice_is_its_table(shared: Path) -> None:
    """Real clips: the sentences as CSV's quotes mean them."""
    folder = shared / "data" / "common_voice_en"
    with (folder / "validated.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    utterances, unusable = read("common_voice", folder)
    assert not unusable and len(utterances) == len(rows) == 96
    for row, utterance in zip(rows, utterances, strict=True):
        assert utterance.id == Path(row["path"]).stem
        assert utterance.path == folder / "clips" / row["path"] and utterance.text == row["sentence"]
        votes = {"up_votes": int(row["up_votes"]), "down_votes": int(row["down_votes"])}
        given = {key: row[key] for key in ("age", "gender", "accent")}
        assert utterance.columns == {"speaker": row["client_id"], "split": "validated", **votes, **given}
    assert any(utterance.text.startswith("\"I'm a woman") for utterance in utterances)


def test_common_voice_releases(tmp_path: Path) -> None:
    """Newer columns are understood, quotes that are text stay, and one that is not closed swallows nothing."""
    rows = [
        "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment",
        'x\ta.mp3\ts\t"Hello"\t2\t0\ttwenties\tfemale_feminine\tScottish\ten\t',
        'x\tb.mp3\ts\t"Open\t\t0\t\t\t\ten',
        'x\tc\ts\t""\t2\t0\t\t\t\ten\t',
        'x\td\ts\t"""Yes,"" he said."\t2\t0\t\t\t\ten\t',
        'x\te.mp3\ts\t"a" "b"\t2\t0\t\t\t\ten\t',
        "x\tgone.mp3\ts\tGone\t2\t0\t\t\t\ten\t",
        "x\t../a.mp3\ts\tOut\t2\t0\t\t\t\ten\t",
        "x\t\ts\tNone\t2\t0\t\t\t\ten\t",
        "x\ta.mp3\ts\tTwice\t2\t0\t\t\t\ten\t",
    ]
    put(tmp_path / "validated.tsv", "\n".join(rows))
    put(tmp_path / "dev.tsv", "\n".join(rows[:2]))
    for name in "abcde":
        put(tmp_path / "clips" / f"{name}.mp3")
    utterances, unusable = read("common_voice", tmp_path, name="cv")
    assert [(u.id, u.text) for u in utterances] == [
        ("cv_a", '"Hello"'),
        ("cv_b", '"Open'),
        ("cv_d", '"Yes," he said.'),
        ("cv_e", '"a" "b"'),
    ]
    known = {"speaker": "x", "split": "validated", "down_votes": 0, "locale": "en"}
    assert utterances[0].columns == known | {"up_votes": 2, "age": "twenties", "gender": "female_feminine", "accent": "Scottish"}
    assert utterances[1].columns == known | {"age": "", "gender": "", "accent": ""}
    assert [(index, reason) for _, index, reason in reasons(unusable)] == [
        (4, "has no text"),
        (7, "names a recording that is not there"),
        (8, "names a recording outside the folder"),
        (9, "names no recording"),
        (10, "gives the id 'cv_a' a second time"),
    ]
    assert [u.columns["split"] for u in read("common_voice", tmp_path, splits=("dev",))[0]] == ["dev"]


MANIFEST = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender\tis_gold_transcript\taccent"
SEGMENT = "20180613-0900-PLENARY-15-en_20180613-15:58:29_"


def voxpopuli(root: Path) -> Path:
    folder = root / "transcribed_data" / "en"
    (folder / "2018").mkdir(parents=True)
    for index in range(4):
        soundfile.write(folder / "2018" / f"{SEGMENT}{index}.ogg", np.zeros(1600, np.float32), 16000)
    rows = {
        "train": [
            f'{SEGMENT}0\tThe "first".\tthe first\t28\ttrain\tmale\tFalse\tNone',
            f"{SEGMENT}1\tThe second.\t\tNone\ttrain\tfemale\tTrue\t",
        ],
        "test": [
            f"{SEGMENT}2\tA\ttab\ta tab\t28\ttest\tmale\tFalse\tNone",
            f"{SEGMENT}9\tGone.\tgone\t28\ttest\tmale\tFalse\tNone",
            "x\t\t",
        ],
    }
    rows["test"] += ["../../../../x\tOut.\tout\t28\ttest\tmale\tFalse\tNone", f"{SEGMENT}3\t\t\t28\ttest\tmale\tFalse\tNone"]
    for split, lines in rows.items():
        put(folder / f"asr_{split}.tsv", "\n".join([MANIFEST, *lines]) + "\n")
    return root


def test_voxpopuli_is_its_manifests(tmp_path: Path) -> None:
    """The normalised text or else the original; quotes are text; a speaker called None is nobody's name."""
    root = voxpopuli(tmp_path)
    utterances, unusable = read("voxpopuli", root, name="vp")
    folder = root / "transcribed_data" / "en"
    assert [(u.id, u.text, u.path) for u in utterances] == [
        (f"vp_{SEGMENT}0", "the first", folder / "2018" / f"{SEGMENT}0.ogg"),
        (f"vp_{SEGMENT}1", "The second.", folder / "2018" / f"{SEGMENT}1.ogg"),
    ]
    known = {"split": "train", "language": "en"}
    assert utterances[0].columns == known | {"speaker": "28", "gender": "male", "is_gold_transcript": "False"}
    assert utterances[1].columns == known | {"gender": "female", "is_gold_transcript": "True"}
    assert reasons(unusable) == [
        ("asr_test.tsv", 2, "has 9 cells for 8 columns"),
        ("asr_test.tsv", 3, "names a recording that is not there"),
        ("asr_test.tsv", 4, "names no recording or no split"),
        ("asr_test.tsv", 5, "names a recording outside the folder"),
        ("asr_test.tsv", 6, "has no text"),
    ]
    for directory in (root / "transcribed_data", folder):
        assert read("voxpopuli", directory, name="vp") == (utterances, unusable)
    assert read("voxpopuli", root, name="vp", splits=("train",)) == (utterances, [])


@pytest.mark.parametrize("name", ["asr_en.tsv", "asr_en.tsv.gz"])
def test_voxpopulis_annotations(tmp_path: Path, name: str) -> None:
    """Where there are no manifests: columns apart by `|` with CSV's quotes; splits without published recordings are left out."""
    folder = voxpopuli(tmp_path) / "transcribed_data" / "en"
    manifests = read("voxpopuli", folder)[0]
    for split in ("train", "test"):
        (folder / f"asr_{split}.tsv").unlink()
    session, segment = SEGMENT.rsplit("-", 1)
    rows = ["session_id|id_|original_text|normed_text|speaker_id|split|gender|vad"]
    rows += [
        f'{session}|{segment}0|"The ""first""."|the first|28|train|male|[]',
        f'{session}|{segment}1|"The second."||None|train|female|[]',
    ]
    rows += [f"{session}|{segment}2|Two.|two|28|test|male|[]", f"{session}|{segment}7|Seven.|seven|28|invalid|male|[]"]
    content = "\n".join(rows).encode()
    put(folder / name, gzip.compress(content) if name.endswith(".gz") else content)
    utterances, unusable = read("voxpopuli", tmp_path)
    assert not unusable and [u.columns["split"] for u in utterances] == ["train", "train", "test"]
    assert [(u.id, u.path, u.text) for u in utterances[:2]] == [(u.id, u.path, u.text) for u in manifests]
    assert [u.text for u in read("voxpopuli", tmp_path, splits=("test",))[0]] == ["two"]


def test_torn_annotations(tmp_path: Path) -> None:
    content = gzip.compress(b"id_|session_id|normed_text|split\n" + os.urandom(9000).hex().encode())
    put(tmp_path / "en/asr_en.tsv.gz", content[:-4000])
    with pytest.raises(DataError, match="cannot be read"):
        read("voxpopuli", tmp_path)


def test_an4_is_its_lists(shared: Path) -> None:
    """Real recordings: each file id with its line of the transcription."""
    folder = shared / "data" / "an4"
    lines = (folder / "etc/an4_train.transcription").read_text().splitlines()
    texts = {line.split()[-1].strip("()"): " ".join(line.split()[1:-2]) for line in lines}
    names = (folder / "etc/an4_train.fileids").read_text().split()
    utterances, unusable = read("an4", folder)
    assert not unusable and len(utterances) == len(names) == 948
    for name, utterance in zip(names, utterances, strict=True):
        assert utterance.id == "an4_" + name.split("/")[-1] and utterance.text == texts[name.split("/")[-1]]
        assert utterance.path == folder / "wav" / f"{name}.ogg"
        assert utterance.columns == {"speaker": name.split("/")[1], "split": "train"}
    assert len({utterance.columns["speaker"] for utterance in utterances}) == 74


def test_an4_in_halves(tmp_path: Path) -> None:
    """Both splits, marks or none; NIST's sphere files too."""
    put(tmp_path / "etc/an4_train.fileids", "an4_clstk/f/a-f\nan4_clstk/f/b-f\nan4_clstk/f/c-f\n../../x\n\n")
    put(
        tmp_path / "etc/an4_train.transcription",
        "<s> YES </s> (a-f)\n<s> NO </s> (c-f)\nno mark\n<s> NO </s> (d-f)\n<s> AGAIN </s> (a-f)\n\n",
    )
    put(tmp_path / "etc/an4_test.fileids", "an4test_clstk/m/e-m\n")
    put(tmp_path / "etc/an4_test.transcription", "RUBOUT G (e-m)\n")
    for name in ("an4_clstk/f/a-f.wav", "an4_clstk/f/b-f.wav", "an4test_clstk/m/e-m.sph"):
        put(tmp_path / "wav" / name)
    utterances, unusable = read("an4", tmp_path)
    assert [(u.id, u.text, u.path.suffix, dict(u.columns)) for u in utterances] == [
        ("an4_e-m", "RUBOUT G", ".sph", {"speaker": "m", "split": "test"}),
        ("an4_a-f", "YES", ".wav", {"speaker": "f", "split": "train"}),
    ]
    assert reasons(unusable) == [
        ("an4_train.transcription", 3, "is not of the form TEXT (UTTERANCE)"),
        ("an4_train.transcription", 5, "gives a text a second time"),
        ("an4_train.fileids", 2, "has no text"),
        ("an4_train.fileids", 3, "names a recording that is not there"),
        ("an4_train.fileids", 4, "names a recording outside the folder"),
        ("an4_train.transcription", 4, "has text but no recording"),
    ]
    assert [u.id for u in read("an4", tmp_path, splits=("test",))[0]] == ["an4_e-m"]


TABLES = {  # layout, the file to break, its first line, what is apart by what
    "tsv": ("folder", "transcripts.tsv", "text\tstart\tpath", "\t"),
    "csv": ("folder", "metadata.csv", "text,file_name,duration", ","),
    "jsonl": ("folder", "transcripts.jsonl", '{"path": "a.wav", "text": "one"}', ":"),
    "librispeech": ("librispeech", "dev/1/2/1-2.trans.txt", "1-2-0 ONE", " "),
    "common_voice": ("common_voice", "validated.tsv", "path\tsentence\tclient_id\tup_votes", "\t"),
    "manifest": ("voxpopuli", "en/asr_dev.tsv", "split\tid\tnormalized_text", "\t"),
    "annotations": ("voxpopuli", "en/asr_en.tsv", "split|id_|normed_text|session_id", "|"),
    "fileids": ("an4", "etc/an4_test.fileids", "a/b", "/"),
    "transcription": ("an4", "etc/an4_test.transcription", "TEXT (b)", " "),
}
WORDS = st.sampled_from(
    ["", ".", "..", "/", "dev", "1-2-1", "a", "b", "(b)", '"', '""', "\0", "\r", "None", "-1", "é", "{", "a.wav", "<s>"]
)


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(WORDS | st.text(max_size=5) | st.binary(max_size=3), max_size=6), max_size=6))
def test_no_line_stops_a_reader(tmp_path_factory: pytest.TempPathFactory, name: str, lines: list[list[str | bytes]]) -> None:
    """Whatever stands in a table is an utterance, an entry that is told, or an error for the user; all of it can be written as JSON."""
    layout, file, header, mark = TABLES[name]
    root = tmp_path_factory.mktemp("broken")
    for neighbour in ("a.wav", "dev/1/2/1-2-0.flac", "etc/an4_test.fileids", "etc/an4_test.transcription", "en/x/x.ogg", "clips/a.mp3"):
        put(root / neighbour, b"a/b")
    cells = [[cell if isinstance(cell, bytes) else cell.encode("utf-8", "surrogatepass") for cell in line] for line in lines]
    put(root / file, b"\n".join([header.encode(), *(mark.encode().join(line) for line in cells)]))
    try:
        utterances, unusable = read(layout, root)
    except DataError:
        return
    json.dumps([[u.id, u.text, dict(u.columns)] for u in utterances] + [vars(u) for u in unusable], ensure_ascii=False).encode()
    assert all(u.text.strip() and u.path.is_file() and ".." not in u.path.parts for u in utterances)
    assert len({u.id for u in utterances}) == len(utterances)


ANYTHING = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3)
ANYTHING |= st.lists(ANYTHING, max_size=2) | st.dictionaries(st.sampled_from(["start", "texts", "custom", "sources"]), ANYTHING, max_size=2)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 20), ANYTHING), min_size=1, max_size=3))
def test_no_cut_stops_the_reader(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, Any]]) -> None:
    """A cut with anything in the place of anything."""
    root = tmp_path_factory.mktemp("cuts")
    put(root / "small/1/a.flac")
    cut = cut_of()
    for place, value in changes:
        spots: list[tuple[Any, Any]] = [(cut, key) for key in cut]
        for holder, key in spots:
            inner = holder[key]
            spots += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ())]
        holder, key = spots[place % len(spots)]
        holder[key] = value
    libriheavy(root, [cut, cut_of("behind")], "libriheavy_cuts_dev.jsonl")
    utterances, unusable = read("libriheavy", root)
    assert "libriheavy_behind" in [u.id for u in utterances]
    assert all(u.start >= 0 and u.duration and 0 < u.duration < 1e9 for u in utterances)
    json.dumps([[u.id, u.text, dict(u.columns)] for u in utterances] + [vars(u) for u in unusable], ensure_ascii=False).encode()
