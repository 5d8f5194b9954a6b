"""Which of the routed experts serve audio, where their number is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from most_ray.errors import ConfigError

Split = Literal["contiguous", "interleaved", "affinity"]
SPLITS: tuple[str, ...] = get_args(Split)


def split_experts(split: str, n_experts: int, n_audio: int, most_text_first: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """(text_expert_indices, audio_expert_indices), each ascending.

    contiguous: the last ones are audio's. interleaved: they lie evenly among the others. affinity: those that carry the least text.

    Args:
        most_text_first: all experts by the text that they carry in the starting model, for `affinity` (see `rank_experts`).

    Raises:
        ConfigError: a group would be empty.
    """
    if not 1 <= n_audio < n_experts:
        raise ConfigError("audio_experts", n_audio, f"must lie in 1..{n_experts - 1}: text needs experts too.")
    if split == "contiguous":
        audio = list(range(n_experts - n_audio, n_experts))
    elif split == "interleaved":
        audio = [(2 * index + 1) * n_experts // (2 * n_audio) for index in range(n_audio)]
    else:
        assert most_text_first is not None and sorted(most_text_first) == list(range(n_experts))
        audio = sorted(most_text_first[n_experts - n_audio :])
    return [expert for expert in range(n_experts) if expert not in set(audio)], audio


def rank_experts(load: np.ndarray) -> tuple[list[int], list[float]]:
    """Experts by the text that they carry, most first, of equal ones the lower index first; and each expert's share, by index.

    Args:
        load: (L, E) selections of text tokens, routed without regard to modality. Every layer counts alike: an expert's share is the mean
            over layers, for a split holds in all of them.
    """
    totals = load.sum(axis=1, keepdims=True)
    share = (load / np.maximum(totals, 1)).mean(axis=0)
    return sorted(range(load.shape[1]), key=lambda expert: (-share[expert], expert)), [float(value) for value in share]
