"""Units to waveform: fitted on recordings, or a SeamlessM4T vocoder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import SeamlessM4TConfig, SeamlessM4Tv2Config
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2CodeHifiGan

from most_ray.errors import CheckpointError, DataError
from most_ray.speech.corpora.audio import load_audio
from most_ray.speech.units.clustering import assign, load_kmeans
from most_ray.speech.units.mfcc import MfccSettings, mfcc
from most_ray.speech.vocoder.code_hifigan import CodeHifiGan
from most_ray.speech.vocoder.fit import Example, VocoderSettings, fit_vocoder
from most_ray.speech.vocoder.unit_vocoder import UnitVocoder
from most_ray.speech.vocoder.vocoders import open_vocoder

RATE = 16000
PITCHES = (300, 700, 1300, 2200, 3400, 5000)  # Hz, one for each unit
QUICK = VocoderSettings(steps=150, batch=8, window=48, width=48, griffin_lim_iterations=30)
IDENTITY = {"features": "tones", "n_units": len(PITCHES), "kmeans": "abc"}


def tones(count: int, rate_hz: float = 50.0, first: int = 0, seed: int = 0, lasting: int | None = None) -> list[Example]:
    """Recordings whose units are tones; unit k lasts k + 2 frames where nothing else is said. The second speaker is ten times as loud."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        order = rng.permutation(np.tile(np.arange(len(PITCHES)), 2))
        order = order[np.diff(order, prepend=-1) != 0]
        units = np.repeat(order, lasting or order + 2)
        pitch = np.repeat(np.asarray(PITCHES, float)[units], round(RATE / rate_hz))
        loud = 0.3 if index % 2 else 0.03
        wave = loud * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
        wave = np.concatenate([np.zeros(round(first * RATE / rate_hz)), wave])
        examples.append(Example(units, wave.astype(np.float32), first, "ab"[index % 2]))
    return examples


@pytest.fixture(scope="module")
def fitted() -> UnitVocoder:
    return fit_vocoder(tones(20), len(PITCHES), 50.0, IDENTITY, True, QUICK)


def peak(wave: np.ndarray) -> float:
    """Hz of the strongest component in the middle half."""
    part = wave[len(wave) // 4 : -len(wave) // 4]
    return float(np.abs(np.fft.rfft(part * np.hanning(len(part)))).argmax() * RATE / len(part))


@pytest.mark.parametrize("rate_hz", [50.0, 25.0, 40.0, 30.0])
def test_a_unit_sounds_like_what_it_stood_for(rate_hz: float) -> None:
    """At rates whose units are whole milliseconds long and at others, after trimmed silence; within a mel band of the tone."""
    settings = dataclasses.replace(QUICK, steps=100)
    vocoder = fit_vocoder(tones(8, rate_hz, first=7, lasting=12), len(PITCHES), rate_hz, IDENTITY, False, settings)
    waves, rate = vocoder([[unit] * 12 for unit in range(len(PITCHES))])
    assert rate == RATE
    for wave, pitch in zip(waves, PITCHES, strict=True):
        assert wave.dtype == np.float32 and wave.ndim == 1 and np.abs(wave).max() <= 1.0
        assert abs(len(wave) / RATE - 12 / rate_hz) < 0.002
        assert abs(peak(wave) - pitch) < 0.06 * pitch + 20


def test_durations_are_learned_where_repeats_were_removed(fitted: UnitVocoder) -> None:
    """Each unit as long as it was, and utterances as long as they were within a tenth; repeats in the input say nothing."""
    for example in tones(6, seed=9):
        order = example.units[np.diff(example.units, prepend=-1) != 0].tolist()
        (once, twice), _ = fitted([order, [unit for unit in order for _ in range(2)]])
        assert len(once) == pytest.approx(len(example.units) * 320, rel=0.1)
        assert np.array_equal(once, twice)
    short, long = (len(fitted([[0, unit, 0]])[0][0]) for unit in (1, 5))
    assert long - short == pytest.approx(4 * 320, abs=320)


def test_one_voice_speaks(fitted: UnitVocoder) -> None:
    """Speakers are not averaged: what comes out is as loud as the one heard longest, within 6 dB (the other is 20 dB off)."""
    lengths = {speaker: sum(len(example.units) for example in tones(20) if example.speaker == speaker) for speaker in "ab"}
    loudness = 0.3 if lengths["b"] > lengths["a"] else 0.03
    wave = fitted([list(range(len(PITCHES)))])[0][0]
    assert abs(20 * np.log10(np.sqrt(2 * (wave**2).mean()) / loudness)) < 6


def test_the_same_examples_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the number of threads, and without touching the caller's random numbers; another seed gives others."""
    quick = dataclasses.replace(QUICK, steps=5)
    threads = torch.get_num_threads()
    for name, count, settings in (("a", 1, quick), ("b", 2, quick), ("c", 1, dataclasses.replace(quick, seed=1))):
        torch.set_num_threads(count)
        torch.manual_seed(3)
        fit_vocoder(iter(tones(4)), len(PITCHES), 50.0, IDENTITY, True, settings).save(tmp_path / name)
        assert torch.get_num_threads() == count and torch.rand(1).item() == torch.rand(1, generator=torch.manual_seed(3)).item()
    torch.set_num_threads(threads)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_saved_and_loaded_it_gives_the_same_samples(fitted: UnitVocoder, tmp_path: Path) -> None:
    fitted.save(tmp_path / "vocoder.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["vocoder.safetensors"]
    utterances = [[0, 1, 2, 3], [5], [4, 0, 4, 0, 4]]
    expected = fitted(utterances)[0]
    for uri in (tmp_path, tmp_path / "vocoder.safetensors"):
        for identity in (IDENTITY, None):
            found = open_vocoder(str(uri), identity)(utterances)[0]
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    again = UnitVocoder.load(tmp_path / "vocoder.safetensors")
    assert (again.n_units, again.units) == (len(PITCHES), IDENTITY)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "vocoder.safetensors").read_bytes()


def test_it_is_the_same_alone_and_among_others(fitted: UnitVocoder) -> None:
    utterances = [[0, 1, 2], [3], [4, 5] * 9]
    together = fitted(utterances)[0]
    for utterance, wave in zip(utterances, together, strict=True):
        assert np.array_equal(fitted([utterance])[0][0], wave)


def test_no_units_make_a_short_silence(fitted: UnitVocoder) -> None:
    (empty, spoken), _ = fitted([[], [1]])
    assert 0 < len(empty) <= RATE and not empty.any() and spoken.any()
    assert fitted([])[0] == []


def test_a_unit_that_was_never_heard_can_be_spoken() -> None:
    """One in the manifest that the first `max_seconds` of audio do not hold; later examples are not even asked for."""
    asked: list[int] = []

    def examples() -> Any:
        for index, example in enumerate(tones(9)):
            asked.append(index)
            yield example

    settings = dataclasses.replace(QUICK, steps=5, max_seconds=0.5)
    wave = fit_vocoder(examples(), 40, 50.0, {}, False, settings)([[39] * 10])[0][0]
    assert asked == [0]
    assert len(wave) == 3200 and np.isfinite(wave).all()


@pytest.mark.parametrize("unit", [-1, len(PITCHES)])
def test_units_out_of_range_are_refused(fitted: UnitVocoder, unit: int) -> None:
    with pytest.raises(DataError, match=rf"units = {unit}: .*0\.\.5"):
        fitted([[0], [1, unit]])
    with pytest.raises(DataError, match=rf"units = {unit}: .*0\.\.5"):
        fit_vocoder([dataclasses.replace(tones(1)[0], units=np.array([unit]))], len(PITCHES), 50.0, IDENTITY, True, QUICK)


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(DataError, match="examples"):
        fit_vocoder([dataclasses.replace(tones(1)[0], units=np.zeros(0, np.int64))], 3, 50.0, IDENTITY, True, QUICK)
    with pytest.raises(DataError, match="rate_hz = 0"):
        fit_vocoder(tones(1), len(PITCHES), 0, IDENTITY, True, QUICK)


def test_other_units_than_it_was_fitted_with_are_refused(fitted: UnitVocoder, tmp_path: Path) -> None:
    """The error names both."""
    fitted.save(tmp_path / "vocoder.safetensors")
    with pytest.raises(CheckpointError, match=r'"kmeans": "abc".*"kmeans": "xyz"'):
        open_vocoder(str(tmp_path), IDENTITY | {"kmeans": "xyz"})


def test_the_beginning_of_an_utterance_costs_no_more_than_itself(fitted: UnitVocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one is the same as ever; of a long one no more is predicted than is played."""
    short, long = [0, 1, 2] * 4, [0, 1, 2, 3] * 20_000
    whole = fitted([short])[0][0]
    wave, seconds = fitted.beginning(short, 60.0)
    assert np.array_equal(wave, whole) and seconds == len(whole) / RATE
    frames: list[int] = []
    predict = fitted._mel.predict
    monkeypatch.setattr(fitted._mel, "predict", lambda units: (frames.append(len(units)), predict(units))[1])
    wave, seconds = fitted.beginning(long, 2.0)
    assert len(wave) == 2 * RATE and seconds > 1000 and max(frames) <= 3.0 * 50
    assert fitted.beginning([], 2.0)[1] == len(fitted([[]])[0][0]) / RATE


def change_about(path: Path, **changes: Any) -> None:
    with safe_open(path, framework="pt") as file:
        about, tensors = json.loads(file.metadata()["vocoder"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {"vocoder": json.dumps(about | changes)})


def change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    kept = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
    safetensors.torch.save_file(kept, path, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b"something else"),
        lambda path: safetensors.torch.save_file({"x": torch.zeros(1)}, path),
        lambda path: change_about(path, version=99),
        lambda path: change_about(path, n_units=10**12),
        lambda path: change_about(path, hop="wide"),
        lambda path: change_about(path, repeats_removed=False),
        lambda path: change_tensors(path, extra=torch.zeros(1)),
        lambda path: change_tensors(path, **{"mel.output.bias": None}),
        lambda path: change_tensors(path, **{"mel.output.bias": torch.full((160,), float("nan"))}),
    ],
    ids=["cut", "text", "other", "version", "sizes", "types", "left over", "extra", "missing", "nan"],
)
def test_damage_is_told(fitted: UnitVocoder, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "vocoder.safetensors"
    fitted.save(path)
    damage(path)
    with pytest.raises(CheckpointError, match=r"vocoder.safetensors.*cannot be read as a vocoder"):
        open_vocoder(str(path), None)


def test_a_digit_keeps_its_spectrum(shared: Path, digits: Path) -> None:
    """Real recordings of one speaker, repeats removed: held-out digits come out nearer to themselves, in MFCC, than to other digits."""
    settings, centroids = MfccSettings(), load_kmeans(digits / "train_asr/kmeans.npy")

    def recordings(takes: range) -> list[tuple[np.ndarray, Any]]:
        folder = shared / "data" / "fsdd" / "recordings"
        waves = [load_audio(next(folder.glob(f"{digit}_jackson_{take}.*")), RATE) for take in takes for digit in range(10)]
        return [(wave, mfcc(wave, settings)) for wave in waves]

    def normalised(features: list[np.ndarray]) -> list[np.ndarray]:
        frames = np.concatenate(features)
        return [((values - frames.mean(axis=0)) / frames.std(axis=0)).astype(np.float32) for values in features]

    heard = recordings(range(16))
    values = normalised([frames.values for _, frames in heard])
    units = [assign(frames, centroids) for frames in values]
    examples = [Example(ids, wave, frames.first, "jackson") for ids, (wave, frames) in zip(units[10:], heard[10:], strict=True)]
    vocoder = fit_vocoder(examples, len(centroids), settings.rate_hz, {}, True, dataclasses.replace(QUICK, steps=200, width=64))
    waves, _ = vocoder([ids.tolist() for ids in units[:10]])
    again = normalised([mfcc(wave, settings).values for wave in waves])

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        """Along a straight line through time: enough to tell digits apart."""
        steps = np.linspace(0, 1, 40)
        pick = [frames[np.round(steps * (len(frames) - 1)).astype(int)] for frames in (a, b)]
        return float(np.sqrt(((pick[0] - pick[1]) ** 2).sum(axis=1)).mean())

    nearest = [int(np.argmin([distance(frames, values[other]) for other in range(10)])) for frames in again]
    assert sum(digit == found for digit, found in enumerate(nearest)) >= 8, nearest


SMALL: dict[str, Any] = {
    "unit_hifi_gan_vocab_size": 30,
    "unit_embed_dim": 12,
    "lang_embed_dim": 4,
    "spkr_embed_dim": 4,
    "vocoder_num_langs": 3,
    "vocoder_num_spkrs": 2,
    "upsample_initial_channel": 32,
    "upsample_rates": [5, 4],
    "upsample_kernel_sizes": [11, 8],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}
KINDS = {"first": (SeamlessM4TConfig, SeamlessM4TCodeHifiGan), "second": (SeamlessM4Tv2Config, SeamlessM4Tv2CodeHifiGan)}


def small(kind: str) -> Any:
    torch.manual_seed(0)
    configuration, model = KINDS[kind]
    made = model(configuration(**SMALL)).eval()
    with torch.no_grad():  # durations of 1 to about 5 frames, and a wave that is no constant
        made.dur_predictor.proj.bias.fill_(1.0)
        for parameter in made.hifi_gan.parameters():
            parameter.mul_(20.0)
    return made


@pytest.fixture(params=["first", "second"])
def seamless(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A folder in the layout of a whole model in two shards, with other parts' tensors, and its vocoder."""
    model = small(request.param)
    folder = tmp_path / "model"
    model.config.save_pretrained(folder)
    state = {f"vocoder.{key}": value for key, value in model.state_dict().items()} | {"text_encoder.weight": torch.zeros(3)}
    weight_map = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(sorted(state))}
    weight_map["speech_encoder.weight"] = "model-00003-of-00003.safetensors"  # not even there: nothing of the vocoder is in it
    for name in sorted(set(weight_map.values()))[:2]:
        safetensors.torch.save_file({key: value for key, value in state.items() if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "generation_config.json").write_text(json.dumps({"vocoder_lang_code_to_id": {"arb": 0, "eng": 2}}))
    return folder, model


def spoken(model: Any, units: list[int], speaker: int, language: int) -> np.ndarray:
    """By the library's forward."""
    with torch.no_grad():
        return model(torch.tensor([units]), torch.tensor([[speaker]]), torch.tensor([[language]]))[0].reshape(-1).numpy()


def test_a_seamless_vocoder_speaks_as_in_the_library(seamless: tuple[Path, Any]) -> None:
    """English and the first voice unless asked otherwise; unit 1, its own padding, is a unit like others; repeats are removed."""
    folder, model = seamless
    vocoder = open_vocoder(str(folder), {"n_units": 30})
    waves, rate = vocoder([[3, 3, 1, 1, 1, 29], [], [1]])
    assert rate == RATE and not waves[1].any() and len(waves[1]) > 0
    assert np.array_equal(waves[0], spoken(model, [3, 1, 29], 0, 2)) and np.array_equal(waves[2], spoken(model, [1], 0, 2))
    assert waves[0].dtype == np.float32 and waves[0].std() > 0
    other = open_vocoder(str(folder), None, language="arb", speaker=1)([[3, 1, 29]])[0][0]
    assert np.array_equal(other, spoken(model, [3, 1, 29], 1, 0)) and not np.array_equal(other, waves[0])
    assert np.array_equal(other, CodeHifiGan(str(folder), language="0", speaker=1)([[3, 1, 29]])[0][0])
    with pytest.raises(DataError, match=r"units = 30: .*0\.\.29"):
        vocoder([[30]])


@pytest.mark.parametrize("kind", ["first", "second"])
def test_a_seamless_vocoder_saved_alone(kind: str, tmp_path: Path) -> None:
    model = small(kind)
    model.save_pretrained(tmp_path)
    assert np.array_equal(open_vocoder(str(tmp_path), None)([[4, 7]])[0][0], spoken(model, [4, 7], 0, 0))


def test_what_a_seamless_folder_lacks_is_said(seamless: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = seamless
    with pytest.raises(CheckpointError, match=r"knows 30 units, fewer than the 31 .* Name"):
        open_vocoder(str(folder), {"n_units": 31})
    with pytest.raises(CheckpointError, match=r"language = 'fra': .*Known: arb, eng"):
        open_vocoder(str(folder), None, language="fra")
    with pytest.raises(CheckpointError, match="speaker = 2"):
        open_vocoder(str(folder), None, speaker=2)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_vocoder(str(tmp_path / "nothing"), None)
    with pytest.raises(CheckpointError, match="is not on this machine"):
        open_vocoder("s3://bucket/vocoder.safetensors", None)
    (folder / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(CheckpointError, match="is a wav2vec2"):
        open_vocoder(str(folder), None)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "outside"])
def test_tensors_must_be_exactly_the_vocoders(seamless: tuple[Path, Any], change: str) -> None:
    """Nothing is left at random, nothing is ignored, and names in an index do not lead out of the folder."""
    folder, _ = seamless
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["vocoder.hifi_gan.conv_pre.bias"]
    tensors = safetensors.torch.load_file(folder / name)
    if change == "missing":
        del tensors["vocoder.hifi_gan.conv_pre.bias"]
    elif change == "extra":
        tensors["vocoder.hifi_gan.conv_pre.weight_g"] = torch.zeros(1)
    elif change == "shape":
        tensors["vocoder.hifi_gan.conv_pre.bias"] = torch.zeros(7)
    else:
        index["weight_map"]["vocoder.hifi_gan.conv_pre.bias"] = f"../model/{name}"
    safetensors.torch.save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map does not name" if change == "outside" else "does not hold the vocoder's tensors"):
        open_vocoder(str(folder), None)
