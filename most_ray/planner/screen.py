"""The screen of `most-ray train --dry_run`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from most_ray.config import Recompute
from most_ray.console.run_screens import layout_text, mix_table, print_rows
from most_ray.console.terminal import print_line
from most_ray.errors import count_of
from most_ray.io import storage
from most_ray.metrics.texts import rough_duration as duration
from most_ray.planner.dry_run import DryRun
from most_ray.planner.hardware import BANDWIDTH_EFFICIENCY, MATMUL_EFFICIENCY
from most_ray.planner.layouts import USABLE_MEMORY, LayoutEstimate

_GIB = 1 << 30
_RECOMPUTED: dict[Recompute, tuple[str, str]] = {
    "none": ("activations", ""),
    "selective": ("selective", ", recompute: selective"),
    "full": ("recomputed", ", recompute: full"),
}
_SHOWN_LAYOUTS = 4
_WORTH = 1.05  # times as fast: a smaller gain is within the error of the estimate


def dry_screen(run: DryRun, console: Console) -> None:
    """Print the estimate. Figures that are based on a sample, or on a stand-in for the tokenizer, are marked `about`."""
    about = "about " if run.about_tokens else ""
    counted = "about " if run.about_records or (run.about_tokens and run.config.weight_unit == "tokens") else ""
    where = f", step {run.done_steps:,} is done" if run.done_steps else ""
    print_line(console, f"Dry run of {storage.redact(run.config.run_uri)}: nothing is started, nothing is written there{where}")
    for note in run.notes:
        print_line(console, f"  note        {note}")
    layout = run.layout
    rows = {
        "model": f"{run.model_name}, {count_of(run.parameters, 'parameter')}",
        "steps": f"{counted}{run.total_steps:,} of {count_of(run.records, 'record')}",
        "a step": f"{about}{run.tokens:,.0f} tokens, {run.supervised:,.0f} of them supervised, in {run.packs:,.1f} rows of "
        f"{run.config.max_seq_length:,} ({run.tokens / run.packs / run.config.max_seq_length:.0%} full)",
        **{"workers" if one is layout else "at least": _workers(one) for one in reversed(run.layouts)},
        "device": _device(run),
        "operations": f"{about}{layout.operations:.3g} a step",
        "time": f"{about}{_times(run)}; saving and evaluations are not counted",
        "checkpoints": _checkpoints(run),
    }
    print_rows(console, rows | ({"rejected": f"{counted}{count_of(run.rejected, 'record')}"} if run.rejected else {}))
    console.print(mix_table(run.config.weight_unit, run.sources, "about " if run.about_records else "", about))
    console.print(_memory(run))
    if len(run.choices) > 1:
        console.print(_layouts(run))
        _best(run, console)
    _verdict(run, console)


def _times(run: DryRun) -> str:
    seconds = run.layout.cost.seconds
    first = f"{duration(run.seconds_to_first_checkpoint)} to the first checkpoint (step {run.first_checkpoint:,})"
    step = f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{step} a step, {first}, {duration(run.seconds_to_end)} to the end"


def _checkpoints(run: DryRun) -> str:
    each = f"{_size(run.layout.checkpoint_bytes)} each, {_size(run.layout.checkpoint_bytes_per_rank)} of it on a rank"
    kept = f"{run.config.keep_last + run.config.keep_best} are kept, {_size(run.kept_bytes)}"
    return f"{each}, which needs as much main memory; {kept}, and one more exists while it is written"


def _workers(layout: LayoutEstimate) -> str:
    passes = f"{count_of(layout.passes, 'forward pass')} a step of {count_of(layout.rows, 'row')} each"
    return f"{layout.topology.world_size}: {layout_text(layout.topology)}; {passes}"


def _device(run: DryRun) -> str:
    device, shares = run.device, (f"{MATMUL_EFFICIENCY:.0%}", f"{BANDWIDTH_EFFICIENCY:.0%}")
    half = run.config.bf16 or run.config.fp16
    peaks = f"{device.half_flops / 1e12:,.4g} x 10^12 operations a second in half precision, " if half else ""
    reached = f"assumed: {shares[0]} of that in matrix products, {shares[1]} of memory's and links' bandwidth"
    if run.calibration is not None:
        how = "measured on" if run.calibration.measured else "too large to be measured: assumed for"
        reached = f"{run.calibration.flops / 1e12:,.2g} {how} the model's steps"
    return f"{device.name}, {peaks}{device.full_flops / 1e12:,.4g} x 10^12 in float32; {reached}"


def _size(count: int) -> str:
    return f"{count / _GIB:,.2f} GiB" if count >= _GIB / 10 else f"{count / (1 << 20):,.1f} MiB"


def _memory(run: DryRun) -> Table:
    table = Table("what", title="Memory of a worker in GiB, the one that holds most")
    for layout in run.layouts:
        table.add_column(count_of(layout.topology.world_size, "worker"), justify="right")
    kinds = {
        "weights": "weights (float32)",
        "gradients": "gradients",
        "moments": "AdamW's moments",
        "gathered": "gathered by FSDP, at most",
        "copies": "weights in half precision",
        "logits": "a block of the head's logits",
    }
    memories = [layout.memory for layout in run.layouts]
    for name, label in (*kinds.items(), *((what, f"activations{label}") for what, label in _RECOMPUTED.values())):
        table.add_row(label, *(_gib(getattr(memory, name)) for memory in memories))
    table.add_section()
    for kind, (_, label) in _RECOMPUTED.items():
        mark = " (this run)" if kind == run.config.recomputed else ""
        table.add_row(f"all{label}{mark}", *(_gib(memory.total(kind)) for memory in memories))
    if run.device.memory:
        table.add_row(f"what a worker has ({run.device.name})", *[_gib(run.device.memory)] * len(memories))
    return table


def _layouts(run: DryRun) -> Table:
    """Return a table of the best layouts and the run's own."""
    title = f"Layouts of {count_of(run.layout.topology.world_size, 'worker')}, {len(run.choices)} in all, the best first"
    table = Table("replicas x shards, expert parallel", title=title)
    for heading in ("tokens/s", "communication", "MiB sent by a worker", "GiB of a worker"):
        table.add_column(heading, justify="right")
    for index, choice in enumerate(run.choices):
        topology, cost, own = choice.topology, choice.cost, choice.topology == run.layout.topology
        if index < _SHOWN_LAYOUTS or own:
            memory = f"{_gib(choice.memory.total(run.config.recomputed))}{'' if choice.fits else ', too much'}"
            sizes = f"{topology.dp_replicate} x {topology.fsdp}, {topology.ep}{' (this run)' if own else ''}"
            sent = f"{sum(cost.sent.values()) / (1 << 20):,.1f}"
            table.add_row(sizes, f"{run.tokens / cost.seconds:,.0f}", f"{cost.communication:.0%}", sent, memory)
    return table


def _best(run: DryRun, console: Console) -> None:
    """Print the best layout, if the run has another one that does not fit or is slower."""
    best, own = run.choices[0], next(choice for choice in run.choices if choice.topology == run.layout.topology)
    gain = own.cost.seconds / best.cost.seconds
    if best.fits and not (own.fits and gain < _WORTH):
        sizes = f"dp_replicate_size: {best.topology.dp_replicate}, ep_size: {best.topology.ep}"
        why = f"about {gain:.2g} times as fast as this run's" if own.fits else "which fits, as this run's does not"
        print_line(console, f"Best layout: {sizes}, {why}.")


def _gib(count: int) -> str:
    return f"{count / _GIB:,.2f}" if count == 0 or count >= _GIB / 10 else f"{count / _GIB:.4f}"


def _verdict(run: DryRun, console: Console) -> None:
    """Print whether the run fits on the layout that needs the most memory, and what to change if it does not."""
    if not (available := run.device.memory):
        return
    layout = max(run.layouts, key=lambda one: one.memory.total(run.config.recomputed))
    needs = layout.memory.total(run.config.recomputed)
    share = f"{needs / available:.0%} of a worker's memory on {count_of(layout.topology.world_size, 'worker')}"
    more = "the device's context, its libraries' buffers and fragmentation come on top"
    if needs <= USABLE_MEMORY * available:
        print_line(console, f"Fits: {share}; {more}.")
        return
    totals = ((other, layout.memory.total(other)) for other in _RECOMPUTED)
    fitting = next((other for other, total in totals if total < needs and total <= USABLE_MEMORY * available), None)
    remedy = f"set recompute: {fitting}" if fitting else "lower train_batch_size or max_seq_length, or take more workers"
    print_line(console, f"{'Hardly fits' if needs <= available else 'Does not fit'}: {share}, and {more}; {remedy}.")
