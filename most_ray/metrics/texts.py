"""Figures as text, in one rounding for screens, logs and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def percent(value: float) -> str:
    """A rate in percent, with more digits below 10%."""
    return f"{value:.2%}" if abs(value) < 0.1 else f"{value:.1%}"


def bounds(interval: Sequence[float | None] | None) -> tuple[str, ...]:
    """The ends of a rate's interval as text; empty where they are unknown."""
    low, high = interval or (None, None)
    return () if low is None or high is None else (percent(low), percent(high))


def rate_text(errors: Mapping[str, Any]) -> str:
    """An error rate with its interval: `8.00% [5.60%, 10.4%]`. `errors`: see `figures.ERRORS`."""
    ends = ", ".join(bounds(errors.get("interval")))
    return percent(errors["rate"]) + (f" [{ends}]" if ends else "")


def figure_text(value: float | None, unit: str) -> str | None:
    """A figure of an evaluation, by the unit that it is declared with; None stays None."""
    if value is None or unit == "share":
        return None if value is None else percent(value)
    return f"{value:,.0f}" if unit == "records" else f"{value:.4f}" if unit == "nats per token" else f"{value:,.2f}"


def duration(seconds: float) -> str:
    """A time that was measured: `40.0 s`, `6 min 56 s` or `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def rough_duration(seconds: float) -> str:
    """A time that is estimated: `40 s`, `12 min`, `3 h 05 min` or `5 d 03 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 100 else f"{hours // 24} d {hours % 24:02d} h"


def exactness(changed: Sequence[str], also_changed: Sequence[str]) -> str:
    """Whether a run continues exactly, with the settings that changed: `exact: no, changed since: learning_rate (0.003 -> 0.001)`."""
    exact = f"exact: no, changed since: {', '.join(changed)}" if changed else "exact: yes"
    return exact + (f"; changed without effect on steps: {', '.join(also_changed)}" if also_changed else "")
