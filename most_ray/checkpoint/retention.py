"""Which checkpoints are kept. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


def steps_to_delete(
    steps: Collection[int], keep_last: int, keep_best: int = 0, scores: Mapping[int, float] | None = None, pending: Collection[int] = ()
) -> list[int]:
    """Return which of the existing checkpoints to delete, oldest first.

    Args:
        steps: steps that have a checkpoint.
        keep_last: how many of the newest are kept; at least one is.
        keep_best: how many of those with the lowest scores are kept too; among equal scores the newer one.
        scores: step -> value of the metric. NaN counts as no score; steps without a checkpoint are ignored.
        pending: steps that are kept because their evaluation is under way.
    """
    ordered = sorted(steps)
    kept = set(ordered[-max(1, keep_last) :]) | set(pending)
    scored = {step: value for step, value in (scores or {}).items() if step in ordered and not math.isnan(value)}
    kept |= set(sorted(scored, key=lambda step: (scored[step], -step))[:keep_best])
    return [step for step in ordered if step not in kept]


def score_of(line: Mapping[str, Mapping[str, float | None]], metric: str) -> float | None:
    """Return the metric that checkpoints are compared by, from a line of kind `evaluation`; None if it has none. The metric is `wer` or
    `loss`, the mean over all sets; or that of one set, as `wer/test_takes`, with or without its task before the name."""
    kind, _, name = metric.partition("/")
    figures = line.get({"wer": "wer", "loss": "validation_loss"}[kind], {})
    values = [value for key, value in figures.items() if not name or key == name or key.endswith(f"/{name}") or name.endswith(f"/{key}")]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
