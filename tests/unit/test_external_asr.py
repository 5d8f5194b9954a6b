"""Speech judged by an outside recogniser: a wav2vec2 checkpoint built here in the layout of the real ones, loaded by the real code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Processor

from most_ray.errors import CheckpointError
from most_ray.evaluation.external_asr import ExternalRecogniser
from tests.support.evaluation import evaluate, make_scene

RATE = 16_000


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("recogniser")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=True)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [16] * 7}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=len(letters), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **small))
    model.save_pretrained(folder)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


def tone(units: Sequence[int], rate: int) -> np.ndarray:
    """A tone of 20 ms for each unit."""
    time = np.arange(rate // 50) / rate
    return np.concatenate([np.sin(2 * np.pi * (200 + unit) * time) for unit in units])


def tones(units: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], int]:
    return [tone(each, RATE) for each in units], RATE


def test_a_checkpoint_hears_the_decoded_units(recogniser: str, tmp_path: Path) -> None:
    heard = ExternalRecogniser(tones, recogniser)
    alone, together = heard([[3, 90, 400, 12]]), heard([[3, 90, 400, 12], [7] * 40])
    assert len(together) == 2 and together[0] == alone[0] and all(isinstance(text, str) for text in together)
    section = evaluate(make_scene(tmp_path), outside=heard).result["sets"]["tts/to_speak"]
    assert section["outside"]["reference"] == 3 and section["outside"]["rate"] is not None


def test_audio_of_another_rate_is_resampled(recogniser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tones at twice the rate come to the recogniser as at its own."""
    given: list[dict[str, Any]] = []

    class Ear:
        feature_extractor = SimpleNamespace(sampling_rate=RATE)

        def __call__(self, inputs: list[dict[str, Any]], batch_size: int) -> list[dict[str, str]]:
            given.extend(inputs)
            return [{"text": " heard "}]

    def faster(units: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], int]:
        return [tone(each, 2 * RATE) for each in units], 2 * RATE

    outside = ExternalRecogniser(faster, recogniser)
    monkeypatch.setattr(outside, "_pipeline", Ear())
    assert outside([[3, 90, 400, 12] * 10]) == ["heard"]
    (wave,) = given
    expected = tone([3, 90, 400, 12] * 10, RATE)
    assert wave["sampling_rate"] == RATE and len(wave["raw"]) == len(expected)
    assert np.abs(wave["raw"] - expected)[200:-200].mean() < 0.1


def test_what_is_no_recogniser_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        ExternalRecogniser(tones, str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a usable recogniser"):
        ExternalRecogniser(tones, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^recogniser = 'openai/none': is neither a folder .* hf:openai/none, or, "):
        ExternalRecogniser(tones, "openai/none")
