"""`most-ray prepare units` and `prepare kmeans`: real corpora, damage, commands that were stopped, forms, k-means files."""

from __future__ import annotations

import shutil
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from most_ray.cli import main
from most_ray.data.ingest import Recipe, ingest_directory
from most_ray.records.record import parse_record, units_hash
from most_ray.speech.corpora.corpus import LAYOUTS, CorpusOptions, parse_condition
from most_ray.speech.units import clustering, corpus_parts, stages
from most_ray.speech.units import prepare as preparing
from most_ray.speech.units.clustering import load_kmeans, save_kmeans
from most_ray.speech.units.corpus_parts import Runner, run_in_process
from most_ray.speech.units.features import Frames
from most_ray.speech.units.prepare import UnitsJob, prepare_units
from tests.support.audio import (
    Counting,
    contents,
    lines_of,
    links,
    prepare,
    records_of,
    refused,
    tones,
    units_command,
)
from tests.support.builders import char_vocabulary

FIT = ("--fit_kmeans", "12")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tones(tmp_path / "corpus")


def run(corpus: Path, output: Path, runner: Runner = run_in_process, **options: Any) -> dict[str, Any]:
    """The command without its parser."""
    options = options if "kmeans" in options else {"fit_kmeans": 12, **options}
    return prepare_units(UnitsJob(CorpusOptions("folder", corpus), output, **options), lambda items, *_: items, lambda _bytes: runner)


# A folder


def test_a_folder_becomes_records(corpus: Path, tmp_path: Path) -> None:
    """Promise 28 of docs/promises.md, its first half."""
    records = prepare(corpus, tmp_path / "out", *FIT, "--where", "split=train", "--perturb", "0.9,1.0")
    assert [record["id"] for record in records] == [*(f"corpus_{i}_sp0.9" for i in range(6)), *(f"corpus_{i}" for i in range(6))]
    assert records[6]["output"] == "word 0"
    assert records[6]["metadata"] == {
        "recording": "0.flac",
        "speaker": "a",
        "split": "train",
        "dataset": "corpus",
        "duration": 0.4,
        "unit_rate_hz": 50.0,
        "deduplicated": True,
    }
    assert records[0]["metadata"] == records[6]["metadata"] | {"speed": 0.9, "duration": 0.444}
    for record in records:
        units = parse_record(record).input
        assert isinstance(units, np.ndarray) and units.max() < 12
        assert (units[1:] != units[:-1]).all()
    manifest = lines_of(tmp_path / "out" / "units.json")[0]
    assert manifest["identity"]["n_units"] == 12 and manifest["identity"]["repeats_removed"] is True
    assert load_kmeans(tmp_path / "out" / "kmeans.npy").shape == (12, 39)
    assert sorted(contents(tmp_path / "out")) == ["kmeans.npy", "prepared.json", "records.jsonl.gz", "units.json"]


def test_the_same_command_gives_the_same_bytes_wherever_the_recordings_lie(corpus: Path, tmp_path: Path) -> None:
    """Also where k-means hears some of the frames only, in files that were copied and in parts of another size."""
    moved = tmp_path / "moved" / "corpus"
    shutil.copytree(corpus, moved, copy_function=shutil.copyfile)
    words = (*FIT, "--fit_frames", "60")
    prepare(corpus, tmp_path / "one", *words)
    prepare(moved, tmp_path / "two", *words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_parts, "PART", 3)
        prepare(moved, tmp_path / "three", *words)
    prepare(corpus, tmp_path / "all", *FIT)
    for name in ("records.jsonl.gz", "units.json", "kmeans.npy"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two != (tmp_path / "all" / name).read_bytes(), name
    assert records_of(tmp_path / "one") == records_of(tmp_path / "three")
    assert (tmp_path / "one/kmeans.npy").read_bytes() == (tmp_path / "three/kmeans.npy").read_bytes()


def test_other_recordings_get_the_same_units(corpus: Path, tmp_path: Path) -> None:
    """What was selected changes neither a speaker's statistics nor the identity; keeping repeats changes the identity."""
    train = prepare(corpus, tmp_path / "train", *FIT, "--where", "split=train")
    known = ("--kmeans", str(tmp_path / "train" / "kmeans.npy"))
    test = prepare(corpus, tmp_path / "test", *known, "--where", "split=test")
    both = prepare(corpus, tmp_path / "both", *known)
    kept = prepare(corpus, tmp_path / "kept", *known, "--keep_repeats")
    assert train + test == both
    assert all(len(one["input"]) > len(two["input"]) for one, two in zip(kept, both, strict=True))
    manifests = [lines_of(tmp_path / name / "units.json")[0] for name in ("train", "test", "kept")]
    assert units_hash(manifests[0]) == units_hash(manifests[1]) != units_hash(manifests[2])


class Loudness:
    """Features that are not normalised per speaker, as an encoder's: two numbers every 20 ms."""

    sample_rate, rate_hz, width, per_speaker, source = 16000, 50.0, 2, False, None
    identity: ClassVar = {"features": "loudness", "settings": {}, "normalisation": "none"}

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        blocks = [wave[: len(wave) // 320 * 320].reshape(-1, 320) for wave in waves]
        return [Frames(np.stack([np.abs(each).max(axis=1), each[:, 0]], axis=1)) for each in blocks]


def test_the_help_shows_the_layouts_of_folders(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On one screen, for every layout that is read: what its folder holds."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["prepare", "units", "--help"])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 60 and max(map(len, shown.splitlines())) <= 80
    listed = " ".join(shown.partition("layouts of folders")[2].split())
    assert all(f"{name} {layout.files}" in listed and layout.files for name, layout in LAYOUTS.items())


def test_speakers_are_counted_without_their_copies(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies at other speeds are other voices to the normalisation, and no other speakers; those of no chosen recording do not count."""
    words = ["prepare", "units", "--input", str(corpus), "--output", str(tmp_path / "out"), "--num_actors", "0", *FIT]
    for changes, said in (
        (["--perturb", "0.9,1.0,1.1"], " of 2 speakers at 3 speeds in 12 units: "),
        (["--perturb", "0.9,1.0,1.1"], " of 2 speakers at 3 speeds in 12 units: "),  # nothing has changed
        (["--where", "speaker=a"], " of 1 speaker in 12 units: "),
    ):
        assert main([*words, *changes]) == 0
        assert said in capsys.readouterr().out


def test_features_that_need_no_speakers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is measured, all are counted; where the centroids are known the recordings are heard once, and only the selected ones."""
    for module in (stages, preparing):
        monkeypatch.setattr(module, "open_extractor", lambda *_: Loudness())
    (corpus / "2.flac").write_bytes(b"no audio")
    counts = run(corpus, tmp_path / "o")
    assert (counts["records"], counts["rejected"], counts["speakers"]) == (7, 1, 2)
    assert "reference" not in lines_of(tmp_path / "o/units.json")[0]
    known, where = tmp_path / "o/kmeans.npy", [parse_condition("speaker=a")]
    assert run(corpus, tmp_path / "again", runner := Counting(), kmeans=known, where=where)["records"] == 3
    assert runner.made == [("EncodeUnits", 0)]
    assert records_of(tmp_path / "again") == [r for r in records_of(tmp_path / "o") if r["metadata"]["speaker"] == "a"]


# Commands that were stopped, or are given again


def made_of(folder: Path) -> dict[str, bytes]:
    """What a command leaves, without the note that it is done."""
    return {name: content for name, content in contents(folder).items() if name != "prepared.json"}


@pytest.mark.parametrize("done", [1, 5, 7])
def test_a_stopped_command_makes_only_what_is_missing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """Four parts to measure, four to encode; the bytes are those of a command that nobody stopped."""
    monkeypatch.setattr(corpus_parts, "PART", 2)
    run(corpus, tmp_path / "whole", whole := Counting())
    assert whole.made == [*(("CollectStatistics", i) for i in range(4)), *(("EncodeUnits", i) for i in range(4))]
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "o", first := Counting(stop_after=done))
    assert not (tmp_path / "o/prepared.json").exists() and not list((tmp_path / "o").glob("records*"))
    run(corpus, tmp_path / "o", second := Counting())
    assert first.made + second.made == whole.made and len(first.made) == done
    assert made_of(tmp_path / "o") == made_of(tmp_path / "whole")


def test_a_part_that_was_half_written_is_made_again(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a part's own name says that it is done."""
    monkeypatch.setattr(corpus_parts, "PART", 2)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "o", Counting(stop_after=6))
    *_, last = sorted((tmp_path / "o/.work").glob("records-*.jsonl.gz"))
    last.rename(last.with_name(f".{last.name}.tmp"))
    run(corpus, tmp_path / "o", again := Counting())
    assert len(again.made) == 3
    run(corpus, tmp_path / "whole")
    assert made_of(tmp_path / "o") == made_of(tmp_path / "whole")


def test_the_order_of_the_parts_does_not_matter(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes finish in any order; the bytes are the same."""
    monkeypatch.setattr(corpus_parts, "PART", 2)
    (corpus / "3.flac").write_bytes(b"no audio")
    for name, runner in (("one", Counting()), ("two", Counting(backwards=True))):
        run(corpus, tmp_path / name, runner, perturb=(0.9, 1.0), fit_frames=50)
    assert made_of(tmp_path / "one") == made_of(tmp_path / "two")


def test_a_finished_command_is_not_repeated(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given again it says so and makes nothing; what it counts is what it counted."""
    first = prepare(corpus, tmp_path / "o", *FIT)
    said = capsys.readouterr().out
    assert prepare(corpus, tmp_path / "o", *FIT) == first
    assert capsys.readouterr().out == said.replace("\n", ": nothing has changed\n")
    run(corpus, tmp_path / "o", runner := Counting())
    assert not runner.made and not (tmp_path / "o/.work").exists()


def _touch(corpus: Path, output: Path) -> None:
    soundfile.write(corpus / "2.flac", np.random.default_rng(0).normal(0, 0.1, 4000), 8000)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (_touch, {}),
        (lambda corpus, _: (corpus / "7.flac").unlink(), {}),
        (lambda corpus, _: (corpus / "transcripts.tsv").write_text("path\ttext\n0.flac\tother\n1.flac\tx\n"), {}),
        (lambda _, output: (output / "records.jsonl.gz").unlink(), {}),
        (lambda _, output: (output / "units.json").unlink(), {}),
        (lambda _, output: (output / "kmeans.npy").write_bytes(b""), {}),
        (lambda _, output: (output / "prepared.json").unlink(), {}),
        (lambda _, output: (output / "prepared.json").write_text("[]"), {}),
        (lambda _, output: (output / "prepared.json").write_text('{"files": []'), {}),
        (lambda *_: None, {"fit_kmeans": 11}),
        (lambda *_: None, {"seed": 1}),
        (lambda *_: None, {"algorithm": "lloyd"}),
        (lambda *_: None, {"fit_frames": 50}),
        (lambda *_: None, {"perturb": (1.0, 1.1)}),
        (lambda *_: None, {"keep_repeats": True}),
        (lambda *_: None, {"max_seconds": 0.5}),
        (lambda *_: None, {"form": "jsonl"}),
        (lambda *_: None, {"speaker_column": "split"}),
    ],
)
def test_what_has_changed_is_made_anew(
    corpus: Path, tmp_path: Path, change: Callable[[Path, Path], object], options: dict[str, Any]
) -> None:
    """A recording, the table, what was made, or a flag; and then just as in a new folder."""
    run(corpus, tmp_path / "o", fit_kmeans=12)
    change(corpus, tmp_path / "o")
    assert "unchanged" not in run(corpus, tmp_path / "o", runner := Counting(), **options)
    assert runner.made
    run(corpus, tmp_path / "new", **options)
    assert contents(tmp_path / "o") == contents(tmp_path / "new")
    assert "unchanged" in run(corpus, tmp_path / "o", **options)


# Forms and files


def test_all_forms_hold_the_same_records(corpus: Path, tmp_path: Path) -> None:
    """And become the same tokens."""
    stores = []
    for form in ("jsonl.gz", "jsonl", "json"):
        made = prepare(corpus, tmp_path / form / "asr", *FIT, "--form", form)
        assert (tmp_path / form / "asr" / f"records.{form}").exists()
        store = ingest_directory(tmp_path / form / "asr", Recipe("asr", char_vocabulary(), 400, "reject"), tmp_path / form / "store")
        stores.append((made, [(store.record_id(row), store.input_ids(row).tolist()) for row in range(len(store))]))
    assert stores[0] == stores[1] == stores[2] and len(stores[0][1]) == 8


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl"])
def test_many_records_are_many_files(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Numbered, together each record once in its order; and no file of another command stays."""
    one = prepare(corpus, tmp_path / "one", *FIT)
    monkeypatch.setattr(corpus_parts, "PART", 2)
    monkeypatch.setattr("most_ray.speech.units.output.SHARD_BYTES", 100)
    many = prepare(corpus, tmp_path / "many", *FIT, "--form", form)
    assert sorted(path.name for path in (tmp_path / "many").glob("rec*")) == [f"records-{i:05d}.{form}" for i in range(4)]
    assert many == one
    few = prepare(corpus, tmp_path / "many", *FIT, "--where", "split=test", "--form", form)
    assert [path.name for path in (tmp_path / "many").glob("rec*")] == [f"records.{form}"] and len(few) == 2


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the utterances: the same but for some hundred bytes for each part."""
    monkeypatch.setattr(corpus_parts, "PART", 5)
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 6400), 16000)
    peaks = []
    for count in (10, 12, 120):  # the first loads what is loaded once
        links(tmp_path / str(count), tmp_path / "a.flac", count)
        tracemalloc.start()
        try:
            counts = run(tmp_path / str(count), tmp_path / f"{count}-out", fit_kmeans=5, fit_frames=100)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert counts["records"] == count
    assert peaks[2] < peaks[1] + (200 << 10), peaks


# k-means by itself


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
@pytest.mark.parametrize("algorithm", ["minibatch", "lloyd"])
def test_centroids_can_be_fitted_first(
    corpus: Path, tmp_path: Path, suffix: str, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is the same each time and gives the units that fitting them on the way gives; nothing else is left."""
    (tmp_path / "k").mkdir()
    for name in ("a", "b"):
        words = ["--k", "12", "--algorithm", algorithm, "--output", str(tmp_path / f"k/{name}.{suffix}"), "--num_actors", "0"]
        assert main(["prepare", "kmeans", "--input", str(corpus), *words]) == 0
        assert "12 units of " in capsys.readouterr().out
    assert sorted(contents(tmp_path / "k")) == [f"a.{suffix}", f"b.{suffix}"]
    assert len(set(contents(tmp_path / "k").values())) == 1
    known = prepare(corpus, tmp_path / "known", "--kmeans", str(tmp_path / f"k/a.{suffix}"))
    assert known == prepare(corpus, tmp_path / "fitted", *FIT, "--algorithm", algorithm)
    assert lines_of(tmp_path / "known/units.json") == lines_of(tmp_path / "fitted/units.json")


@pytest.mark.parametrize("most", [60, 100_000])
def test_kmeans_hears_no_more_frames_than_asked_for(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Drawn evenly from all recordings; asked for as many units as they can tell, it counts all frames."""
    heard: list[np.ndarray] = []
    fit = clustering.fit_kmeans

    def spy(frames: np.ndarray, *rest: Any) -> np.ndarray:
        heard.append(frames)
        return fit(frames, *rest)

    monkeypatch.setattr(clustering, "fit_kmeans", spy)
    counts = run(corpus, tmp_path / "o", fit_kmeans=0, fit_frames=most)
    everything = sum(len(parse_record(r).input) for r in prepare(corpus, tmp_path / "all", *FIT, "--keep_repeats"))
    assert len(heard[0]) == min(most, everything) and 60 < everything < 400
    assert counts["units"] == everything // 100


def test_kmeans_of_something_else_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other features, another width, no numbers, too many, pickled: one line that says so, and no records."""
    save_kmeans(tmp_path / "hubert.safetensors", np.zeros((5, 39), np.float32), {"features": "hubert"})
    np.save(tmp_path / "wide.npy", np.zeros((5, 768), np.float32))
    np.save(tmp_path / "nan.npy", np.full((5, 39), np.nan, np.float32))
    np.save(tmp_path / "many.npy", np.zeros((501, 39), np.float32))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "km.joblib").write_bytes(b"anything")
    for name, message in (
        ("hubert.safetensors", "was fitted on other features"),
        ("wide.npy", "was fitted on 768 features, the settings give 39"),
        ("nan.npy", "finite centroids"),
        ("many.npy", "not 1..500"),
        ("object.npy", "cannot be read as an array"),
        ("km.joblib", "can run any code"),
        ("none.npy", "cannot be read as an array"),
    ):
        assert message in refused(capsys, *units_command(corpus, tmp_path / "o", "--kmeans", str(tmp_path / name)))
    assert not (tmp_path / "o").exists()


# Wrong uses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one of them"),
        (["--fit_kmeans", "5", "--kmeans", "k.npy"], "exactly one of them"),
        (["--fit_kmeans", "many"], "is neither a number of units nor auto"),
        (["--fit_kmeans", "²"], "is neither a number of units nor auto"),
        (["--fit_kmeans", "0"], "must be in 2..500"),
        (["--fit_kmeans", "1"], "must be in 2..500"),
        (["--fit_kmeans", "501"], "must be in 2..500"),
        (["--fit_kmeans", "450"], "more units than there are frames"),
        ([*FIT, "--perturb", "fast"], "is not a list of numbers"),
        ([*FIT, "--perturb", "1.0,1.0"], "must hold different speeds"),
        ([*FIT, "--perturb", "nan"], "is not a list of numbers"),
        ([*FIT, "--fit_frames", "0"], "must be at least 1"),
        ([*FIT, "--fit_frames", "11"], "more units than there are frames"),
        ([*FIT, "--seed", "-1"], "must not be negative"),
        ([*FIT, "--max_seconds", "0"], "must be above 0"),
        ([*FIT, "--max_seconds", "nan"], "is not finite"),
        ([*FIT, "--max_seconds", "0.1"], "holds no usable recording"),
        ([*FIT, "--num_actors", "-1"], "must not be negative"),
        ([*FIT, "--gpus_per_actor", "-1"], "must not be negative"),
        ([*FIT, "--features", "mfc"], "is neither mfcc nor"),
        ([*FIT, "--where", "speker=a"], "Did you mean 'speaker'"),
        ([*FIT, "--where", "speaker=z"], "leaves no recording"),
        ([*FIT, "--where", "speaker"], "not of the form"),
        ([*FIT, "--speaker_column", "speker"], "Did you mean 'speaker'"),
        ([*FIT, "--splits", "train"], "are unknown in a folder"),
        ([*FIT, "--casing", "upper"], "is a choice of libriheavy"),
        ([*FIT, "--corpus", "librispeech"], "holds no LibriSpeech"),
        ([*FIT, "--corpus", "timit"], "invalid choice"),
        ([*FIT, "--form", "xml"], "invalid choice"),
        ([*FIT, "--algorithm", "em"], "invalid choice"),
        ([*FIT, "--input", "nowhere"], "does not exist"),
        ([*FIT, "--output", "s3://bucket/x"], "is not a local path"),
        ([*FIT, "--keep_repeat"], "Did you mean 'keep_repeats'"),
    ],
)
def test_wrong_flags(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    """One line, exit code 2, no records."""
    assert message in refused(capsys, *units_command(corpus, tmp_path / "o", *words))
    assert not list(tmp_path.glob("o/records*"))


def test_an_output_that_is_a_file(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "o").touch()
    assert str(tmp_path / "o") in refused(capsys, *units_command(corpus, tmp_path / "o", *FIT))


def test_ray_is_not_loaded_where_nobody_asked_for_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--num_actors 0 works where there is no Ray."""
    monkeypatch.setitem(sys.modules, "most_ray.service.tasks.unit_tasks", None)
    assert len(prepare(corpus, tmp_path / "o", *FIT)) == 8
