"""Which routed experts serve audio, given their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from most_ray.errors import ConfigError

Split = Literal["contiguous", "interleaved", "affinity"]
SPLITS: tuple[str, ...] = get_args(Split)


def split_experts(split: str, n_experts: int, n_audio: int, most_text_first: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Return text_expert_indices and audio_expert_indices, each ascending. Raises ConfigError if a group would be empty.

    Args:
        split: which experts serve audio. `contiguous`: the last ones; `interleaved`: evenly spaced ones; `affinity`: those that the least
            text is routed to, which is the end of `most_text_first` (see `rank_experts`).
    """
    if not 1 <= n_audio < n_experts:
        raise ConfigError("audio_experts", n_audio, f"must be in 1..{n_experts - 1}: text needs experts too.")
    if split == "contiguous":
        audio = list(range(n_experts - n_audio, n_experts))
    elif split == "interleaved":
        audio = [(2 * index + 1) * n_experts // (2 * n_audio) for index in range(n_audio)]
    else:
        assert most_text_first is not None and sorted(most_text_first) == list(range(n_experts))
        audio = sorted(most_text_first[n_experts - n_audio :])
    return [expert for expert in range(n_experts) if expert not in set(audio)], audio


def rank_experts(load: np.ndarray) -> tuple[list[int], list[float]]:
    """Rank experts by the selections of text tokens that were routed without regard to modality, `(layers, experts)`. Returns the experts,
    the one with the most text first, among equals the lower index; and the share of each expert by index. It is the mean over layers of its
    share in a layer, since a split is the same in all of them."""
    share = (load / np.maximum(load.sum(axis=1, keepdims=True), 1)).mean(axis=0)
    return np.argsort(-share, kind="stable").tolist(), share.tolist()
