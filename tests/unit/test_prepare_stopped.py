"""`prepare`: commands killed half-way, beside each other, or while the corpus is out of reach. Nothing wrong is ever trusted."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from most_ray.cli import main
from most_ray.cli.from_audio import choose_division
from most_ray.data.ingest import Recipe, ingest_directory
from most_ray.errors import CheckpointError, DataError
from most_ray.evaluation.generate import GeneratedUnits
from most_ray.records.record import units_hash
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.corpora.corpus import CorpusOptions, parse_condition
from most_ray.speech.units import corpus_parts
from most_ray.speech.units import output as placing
from most_ray.speech.units.assets import copy_assets
from most_ray.speech.units.clustering import save_kmeans
from most_ray.speech.units.corpus_parts import Part, PartTask, run_in_process
from most_ray.speech.units.features import EncoderSettings
from most_ray.speech.units.mfcc import MfccExtractor, MfccSettings
from most_ray.speech.units.prepare import UnitsJob, prepare_units
from most_ray.speech.units.stages import CollectStatistics
from tests.support.audio import lines_of, prepare, records_of, refused, table, tones, units_command
from tests.support.builders import asr, char_vocabulary, write_records

RECIPE = Recipe("asr", char_vocabulary(), 4000, "reject")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return tones(tmp_path / "corpus")


def test_two_commands_at_one_output_keep_out_of_each_others_way(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused while the first is at it, and what the first has listed stays what it was."""
    output = tmp_path / "out"

    def meddling(work: PartTask, found: Sequence[Part]) -> Iterator[dict[str, float]]:
        words = ("--fit_kmeans", "5", "--where", "split=test")
        assert main(units_command(corpus, output, *words)) == 2
        assert "by another command" in capsys.readouterr().err
        # Even one that does not look at the lock cannot put other recordings under a name that is known.
        chunk = Path(found[0].chunk).read_bytes()
        corpus_parts.scan_corpus(CorpusOptions("folder", corpus), [parse_condition("split=test")], [1.0], "speaker", output / ".work")
        assert Path(found[0].chunk).read_bytes() == chunk
        yield from run_in_process(work, found)

    job = UnitsJob(CorpusOptions("folder", corpus), output, fit_kmeans=5, where=[parse_condition("split=train")])
    prepare_units(job, lambda items, *_: items, lambda _bytes: meddling)
    assert {record["metadata"]["split"] for record in records_of(output)} == {"train"}


@pytest.mark.parametrize("at", ["save_kmeans", "mark_prepared"])
def test_records_that_are_being_replaced_are_not_read(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Killed between the new records and their manifest: a run refuses the folder, and the same command mends it."""
    output = tmp_path / "out"
    prepare(corpus, output, "--fit_kmeans", "4")
    with monkeypatch.context() as patch:
        target = placing if at == "save_kmeans" else "most_ray.speech.units.prepare"
        patch.setattr(*((target, at) if at == "save_kmeans" else (f"{target}.{at}",)), killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_units(UnitsJob(CorpusOptions("folder", corpus), output, fit_kmeans=8), lambda items, *_: items)
    with pytest.raises(DataError, match="is not finished"):
        ingest_directory(output, RECIPE, tmp_path / "store")
    prepare(corpus, output, "--fit_kmeans", "8")
    store = ingest_directory(output, RECIPE, tmp_path / "store")
    assert store.manifest["units"]["identity"]["n_units"] == 8 and len(store) == 8


def first_stage(features: MfccSettings, key: str, sample: int, scratch: Path) -> CollectStatistics:
    common = {"features": features, "features_key": key, "speaker_column": "speaker", "max_seconds": 120.0, "scratch": str(scratch)}
    return CollectStatistics(**common, sample=sample, seed=0)  # type: ignore[arg-type]


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_users_own_files_stay(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "records_of_mine.jsonl").write_text("{}\n")
    prepare(corpus, output, "--fit_kmeans", "4", "--form", "json")
    prepare(corpus, output, "--fit_kmeans", "4")
    assert sorted(path.name for path in output.glob("records*")) == ["records.jsonl.gz", "records_of_mine.jsonl"]


def test_recordings_out_of_reach_are_no_damage(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that goes away while units are made must not cost a record; when it is back the command goes on."""
    output, away = tmp_path / "out", tmp_path / "away"

    def outage(work: PartTask, found: Sequence[Part]) -> Iterator[dict[str, float]]:
        if not isinstance(work, CollectStatistics):
            (corpus / "3.flac").rename(away)
        yield from run_in_process(work, found)

    job = UnitsJob(CorpusOptions("folder", corpus), output, fit_kmeans=4)
    with pytest.raises(DataError, match="cannot be reached"):
        prepare_units(job, lambda items, *_: items, lambda _bytes: outage)
    away.rename(corpus / "3.flac")
    assert len(prepare(corpus, output, "--fit_kmeans", "4")) == 8 and not (output / "rejected.jsonl").exists()


def test_other_weights_under_the_same_name_are_refused(corpus: Path, tmp_path: Path) -> None:
    """On another node a name may stand for something else; the manifest would be wrong."""
    work = first_stage(MfccSettings(num_ceps=12), "what the command was started with", 0, tmp_path)
    with pytest.raises(CheckpointError, match="other ones on"):
        work.open("cpu")


def test_absurd_times_cost_their_row_only(corpus: Path, tmp_path: Path) -> None:
    rows = "path\ttext\tstart\tduration\n0.flac\tone\t0\t1e306\n1.flac\ttwo\t1e306\t\n2.flac\tthree\t0\t0.2\n"
    (corpus / "transcripts.tsv").write_text(rows)
    assert len(prepare(corpus, tmp_path / "out", "--fit_kmeans", "2")) == 1
    reasons = [line["reason"] for line in lines_of(tmp_path / "out/rejected.jsonl")]
    assert sum("not a number of seconds" in reason for reason in reasons) == 2


def test_k_means_takes_as_many_units_as_its_sample_can_tell(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(corpus, tmp_path / "out", "--fit_kmeans", "auto", "--fit_frames", "2")
    assert lines_of(tmp_path / "out/units.json")[0]["identity"]["n_units"] == 2
    np.save(tmp_path / "huge.npy", np.full((4, 39), 1e300))
    assert "finite" in refused(capsys, *units_command(corpus, tmp_path / "o", "--kmeans", str(tmp_path / "huge.npy")))


def test_converting_again_leaves_nothing_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source file that is gone takes its conversion along: its units may be others than the manifest says. What others put there stays,
    and so does everything where there is nothing to convert."""
    source, output = tmp_path / "asr", tmp_path / "tts"
    write_records(source, [asr(0)], "a.jsonl")
    write_records(source, [asr(1)], "b.jsonl")
    (source / "units.json").write_text('{"identity": {"kmeans": "old"}}')
    convert = ["prepare", "tts", "--input_dir", str(source), "--output_dir", str(output)]
    assert main(convert) == 0
    (output / "mine.jsonl.gz").write_bytes(b"")
    (source / "a.jsonl").unlink()
    (source / "units.json").write_text('{"identity": {"kmeans": "new"}}')
    assert main(convert) == 0
    assert sorted(path.name for path in output.iterdir()) == ["b.jsonl.gz", "converted.json", "mine.jsonl.gz", "units.json"]
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (source / "b.jsonl").write_text("nothing\n")
    (source / "units.json").write_text('{"identity": {"kmeans": "newest"}}')
    capsys.readouterr()
    assert "no ASR record" in refused(capsys, *convert)
    assert {name: (output / name).read_bytes() for name in before} == before
    (output / "converted.json").write_text(json.dumps({"files": [str(source / "x.jsonl.gz"), "../asr/x.jsonl.gz"]}))
    (source / "x.jsonl.gz").write_bytes(b"")
    write_records(source, [asr(2)], "b.jsonl")
    main(convert)
    assert (source / "x.jsonl.gz").exists()  # a list that somebody wrote names nothing outside the folder


def test_a_kit_is_put_together_from_all_that_have_a_part(tmp_path: Path) -> None:
    manifest = {"identity": {"kmeans": "one"}}
    for name, files in {"a": ["units.json"], "b": ["units.json", "kmeans.npy"], "c": ["units.json", "vocoder.safetensors"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(json.dumps(manifest) if file == "units.json" else name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/units.json").write_text('{"identity": {"kmeans": "two"}}')
    (tmp_path / "other/kmeans.npy").write_text("other")
    sources = [str(tmp_path / name) for name in ("other", "a", "b", "c")]
    copy_assets(sources, str(tmp_path / "kit"), units_hash(manifest))
    assert (tmp_path / "kit/kmeans.npy").read_text() == "b" and (tmp_path / "kit/vocoder.safetensors").read_text() == "c"


def test_a_vocoder_of_other_units_does_not_stay(corpus: Path, tmp_path: Path) -> None:
    """Records made anew with other centroids would be made to sound by the old ones."""
    output, words = tmp_path / "out", ["--records", str(tmp_path / "out"), "--seconds", "1"]
    prepare(corpus, output, "--fit_kmeans", "4")
    assert main(["prepare", "vocoder", "--input", str(corpus), *words]) == 0
    prepare(corpus, output, "--fit_kmeans", "4", "--form", "json")
    assert (output / "vocoder.safetensors").exists()
    prepare(corpus, output, "--fit_kmeans", "5")
    assert not (output / "vocoder.safetensors").exists()


def test_records_are_spoken_by_a_vocoder_of_their_own_units(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, k in (("one", "4"), ("two", "5")):
        prepare(corpus, tmp_path / name, "--fit_kmeans", k)
    words = ["prepare", "vocoder", "--input", str(corpus), "--records", str(tmp_path / "one"), "--seconds", "1"]
    assert main(words) == 0
    say = ["synthesize", "--output", str(tmp_path / "waves"), "--limit", "2", "--records"]
    assert main([*say, str(tmp_path / "one")]) == 0 and len(list((tmp_path / "waves").glob("*.wav"))) == 2
    capsys.readouterr()
    assert "other units" in refused(capsys, *say, str(tmp_path / "two"), "--speech", str(tmp_path / "one"))
    assert "holds no vocoder" in refused(capsys, *say, str(tmp_path / "two"))


def test_flags_that_would_do_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(tmp_path / "corpus", [])
    assert "from_audio" in refused(capsys, "train", "--corpus", "an4", "--name", "x", "--train_asr_dirs", str(rows))
    score = ["evaluate", "--output", str(tmp_path / "e.json")]
    assert "recogniser" in refused(capsys, *score, "--rescore", str(tmp_path / "h.jsonl"), "--recogniser", "x")
    assert "only with a recogniser" in refused(capsys, *score, "--model", str(tmp_path), "--asr_dirs", str(rows), "--vocoder", "x")


def test_a_lock_is_only_held_while_a_command_runs(corpus: Path, tmp_path: Path) -> None:
    """A command that was killed leaves its scratch, and no lock."""
    scratch = tmp_path / "out" / ".work"
    scratch.mkdir(parents=True)
    (scratch / "lock").touch()
    descriptor = os.open(scratch / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another command"):
        prepare_units(UnitsJob(CorpusOptions("folder", corpus), tmp_path / "out", fit_kmeans=4), lambda items, *_: items)
    os.close(descriptor)
    prepare(corpus, tmp_path / "out", "--fit_kmeans", "4")


def test_centroids_go_in_by_one_move(tmp_path: Path) -> None:
    save_kmeans(tmp_path / "k.npy", np.zeros((2, 3), np.float32), {})
    assert [path.name for path in tmp_path.iterdir()] == ["k.npy"]


def test_the_sample_of_a_long_recording_is_drawn_from_all_of_it(tmp_path: Path) -> None:
    """k-means that heard only how recordings begin would know little of speech."""
    scan = corpus_parts.scan_corpus(CorpusOptions("folder", tones(tmp_path / "corpus")), [], [1.0], "speaker", tmp_path / "work")
    extractor = MfccExtractor(MfccSettings())
    work = first_stage(MfccSettings(), corpus_parts.json_digest(extractor.identity), 6, tmp_path / "work")
    list(run_in_process(work, scan.parts))
    with np.load(work.target(scan.parts[0])) as found:
        sample = found["sample"]
    frames = [
        [values.tolist() for values in each.values]
        for item in corpus_parts.read_chunk(scan.parts[0].chunk)
        for each in extractor([load_audio(Path(item["path"]), 16000)])
    ]
    uris = [each.index(row) for row in sample.tolist() for each in frames if row in each]
    assert len(uris) == 6 and max(uris) >= 6


def test_a_perturbed_copy_is_another_speaker(corpus: Path, tmp_path: Path) -> None:
    """So that its units do not hang on what else is made beside it."""
    prepare(corpus, tmp_path / "fit", "--fit_kmeans", "12")
    known = ("--kmeans", str(tmp_path / "fit/kmeans.npy"))
    beside = prepare(corpus, tmp_path / "beside", *known, "--perturb", "0.7,1.0")
    assert beside[:8] == prepare(corpus, tmp_path / "alone", *known, "--perturb", "0.7")
    assert beside[8:] == prepare(corpus, tmp_path / "plain", *known)


def test_a_vocoder_is_made_anew_where_something_changed(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    prepare(corpus, output, "--fit_kmeans", "4")
    words = ["prepare", "vocoder", "--input", str(corpus), "--records", str(output), "--seconds", "1"]
    made = []
    for more in ([], [], ["--seed", "1"]):
        assert main([*words, *more]) == 0
        made.append(((output / "vocoder.safetensors").read_bytes(), "nothing has changed" in capsys.readouterr().out))
    assert made[0][0] == made[1][0] != made[2][0] and [unchanged for _, unchanged in made] == [False, True, False]


def test_who_speaks_most_is_not_held_out() -> None:
    for number in range(30):
        speakers = {f"{number}{name}": spoken for name, spoken in (("a", 90), ("b", 4), ("c", 3), ("d", 3))}
        assert f"{number}a" not in choose_division(speakers, {"": 100}, {"0": 10, "1": 90}).validation


def test_little_work_starts_no_cluster() -> None:
    """Some seconds' work must not wait for Ray; an encoder's is much sooner."""
    mebibyte = 1 << 20
    assert not corpus_parts.worth_a_cluster(MfccSettings(), 100 * mebibyte) and corpus_parts.worth_a_cluster(
        MfccSettings(), 1000 * mebibyte
    )
    assert corpus_parts.worth_a_cluster(EncoderSettings("hubert", "x", 9), 100 * mebibyte)


def test_a_text_is_spoken_into_a_file(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model answers is what is heard, made by the vocoder of its kit."""
    prepare(corpus, tmp_path / "out", "--fit_kmeans", "4")
    assert main(["prepare", "vocoder", "--input", str(corpus), "--records", str(tmp_path / "out"), "--seconds", "1"]) == 0
    monkeypatch.setattr("most_ray.cli.speech_commands._assets_folder", lambda _: str(tmp_path / "out"))
    monkeypatch.setattr("most_ray.cli.speech_commands._open", lambda _: (None, None))
    monkeypatch.setattr(
        "most_ray.evaluation.generate.synthesize_texts", lambda _, __, texts, ___: [GeneratedUnits([3, 0, 2], [], 1) for _ in texts]
    )
    said, units = tmp_path / "said.wav", tmp_path / "units.wav"
    assert main(["synthesize", "--model", str(tmp_path), "--text", "seven", "--output", str(said)]) == 0
    assert main(["synthesize", "--speech", str(tmp_path / "out"), "--units", "[Hu3][Hu0][Hu2]", "--output", str(units)]) == 0
    assert said.read_bytes() == units.read_bytes() and soundfile.info(said).frames > 100
