"""What turns recordings into a model's units, and `train --from_audio`'s choices."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from most_ray import config as configuration
from most_ray.cli import from_audio, main
from most_ray.cli.from_audio import choose_division, evaluation_steps, run_settings, run_text
from most_ray.errors import CheckpointError, ConfigError, DataError
from most_ray.records.record import parse_record, units_hash
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.corpora.corpus import Utterance, guess_layout, matches_all, parse_condition
from most_ray.speech.units.assets import copy_assets, find_assets, open_assets, require_units_manifest
from most_ray.speech.units.mfcc import MfccSettings
from tests.support.audio import contents, prepare, records_of, refused, table, tones
from tests.support.corpora import cut_of, libriheavy, put
from tests.support.speech import published_corpora


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of tones, which tests copy before they damage them."""
    folder = tmp_path_factory.mktemp("kit")
    prepare(tones(folder / "corpus"), folder / "records", "--fit_kmeans", "12")
    return folder / "records"


@pytest.fixture
def kit(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "kit"))


def identity_of(folder: Path) -> str:
    return units_hash(json.loads((folder / "units.json").read_text()))


# Hearing


def agreement(records: Sequence[dict[str, Any]], units: Sequence[np.ndarray]) -> float:
    """The share of the records' units that need no edit to become those."""
    wanted = [parse_record(record).input.tolist() for record in records]  # type: ignore[union-attr]
    edits = sum(Levenshtein.distance(one, two.tolist()) for one, two in zip(wanted, units, strict=True))
    return 1 - edits / sum(map(len, wanted))


def test_recordings_of_one_speaker_give_the_records_units(shared: Path, tmp_path: Path) -> None:
    """Real speech of one speaker of a corpus: all of it together gives the units that the records have; each recording for itself nearly
    those, for of a few seconds less can be known."""
    source = shared / "data" / "an4"
    records = prepare(source, tmp_path / "o", "--fit_kmeans", "100", "--where", "speaker=mkem,fash", corpus="an4")
    records = [record for record in records if record["metadata"]["speaker"] == "mkem"]
    waves = [load_audio(source / f"wav/an4_clstk/mkem/{record['id'].removeprefix('an4_')}.ogg", 16000) for record in records]
    kit = open_assets(tmp_path / "o")
    together = kit.encode(waves, one_speaker=True)
    assert len(records) == 12 and agreement(records, together) >= 0.99
    assert agreement(records, kit.encode(waves)) >= 0.95
    assert all((units[1:] != units[:-1]).all() and units.max() < 100 for units in together)


def test_a_recording_by_itself_does_not_hang_on_the_others(made: Path) -> None:
    """Unless all are said to be of one speaker."""
    waves = [load_audio(made.parent / "corpus" / f"{i}.flac", 16000) for i in range(4)]
    kit = open_assets(made)
    alone = [kit.encode([wave])[0].tolist() for wave in waves]
    assert [units.tolist() for units in kit.encode(waves)] == alone
    assert [units.tolist() for units in kit.encode([waves[0]], one_speaker=True)] == alone[:1]
    assert [units.tolist() for units in kit.encode(waves, one_speaker=True)] != alone


def test_what_is_too_short_has_no_units(made: Path) -> None:
    """Nor does it disturb what stands beside it."""
    kit, wave = open_assets(made), load_audio(made.parent / "corpus" / "0.flac", 16000)
    for one_speaker in (False, True):
        units = kit.encode([np.zeros(10, np.float32), wave], one_speaker)
        assert len(units[0]) == 0 and units[1].tolist() == kit.encode([wave])[0].tolist()
    assert kit.encode([]) == [] and kit.encode([], one_speaker=True) == []
    assert [len(u) for u in kit.encode([np.zeros(0, np.float32)], one_speaker=True)] == [0]


def test_repeats_stay_where_the_records_have_them(made: Path, tmp_path: Path) -> None:
    prepare(made.parent / "corpus", tmp_path / "kept", "--kmeans", str(made / "kmeans.npy"), "--keep_repeats")
    wave = load_audio(made.parent / "corpus" / "7.flac", 16000)
    kept, removed = (open_assets(folder).encode([wave])[0] for folder in (tmp_path / "kept", made))
    assert len(kept) > len(removed) and (removed[1:] != removed[:-1]).all()


# Damage


def _change(**changes: Any) -> Any:
    def write(folder: Path) -> None:
        manifest = json.loads((folder / "units.json").read_text())
        manifest["identity"] |= changes
        (folder / "units.json").write_text(json.dumps(manifest))

    return write


MFCC = dict(MfccSettings().__dict__)


def _few_centroids(folder: Path) -> None:
    np.save(folder / "kmeans.npy", np.load(folder / "kmeans.npy")[:2])


def _other_centroids(folder: Path) -> None:
    np.save(folder / "kmeans.npy", np.load(folder / "kmeans.npy") + 1)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder), DataError, "holds no units.json"),
        (lambda folder: (folder / "units.json").unlink(), DataError, "holds no units.json"),
        (lambda folder: (folder / "units.json").write_text("{"), DataError, "is not a units manifest"),
        (lambda folder: (folder / "units.json").write_text("[]"), DataError, "is not a units manifest"),
        (lambda folder: (folder / "units.json").write_text('{"identity": {}}'), DataError, "is not a units manifest"),
        (lambda folder: (folder / "units.json").write_bytes(b"\xff"), DataError, "is not a units manifest"),
        (lambda folder: (folder / "kmeans.npy").unlink(), DataError, "holds no kmeans.npy"),
        (lambda folder: (folder / "kmeans.npy").write_bytes(b""), DataError, "cannot be read as an array"),
        (_other_centroids, DataError, "is not the one that units.json beside it names"),
        (_change(settings=7), DataError, "does not say how to make its features"),
        (_change(settings={"sampling": 1}), DataError, "does not say how to make its features"),
        (_change(settings=dict(MFCC, num_mels=10**9)), DataError, "num_mels 1000000000 is not in 4..1024"),
        (_change(settings=dict(MFCC, sample_rate=0)), DataError, "sample_rate 0 is not in"),
        (_change(settings=dict(MFCC, keep_every=0)), DataError, "keep_every 0 is not in"),
        (_change(settings=dict(MFCC, trim="x")), DataError, "trim 'x' is not in"),
        (_change(settings=dict(MFCC, high_freq=1e9)), DataError, "high_freq 1000000000.0 is not in"),
        (_change(features="hubert", settings={"layer": -1}), DataError, "layer -1 is none"),
        (_change(n_units=3), DataError, "neighbours those of .* units, not of 3"),
        (_few_centroids, DataError, "is not the one that units.json beside it names"),
        (_change(features="hubert"), DataError, "does not say how to make its features"),
        (_change(normalisation="none"), CheckpointError, "are not those that the units were made with"),
    ],
)
def test_damaged_kits_are_refused(kit: Path, damage: Any, error: type[Exception], message: str) -> None:
    """One line that says what is wrong and what to name instead."""
    damage(kit)
    with pytest.raises(error, match=message) as refusal:
        open_assets(kit)
    assert refusal.value.remedy and "\n" not in str(refusal.value)  # type: ignore[attr-defined]


def test_the_manifest_says_how_to_make_the_features(kit: Path) -> None:
    assert require_units_manifest(kit)["identity"]["settings"] == json.loads(json.dumps(MfccSettings().__dict__))
    assert len(require_units_manifest(kit)["reference"]["mean"]) == 39


# Where a model's kit lies


@pytest.mark.parametrize("model", ["export", "checkpoints/step-000000100"])
def test_a_models_kit_is_found(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """In the model's own folder, or for a run's checkpoint in the run's; only one whose units are the model's."""
    run, identity = tmp_path / "run", identity_of(kit)
    (run / model).mkdir(parents=True)
    assert find_assets(str(run / model), identity) is None
    uri = run / model / "speech" if model == "export" else run / "speech"
    copy_assets([str(tmp_path / "none"), str(kit)], str(uri), identity)
    assert find_assets(str(run / model), identity) == str(uri)
    assert find_assets(str(run / model), "0123") is None and find_assets(str(run / model), None) is None
    monkeypatch.chdir(run)
    assert Path(str(find_assets(model, identity))).samefile(uri)


def test_only_the_kit_that_was_asked_for_is_copied(kit: Path, made: Path, tmp_path: Path) -> None:
    """The first of the places with these units; nothing where none has them. Records do not go along."""
    other = Path(shutil.copytree(made, tmp_path / "other"))
    _change(rate_hz=25.0)(other)
    (kit / "vocoder.safetensors").write_bytes(b"sound")
    sources = [str(tmp_path / "none"), str(other), str(kit)]
    copy_assets(sources, str(tmp_path / "a"), identity_of(kit))
    assert contents(tmp_path / "a") == {name: (kit / name).read_bytes() for name in ("kmeans.npy", "units.json", "vocoder.safetensors")}
    copy_assets(sources, str(tmp_path / "b"), identity_of(other))
    assert sorted(contents(tmp_path / "b")) == ["kmeans.npy", "units.json"]
    for identity in (None, "0123"):
        copy_assets(sources, str(tmp_path / "c"), identity)
    assert not (tmp_path / "c").exists()
    (other / "units.json").write_text("{")
    with pytest.raises(DataError, match="is not a units manifest"):
        copy_assets(sources, str(tmp_path / "d"), identity_of(kit))


# From a folder of recordings to a run


REAL = {"LibriSpeech": "librispeech", "LibriSpeech/train-clean-5": "librispeech", "an4": "an4", "common_voice_en": "common_voice"}


def test_published_corpora_are_known_by_their_files(shared: Path) -> None:
    """From their own folder or the one above."""
    for name, layout in {**REAL, "fsdd": "folder"}.items():
        assert guess_layout(shared / "data" / name) == layout, name


def test_layouts_are_known_by_their_files(tmp_path: Path) -> None:
    """From their own folder or the one above; anything else is a folder."""
    published_corpora(tmp_path)
    for name, layout in REAL.items():
        assert guess_layout(tmp_path / name) == layout, name
    assert guess_layout(libriheavy(tmp_path / "heavy", [cut_of()]).parent) == "libriheavy"
    for folder in ("vp/transcribed_data/en", "vp2/en", "vp3"):
        put(tmp_path / folder / "asr_train.tsv")
        assert guess_layout(tmp_path / folder.split("/")[0]) == "voxpopuli"
    (tmp_path / "empty").mkdir()
    put(tmp_path / "named" / "a.wav")
    put(tmp_path / "named" / "a.txt")
    put(tmp_path / "named" / "cuts.txt")
    assert guess_layout(tmp_path / "empty") == guess_layout(tmp_path / "named") == "folder"
    for name in ("transcripts.tsv", "transcripts.jsonl", "metadata.csv", "metadata.jsonl"):
        assert guess_layout(put(tmp_path / name.replace(".", "-") / name).parent) == "folder"


NAMES = st.text(st.characters(codec="utf-8", exclude_characters=","), max_size=4)


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "b", "c", "d", "e", "f", "g, h"]) | NAMES, st.sampled_from(["", "train", "test", "Dev", "x"])),
        min_size=20,
        max_size=60,
    ),
    st.booleans(),
    st.booleans(),
)
def test_every_recording_is_trained_on_or_validated_on(rows: list[tuple[str, str]], with_speakers: bool, with_splits: bool) -> None:
    """Never on both, and neither is empty."""
    speakers: dict[str, int] = {}
    splits: dict[str, int] = {}
    folds: dict[str, int] = {}
    utterances = []
    for index, (speaker, split) in enumerate(rows):
        columns = {"speaker": speaker} if with_speakers else {}
        utterances.append(Utterance(f"u_{index}", Path("x"), "t", columns | ({"split": split} if with_splits else {})))
        fold = next(str(n) for n in range(10) if parse_condition(f"fold={n}").matches(utterances[-1]))
        values = (speaker if with_speakers else "", split if with_splits else "", fold)
        for known, value in zip((speakers, splits, folds), values, strict=True):
            known[value] = known.get(value, 0) + 1
    division = choose_division(speakers, splits, folds)
    train, validation = (
        {u.id for u in utterances if matches_all(u, [parse_condition(words)])} for words in (division.train, division.validation)
    )
    assert train and validation and not train & validation and len(train | validation) == len(utterances)
    assert f"{len(utterances)} recordings" in division.description and f" {len(validation)} of" in division.description


def test_what_is_held_out() -> None:
    """Its own test splits first, then whole speakers, then a tenth of the recordings."""
    splits = {"train": 90, "test": 6, "validation": 4}
    many = {f"s{i}": 10 for i in range(40)}
    assert choose_division(many, splits, {"0": 100}).validation == "split=test,validation"
    speakers = choose_division(many, {"train": 400}, {"0": 40, "1": 360})
    held_out = speakers.validation.removeprefix("speaker=").split(",")
    assert len(held_out) == 4 and set(held_out) < set(many) and speakers.train == "speaker!=" + ",".join(held_out)
    assert choose_division(dict(reversed(many.items())), {"": 400}, {"0": 40, "1": 360}) == speakers
    assert choose_division({"a": 50, "b": 40, "c": 10}, {"test": 100}, {"0": 8, "3": 92}).train == "fold!=0"
    assert choose_division({"": 20}, {"": 20}, {"3": 2, "7": 18}).validation == "fold=3"
    with pytest.raises(DataError, match="holds 2 recordings that cannot be divided"):
        choose_division({"": 2}, {"": 2}, {"4": 2})


@pytest.mark.parametrize(("records", "longest"), [(2, 30), (20, 30), (640, 900), (100_000, 5000)])
def test_the_runs_configuration_is_one(tmp_path: Path, records: int, longest: int) -> None:
    """Whatever was recorded: keys that are known, values that are allowed, room for the longest."""
    put(tmp_path / "train_asr" / "prepared.json", json.dumps({"records": records, "longest": longest}))
    settings = run_settings("mine", str(tmp_path), tmp_path)
    config = configuration.config_from(settings)
    assert configuration.config_from(json.loads(json.dumps(settings))) == config
    assert settings["max_seq_length"] >= min(4096, longest) and settings["max_steps"] >= 300
    assert settings["train_tts_dirs"] == [str(tmp_path / "train_tts")]
    assert settings["global_batch_size"] % settings["train_batch_size"] == 0
    text = run_text(settings)
    assert configuration.config_from(yaml.safe_load(text)) == config
    unexplained = {line.split(":")[0] for line in text.splitlines() if "  # " not in line}
    assert unexplained == {"name", "output_dir", "train_asr_dirs", "train_tts_dirs", "val_asr_dirs", "val_tts_dirs"}


def test_the_first_evaluation_comes_early(tmp_path: Path) -> None:
    """Within a minute of small data's steps; of longer runs there are thirty in all, or one every 200 steps."""
    for seconds, steps, every in ((0.2, 300, 200), (0.6, 300, 50), (3.0, 300, 25), (0.9, 1500, 50), (0.9, 3000, 100), (0.9, 5000, 200)):
        assert evaluation_steps(seconds, steps) == every and every <= steps
    put(tmp_path / "train_asr" / "prepared.json", json.dumps({"records": 120, "longest": 200, "hours": 0.1}))
    assert run_settings("mine", str(tmp_path), tmp_path)["eval_steps"] in (50, 100, 200)


def test_names_that_yaml_would_take_for_something_else(tmp_path: Path) -> None:
    """Whatever folders are called, the configuration names them."""
    for name in ("a: b", "a # b", "[x", "ja", "no", "é {y}", "it's"):
        folder = tmp_path / name
        put(folder / "train_asr" / "prepared.json", json.dumps({"records": 2, "longest": 30}))
        settings = run_settings(name, str(folder), folder)
        assert yaml.safe_load(run_text(settings)) == settings


def arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"from_audio": folder, "config": None, "corpus": None, "features": None, **changes})


def test_from_audio_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands that can be given by hand: each is run as it is shown, and they leave what the configuration names."""
    monkeypatch.chdir(tmp_path)
    source = tones(tmp_path / "my voice")
    ran: list[list[str]] = []

    def run(words: Sequence[str]) -> None:
        ran.append(list(words))
        assert words[1] == "vocoder" or main(words) == 0  # a vocoder's training is tested by itself

    path = from_audio.prepare(arguments(source), {"output_dir": "runs", "max_steps": 7}, run)
    assert [words[1] for words in ran] == ["units", "units", "vocoder", "tts", "tts"]
    assert path == Path("runs/my_voice-data/run.yaml") and "--max_steps 7" in capsys.readouterr().out
    config = configuration.load_config(path)
    assert config.train_asr_dirs == ("runs/my_voice-data/train_asr",) and config.val_tts_dirs == ("runs/my_voice-data/val_tts",)
    train, val = (records_of(path.parent / f"{part}_asr") for part in ("train", "val"))
    assert {r["metadata"]["split"] for r in train} == {"train"} and {r["metadata"]["split"] for r in val} == {"test"}
    assert len(train) == 6 * 5 and len(val) == 2
    assert identity_of(path.parent / "train_asr") == identity_of(path.parent / "val_tts")


def test_wrong_uses_of_from_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made."""
    monkeypatch.chdir(tmp_path)
    source = tones(tmp_path / "corpus")
    alone = table(tmp_path / "alone", [(str(source / "0.flac"), "only one")])

    def never(words: Sequence[str]) -> None:
        pytest.fail(f"ran {words}")

    cases: list[tuple[argparse.Namespace, dict[str, Any], type[Exception], str]] = [
        (arguments(source, config=tmp_path / "c.yaml"), {}, ConfigError, "and config both define"),
        (arguments(source), {"train_asr_dirs": ["x"]}, ConfigError, "train_asr_dirs = .*is what from_audio makes"),
        (arguments(source), {"val_tts_dirs": ["x"]}, ConfigError, "val_tts_dirs = .*is what from_audio makes"),
        (arguments(source), {"output_dir": "s3://bucket/runs"}, ConfigError, "is not on this machine"),
        (arguments(source), {"name": "../elsewhere"}, ConfigError, "must be a plain folder name"),
        (arguments(source), {"learning_rate": "fast"}, ConfigError, "learning_rate"),
        (arguments(tmp_path / "nowhere"), {}, DataError, "is no folder"),
        (arguments(source / "0.flac"), {}, DataError, "is no folder"),
        (arguments(source, corpus="an4"), {}, DataError, "holds no etc"),
        (arguments(alone), {}, DataError, "holds 1 recording with text: some are needed"),
    ]
    for args, flags, error, message in cases:
        with pytest.raises(error, match=message):
            from_audio.prepare(args, flags, never)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transcribe", "a.wav"], "--model"),
        (["transcribe", "--model", "x"], "RECORDING"),
        (["transcribe", "a.wav", "--model", "./nowhere"], "does not exist"),
        (["transcribe", "a.wav", "--model", "./nowhere", "--num_beams", "0"], "num_beams = 0: must be at least 1"),
        (["transcribe", "a.wav", "--model", "./nowhere", "--max_new_tokens", "0"], "max_new_tokens = 0"),
        (["transcribe", "a.wav", "--model", "./nowhere", "--output", "."], "is a folder"),
        (["transcribe", "a.wav", "--model", "./nowhere", "--max_seconds", "nan"], "max_seconds = 'nan': is not finite"),
        (["synthesize", "--text", "a"], "--output"),
        (["synthesize", "--output", "a.wav"], "one of the arguments"),
        (["synthesize", "--text", "a", "--units", "[Hu1]", "--output", "a.wav"], "not allowed with"),
        (["synthesize", "--text", "a", "--output", "a.wav"], "is needed to speak a text"),
        (["synthesize", "--text", " ", "--output", "a.wav"], "is empty"),
        (["synthesize", "--text", "a", "--model", "./nowhere", "--output", "a.mp3"], "neither a .wav nor a .flac"),
        (["synthesize", "--units", "[Hu1]", "--output", "a.wav"], "to turn units into speech"),
        (["synthesize", "--units", "[Hu1]", "--speech", "kit", "--output", "a.wav", "--limit", "0"], "limit = 0"),
        (["synthesize", "--units", "[Hu1]", "--speech", "nowhere", "--output", "a.wav"], "nowhere"),
        (["synthesize", "--units", "[Hu1]", "--speech", "kit", "--output", "a.wav"], "vocoder"),
    ],
)
def test_wrong_uses_of_a_model_on_speech(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
