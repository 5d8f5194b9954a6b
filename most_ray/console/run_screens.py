"""The screens of a run: its plan at the start, its results at the end."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from most_ray.config import RunConfig
from most_ray.console.progress import duration
from most_ray.data.store import TokenStore
from most_ray.distributed.topology import Topology
from most_ray.io import storage
from most_ray.io.run_folder import local_copy
from most_ray.metrics.figures import TITLES
from most_ray.runs.resolve import Prepared
from most_ray.trackers.select import tracker_notes

Figures = Mapping[str, Any]
_MOST_EXPERTS = 16  # the most experts that have a column each


def first_screen(prepared: Prepared, console: Console, *, validation: str | None) -> None:
    """Print the plan of a run: where it runs, its model and data, and the step that it starts from. `validation`: see `evaluation_plan`."""
    job, plan, uri = prepared.job, prepared.plan, storage.redact(prepared.folder.uri)
    records = ", ".join(f"{len(store)} {store.task} ({store.name})" for store in plan.stores)
    print_line(console, f"Run {uri}: {job.total_steps} steps of {job.plan.global_batch_size} records; {records}")
    if prepared.n_rejected:
        print_line(console, f"{prepared.n_rejected} records were rejected: {uri}/rejected.jsonl")
    done = prepared.done_steps
    exact = f"exact: no, changed since: {', '.join(prepared.accepted)}" if prepared.accepted else "exact: yes"
    verb, epoch = "Resuming" if done else "Starting", plan.cursor(done).epoch
    print_line(console, f"{verb} after step {done}, epoch {epoch:.3f}, records trained on {plan.consumed(done)}, {exact}")
    mix = plan.mix(job.total_steps)
    tokens = sum(part["tokens"] for part in mix.values())
    rows = {
        "where": where(prepared.topologies, job.threads, prepared.use_gpu),
        "model": _model(job.config, job.model_path),
        "steps": f"{job.total_steps - done:,} to make, {tokens / max(1, job.total_steps):,.0f} tokens each on average, {tokens:,} in all",
        "evaluation": validation or "none",
        "tracking": ", ".join([f"{uri}/metrics.jsonl", *tracker_notes(job.config)]),
    }
    print_rows(console, rows)
    sources = [
        (name, len(store), store.manifest["n_tokens"], part["target"], part["records"] / max(1, len(store)))
        for store, (name, part) in zip(plan.stores, mix.items(), strict=True)
    ]
    console.print(mix_table(job.plan.weight_unit, sources))


def mix_table(unit: str, sources: Iterable[tuple[str, int, int, float, float]], records: str = "", tokens: str = "") -> Table:
    """Return a table of the sources of records.

    Args:
        unit: that the shares are of.
        sources: name, records, tokens, share, and passes in the run.
        records, tokens: put before the headings of these columns.
    """
    table = Table(title=f"Mix (shares of {unit})")
    for heading in ("source", f"{records}records", f"{tokens}tokens", "share", f"{records}passes in this run"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, n_records, n_tokens, share, passes in sources:
        table.add_row(name, f"{n_records:,}", f"{n_tokens:,}", f"{share:.1%}", f"{passes:.2f}")
    return table


def evaluation_plan(prepared: Prepared, inline: bool) -> str | None:
    """When and where a run is evaluated, as text; None if it has no validation sets. `inline`: by the training workers."""
    config = prepared.job.config
    if not prepared.job.has_validation:
        return None
    when = f"every {config.eval_steps} steps and at the end" if config.eval_steps else "at the end"
    if inline:
        return f"{when}, in between steps on the training workers"
    shared = f"sharing the {os.cpu_count() or 1} CPUs"
    where = f"on {config.eval_gpus:g} GPUs" if config.eval_gpus else "on CPUs" if prepared.use_gpu else shared
    tasks = f" in {config.eval_workers} tasks" if config.eval_workers > 1 else ""
    return f"{when}, beside training{tasks}, {where}"


def print_line(console: Console, text: str) -> None:
    """Print text as it is: without markup or highlighting, and without breaking lines."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Print a line for each name and its text."""
    for name, text in rows.items():
        print_line(console, f"  {name:<11} {text}")


def where(topologies: Sequence[Topology], threads: int, use_gpu: bool) -> str:
    """Workers and layout as text: `2 workers: 1 replica x 2 shards, expert parallel 2; CPU, 1 thread each`. `topologies`: by workers."""
    fewest, most = topologies[0].world_size, topologies[-1]
    workers = count_of(most.world_size, "worker") if fewest == most.world_size else f"{fewest} to {most.world_size} workers, at most"
    layout = f": {layout_text(most)}"
    device = "a GPU" if use_gpu else "CPU"
    each = " each" if most.world_size > 1 else ""
    return f"{workers}{layout if most.world_size > 1 else ''}; {device}, {count_of(threads, 'thread')}{each}"


def count_of(number: int, what: str, plural: str = "s") -> str:
    """Return a number with its noun, as `2 workers`."""
    return f"{number:,} {what}{'' if number == 1 else plural}"


def layout_text(topology: Topology) -> str:
    """Return a layout as `1 replica x 2 shards, expert parallel 2`."""
    return f"{count_of(topology.dp_replicate, 'replica')} x {count_of(topology.fsdp, 'shard')}, expert parallel {topology.ep}"


def _model(config: RunConfig, model_path: str) -> str:
    name = storage.redact(config.model_name_or_path)
    size = _parameters(Path(local_copy(model_path)))
    return name + (f", {size:,} parameters" if size else "")


def _parameters(folder: Path) -> int | None:
    """The number of values in a folder's safetensors files, read from their headers; None if there are none.

    Source: the file format, https://huggingface.co/docs/safetensors.
    """
    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, struct.error):
        return None
    return total or None


def last_screen(summary: Figures, console: Console) -> None:
    """Print error rates, losses, sample transcriptions, expert load, and the URIs of what the run has written."""
    sets: Mapping[str, Figures] = summary.get("sets", {})
    tables = (_recognition(sets), _synthesis(sets), _text(sets), _samples(summary.get("samples", [])), _routing(summary.get("routing")))
    for table in tables:
        if table is not None:
            console.print(table)
    if summary.get("routing"):
        print_line(console, f"Selections across the modality border: {summary['routing']['leaked']}")
    if summary.get("training_seconds") is not None:
        speed = f", {summary['tokens_per_second']:,} tokens/s" if summary.get("tokens_per_second") is not None else ""
        print_line(console, f"Time:       {duration(summary['training_seconds'])}{speed}")
    for name in ("checkpoint", "export", "report"):
        if summary.get(name):
            print_line(console, f"{name.capitalize() + ':':<11} {summary[name]}")


def _recognition(sets: Mapping[str, Figures]) -> Table | None:
    columns: dict[str, Callable[[Figures], str]] = {
        TITLES["words"]: lambda figures: _percent(_words(figures).get("rate")),
        "95 % interval": lambda figures: _interval(_words(figures)),
        TITLES["characters"]: lambda figures: _percent((figures.get("characters") or {}).get("rate")),
        "errors": lambda figures: _number(_words(figures).get("wrong")),
        "words": lambda figures: _number(_words(figures).get("reference")),
        TITLES["records"]: lambda figures: _number(figures.get("records")),
        TITLES["loss"]: lambda figures: _number(figures.get("loss"), ".4f"),
    }
    return _table("Word error rate", columns, sets, "asr")


def _synthesis(sets: Mapping[str, Figures]) -> Table | None:
    def rate(part: str) -> Callable[[Figures], str]:
        return lambda figures: _percent((figures.get(part) or {}).get("rate"))

    columns: dict[str, Callable[[Figures], str]] = {
        TITLES["units"]: rate("units"),
        TITLES["cycle"]: rate("cycle"),
        "95 % interval": lambda figures: _interval(figures.get("cycle") or {}),
        TITLES["outside"]: rate("outside"),
        TITLES["duration_ratio"]: lambda figures: _number(figures.get("duration_ratio"), ".2f"),
        TITLES["records"]: lambda figures: _number(figures.get("records")),
        TITLES["loss"]: lambda figures: _number(figures.get("loss"), ".4f"),
    }
    if not any(figures.get("outside") for figures in sets.values()):
        del columns[TITLES["outside"]]
    return _table("Speech synthesis", columns, sets, "tts")


def _text(sets: Mapping[str, Figures]) -> Table | None:
    columns: dict[str, Callable[[Figures], str]] = {
        TITLES["perplexity"]: lambda figures: _number(figures.get("perplexity"), ",.2f"),
        TITLES["records"]: lambda figures: _number(figures.get("records")),
        TITLES["loss"]: lambda figures: _number(figures.get("loss"), ".4f"),
    }
    return _table("Text", columns, sets, "text")


def _table(title: str, columns: Mapping[str, Callable[[Figures], str]], sets: Mapping[str, Figures], task: str) -> Table | None:
    """A table with a row for each set of a task; None if there are none."""
    rows = {name: figures for name, figures in sets.items() if figures.get("task", name.split("/")[0]) == task}
    if not rows:
        return None
    table = Table(title=title)
    table.add_column("set", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(cell(figures) for cell in columns.values()))
    return table


def _words(figures: Figures) -> Figures:
    """The word errors of a set; summaries of earlier versions are read too."""
    if "words" in figures:
        words = dict(figures["words"])
    else:
        old = figures.get("errors") or {}
        words = {**old, "rate": old.get("wer"), "reference": old.get("words")}
    if "substitutions" in words:
        words["wrong"] = words["substitutions"] + words["deletions"] + words["insertions"]
    return words


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2%}"


def _interval(rates: Figures) -> str:
    low, high = rates.get("interval") or (None, None)
    return "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def _number(value: float | None, form: str = ",") -> str:
    return "-" if value is None else f"{value:{form}}"


def _samples(samples: list[dict[str, Any]]) -> Table | None:
    if not samples:
        return None
    table = Table(title="Samples")
    for heading in ("record", "reference", "hypothesis"):
        table.add_column(heading)
    for sample in spread(samples, 5):
        # As Text: the output of a model may contain what rich takes for markup, as [Hu7].
        table.add_row(*map(Text, (f"{sample['set']} {sample['id']}", sample["reference"], sample["hypothesis"])))
    return table


def _routing(routing: Figures | None) -> Table | None:
    if not routing or not routing["expert_load"]:
        return None
    load: Mapping[str, Sequence[int]] = routing["expert_load"]
    n_experts = len(next(iter(load.values())))
    few = n_experts <= _MOST_EXPERTS
    table = Table(title="Expert load (share of a modality's selections)")
    for heading in ("modality", *(map(str, range(n_experts)) if few else ("experts used", "busiest expert"))):
        table.add_column(heading, justify="left" if heading == "modality" else "right")
    for modality, counts in load.items():
        shares = [count / max(1, sum(counts)) for count in counts]
        busiest = max(range(n_experts), key=lambda expert: counts[expert])
        summed_up = (f"{sum(count > 0 for count in counts)} of {n_experts}", f"{busiest}: {shares[busiest]:.1%}")
        table.add_row(modality, *((f"{share:.1%}" if share else "-" for share in shares) if few else summed_up))
    return table


def spread(samples: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of the samples, alternating between the sets."""
    by_set: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_set.setdefault(sample["set"], []).append(sample)
    ordered = [row[index] for index in range(max(map(len, by_set.values()), default=0)) for row in by_set.values() if index < len(row)]
    return ordered[:count]


def print_stores(stores: Sequence[TokenStore], seconds: float, console: Console) -> None:
    """Print the contents and URIs of token stores. `seconds`: that ingesting took."""
    table = Table(title="Token stores")
    for heading in ("source", "task", "records", "bad", "too long", "tokens", "MB"):
        table.add_column(heading, justify="left" if heading in ("source", "task") else "right")
    for store in stores:
        m = store.manifest
        megabytes = sum(shard["bytes"] for shard in m["shards"]) / 1e6
        numbers = (f"{m['n_records']:,}", f"{m['n_rejected']:,}", f"{m['n_set_aside']:,}", f"{m['n_tokens']:,}", f"{megabytes:,.1f}")
        table.add_row(store.name, store.task, *numbers)
    console.print(table)
    for store in stores:
        console.print(f"{store.task}/{store.name}: {store.uri}", highlight=False, soft_wrap=True)
    console.print(f"{sum(len(store) for store in stores):,} records in {seconds:.1f} s", highlight=False)
