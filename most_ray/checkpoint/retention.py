"""Which checkpoints may go. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


def steps_to_delete(
    steps: Collection[int],
    keep_last: int,
    keep_best: int = 0,
    scores: Mapping[int, float] | None = None,
    pending: Collection[int] = (),
) -> list[int]:
    """The steps to delete, oldest first, of those whose checkpoints exist.

    Kept are the newest `keep_last` (at least one), of those with a score the `keep_best` lowest (of equal ones the newer; what is not a
    number is no score), and all that are still being evaluated.

    Args:
        scores: step -> value of the metric; steps without a checkpoint are passed over.
        pending: steps whose evaluation is under way.
    """
    ordered = sorted(steps)
    kept = set(ordered[-max(1, keep_last) :]) | set(pending)
    scored = {step: value for step, value in (scores or {}).items() if step in ordered and not math.isnan(value)}
    kept |= set(sorted(scored, key=lambda step: (scored[step], -step))[:keep_best])
    return [step for step in ordered if step not in kept]


def score_of(line: Mapping[str, Mapping[str, float | None]], metric: str) -> float | None:
    """A line of kind `evaluation` as one figure: `wer` or `loss`, the mean over all sets, or of one set as `wer/test_takes`, its task
    before it or not. None where the line has no such figure."""
    kind, _, name = metric.partition("/")
    figures = line.get({"wer": "wer", "loss": "validation_loss"}[kind], {})
    values = [value for key, value in figures.items() if not name or key == name or key.endswith(f"/{name}") or name.endswith(f"/{key}")]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
