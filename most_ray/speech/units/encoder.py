"""Frames from a layer of a speech encoder in transformers: HuBERT, WavLM, wav2vec 2.0 and similar models, w2v-BERT, Whisper's encoder.

Recordings go through the encoder one by one: in a batch, even of equal lengths, the last bits of a result depend on the other recordings
(matrix products are blocked by size), and with them a unit now and then; on a CPU a batch is not faster either.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor

from most_ray.distributed.determinism import torch_threads
from most_ray.errors import CheckpointError, ConfigError, count_of, one_line
from most_ray.io.hub import model_folder
from most_ray.records.model_files import check_foreign_model, loading
from most_ray.speech.units.features import EncoderSettings, Frames

_WINDOW = 30  # seconds: longer recordings go through in windows, so that memory does not grow with them
_CONTEXT = 2  # seconds dropped at an end that another window overlaps: more than the 1.3 s to either side of positional convolutions
_PROBE = 6  # seconds by which two probes differ: whole frames at any usual rate, 12.5 Hz and Moonshine's 41.67 Hz among them
_TRAINING_ONLY = "masked_spec_embed"  # a weight that replaces masked frames, which only training has
_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"  # transformers' environment variable
_FIELD = "features"  # of errors


class EncoderExtractor:
    """Extracts layer `settings.layer` of an encoder, in float32: exactly transformers' `hidden_states[layer]` of a recording alone.

    Layer 0 is what enters the first layer; layers above the requested one are neither kept nor computed. A recording longer than 30 s is
    cut into windows of 30 s that overlap by 4 s, of which each window drops the outer half, so there are as many frames as in one piece.
    If the model's feature extractor normalises the input, it does so over the whole recording for samples, over each window for
    spectrograms. The last bits, as with any such computation, depend on the machine, the device and the number of threads.

    Whisper's encoder always takes 30 s; of its frames those that the recording fills are kept.
    """

    per_speaker = False

    def __init__(self, settings: EncoderSettings, device: str = "cpu") -> None:
        """Load the encoder's weights to the torch device `device`. Raises ConfigError if the encoder is of another kind than
        `settings.kind`, is not a speech encoder, or does not have that layer; CheckpointError if it cannot be found or read, or weights are
        missing or of another shape."""
        self.source: str | None = settings.source
        # Encoders may be pickled: facebook/hubert-base-ls960, for one, is published as pytorch_model.bin alone.
        folder = model_folder(settings.source, _FIELD, pickled=True)
        check_foreign_model(folder, _FIELD)
        with _quiet_transformers():
            config = _open_config(settings, folder)
            self._frontend = _open_frontend(settings.source, folder, config)
            self._encoder, blocks = _open_encoder(settings, folder, config)
        layers = list(blocks)
        self._waveform = self._encoder.main_input_name == "input_values"
        # The number of samples that the encoder's input is always padded to; 0 if it takes any length.
        self._fixed_length = 0 if self._waveform else int(getattr(self._frontend, "n_samples", 0))
        self._device = torch.device(device)
        self.sample_rate = int(self._frontend.sampling_rate)
        _cut(blocks, [])
        self._encoder.to(self._device)
        self._all_layers = False
        self._hop, self._shortest, self.width = self._probe(config)
        self.rate_hz = self.sample_rate / self._hop
        _cut(blocks, layers[: settings.layer])
        if settings.layer == len(layers):
            # The last hidden state is not always the last layer's output: Whisper's has gone through the final norm.
            self._all_layers = True
            del blocks[-1]
        self._encoder.to(self._device)
        self._window = min(_WINDOW * self.sample_rate, self._fixed_length or _WINDOW * self.sample_rate) // self._hop * self._hop
        self._context = _CONTEXT * self.sample_rate // self._hop * self._hop
        normalised = self._waveform and bool(getattr(self._frontend, "do_normalize", False))
        known = {"encoder": config.model_type, "weights": _weights_hash(self._encoder.state_dict())}
        known |= {"layer": settings.layer, "sample_rate": self.sample_rate}
        self.identity: dict[str, Any] = {
            "features": config.model_type,
            "settings": known | {"normalised_samples": normalised, "window_s": _WINDOW, "context_s": _CONTEXT},
            "normalisation": "none",
        }

    def __call__(self, waves: Sequence[np.ndarray]) -> list[Frames]:
        """Features of each recording, given as float32 (samples,) at `sample_rate`; values are float32 (frames, width). A recording that is
        shorter than what one frame is computed from (25 ms for HuBERT and similar models) gives no frames."""
        with torch_threads(1):  # see determinism: the result must not depend on the number of threads
            return [Frames(self._frames(wave)) for wave in waves]

    def _frames(self, wave: np.ndarray) -> np.ndarray:
        if len(wave) < self._shortest:
            return np.zeros((0, self.width), np.float32)
        if self._waveform:
            wave = self._frontend(wave, sampling_rate=self.sample_rate, return_tensors="np")["input_values"][0]
        if len(wave) <= self._window:
            return self._forward(wave)
        parts = []
        for start in range(0, len(wave) - 2 * self._context, self._window - 2 * self._context):
            frames = self._forward(wave[start : start + self._window])
            first = self._context // self._hop if start else 0
            last = len(frames) if start + self._window >= len(wave) else (self._window - self._context) // self._hop
            parts.append(frames[first:last])
        return np.concatenate(parts)

    def _forward(self, window: np.ndarray) -> np.ndarray:
        """Hidden states of one window, float32 (frames, width), from normalised samples; spectrograms are computed here."""
        if self._waveform:
            # A copy: the last bits may depend on an array's alignment in memory.
            inputs: dict[str, torch.Tensor] = {"input_values": torch.tensor(window)[None].to(self._device)}
        else:
            with np.errstate(invalid="ignore"):
                features = self._frontend(window, sampling_rate=self.sample_rate, return_tensors="pt")
            # Silence, where its spectrogram is divided by its own deviation, is 0 / 0.
            features["input_features"] = torch.nan_to_num(features["input_features"])
            inputs = {name: features[name].to(self._device) for name in ("input_features", "attention_mask") if name in features}
        # TensorFloat-32, cuDNN's default, would keep 10 bits of the convolutions.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            try:
                hidden = self._encoder(**inputs, output_hidden_states=self._all_layers, return_dict=True).hidden_states[-1][0]
            except _Reached as reached:
                hidden = reached.hidden_states[0]
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape[1] == len(hidden):
            hidden = hidden[: int(mask.sum())]  # w2v-BERT pads to whole frames; padding is not part of the recording
        if length := self._fixed_length:
            hidden = hidden[: min(len(window), length) * len(hidden) // length]
        return hidden.cpu().numpy()

    def _probe(self, config: Any) -> tuple[int, int, int]:
        """Run the encoder on two lengths of silence to find the samples from one frame to the next, the samples that the first frame is
        computed from, and the width."""
        short, long = self.sample_rate, (1 + _PROBE) * self.sample_rate
        try:
            (n_short, width), (n_long, _) = (self._forward(np.zeros(length, np.float32)).shape for length in (short, long))
        except Exception as error:  # whatever a wrong configuration makes torch raise
            raise ConfigError("features", self.source, f"cannot be run on samples of speech ({one_line(error)}).") from error
        frames = n_long - n_short
        if frames <= 0 or (long - short) % frames:
            raise ConfigError("features", self.source, f"gives {count_of(frames, 'frame')} in {_PROBE} s, no whole number of samples each.")
        hop = (long - short) // frames
        kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
        if not self._waveform or not kernels or not strides:
            return hop, short - (n_short - 1) * hop, width  # at most a hop more than the very shortest
        reach, jump = 1, 1
        for kernel, stride in zip(kernels, strides, strict=True):
            reach, jump = reach + (kernel - 1) * jump, jump * stride
        return hop, reach + hop - jump, width  # hop > jump for SEW, whose frames are means over several


class _Reached(Exception):  # noqa: N818 - not an error
    """Carries the input of the first layer that is not needed out of the forward pass."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states


class _Stop(nn.Module):
    """Ends a forward pass in place of the first layer that is not needed, so that what follows (a final norm, say) is not computed."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
        raise _Reached(hidden_states)


def _cut(blocks: nn.ModuleList, layers: list[nn.Module]) -> None:
    """Replace the encoder's layers by `layers` and an end of the forward pass."""
    del blocks[:]
    blocks.extend([*layers, _Stop()])


def _open_config(settings: EncoderSettings, folder: str) -> Any:
    remedy = "Name a folder with config.json and weights, or a model on the hub: hf:OWNER/NAME."
    with loading(CheckpointError, _FIELD, settings.source, "holds no encoder that can be opened", remedy):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if settings.kind not in (config.model_type, "auto"):
        rule = f"is not what {settings.source} holds: its model_type is {config.model_type!r}."
        raise ConfigError("features", settings.kind, rule, f"Write {config.model_type}:{settings.source}:{settings.layer}.")
    return config


def _open_frontend(source: str, folder: str, config: Any) -> Any:
    """The library's feature extractor; without preprocessor_config.json, the one that wav2vec 2.0 and similar models were trained with."""
    remedy = "Put the encoder's own preprocessor_config.json beside its weights."
    with loading(CheckpointError, _FIELD, source, "has no usable preprocessor_config.json", remedy):
        try:
            return AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError):
            if (Path(folder) / "preprocessor_config.json").exists() or not getattr(config, "conv_kernel", None):
                raise
            norm = getattr(config, "feat_extract_norm", "layer")  # data2vec has no other
            return Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=norm == "layer")


def _open_encoder(settings: EncoderSettings, folder: str, config: Any) -> tuple[Any, nn.ModuleList]:
    """Load the encoder in float32, in evaluation mode, and find its list of layers. Raises what EncoderExtractor does; only weights up to
    the requested layer must be there."""
    with loading(CheckpointError, _FIELD, settings.source, "has no weights that can be loaded"):
        # safetensors where there are any. From pytorch_model.bin, weights_only reads tensors and refuses, rather than runs, anything else.
        checked = {"trust_remote_code": False, "weights_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32, **checked)
    encoder = model.get_encoder() if config.is_encoder_decoder else model
    blocks = _layers_of(encoder)
    if blocks is None or encoder.main_input_name not in ("input_values", "input_features"):
        raise ConfigError("features", settings.source, f"is a model of type {config.model_type!r}, not a speech encoder with layers.")
    if settings.layer > len(blocks):
        remedy = f"Choose 0 (what enters the first) to {len(blocks)}."
        raise ConfigError("features", settings.layer, f"is not a layer of {settings.source}, which has {len(blocks)}.", remedy)
    names = {module: name for name, module in model.named_modules()}
    inside, outside = (f"{names[m]}." if names[m] else "" for m in (encoder, blocks))
    above = tuple(f"{outside}{index}." for index in range(settings.layer, len(blocks)))
    used = {inside + name for name in encoder.state_dict() if name != _TRAINING_ONLY}
    for what in ("missing", "mismatched"):
        keys = {key if isinstance(key, str) else key[0] for key in info[f"{what}_keys"]}
        if bad := sorted(name for name in keys & used if not name.startswith(above)):
            rule = f"has {len(bad)} {what} weights up to layer {settings.layer}, the first {bad[0]}."
            raise CheckpointError("features", settings.source, rule, "Download the encoder again, with the config.json that belongs to it.")
    return encoder.eval().requires_grad_(False), blocks


def _layers_of(encoder: Any) -> nn.ModuleList | None:
    """The encoder's list of layers whose outputs are transformers' hidden states; None if there is no such list."""
    recorded = (getattr(encoder, "_can_record_outputs", None) or {}).get("hidden_states", ())
    targets = [getattr(each, "target_class", each) for each in (recorded if isinstance(recorded, (list, tuple)) else [recorded])]
    classes = tuple(each for each in targets if isinstance(each, type))
    lists = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module))
    return next((each for each in lists if all(isinstance(layer, classes) for layer in each)), None)


def _weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, shapes and values in order of names, whatever dtype and file format they were stored in."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        if name != _TRAINING_ONLY:
            array = tensors[name].cpu().contiguous().numpy()
            digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data if math.prod(array.shape) else b"")
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the library from showing progress bars and advice, and from what it otherwise does when it loads pytorch_model.bin from the hub:
    asking a service, from a thread, to convert the model there."""
    verbosity, conversion = transformers.logging.get_verbosity(), os.environ.get(_NO_CONVERSION)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ[_NO_CONVERSION] = "true"
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
        os.environ.pop(_NO_CONVERSION)
        os.environ |= {} if conversion is None else {_NO_CONVERSION: conversion}
