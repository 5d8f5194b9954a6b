"""Corpora: a folder of one's own, and what is asked for of any corpus. What is broken is told and left behind."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from most_ray.errors import ConfigError, DataError
from most_ray.speech.corpora.corpus import (
    LAYOUTS,
    CorpusOptions,
    Utterance,
    check_conditions,
    dataset_name,
    matches_all,
    parse_condition,
    read_corpus,
)
from tests.support.corpora import librispeech, put, read, reasons


def table(folder: Path, *rows: str, name: str = "transcripts.tsv", recordings: Sequence[str] = ("a.wav", "b.wav")) -> Path:
    for recording in recordings:
        put(folder / recording)
    put(folder / name, "\n".join(rows) + "\n")
    return folder


# A folder with a table


def test_a_folder_is_its_table(shared: Path) -> None:
    """Real digits: every row of the table, in its order, with all its columns."""
    with (shared / "data/fsdd/transcripts.tsv").open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    utterances, unusable = read("folder", shared / "data" / "fsdd")
    assert not unusable and len(utterances) == len(rows) == 2500
    for row, utterance in zip(rows, utterances, strict=True):
        assert utterance.id == "fsdd_" + Path(row["path"]).stem
        assert utterance.path == shared / "data" / "fsdd" / row["path"]
        assert utterance.text == row["text"]
        assert utterance.columns == {"speaker": row["speaker"], "take": row["take"], "split": row["split"]}
        assert (utterance.start, utterance.duration) == (0.0, None)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("transcripts.tsv", ["path\ttext\tspeaker", "a.wav\tHe said, twice\tx", "b.wav\t Two \ty"]),
        ("transcripts.tsv", ["\ufeffpath\ttext\tspeaker\r", "a.wav\tHe said, twice\tx\r", "\r", "b.wav\tTwo\ty\r"]),
        (
            "transcripts.jsonl",
            ['{"path": "a.wav", "text": "He said, twice", "speaker": "x"}', '{"speaker":"y","text":"Two","path":"./b.wav"}'],
        ),
        ("metadata.csv", ["file_name,text,speaker", 'a.wav,"He said, twice",x', "b.wav,Two,y"]),
        ("metadata.csv", ["file_name,transcription,speaker", 'a.wav,"He said, twice",x', "b.wav,Two,y"]),
        (
            "metadata.jsonl",
            [
                '{"file_name": "a.wav", "transcription": "He said, twice", "speaker": "x"}',
                '{"file_name":"b.wav","text":"Two","speaker":"y"}',
            ],
        ),
    ],
)
def test_all_tables_say_the_same(tmp_path: Path, name: str, lines: list[str]) -> None:
    utterances, unusable = read("folder", table(tmp_path, *lines, name=name), name="n")
    assert not unusable
    assert [(u.id, u.text, dict(u.columns)) for u in utterances] == [
        ("n_a", "He said, twice", {"speaker": "x"}),
        ("n_b", "Two", {"speaker": "y"}),
    ]


def test_a_row_may_be_a_part_of_a_recording(tmp_path: Path) -> None:
    """start and duration are seconds; two parts of one recording have different ids."""
    rows = ["path\ttext\tstart\tduration", "a.wav\tone\t0\t1.5", "a.wav\ttwo\t1.5\t2", "a.wav\tthree\t3.5\t", "b.wav\tall\t\t"]
    utterances, unusable = read("folder", table(tmp_path, *rows), name="n")
    assert not unusable
    assert [(u.id, u.start, u.duration, dict(u.columns)) for u in utterances] == [
        ("n_a_0", 0.0, 1.5, {}),
        ("n_a_1500", 1.5, 2.0, {}),
        ("n_a_3500", 3.5, None, {}),
        ("n_b", 0.0, None, {}),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b.wav\t\t", "has no text"),
        ("b.wav", "has no text"),
        ("b.wav\t  \t", "has no text"),
        ("\ttwo\t", "names no recording"),
        ("c.wav\ttwo\t", "names a recording that is not there"),
        ("c\0.wav\ttwo\t", "names a recording that is not there"),
        (f"{'c' * 300}.wav\ttwo\t", "names a recording that is not there"),
        (".\ttwo\t", "names a recording that is not there"),
        ("../a.wav\ttwo\t", "names a recording outside the folder"),
        ("x/../../a.wav\ttwo\t", "names a recording outside the folder"),
        ("x/../a.wav\ttwo\t", "gives the id 'n_a' a second time"),
        ("a.wav\ttwo\t", "gives the id 'n_a' a second time"),
        ("b.wav\ttwo\tx\ty", "has 4 cells for 3 columns"),
        ("b.wav\ttwo\t-1", "has a start or a duration that is not a number of seconds: '-1', None"),
        ("b.wav\ttwo\tnan", "has a start or a duration that is not a number of seconds: 'nan', None"),
        ("b.wav\ttwo\t0:10", "has a start or a duration that is not a number of seconds: '0:10', None"),
    ],
)
def test_bad_rows_are_told_and_the_others_kept(tmp_path: Path, row: str, reason: str) -> None:
    folder = table(tmp_path, "path\ttext\tstart", "a.wav\tone\t", row, "c/d.wav\tthree\t", recordings=("a.wav", "b.wav", "c/d.wav"))
    utterances, unusable = read("folder", folder, name="n")
    assert [utterance.id for utterance in utterances] == ["n_a", "n_d"]
    assert reasons(unusable)[0] == ("transcripts.tsv", 3, reason)
    unnamed = not row.startswith("b.wav") or "cells" in reason  # which of its cells too many names the recording is not known
    assert reasons(unusable)[1:] == [("b.wav", 0, "is named by no row: a recording without text")] * unnamed


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"path": "b.wav"}', "has no text"),
        ('{"path": "b.wav", "text": 3}', "has no text"),
        ('{"text": "two"}', "names no recording"),
        ('{"path": ["b.wav"], "text": "two"}', "names no recording"),
        ('{"path": "b.wav", "text": "two", "start": 0, "duration": 0}', "has a start or a duration that is not a number of seconds: 0, 0"),
        ('{"path": "b.wav", "text": "two", "start": true}', "has a start or a duration that is not a number of seconds: True, None"),
        ('{"path": "b.wav", "text": "\\ud800"}', "holds bytes that are not UTF-8, or half a surrogate pair, which is not text"),
        ('{"path": "\\ud800.wav", "text": "two"}', "holds bytes that are not UTF-8, or half a surrogate pair, which is not text"),
        ('{"path": "b.wav", "text": "two", "snr": NaN}', "has a column with a number that is not finite"),
        ('["b.wav", "two"]', "is a JSON list, not an object"),
        ('{"path": "b.wav", "text": "two"', r"is not JSON at byte .*"),
    ],
)
def test_bad_json_rows_are_told_and_the_others_kept(tmp_path: Path, row: str, reason: str) -> None:
    rows = ('{"path": "a.wav", "text": "one"}', row, '{"path": "c.wav", "text": "three", "snr": 3.5, "tags": ["x"]}')
    folder = table(tmp_path, *rows, name="transcripts.jsonl", recordings=("a.wav", "b.wav", "c.wav"))
    utterances, unusable = read("folder", folder, name="n")
    assert [(u.id, dict(u.columns)) for u in utterances] == [("n_a", {}), ("n_c", {"snr": 3.5, "tags": ["x"]})]
    assert unusable[0].index == 2 and re.fullmatch(reason, unusable[0].reason)
    json.dumps([vars(item) for item in unusable], ensure_ascii=False).encode()


def test_unnamed_recordings_are_told(tmp_path: Path) -> None:
    """Anywhere below the folder, whatever the case of their suffix; other files and hidden ones are nobody's business."""
    folder = table(
        tmp_path / "c",
        "path\ttext",
        "a.wav\tone",
        f"{tmp_path}/c/e/b.wav\ttwo",
        f"{tmp_path}/far.wav\tthree",
        recordings=["a.wav", "e/b.wav"],
    )
    for name in ("far.wav", "c/x.FLAC", "c/e/y.ogg", "c/notes.pdf", "c/.hidden.wav", "c/.cache/z.wav"):
        put(tmp_path / name)
    utterances, unusable = read("folder", folder)
    assert [utterance.id for utterance in utterances] == ["c_a", "c_b", "c_far"]
    assert [item.file for item in unusable] == [str(folder / "x.FLAC"), str(folder / "e" / "y.ogg")]
    assert {item.reason for item in unusable} == {"is named by no row: a recording without text"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"transcripts.tsv": b"file\ttext\n"}, "no column 'path'"),
        ({"transcripts.tsv": b"path\ttxt\n"}, "no column 'text'. Did you mean 'txt'"),
        ({"transcripts.tsv": b""}, "no column 'path'"),
        ({"transcripts.tsv": b"path\ttext\na.wav\tcaf\xe9\n"}, "not UTF-8 at byte 19. Save"),
        ({"transcripts.tsv": b"path\ttext\n" + b"x" * ((1 << 20) - 11) + "é".encode()[:1]}, f"not UTF-8 at byte {(1 << 20) - 1}"),
        ({"transcripts.jsonl": b'{"path": "a.wav", "text": "caf\xe9"}'}, "not UTF-8 at byte 30"),
        ({"transcripts.tsv": "path\ttext".encode("utf-16")}, "not UTF-8 at byte 0"),
        ({"metadata.csv": b'file_name,text\na.wav,"one\n' + b"x" * 200_000}, "is not CSV .*quote"),
        ({"metadata.csv": b"path,text\n", "transcripts.tsv": b"path\ttext\n"}, "holds transcripts.tsv and metadata.csv. Keep"),
        ({}, "no transcripts.tsv, .* and no recording. Write"),
        ({"note.txt": b"one"}, "no transcripts.tsv, .* and no recording. Write"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read("folder", tmp_path)


# A folder with texts beside recordings


def test_recordings_beside_their_texts(tmp_path: Path) -> None:
    """Ids and the folder come from the path below the root; spaces, Unicode and several dots in names are kept; lines are joined."""
    for stem, text in {"b c.1": "two\n", "a": "\ufeffone", "日本/ü ber/x": " first \r\n\r\n second\n"}.items():
        put(tmp_path / f"{stem}.wav")
        put(tmp_path / f"{stem}.txt", text)
    put(tmp_path / "README.md", "not audio")
    put(tmp_path / ".a.wav")
    utterances, unusable = read("folder", tmp_path, name="n")
    assert not unusable
    assert [(u.id, u.text, dict(u.columns), u.path.relative_to(tmp_path).as_posix()) for u in utterances] == [
        ("n_a", "one", {}, "a.wav"),
        ("n_b c.1", "two", {}, "b c.1.wav"),
        ("n_日本_ü ber_x", "first second", {"folder": "日本/ü ber"}, "日本/ü ber/x.wav"),
    ]


def test_missing_halves_are_told(tmp_path: Path) -> None:
    for name, text in {"a.wav": "", "a.txt": "one", "b.wav": "", "c.txt": "three", "d.wav": "", "d.txt": " \n", "e/f.txt": "six"}.items():
        put(tmp_path / name, text)
    put(tmp_path / "g.wav")
    put(tmp_path / "g.txt", b"caf\xe9")
    utterances, unusable = read("folder", tmp_path, name="n")
    assert [utterance.id for utterance in utterances] == ["n_a"]
    assert [(*reason, item.id) for reason, item in zip(reasons(unusable), unusable, strict=True)] == [
        ("b.wav", 0, "has no text", "n_b"),
        ("d.wav", 0, "has no text", "n_d"),
        ("g.wav", 0, "holds bytes that are not UTF-8, or half a surrogate pair, which is not text", "n_g"),
        ("c.txt", 0, "has text but no recording", "n_c"),
        ("f.txt", 0, "has text but no recording", "n_e_f"),
    ]


def test_two_recordings_never_share_an_id(tmp_path: Path) -> None:
    """a_b.wav and a/b.wav: both are kept. a.wav and a.flac: the first in the order of reading is kept, the other is told."""
    for name in ("a.wav", "a.flac", "a.txt", "a_b.wav", "a_b.txt", "a/b.wav", "a/b.txt"):
        put(tmp_path / name, "text" if name.endswith("txt") else "")
    utterances, unusable = read("folder", tmp_path, name="n")
    found = {utterance.id: utterance.path.relative_to(tmp_path).as_posix() for utterance in utterances}
    assert found == {"n_a": "a.flac", "n_a_b": "a_b.wav", "n_a/b.wav": "a/b.wav"}
    assert reasons(unusable) == [("a.wav", 0, "gives the id 'n_a' a second time")]


def test_names_that_are_not_utf8_are_told(tmp_path: Path) -> None:
    put(tmp_path / "a.wav")
    put(tmp_path / "a.txt", "one")
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    for suffix in (b".wav", b".txt"):
        with open(raw + suffix, "wb") as stream:
            stream.write(b"two")
    utterances, unusable = read("folder", tmp_path)
    assert len(utterances) == 1 and [item.reason[:28] for item in unusable] == ["holds bytes that are not UTF"]
    json.dumps(vars(unusable[0]), ensure_ascii=False).encode()


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "far/a.wav")
    put(tmp_path / "far/a.txt", "one")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/near").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/broken.wav").symlink_to(tmp_path / "nowhere")
    utterances, unusable = read("folder", tmp_path / "corpus")
    assert [utterance.id for utterance in utterances] == ["corpus_near_a"]
    assert reasons(unusable) == [("broken.wav", 0, "has no text")]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="/\\\0\t\n\r\x85", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
            lambda name: not name.startswith((".", "\ufeff")) and len(name.encode()) < 200
        ),
        st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=1,
        max_size=5,
    )
)
def test_any_name_and_text_come_back(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> None:
    """The same names and texts by a table of either form and by files; whatever Unicode calls a line's end is none."""
    folder = tmp_path_factory.mktemp("any")
    for name in texts:
        put(folder / f"{name}.wav")
    expected = sorted((f"n_{name}", text.strip()) for name, text in texts.items())
    quoted = io.StringIO()
    csv.writer(quoted, delimiter="\t", lineterminator="\n").writerows([f"{name}.wav", text] for name, text in texts.items())
    rows = {"transcripts.tsv": ["path\ttext", quoted.getvalue()]}
    rows["transcripts.jsonl"] = [json.dumps({"path": f"{name}.wav", "text": text}) for name, text in texts.items()]
    for file, lines in rows.items():
        put(folder / file, "\n".join(lines) + "\n")
        utterances, unusable = read("folder", folder, name="n")
        assert not unusable and sorted((u.id, u.text) for u in utterances) == expected
        (folder / file).unlink()
    for name, text in texts.items():
        put(folder / f"{name}.txt", text)
    utterances, unusable = read("folder", folder, name="n")
    assert not unusable and sorted((u.id, u.text) for u in utterances) == expected


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """A table of 15 MB: what stays is a digest of each id."""
    put(tmp_path / "a.wav")
    with (tmp_path / "transcripts.tsv").open("w") as stream:
        stream.write("path\ttext\tstart\n")
        stream.writelines(f"a.wav\t{'x' * 5000}{i}\t{i}\n" for i in range(3_000))
    items = read_corpus(CorpusOptions("folder", tmp_path))
    next(items)
    tracemalloc.start()
    try:
        assert sum(isinstance(item, Utterance) for item in items) == 2_999
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


# What is asked for


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "folder"])
def test_folders_of_something_else(tmp_path: Path, layout: str) -> None:
    """Each says what it looked for and what to give; a split that is not there is named, too."""
    put(tmp_path / "x/readme.md")
    with pytest.raises(DataError, match=r"holds no .* Give the folder"):
        read(layout, tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read(layout, tmp_path / "nowhere")
    message = "holds no .*jsonl.gz" if layout == "libriheavy" else "is not a folder"
    with pytest.raises(DataError, match=message):
        read(layout, tmp_path / "x" / "readme.md")


def test_wrong_options(tmp_path: Path) -> None:
    librispeech(tmp_path, {"dev/1/2": "1-2-0 ONE"}, ("dev/1/2/1-2-0.flac",))
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("libreespeech", {}, "corpus = 'libreespeech'.* Did you mean 'librispeech'"),
        ("librispeech", {"casing": "upper"}, "casing = 'upper'.*libriheavy"),
        ("libriheavy", {"casing": "lower"}, "must be cased or upper"),
        ("librispeech", {"splits": ("dev", "def")}, "splits = 'def'.* Did you mean 'dev'"),
        ("folder", {"splits": ("dev",)}, "splits.*where"),
    ]
    for layout, options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            read(layout, tmp_path, **options)


def test_data_set_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout's name, for a folder the folder's, also where that is written as a dot."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert dataset_name(CorpusOptions("folder", Path())) == "mine"
    assert dataset_name(CorpusOptions("folder", tmp_path / "mine", name="x")) == "x"
    assert dataset_name(CorpusOptions("an4", tmp_path)) == "an4"


def test_conditions() -> None:
    """Values are compared as text, whatever the column holds; a column that no utterance has is told with the nearest one."""
    utterance = Utterance("x", Path("x"), "x", {"speaker": "a", "votes": 3})

    def holds(*words: str) -> bool:
        return matches_all(utterance, [parse_condition(word) for word in words])

    assert holds() and holds("speaker=a,b") and holds("votes=3", "speaker!=b") and holds("accent=") and holds("accent!=x")
    assert not holds("speaker=b") and not holds("speaker=a", "votes!=3") and not holds("accent=x")
    check_conditions([parse_condition("speaker=a")], {"speaker", "votes"})
    with pytest.raises(ConfigError, match="Did you mean 'speaker'"):
        check_conditions([parse_condition("speaker=a"), parse_condition("speker=a")], {"speaker", "votes"})
    for word in ("speaker", "=a", "!=a"):
        with pytest.raises(ConfigError, match="not of the form"):
            parse_condition(word)


def test_a_duration_without_a_start_cuts_nothing(tmp_path: Path) -> None:
    """Tables often tell how long a recording is, rounded."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.wav").write_bytes(b"RIFF")
    (folder / "transcripts.tsv").write_text("path\ttext\tduration\na.wav\tone\t3.2\n")
    (utterance,) = read_corpus(CorpusOptions("folder", folder))
    assert isinstance(utterance, Utterance) and utterance.duration is None and "duration" not in utterance.columns


def test_every_utterance_has_a_fold(tmp_path: Path) -> None:
    """So that recordings without speakers can be divided: each in one of ten, whatever else is in the corpus."""
    utterances = [Utterance(f"n_{index}", Path("a.wav"), "x", {}) for index in range(500)]
    folds = [[u.id for u in utterances if matches_all(u, [parse_condition(f"fold={fold}")])] for fold in range(10)]
    assert sorted(name for fold in folds for name in fold) == sorted(u.id for u in utterances) and min(map(len, folds)) > 25
    rest = [u.id for u in utterances if matches_all(u, [parse_condition("fold!=0")])]
    assert sorted(rest + folds[0]) == sorted(u.id for u in utterances)
    check_conditions([parse_condition("fold=0")], {"speaker"})


# What is easily misread


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('g\t"He said ""hi"""\nh\tplain\n', ['He said "hi"', "plain"]),
        ('g\t"two\nlines"\nh\t"a\ttab"\n', ["two lines", "a\ttab"]),
        ('g\t"two\r\n\r\nlines"\r\nh\tx\r\n', ["two lines", "x"]),
        ('g\t""""\nh\t"a ""b"""\n', ['"', 'a "b"']),
        ('g\t"Yes"\nh\t"No, he said."\n', ['"Yes"', '"No, he said."']),  # nothing in it needs the quotes: they are text
        ('g\t"Yes," he said.\nh\t"a ""b"""\n', ['"Yes," he said.', 'a "b"']),  # in a table that is not CSV, a cell may be
        ('g\t"Open\nh\tinch 5"\ni\ta "b"\n', ['"Open', 'inch 5"', 'a "b"']),
        ('g\t"one\nh\ttwo"\ni\t"a ""b"""\n', ["one h\ttwo", 'a "b"']),
        ('g\tsaid "hi"\nh\t"x"\n', ['said "hi"', '"x"']),
        ("g\ta\rb\nh\tx\n", ["a b", "x"]),
    ],
)
def test_quotes_of_tables_with_tabs(tmp_path: Path, content: str, texts: list[str]) -> None:
    folder = table(tmp_path, f"path\ttext\n{content}", recordings=("g", "h", "i"))
    assert [utterance.text for utterance in read("folder", folder)[0]] == texts


def test_a_quoted_header_makes_a_table_csv(tmp_path: Path) -> None:
    folder = table(tmp_path, '"path"\t"text"', '"a.wav"\t"one"', '"b.wav"\t"two"')
    assert [utterance.text for utterance in read("folder", folder)[0]] == ["one", "two"]


def test_a_quote_over_two_rows_is_refused(tmp_path: Path) -> None:
    """As CSV one text with a tab and a line break, else two: a guess would lose a recording or its words."""
    with pytest.raises(DataError, match=r"transcripts.tsv:3.* ends a quote that begins in another row"):
        read("folder", table(tmp_path, "path\ttext", 'a.wav\t"Open', 'b.wav\tclosed"'))


def test_one_stem_in_several_folders(tmp_path: Path) -> None:
    """Nothing is lost, and the ids of a table whose names are unique are the names."""
    names = ("s0/SA0.wav", "s1/SA0.wav", "s2/SA0.wav", "s2/SA0.flac", "SA1.wav")
    rows = [f"{name}\ttext {number}\t1" for number, name in enumerate(names)]
    folder = table(tmp_path, "path\ttext\tstart", *rows, "s1/../s1/SA0.wav\tagain\t1", recordings=names)
    utterances, unusable = read("folder", folder, name="n")
    assert [u.id for u in utterances] == ["n_SA0_1000", "n_s1_SA0_1000", "n_s2_SA0_1000", "n_s2/SA0.flac_1000", "n_SA1_1000"]
    assert [item.reason for item in unusable] == ["gives the id 'n_SA0_1000' a second time"]


def test_a_table_for_each_split(tmp_path: Path) -> None:
    """As Hugging Face's audiofolder has them; recordings beside their texts elsewhere are read as ever."""
    for split in ("train", "test"):
        table(tmp_path / "data" / split, "file_name,transcription", f"0.wav,{split}", name="metadata.csv", recordings=("0.wav", "1.wav"))
    put(tmp_path / "more" / "a.wav")
    put(tmp_path / "more" / "a.txt", "beside")
    put(tmp_path / "more" / "metadata.csv", "not a table of recordings")
    utterances, unusable = read("folder", tmp_path, name="n")
    assert [(u.id, u.text, dict(u.columns)) for u in utterances] == [
        ("n_data_test_0", "test", {"folder": "data/test", "split": "test"}),
        ("n_data_train_0", "train", {"folder": "data/train", "split": "train"}),
        ("n_more_a", "beside", {"folder": "more"}),
    ]
    assert [Path(item.file).parent.name for item in unusable if "named by no row" in item.reason] == ["test", "train"]


def test_formats_that_are_not_read_are_told(tmp_path: Path) -> None:
    for name in ("a.wav", "a.txt", "a.m4a", "b.M4A", "b.txt", "c.webm", "d/e.mp4"):
        put(tmp_path / name, "one")
    utterances, unusable = read("folder", tmp_path, name="n")
    assert [utterance.id for utterance in utterances] == ["n_a"]
    assert sorted((Path(item.file).name, item.suffix) for item in unusable) == [("b.M4A", ".m4a"), ("c.webm", ".webm"), ("e.mp4", ".mp4")]


def test_a_link_to_itself_costs_itself(tmp_path: Path) -> None:
    put(tmp_path / "a.wav")
    put(tmp_path / "a.txt", "one")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "x.wav").symlink_to("x.wav")
    put(tmp_path / "x.txt", "two")
    utterances, unusable = read("folder", tmp_path, name="n")
    assert [utterance.id for utterance in utterances] == ["n_a"]
    assert reasons(unusable) == [("x.wav", 0, "names a recording that is not there")]


@pytest.mark.parametrize("depth", [90, 97, 500, 990])
def test_deep_columns_cost_their_row(tmp_path: Path, depth: int) -> None:
    """What is kept can be read again from a list of utterances and from a record, which hold it a little deeper."""
    rows = ['{"path": "a.wav", "text": "one"}', '{"path": "b.wav", "text": "two", "deep": ' + "[" * depth + "]" * depth + "}"]
    utterances, unusable = read("folder", table(tmp_path, *rows, name="transcripts.jsonl"))
    assert [utterance.text for utterance in utterances] == ["one", "two"][: 2 if depth == 90 else 1]
    assert len(unusable) == (depth != 90) or "named by no row" in unusable[-1].reason


def test_units_are_no_transcript(tmp_path: Path) -> None:
    utterances, unusable = read("folder", table(tmp_path, "path\ttext", "a.wav\t[Humming] la", "b.wav\tone [Hu7]"))
    assert [utterance.text for utterance in utterances] == ["[Humming] la"]
    assert [item.reason for item in unusable] == ["has a text with speech units, which is no transcript"]
