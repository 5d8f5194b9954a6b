"""The unit vocoder of SeamlessM4T and SeamlessM4T v2 (code HiFi-GAN, Polyak et al. 2021), loaded from a model in transformers' format."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2CodeHifiGan

from most_ray.errors import CheckpointError, count_of
from most_ray.io.hub import model_folder
from most_ray.records.model_files import check_foreign_model, loading, read_json_object, weight_files
from most_ray.speech.units.clustering import remove_repeats
from most_ray.speech.vocoder.unit_vocoder import check_units

_MODELS: dict[str, Any] = {"seamless_m4t": SeamlessM4TCodeHifiGan, "seamless_m4t_v2": SeamlessM4Tv2CodeHifiGan}
_FIELD = "vocoder"  # of errors
_PREFIX = "vocoder."  # of the vocoder's tensors in a whole model
_REMEDY = "Name SeamlessM4T (a folder or hf:OWNER/NAME) with safetensors, its vocoder alone, or a vocoder of `prepare vocoder`."


class CodeHifiGan:
    """Synthesises units in one of the model's voices, on the CPU. The same units give the same samples, alone or among others.

    Args:
        source: folder or name on the hub of a whole model, of which only the vocoder's tensors are read, or of a vocoder saved alone.
        n_units: how many units it will be given; None: unknown.
        language: a code in the model's generation_config.json, or a number below config.vocoder_num_langs; None: eng if the model lists
            that code, else 0.
        speaker: number of the voice, below config.vocoder_num_spkrs.

    Raises:
        CheckpointError: the vocoder does not exist, tensors are missing or left over, it knows fewer units, or it does not have the
            language or the speaker.
    """

    def __init__(self, source: str, n_units: int | None = None, language: str | None = None, speaker: int = 0) -> None:
        folder = model_folder(source, _FIELD)
        check_foreign_model(folder, _FIELD)
        with loading(CheckpointError, _FIELD, source, "cannot be opened", _REMEDY):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if config.model_type not in _MODELS:
                raise CheckpointError("vocoder", source, f"is a {config.model_type}, not a SeamlessM4T vocoder.", _REMEDY)
            self.n_units, self._rate = int(config.unit_hifi_gan_vocab_size), int(config.sampling_rate)
            n_languages, n_speakers = int(config.vocoder_num_langs), int(config.vocoder_num_spkrs)
            with torch.device("meta"):
                self._model = _MODELS[config.model_type](config)
        if n_units is not None and n_units > self.n_units:
            rule = f"knows {count_of(self.n_units, 'unit')}, fewer than the {n_units} it is to speak."
            raise CheckpointError("vocoder", source, rule, _REMEDY)
        if not 0 <= speaker < n_speakers:
            raise CheckpointError("speaker", speaker, f"is none of the voices 0..{n_speakers - 1} of {source}.")
        self._speaker = torch.tensor([[speaker]])
        self._language = torch.tensor([[_language_number(source, folder, language, n_languages)]])
        _load(self._model, source, folder)
        self._model.eval()
        with loading(CheckpointError, _FIELD, source, "cannot speak", _REMEDY), torch.no_grad():
            self._synthesise(np.zeros(1, np.int64))

    @torch.no_grad()
    def __call__(self, utterances: Sequence[Sequence[int]]) -> tuple[list[np.ndarray], int]:
        """Waveforms, each float32 (samples,) in [-1, 1], and their rate in Hz. An utterance without units gives a short silence. Raises
        DataError for a unit that the vocoder does not know."""
        return [self._synthesise(check_units(units, self.n_units)) for units in utterances], self._rate

    def _synthesise(self, units: np.ndarray) -> np.ndarray:
        if len(units) == 0:
            return np.zeros(self._rate // 20, np.float32)
        units = remove_repeats(units)  # the model predicts durations itself
        # One at a time, and without the lengths that the model returns: it takes unit 1 for padding.
        waves, _ = self._model(torch.from_numpy(units)[None], self._speaker, self._language)
        return waves.reshape(-1).numpy()


def _language_number(source: str, folder: str, language: str | None, n_languages: int) -> int:
    """The number of a language, given as a code, a number, or None for the default."""
    codes = (read_json_object(folder, "generation_config.json", _FIELD) or {}).get("vocoder_lang_code_to_id") or {}
    if not isinstance(codes, dict) or not all(isinstance(number, int) for number in codes.values()):
        rule = "has a generation_config.json whose vocoder_lang_code_to_id is no table of numbers."
        raise CheckpointError("vocoder", source, rule, _REMEDY)
    if language is None:
        language = "eng" if "eng" in codes else "0"
    number = codes.get(language, int(language) if re.fullmatch(r"[0-9]{1,9}", language) else -1)
    if not 0 <= number < n_languages:
        known = f"Known: {', '.join(sorted(codes))}." if codes else f"Give a number in 0..{n_languages - 1}."
        raise CheckpointError("language", language, f"is not a language of {source}.", known)
    return number


def _load(model: torch.nn.Module, source: str, folder: str) -> None:
    """Load exactly the tensors of a model that is on the meta device, in float32; nothing else is read."""
    files = weight_files(folder, _FIELD, _PREFIX)
    lacks = loading(CheckpointError, _FIELD, source, "does not hold the vocoder's tensors", _REMEDY)
    with lacks, contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        file_of = {key: file for file in opened for key in file.keys()}  # noqa: SIM118 - not a dict
        prefix = _PREFIX if any(key.startswith(_PREFIX) for key in file_of) else ""
        held, wanted = {key for key in file_of if key.startswith(prefix)}, {prefix + key for key in model.state_dict()}
        if held != wanted:
            raise ValueError(f"missing: {sorted(wanted - held)[:3]}, left over: {sorted(held - wanted)[:3]}")
        tensors = {key.removeprefix(prefix): file_of[key].get_tensor(key).float() for key in held}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("numbers that are not finite")
        model.load_state_dict(tensors, assign=True)
