"""What a finished run shows on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from most_ray.data.store import TokenStore


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Word error rates, sample transcriptions, expert load, and where things lie."""
    rates = Table(title="Word error rate")
    for heading in ("set", "WER", "errors", "words", "records", "loss"):
        rates.add_column(heading, justify="left" if heading == "set" else "right")
    for name, section in summary.get("sets", {}).items():
        errors = section.get("errors")
        if errors:
            wrong = errors["substitutions"] + errors["deletions"] + errors["insertions"]
            cells = (f"{errors['wer']:.2%}", str(wrong), str(errors["words"]), str(errors["records"]))
        else:
            cells = ("-", "-", "-", str(section["records"]))
        rates.add_row(name, *cells, f"{section['loss']:.4f}")
    if summary.get("sets"):
        console.print(rates)
    samples = Table(title="Samples")
    for heading in ("record", "reference", "hypothesis"):
        samples.add_column(heading)
    for sample in spread(summary.get("samples", []), 5):
        samples.add_row(f"{sample['set']} {sample['id']}", sample["reference"], sample["hypothesis"])
    if summary.get("samples"):
        console.print(samples)
    routing = summary.get("routing")
    if routing:
        load = Table(title="Expert load (share of a modality's selections)")
        load.add_column("modality")
        totals = {modality: max(1, sum(counts)) for modality, counts in routing["expert_load"].items()}
        for expert in range(len(next(iter(routing["expert_load"].values())))):
            load.add_column(str(expert), justify="right")
        for modality, counts in routing["expert_load"].items():
            load.add_row(modality, *(f"{count / totals[modality]:.1%}" if count else "-" for count in counts))
        console.print(load)
        console.print(f"Selections across the modality border: {routing['leaked']}", highlight=False)
    console.print(f"Checkpoint: {summary['checkpoint']}", highlight=False, soft_wrap=True)
    console.print(f"Export:     {summary['export']}", highlight=False, soft_wrap=True)


def spread(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the samples, taken in turn from each set."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_set.setdefault(sample["set"], []).append(sample)
    ordered = [row[index] for index in range(max(map(len, by_set.values()), default=0)) for row in by_set.values() if index < len(row)]
    return ordered[:count]


def print_stores(stores: Sequence[TokenStore], seconds: float, console: Console) -> None:
    """What was taken in, and where it lies."""
    table = Table(title="Token stores")
    for heading in ("source", "task", "records", "bad", "set aside", "tokens", "MB"):
        table.add_column(heading, justify="left" if heading in ("source", "task") else "right")
    for store in stores:
        m = store.manifest
        megabytes = sum(shard["bytes"] for shard in m["shards"]) / 1e6
        numbers = (f"{m['n_records']:,}", f"{m['n_rejected']:,}", f"{m['n_set_aside']:,}", f"{m['n_tokens']:,}", f"{megabytes:,.1f}")
        table.add_row(store.name, store.task, *numbers)
    console.print(table)
    for store in stores:
        console.print(f"{store.task}/{store.name}: {store.place}", highlight=False, soft_wrap=True)
    console.print(f"{sum(len(store) for store in stores):,} records in {seconds:.1f} s", highlight=False)
