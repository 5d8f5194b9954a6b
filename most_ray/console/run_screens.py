"""The screens of a run: its plan at the start, its results at the end."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from most_ray.config import RunConfig
from most_ray.console.terminal import print_line, print_words
from most_ray.data.store import TokenStore
from most_ray.distributed.topology import Topology
from most_ray.errors import count_of
from most_ray.io import storage
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import local_copy
from most_ray.metrics.figures import FIGURES, TITLES
from most_ray.metrics.texts import bounds, duration, exactness, figure_text, percent
from most_ray.trackers.select import tracker_notes

if TYPE_CHECKING:
    from most_ray.runs.resolve import Prepared

Figures = Mapping[str, Any]
_MOST_EXPERTS = 16  # the most experts that have a column each


def first_screen(prepared: Prepared, console: Console, *, validation: str | None) -> None:
    """Print the plan of a run: where it runs, its model and data, and the step that it starts from. `validation`: see `evaluation_plan`."""
    job, plan, uri = prepared.job, prepared.plan, storage.redact(prepared.folder.uri)
    records = ", ".join(f"{len(store):,} {store.task} ({store.name})" for store in plan.stores)
    print_words(console, f"Run {uri}: {count_of(job.total_steps, 'step')} of {count_of(job.plan.global_batch_size, 'record')}; {records}")
    if prepared.n_rejected:
        were = "was" if prepared.n_rejected == 1 else "were"
        print_line(console, f"{count_of(prepared.n_rejected, 'record')} {were} rejected: {uri}/rejected.jsonl")
    done = prepared.done_steps
    exact = exactness(prepared.changed, prepared.also_changed)
    verb, epoch = "Resuming" if done else "Starting", plan.cursor(done).epoch
    trained = ", ".join(f"{count:,} {name}" for name, count in plan.consumed(done).items())
    print_words(console, f"{verb} after step {done}, epoch {epoch:.3f}, records trained on: {trained}; {exact}")
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
    headings = ("source", f"{records}records", f"{tokens}tokens", "share", f"{records}passes in this run")
    table = _columns(f"Mix (shares of {unit})", *headings)
    for name, n_records, n_tokens, share, passes in sources:
        table.add_row(name, f"{n_records:,}", f"{n_tokens:,}", f"{share:.1%}", f"{passes:.2f}")
    return table


def _columns(title: str, *headings: str) -> Table:
    """An empty table; names are on the left of their columns, numbers on the right."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("source", "task", "modality") else "right")
    return table


def evaluation_plan(prepared: Prepared, inline: bool) -> str | None:
    """When and where a run is evaluated, as text; None if it has no validation sets. `inline`: by the training workers."""
    config = prepared.job.config
    if not prepared.job.has_validation:
        return None
    when = f"every {count_of(config.eval_steps, 'step')} and at the end" if config.eval_steps else "at the end"
    if inline:
        return f"{when}, in between steps on the training workers"
    shared = f"sharing the {count_of(os.cpu_count() or 1, 'CPU')}"
    where = f"on {count_of(config.eval_gpus, 'GPU')}" if config.eval_gpus else "on CPUs" if prepared.use_gpu else shared
    tasks = f" in {count_of(config.eval_workers, 'task')}" if config.eval_workers > 1 else ""
    return f"{when}, beside training{tasks}, {where}"


def print_rows(console: Console, rows: Mapping[str, str]) -> None:
    """Print a line for each name and its text."""
    for name, text in rows.items():
        print_words(console, f"  {name:<11} {text}", " " * 14)


def where(topologies: Sequence[Topology], threads: int, use_gpu: bool) -> str:
    """Workers and layout as text: `2 workers: 1 replica x 2 shards, expert parallel 2; CPU, 1 thread each`. `topologies`: by workers."""
    fewest, most = topologies[0].world_size, topologies[-1]
    workers = count_of(most.world_size, "worker") if fewest == most.world_size else f"{fewest} to {most.world_size} workers, at most"
    layout = f": {layout_text(most)}"
    device = "a GPU" if use_gpu else "CPU"
    each = " each" if most.world_size > 1 else ""
    return f"{workers}{layout if most.world_size > 1 else ''}; {device}, {count_of(threads, 'thread')}{each}"


def layout_text(topology: Topology) -> str:
    """Return a layout as `1 replica x 2 shards, expert parallel 2`."""
    return f"{count_of(topology.dp_replicate, 'replica')} x {count_of(topology.fsdp, 'shard')}, expert parallel {topology.ep}"


def _model(config: RunConfig, model_path: str) -> str:
    size = _parameters(Path(local_copy(model_path)))
    return storage.redact(config.model_name_or_path) + (f", {count_of(size, 'parameter')}" if size else "")


def _parameters(folder: Path) -> int | None:
    """The number of values in a folder's safetensors files, read from their headers; None if there are none.

    Source: the file format, https://huggingface.co/docs/safetensors.
    """
    total = 0
    try:
        for path in folder.glob("*.safetensors"):
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = parse_json(stream.read(min(length, storage.SMALL)))
            total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return total or None


def last_screen(summary: Figures, console: Console) -> None:
    """Print error rates, losses, sample transcriptions, expert load, and the URIs of what the run has written."""
    sets: Mapping[str, Figures] = summary.get("sets", {})
    for table in (*(_table(task, sets) for task in _TABLES), _samples(summary.get("samples", [])), _routing(summary.get("routing"))):
        if table is not None:
            console.print(table)
    if summary.get("routing"):
        print_line(console, f"Selections across the modality border: {summary['routing']['leaked']}")
    for note in summary.get("notes", []):
        print_words(console, f"Note: {note}")
    for name, text in (("Training:", _trained(summary)), ("Time:", _time(summary))):
        if text:
            print_words(console, f"{name:<11} {text}", " " * 12)
    for name in ("checkpoint", "export", "report"):
        if summary.get(name):
            print_line(console, f"{name.capitalize() + ':':<11} {summary[name]}")


def _trained(summary: Figures) -> str:
    """Steps, records, tokens and the last losses of a run; summaries of earlier versions do not have all of them."""
    parts = [
        f"{summary[key]:,} {what}"
        for key, what in (("step", "steps"), ("trained_records", "records"), ("tokens", "tokens"))
        if key in summary
    ]
    tasks = ", ".join(f"{task} {loss:.4f}" for task, loss in summary.get("losses", {}).items() if loss is not None)
    if summary.get("loss") is not None:
        parts.append(f"loss {summary['loss']:.4f}" + (f" ({tasks})" if tasks else ""))
    return ", ".join(parts)


def _time(summary: Figures) -> str:
    """The training time and the speed of a run, and the time of its last start where it is not the only one."""
    if summary.get("training_seconds") is None:
        return ""
    speed = f", {summary['tokens_per_second']:,} tokens/s" if summary.get("tokens_per_second") is not None else ""
    starts = summary.get("starts", 1)
    last = f"; {starts} starts, the last one {duration(summary['start_seconds'])}" if starts > 1 and "start_seconds" in summary else ""
    return f"{duration(summary['training_seconds'])} of training{speed}{last}"


def _rate(part: str) -> Callable[[Figures], str]:
    return lambda figures: _percent((figures.get(part) or {}).get("rate"))


def _value(name: str) -> Callable[[Figures], str]:
    return lambda figures: figure_text(figures.get(name), FIGURES.keys[name].unit) or "-"


_RECORDS_LOSS = {TITLES["records"]: _value("records"), TITLES["loss"]: _value("loss")}
_TABLES: dict[str, tuple[str, dict[str, Callable[[Figures], str]]]] = {  # by task: the title, and the columns with the texts of their cells
    "asr": (
        "Word error rate",
        {
            TITLES["words"]: lambda figures: _percent(_words(figures).get("rate")),
            "95 % interval": lambda figures: _interval(_words(figures)),
            TITLES["characters"]: _rate("characters"),
            "errors": lambda figures: _errors(_words(figures)),
            **_RECORDS_LOSS,
        },
    ),
    "tts": (
        "Speech synthesis",
        {
            TITLES["outside"]: _rate("outside"),
            "outside 95 % interval": lambda figures: _interval(figures.get("outside") or {}),
            TITLES["cycle"]: _rate("cycle"),
            "95 % interval": lambda figures: _interval(figures.get("cycle") or {}),
            TITLES["units"]: _rate("units"),
            "speech s (median)": lambda figures: _length(figures, "generated_seconds"),
            "recordings s (median)": lambda figures: _length(figures, "recorded_seconds"),
            TITLES["duration_ratio"]: _value("duration_ratio"),
            TITLES["short_records"]: _value("short_records"),
            **_RECORDS_LOSS,
        },
    ),
    "text": ("Text", {TITLES["perplexity"]: _value("perplexity"), **_RECORDS_LOSS}),
}


def _table(task: str, sets: Mapping[str, Figures]) -> Table | None:
    """A table with a row for each set of a task; None if there are none."""
    rows = {name: figures for name, figures in sets.items() if figures.get("task", name.split("/")[0]) == task}
    if not rows:
        return None
    title, columns = _TABLES[task]
    cells = {heading: [cell(figures) for figures in rows.values()] for heading, cell in columns.items()}
    # Columns that no set has a figure for are left out, but for rates that every evaluation of the task has.
    always = (TITLES["words"], TITLES["cycle"], "95 % interval", TITLES["characters"], TITLES["perplexity"])
    cells = {heading: texts for heading, texts in cells.items() if heading in always or set(texts) != {"-"}}
    table = Table(title=title)
    table.add_column("set", overflow="fold")
    for heading in cells:
        table.add_column(heading, justify="right")
    for name, *texts in zip(rows, *cells.values(), strict=True):
        table.add_row(name, *texts)
    return table


def _words(figures: Figures) -> Figures:
    """The word errors of a set; summaries of earlier versions are read too."""
    old = figures.get("errors") or {}
    words = dict(figures.get("words", {**old, "rate": old.get("wer"), "reference": old.get("words")}))
    if "substitutions" in words:
        words["wrong"] = words["substitutions"] + words["deletions"] + words["insertions"]
    return words


def _length(figures: Figures, name: str) -> str:
    """A mean length and the median in seconds, as `0.33 (0.31)`."""
    mean, median = (figure_text(figures.get(key), "s") for key in (name, f"{name}_median"))
    return "-" if mean is None or median is None else f"{mean} ({median})"


def _errors(words: Figures) -> str:
    """Errors and reference words, as `40 of 500`."""
    wrong, reference = words.get("wrong"), words.get("reference")
    return "-" if wrong is None or reference is None else f"{wrong:,} of {reference:,}"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else percent(rate)


def _interval(rates: Figures) -> str:
    return " to ".join(bounds(rates.get("interval"))) or "-"


def _samples(samples: list[dict[str, Any]]) -> Table | None:
    if not samples:
        return None
    table = Table(title="Samples")
    for heading in ("record", "reference", "hypothesis"):
        table.add_column(heading, overflow="fold")
    for sample in spread(samples, 5):
        table.add_row(f"{sample['set']} {sample['id']}", sample["reference"], sample["hypothesis"])
    return table


def _routing(routing: Figures | None) -> Table | None:
    if not routing or not routing["expert_load"]:
        return None
    load: Mapping[str, Sequence[int]] = routing["expert_load"]
    n_experts = len(next(iter(load.values())))
    few = n_experts <= _MOST_EXPERTS
    headings = map(str, range(n_experts)) if few else ("experts used", "busiest expert")
    table = _columns("Expert load (share of a modality's selections)", "modality", *headings)
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
    return [sample for row in zip_longest(*by_set.values()) for sample in row if sample][:count]


def print_stores(stores: Sequence[TokenStore], seconds: float, console: Console) -> None:
    """Print the contents and URIs of token stores. `seconds`: that ingesting took."""
    table = _columns("Token stores", "source", "task", "records", "bad", "too long", "tokens", "MB")
    for store in stores:
        m = store.manifest
        megabytes = sum(shard["bytes"] for shard in m["shards"]) / 1e6
        numbers = (f"{m['n_records']:,}", f"{m['n_rejected']:,}", f"{m['n_set_aside']:,}", f"{m['n_tokens']:,}", f"{megabytes:,.1f}")
        table.add_row(store.name, store.task, *numbers)
    console.print(table)
    for store in stores:
        print_line(console, f"{store.task}/{store.name}: {store.uri}")
    print_line(console, f"{count_of(sum(len(store) for store in stores), 'record')} in {seconds:.1f} s")
