"""Speech encoders as features. Models are small ones with random weights, saved as the library saves them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from most_ray.distributed.determinism import torch_threads
from most_ray.errors import CheckpointError, ConfigError
from most_ray.speech.units import encoder as encoder_module
from most_ray.speech.units.encoder import EncoderExtractor
from most_ray.speech.units.extractors import open_extractor, parse_features
from most_ray.speech.units.features import EncoderSettings, Extractor

LAYERS = 3
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    # What would make two passes differ if it were not off.
    "mask_time_prob": 0.5,
    "mask_feature_prob": 0.5,
    "layerdrop": 1.0,
    "hidden_dropout": 0.5,
    "attention_dropout": 0.5,
    "activation_dropout": 0.5,
    "feat_proj_dropout": 0.5,
}
CONVOLUTIONS: dict[str, Any] = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
STABLE: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
WHISPER: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": LAYERS,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "vocab_size": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
BERT = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
# Name of the model: its class, its configuration, its feature extractor (None: no preprocessor_config.json), frames a second.
MODELS: dict[str, tuple[str, dict[str, Any], Any, float]] = {
    "hubert": ("HubertModel", SMALL | CONVOLUTIONS, None, 50.0),
    "hubert-large": ("HubertModel", SMALL | CONVOLUTIONS | STABLE, None, 50.0),
    "wavlm": ("WavLMModel", SMALL | CONVOLUTIONS, (Wav2Vec2FeatureExtractor, {"do_normalize": False}), 50.0),
    "wavlm-large": ("WavLMModel", SMALL | CONVOLUTIONS | STABLE, (Wav2Vec2FeatureExtractor, {"return_attention_mask": True}), 50.0),
    "wav2vec2": ("Wav2Vec2ForCTC", SMALL | CONVOLUTIONS | {"vocab_size": 5}, None, 50.0),
    "data2vec-audio": ("Data2VecAudioModel", SMALL | CONVOLUTIONS | {"num_conv_pos_embeddings": LAYERS}, None, 50.0),
    "sew": ("SEWModel", SMALL | CONVOLUTIONS | {"conv_dim": (8,) * 13}, None, 25.0),
    "wav2vec2-bert": ("Wav2Vec2BertModel", BERT, (transformers.SeamlessM4TFeatureExtractor, {}), 50.0),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, (transformers.WhisperFeatureExtractor, {"feature_size": 8}), 50.0),
}
WAVEFORM = [name for name in MODELS if name not in ("wav2vec2-bert", "whisper")]


def save_model(name: str, folder: Path) -> Path:
    class_name, values, frontend, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model_class(model_class.config_class(**values)).save_pretrained(folder)
    if frontend is not None:
        frontend[0](**frontend[1]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: save_model(name, root / name) for name in MODELS}


@pytest.fixture
def hubert(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders["hubert"], tmp_path / "hubert"))


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 s that overlap by 2 s."""
    monkeypatch.setattr(encoder_module, "_WINDOW", 3)
    monkeypatch.setattr(encoder_module, "_CONTEXT", 1)


def kind_of(name: str) -> str:
    return name.removesuffix("-large")


def opened(folders: dict[str, Path], name: str, layer: int = 2) -> EncoderExtractor:
    return EncoderExtractor(EncoderSettings(kind_of(name), str(folders[name]), layer))


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def plain(folder: Path, name: str, wave: np.ndarray) -> list[np.ndarray]:
    """hidden_states (frames, width) as the whole model in the library gives them."""
    model = AutoModel.from_pretrained(folder).eval()
    frontend = MODELS[name][2]
    processor = (
        frontend[0].from_pretrained(folder)
        if frontend
        else Wav2Vec2FeatureExtractor(do_normalize=name in ("hubert-large", "data2vec-audio"))
    )
    inputs = processor(wave, sampling_rate=16000, return_tensors="pt")
    part = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad(), torch_threads(1):  # as the extractor does it: with several, the last bits would depend on their number
        return [states[0].numpy() for states in part(**inputs, output_hidden_states=True).hidden_states]


def same(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> bool:
    return len(one) == len(two) and all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_is_the_librarys_hidden_states_to_the_bit(folders: dict[str, Path], name: str) -> None:
    wave = noise(12345)
    wanted = plain(folders[name], name, wave)
    assert len(wanted) == LAYERS + 1
    for layer, states in enumerate(wanted):
        extractor = opened(folders, name, layer)
        values = extractor([wave])[0].values
        whole = {"whisper": 12345 // 320, "wav2vec2-bert": ((12345 - 400) // 160 + 1) // 2}.get(name, len(states))
        assert values.dtype == np.float32 and values.shape == (whole, extractor.width) == (whole, 16)
        assert same([values], [states[:whole]]), layer


@pytest.mark.parametrize("name", MODELS)
def test_rate_and_number_of_frames(folders: dict[str, Path], name: str) -> None:
    """A second more is exactly as many frames more as the rate says, and what a frame needs is what the convolutions reach."""
    extractor: Extractor = opened(folders, name)
    rate = MODELS[name][3]
    assert (extractor.sample_rate, extractor.rate_hz, extractor.per_speaker) == (16000, rate, False)
    one, two = extractor([noise(16000), noise(32000)])
    assert len(two.values) - len(one.values) == rate and one.first == two.first == 0
    if name in WAVEFORM:
        reach, hop = (720, 640) if name == "sew" else (400, 320)
        lengths = [0, 1, reach - 1, reach, reach + hop - 1, reach + hop]
        assert [len(frames.values) for frames in extractor([noise(length) for length in lengths])] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("name", MODELS)
def test_very_short_or_silent_recordings(folders: dict[str, Path], name: str) -> None:
    extractor = opened(folders, name)
    lengths = [0, 1, 200, 319, 400, 640, 960]
    for length, frames in zip(lengths, extractor([np.zeros(n, np.float32) for n in lengths]), strict=True):
        assert frames.values.shape[1] == 16 and np.isfinite(frames.values).all()
        assert length >= 320 or len(frames.values) == 0
    assert np.isfinite(extractor([np.full(16000, 0.25, np.float32)])[0].values).all()


@pytest.mark.parametrize("name", ["hubert", "wavlm-large"])
def test_the_company_of_a_recording_does_not_matter(folders: dict[str, Path], name: str, short_windows: None) -> None:
    waves = [noise(n, seed) for seed, n in enumerate([9000, 9000, 400, 100000, 17000, 300, 9000])]
    extractor = opened(folders, name)
    together = [frames.values for frames in extractor(waves)]
    assert same(together, [extractor([wave])[0].values for wave in waves])
    assert same(together, [frames.values for frames in opened(folders, name)(waves[::-1])][::-1])
    assert extractor([]) == []


@pytest.mark.parametrize("name", ["hubert", "hubert-large", "wavlm-large", "sew", "wav2vec2-bert", "whisper"])
def test_windows_join_without_gaps(folders: dict[str, Path], name: str, request: pytest.FixtureRequest) -> None:
    """As many frames as in one piece. Before the layers, where only neighbours matter, they are the same frames, unless the recording
    is normalised as a whole inside the model, or a spectrogram by windows."""
    waves = [noise(samples) for samples in (48000, 48001, 80123)]
    whole = opened(folders, name, 0)(waves)
    request.getfixturevalue("short_windows")
    parts = opened(folders, name, 0)(waves)
    assert [frames.values.shape for frames in parts] == [frames.values.shape for frames in whole]
    assert same([parts[0].values], [whole[0].values])
    if name.endswith("-large"):
        for one, other in zip(parts, whole, strict=True):
            # Rounding of float32 values of up to 3 through nine layers; from one frame to the next they differ by a thousand times that.
            np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-5)
            assert np.abs(np.diff(other.values, axis=0)).mean() > 0.01


def test_a_layer_that_is_not_there_is_named(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=f"features = 4: is not a layer of .*, which has {LAYERS}. Choose 0 .* to {LAYERS}"):
        opened(folders, "hubert", LAYERS + 1)


def test_the_kind_documents_the_run(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"features = 'wavlm': .*its model_type is 'hubert'\. Write hubert:.*:2"):
        EncoderExtractor(EncoderSettings("wavlm", str(folders["hubert"]), 2))
    auto = EncoderExtractor(EncoderSettings("auto", str(folders["hubert"]), 2))
    assert auto.identity == opened(folders, "hubert").identity and auto.identity["features"] == "hubert"


def test_open_extractor_takes_it_from_the_flag(folders: dict[str, Path]) -> None:
    extractor = open_extractor(parse_features(f"hubert:{folders['hubert']}:1"))
    assert isinstance(extractor, EncoderExtractor) and extractor.source == str(folders["hubert"])


def test_identity_is_of_the_weights_in_use_not_of_the_place(folders: dict[str, Path], hubert: Path) -> None:
    """Layers above are not part of it, nor is the vector that masks frames in training; a changed weight below, or another layer, is."""
    first = opened(folders, "hubert").identity
    assert json.loads(json.dumps(first)) == first and str(folders["hubert"]) not in json.dumps(first)
    assert opened({"hubert": hubert}, "hubert").identity == first
    tensors = load_file(hubert / "model.safetensors")
    tensors["masked_spec_embed"] += 1
    tensors["encoder.layers.2.layer_norm.bias"] += 1
    save_file(tensors, hubert / "model.safetensors", {"format": "pt"})
    assert opened({"hubert": hubert}, "hubert").identity == first
    assert opened({"hubert": hubert}, "hubert", 1).identity != first
    tensors["encoder.layers.1.layer_norm.bias"] += 1
    save_file(tensors, hubert / "model.safetensors", {"format": "pt"})
    changed = opened({"hubert": hubert}, "hubert").identity
    assert changed != first and changed["settings"]["weights"] != first["settings"]["weights"]


def test_published_layouts_load_as_the_same_encoder(folders: dict[str, Path], hubert: Path) -> None:
    """As facebook/hubert-base-ls960: pytorch_model.bin alone, with the older names of the positional convolution's weight norm."""
    tensors = load_file(hubert / "model.safetensors")
    for number, letter in enumerate("gv"):
        stem = "encoder.pos_conv_embed.conv"
        tensors[f"{stem}.weight_{letter}"] = tensors.pop(f"{stem}.parametrizations.weight.original{number}")
    save_file(tensors, hubert / "model.safetensors", {"format": "pt"})
    wave, wanted = noise(8000), opened(folders, "hubert")
    renamed = opened({"hubert": hubert}, "hubert")
    (hubert / "model.safetensors").unlink()
    torch.save(tensors, hubert / "pytorch_model.bin")
    pickled = opened({"hubert": hubert}, "hubert")
    for extractor in (renamed, pickled):
        assert extractor.identity == wanted.identity
        assert same([extractor([wave])[0].values], [wanted([wave])[0].values])


class _Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_weight_file_is_run(hubert: Path, tmp_path: Path) -> None:
    tensors = load_file(hubert / "model.safetensors")
    (hubert / "model.safetensors").unlink()
    torch.save({**tensors, "harm": _Harm(tmp_path / "harm")}, hubert / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="has no weights that can be loaded"):
        opened({"hubert": hubert}, "hubert")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("tensor", "what"),
    [("encoder.layers.1.attention.k_proj.weight", "missing"), ("encoder.pos_conv_embed.conv.bias", "mismatched")],
)
def test_weights_that_are_missing_or_misshapen_are_an_error(hubert: Path, tensor: str, what: str) -> None:
    """Where they are used: what only layers above lack, or the vector for masked frames, is not looked at."""
    tensors = load_file(hubert / "model.safetensors")
    for unused in ("encoder.layers.2.attention.k_proj.weight", "masked_spec_embed"):
        del tensors[unused]
    save_file(tensors, hubert / "model.safetensors", {"format": "pt"})
    opened({"hubert": hubert}, "hubert")
    with pytest.raises(CheckpointError, match=r"has 1 missing weights up to layer 3, the first encoder\.layers\.2\.attention"):
        opened({"hubert": hubert}, "hubert", 3)
    kept = tensors.pop(tensor)
    if what == "mismatched":
        tensors[tensor] = kept[:-1].clone()
    save_file(tensors, hubert / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"has 1 {what} weights up to layer 2, the first {tensor}"):
        opened({"hubert": hubert}, "hubert")


def test_other_models_are_refused(tmp_path: Path) -> None:
    values = BERT | {"vocab_size": 10}
    transformers.BertModel(transformers.BertConfig(**values)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a model of type 'bert', not a speech encoder with layers"):
        EncoderExtractor(EncoderSettings("auto", str(tmp_path), 1))


@pytest.mark.parametrize(
    "damage", ["no folder", "no such name", "a URI", "empty", "config", "config values", "weights", "no weights", "frontend"]
)
def test_what_cannot_be_opened_is_told_in_one_line(hubert: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = str(hubert)
    match damage:
        case "no folder":
            place = str(tmp_path / "nowhere")
        case "no such name":
            place = "nobody/no-such-encoder"
        case "a URI":
            place = "s3://bucket/encoder"
        case "empty":
            place = str(tmp_path)
        case "config":
            (hubert / "config.json").write_text("{")
        case "config values":
            values = json.loads((hubert / "config.json").read_text())
            (hubert / "config.json").write_text(json.dumps(values | {"num_hidden_layers": "three"}))
        case "weights":
            (hubert / "model.safetensors").write_bytes(b"no weights")
        case "no weights":
            (hubert / "model.safetensors").unlink()
        case "frontend":
            (hubert / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        EncoderExtractor(EncoderSettings("hubert", place, 1))
    assert caught.value.field == "features" and caught.value.value == place and "\n" not in str(caught.value)


def test_a_spectrogram_model_needs_its_preprocessor_config(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["whisper"], tmp_path / "whisper"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no usable preprocessor_config\.json .* Put the encoder's own"):
        EncoderExtractor(EncoderSettings("whisper", str(folder), 1))


def test_code_in_a_models_folder_is_not_run(hubert: Path, tmp_path: Path) -> None:
    values = json.loads((hubert / "config.json").read_text())
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (hubert / "config.json").write_text(json.dumps(values))
    (hubert / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    with pytest.raises(CheckpointError, match="contains custom code"):
        EncoderExtractor(EncoderSettings("auto", str(hubert), 1))
    assert not (tmp_path / "harm").exists()


def test_the_librarys_settings_are_as_before(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    before = transformers.logging.get_verbosity()
    with caplog.at_level(logging.WARNING):
        opened(folders, "wav2vec2")
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ and transformers.logging.get_verbosity() == before
    assert not caplog.records
