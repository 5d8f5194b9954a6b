"""The screen of `most-ray train --dry_run`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from most_ray import storage
from most_ray.service.progress import duration
from most_ray.train.dryrun import DryRun, Layout
from most_ray.train.memory import Memory
from most_ray.train.topology import Topology

_GIB = 1 << 30
_ROOM = 0.9  # of a device's memory: the rest is for what is not counted


def dry_screen(run: DryRun, console: Console) -> None:
    """What the run would be. Figures that rest on a sample or on a stand-in for the tokenizer are marked `about`."""
    about = "about " if run.about_tokens else ""
    counted = "about " if run.about_records or (run.about_tokens and run.config.weight_unit == "tokens") else ""
    where = f", step {run.done_steps:,} is done" if run.done_steps else ""
    _say(console, f"Dry run of {storage.redact(run.config.run_place)}: nothing is started, nothing is written there{where}")
    for note in run.notes:
        _say(console, f"  note        {note}")
    layout = run.layouts[-1]
    rows = {
        "model": f"{run.model_name}, {run.parameters:,} parameters",
        "steps": f"{counted}{run.total_steps:,} of {run.records:,} records",
        "a step": f"{about}{run.tokens:,.0f} tokens, {run.supervised:,.0f} of them supervised, in {run.packs:,.1f} rows of "
        f"{run.config.max_seq_length:,} ({run.tokens / run.packs / run.config.max_seq_length:.0%} full)",
        **{"workers" if one is layout else "at least": _workers(one) for one in reversed(run.layouts)},
        "device": _device(run),
        "operations": f"{about}{layout.operations:.3g} a step",
        "time": f"{about}{_times(run)}; saving and evaluations are not counted",
        "checkpoints": _checkpoints(run),
    }
    if run.rejected:
        rows["set aside"] = f"{counted}{run.rejected:,} records"
    for name, text in rows.items():
        _say(console, f"  {name:<11} {text}")
    console.print(_mix(run))
    console.print(_memory(run))
    _verdict(run, console)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _times(run: DryRun) -> str:
    first = f"{duration(run.seconds_to_first_checkpoint)} to the first checkpoint (step {run.first_checkpoint:,})"
    return f"{_seconds(run.seconds_per_step)} a step, {first}, {duration(run.seconds_to_end)} to the end"


def _checkpoints(run: DryRun) -> str:
    kept = run.config.keep_last + run.config.keep_best
    each = f"{_size(run.checkpoint_bytes)} each, {_size(run.checkpoint_bytes_per_rank)} of it on a rank, which takes as much main memory"
    return f"{each}; {kept} are kept, {_size(run.kept_bytes)}, and one more is there while it is written"


def _workers(layout: Layout) -> str:
    topology = layout.topology
    size = f"{_layout(topology)}; {_count(layout.passes, 'forward pass', 'es')} a step of {_count(layout.rows, 'row')} each"
    return f"{topology.world_size}: {size}"


def _layout(topology: Topology) -> str:
    return f"{_count(topology.dp_replicate, 'replica')} x {_count(topology.fsdp, 'shard')}, expert parallel {topology.ep}"


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def _device(run: DryRun) -> str:
    device = run.device
    half = run.config.bf16 or run.config.fp16
    peaks = f"{device.half / 1e12:,.4g} x 10^12 operations a second in half precision, " if half else ""
    routed = " (routed experts)" if half else ""
    return f"{device.name}, {peaks}{device.full / 1e12:,.4g} x 10^12 in float32{routed}; assumed: {device.share:.0%} of that is reached"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _size(count: int) -> str:
    return f"{count / _GIB:,.2f} GiB" if count >= _GIB / 10 else f"{count / (1 << 20):,.1f} MiB"


def _mix(run: DryRun) -> Table:
    table = Table(title=f"Mix (shares of {'records' if run.config.weight_unit == 'rows' else 'tokens'})")
    records, tokens = ("about " if about else "" for about in (run.about_records, run.about_tokens))
    for heading in ("source", f"{records}records", f"{tokens}tokens", "share", f"{records}passes in this run"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for source in run.sources:
        table.add_row(source.name, f"{source.records:,}", f"{source.tokens:,}", f"{source.share:.1%}", f"{source.passes:.2f}")
    return table


def _memory(run: DryRun) -> Table:
    table = Table(title="Memory of a worker in GiB, the one that holds most")
    table.add_column("what")
    for layout in run.layouts:
        table.add_column(_count(layout.topology.world_size, "worker"), justify="right")
    kinds = {
        "weights": "weights (float32)",
        "gradients": "gradients",
        "moments": "AdamW's moments",
        "gathered": "gathered by FSDP, at most",
        "copies": "weights in half precision",
        "logits": "the head's logits",
    }
    memories = [layout.memory for layout in run.layouts]
    for name, label in kinds.items():
        table.add_row(label, *(_gib(getattr(memory, name)) for memory in memories))
    chosen = run.config.gradient_checkpointing
    labels = {False: "without gradient checkpointing", True: "with gradient checkpointing"}
    for checkpointing, label in labels.items():
        kept = [memory.recomputed if checkpointing else memory.activations for memory in memories]
        table.add_row(f"activations {label}", *map(_gib, kept))
    table.add_section()
    for checkpointing, label in labels.items():
        mark = " (this run)" if checkpointing == chosen else ""
        table.add_row(f"all {label}{mark}", *_totals(memories, checkpointing))
    if run.device.memory:
        table.add_row(f"what a worker has ({run.device.name})", *[_gib(run.device.memory)] * len(memories))
    return table


def _totals(memories: Sequence[Memory], checkpointing: bool) -> list[str]:
    return [_gib(memory.total(checkpointing)) for memory in memories]


def _gib(count: int) -> str:
    return f"{count / _GIB:,.2f}" if count == 0 or count >= _GIB / 10 else f"{count / _GIB:.4f}"


def _verdict(run: DryRun, console: Console) -> None:
    """Whether that fits, on the layout that needs most."""
    has = run.device.memory
    if not has:
        return
    chosen = run.config.gradient_checkpointing
    layout = max(run.layouts, key=lambda one: one.memory.total(chosen))
    needs = layout.memory.total(chosen)
    share = f"{needs / has:.0%} of a worker's memory on {_count(layout.topology.world_size, 'worker')}"
    more = "the device's context, its libraries' buffers and fragmentation come on top"
    if needs <= _ROOM * has:
        _say(console, f"Fits: {share}; {more}.")
        return
    remedy = "lower train_batch_size or max_seq_length, or take more workers"
    if not chosen and layout.memory.total(True) <= _ROOM * has:
        remedy = "set gradient_checkpointing: true"
    _say(console, f"{'Hardly fits' if needs <= has else 'Does not fit'}: {share}, and {more}; {remedy}.")
