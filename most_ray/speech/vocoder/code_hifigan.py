"""The unit vocoder of SeamlessM4T and its second version (code HiFi-GAN, Polyak et al. 2021), from a model in transformers' layout."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2CodeHifiGan
from transformers.utils import cached_file

from most_ray.errors import CheckpointError, DataError

_MODELS: dict[str, Any] = {"seamless_m4t": SeamlessM4TCodeHifiGan, "seamless_m4t_v2": SeamlessM4Tv2CodeHifiGan}
_PREFIX = "vocoder."  # of its tensors in a whole model
_REMEDY = "Name a folder or hub name of SeamlessM4T, with safetensors, or of its vocoder alone, or a vocoder of `prepare vocoder`."


class CodeHifiGan:
    """Speaks units with one of the model's voices, on the CPU. The same units give the same samples, alone or among others.

    Args:
        place: folder or hub name of a whole model, of which only the vocoder's tensors are read, or of a vocoder saved alone.
        n_units: how many units it will be given; None: unknown.
        language: a code in the model's generation_config.json, or a number below config.vocoder_num_langs; None: eng where the model
            says which one that is, else 0.
        speaker: number of the voice, below config.vocoder_num_spkrs.

    Raises:
        CheckpointError: no such vocoder, tensors are missing or left over, it knows fewer units, or no such language or speaker.
    """

    def __init__(self, uri: str, n_units: int | None = None, language: str | None = None, speaker: int = 0) -> None:
        try:
            config = transformers.AutoConfig.from_pretrained(uri, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError("vocoder", uri, f"cannot be opened ({_line(error)}).", _REMEDY) from error
        if config.model_type not in _MODELS:
            raise CheckpointError("vocoder", uri, f"is a {config.model_type}, not a SeamlessM4T vocoder.", _REMEDY)
        self.n_units = int(config.unit_hifi_gan_vocab_size)
        if n_units is not None and n_units > self.n_units:
            raise CheckpointError("vocoder", uri, f"knows {self.n_units} units, fewer than the {n_units} it is to speak.", _REMEDY)
        if not 0 <= speaker < config.vocoder_num_spkrs:
            raise CheckpointError("speaker", speaker, f"is none of the voices 0..{config.vocoder_num_spkrs - 1} of {uri}.")
        self._speaker, self._language = torch.tensor([[speaker]]), torch.tensor([[_language(uri, language, config.vocoder_num_langs)]])
        self._rate = int(config.sampling_rate)
        with torch.device("meta"):
            self._model = _MODELS[config.model_type](config)
        _load(self._model, uri)
        self._model.eval()

    @torch.no_grad()
    def __call__(self, utterances: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], int]:
        """Waveforms, each float32 (samples,) in [-1, 1], and their rate in Hz. Without units: a short silence.

        Raises:
            DataError: a unit that the vocoder does not know.
        """
        return [self._speak(np.asarray(units, dtype=np.int64).reshape(-1)) for units in utterances], self._rate

    def _speak(self, units: np.ndarray) -> np.ndarray:
        if len(units) == 0:
            return np.zeros(self._rate // 20, np.float32)
        if units.min() < 0 or units.max() >= self.n_units:
            wrong = int(units[(units < 0) | (units >= self.n_units)][0])
            raise DataError("units", wrong, f"is no unit of this vocoder, which knows 0..{self.n_units - 1}.")
        units = units[np.diff(units, prepend=-1) != 0]  # it predicts durations itself
        # One at a time and without the lengths it returns: it takes unit 1 for padding.
        waves, _ = self._model(torch.from_numpy(units)[None], self._speaker, self._language)
        return waves.reshape(-1).numpy()


def _language(uri: str, language: str | None, n_languages: int) -> int:
    """The number of a language."""
    try:
        path = _file(uri, "generation_config.json")
        codes: dict[str, int] = dict(json.loads(path.read_text("utf-8")).get("vocoder_lang_code_to_id") or {}) if path else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError("vocoder", uri, f"has a generation_config.json that cannot be read ({_line(error)}).", _REMEDY) from error
    if language is None:
        language = "eng" if "eng" in codes else "0"
    number = codes.get(language, int(language) if language.isdecimal() else -1)
    if not 0 <= number < n_languages:
        known = f"Known: {', '.join(sorted(codes))}." if codes else f"Give a number in 0..{n_languages - 1}."
        raise CheckpointError("language", language, f"is no language of {uri}.", known)
    return number


def _load(model: torch.nn.Module, uri: str) -> None:
    """Fill a model on the meta device with exactly its tensors, in float32; nothing else is read."""
    try:
        where = {key: path for path in _shards(uri) for key in _keys(path)}
        prefix = _PREFIX if any(key.startswith(_PREFIX) for key in where) else ""
        held, wanted = {key for key in where if key.startswith(prefix)}, {prefix + key for key in model.state_dict()}
        if held != wanted:
            raise ValueError(f"missing: {sorted(wanted - held)[:3]}, left over: {sorted(held - wanted)[:3]}")
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(set(where.values())):
            with safe_open(path, framework="pt") as file:
                chosen = [key for key in sorted(held) if where[key] == path]
                tensors |= {key.removeprefix(prefix): file.get_tensor(key).float() for key in chosen}
        model.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError("vocoder", uri, f"does not hold the vocoder's tensors ({_line(error)}).", _REMEDY) from error


def _shards(uri: str) -> list[Path]:
    """The files that may hold the vocoder, of a model in one or in several."""
    index = _file(uri, "model.safetensors.index.json")
    if index is None:
        names = ["model.safetensors"]
    else:
        where: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        whole = any(key.startswith(_PREFIX) for key in where)
        names = sorted({name for key, name in where.items() if key.startswith(_PREFIX) or not whole})
    paths = []
    for name in names:
        path = _file(uri, name) if re.fullmatch(r"[\w.-]+\.safetensors", name) else None
        if path is None:
            raise FileNotFoundError(f"no {name}")
        paths.append(path)
    return paths


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _file(uri: str, name: str) -> Path | None:
    """A file of a folder or of the hub; None where there is none."""
    found = cached_file(uri, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    return Path(found) if found else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
