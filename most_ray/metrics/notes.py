"""What a run's figures should make its user look at, in sentences for screen, summary.json and report, with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHORT = 0.5  # of a recording's length: speech that the model makes below it is counted as short
NEAR_COLLAPSE = 0.8  # of the greatest imbalance that there can be, above which experts are near collapse
ADVICE = "Raise aux_loss_alpha or balance_bias_rate, and check the mix of the sources (asr_tts_mix_ratio, text_mix_ratio)."


def most_load(experts: int, selected: int) -> float:
    """The greatest load that an expert can have, over the mean of `experts`, where each token selects `selected` different ones."""
    return max(1.0, experts / max(1, selected))


def imbalance(ratio: float, experts: int, selected: int) -> float:
    """The busiest expert's load over the mean, `ratio`, on the scale from even (0) to the greatest that there can be (1)."""
    most = most_load(experts, selected)
    return (ratio - 1) / (most - 1) if most > 1 else 0.0


def is_overloaded(ratio: float, experts: int, selected: int | None, load_alert: float) -> bool:
    """Whether an expert has too much load: more than `load_alert` times the mean (0: never), or nearly all that it can have."""
    near = selected is not None and imbalance(ratio, experts, selected) > NEAR_COLLAPSE
    return load_alert > 0 and (ratio > load_alert or near)


def run_notes(
    start: Mapping[str, Any], line: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]], load_alert: float | None
) -> list[str]:
    """The sentences about a run.

    Args:
        start, line: its newest lines of kinds `start` and `train`, empty where it has none.
        sets: figures of its newest evaluation, by task/set.
        load_alert: None where it is unknown.
    """
    return [*collapse_notes(start, line, 4.0 if load_alert is None else load_alert), *short_speech_notes(sets)]


def collapse_notes(start: Mapping[str, Any], line: Mapping[str, Any], load_alert: float) -> list[str]:
    """A sentence for each modality whose experts are near collapse, or overloaded."""
    found = []
    groups, ratios, selected = (_mapping(start.get("experts")), _mapping(line.get("expert_max_over_mean")), start.get("experts_per_token"))
    known = selected if isinstance(selected, int) and selected > 0 else None
    for modality, ratio in ratios.items():
        group = groups.get(modality)
        if not isinstance(group, list) or not isinstance(ratio, int | float) or not is_overloaded(ratio, len(group), known, load_alert):
            continue
        of = f" of at most {most_load(len(group), known):.2f}" if known else ""
        found.append(
            f"The {modality} experts are near collapse: the busiest one has {ratio:.2f}{of} times their mean load, in the worst layer at "
            f"step {line.get('step', 0):,.0f}. {ADVICE}"
        )
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def short_speech_notes(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each set of synthesis in which the model's speech is far shorter than the recordings."""
    return [
        f"{name}: {figures['short_records']:,} of {figures.get('records', 0):,} synthesised records last less than {SHORT:g} times as long "
        "as their recordings, so rates of what is recognised in them flatter. Listen to them; train longer, or give synthesis more weight "
        "(asr_tts_mix_ratio, asr_loss_weight); a recogniser (key recogniser) judges from outside."
        for name, figures in sets.items()
        if isinstance(figures.get("short_records"), int) and figures["short_records"] > 0 and isinstance(figures.get("records", 0), int)
    ]
