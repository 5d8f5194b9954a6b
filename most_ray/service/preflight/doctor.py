"""`most-ray doctor`: all checks of a cluster or of this machine, without a run, as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import ray
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from most_ray.config import RunConfig
from most_ray.console.terminal import print_line
from most_ray.distributed.topology import Topology, plan_topologies
from most_ray.errors import UserError
from most_ray.io import storage
from most_ray.io.run_folder import local_copy, model_source
from most_ray.model.build import read_config
from most_ray.planner.memory import checkpoint_bytes
from most_ray.presets import PRESETS
from most_ray.runs.job import overrides_of
from most_ray.runs.output_checks import check_outputs
from most_ray.runs.resolve import check_inputs, devices_of
from most_ray.runs.room import cluster_address
from most_ray.runs.start_checks import walk
from most_ray.service.cluster.capacity import usable_nodes
from most_ray.service.cluster.connection import check_local_room, check_resources, cluster_gpus
from most_ray.service.cluster.probe import Probe, run_probe, versions
from most_ray.service.preflight.checks import (
    Finding,
    NodeAnswer,
    assess_nodes,
    check_cluster,
    check_own_files,
    check_safety,
    check_space,
    check_tracking,
)


def examine_run(config: RunConfig) -> list[Finding]:
    """Make all checks that need no ingested records, on the named cluster, else on this machine; a failure becomes a finding."""
    findings: list[Finding] = []
    gpus: int | None = None  # of the cluster that was joined
    topologies: Sequence[Topology] = ()

    def cluster() -> list[Finding]:
        nonlocal gpus
        if not cluster_address(config):  # the check "safety" looks at what Ray on this machine needs
            return [Finding("cluster", "ok", "driver", "none is named: a run would start Ray on this machine")]
        gpus = cluster_gpus(config)
        total = ray.cluster_resources()
        resources = ", ".join(f"{total[name]:g} {name}" for name in ("CPU", "GPU") if total.get(name))
        return [Finding("cluster", "ok", "cluster", f"{resources} on {len(usable_nodes())} node(s)")]

    def this_machine() -> list[Finding]:
        report = run_probe(Probe(marker=""))
        return assess_nodes([NodeAnswer(report.host, report, report.time, report.time)], versions())

    def room() -> None:
        nonlocal topologies
        topologies = _plan_layouts(config, gpus)

    def safety() -> list[Finding]:
        return check_safety(config) if cluster_address(config) else check_own_files(config)

    def failed(name: str, error: UserError) -> None:
        findings.append(Finding(name, "error", "driver", error.rule.rstrip("."), error.remedy.rstrip("."), error.field, error.value))

    # Each with what is shown if it finds nothing.
    checks: dict[str, tuple[Callable[[], Sequence[Finding] | None], str]] = {
        "cluster": (cluster, ""),
        "storage": (lambda: check_outputs(config), f"{storage.redact(config.run_uri)} can be written to"),
        "data": (lambda: check_inputs(config), "all directories exist"),
        "limits": (this_machine, "enough files can be opened"),
        "nodes": (lambda: check_cluster(config), "all nodes can write, read and run the same versions"),
        "room": (room, "the workers have room"),
        "space": (lambda: _check_space(config, topologies[-1]), ""),
        "tracking": (lambda: check_tracking(config), "Weights & Biases is not used"),
        "safety": (
            lambda: check_safety(config) if cluster_address(config) else check_own_files(config),
            "no one else can use it without a token",
        ),
    }
    if not any((config.train_asr_dirs, config.train_tts_dirs, config.train_text_dirs)):
        del checks["data"]

    def reported(name: str) -> None:
        if (name == "nodes" and gpus is None) or (name == "limits" and gpus is not None):
            return
        operation, passed = checks[name]
        findings.extend(operation() or [Finding(name, "ok", "driver", passed)])

    walk({name: partial(reported, name) for name in checks}, failed)
    return findings


def _plan_layouts(config: RunConfig, gpus: int | None) -> Sequence[Topology]:
    """The topologies of the run, smallest first. Raises UserError where there is none, or the cluster that was joined has no room."""
    if gpus is None:
        check_local_room(config)
    use_gpu, fewest, most = devices_of(config, gpus=gpus)
    if gpus is not None:
        check_resources(config, fewest, most, use_gpu)
    name = config.model_name_or_path
    n_experts = (
        PRESETS[name]["n_routed_experts"]
        if name in PRESETS
        else read_config(local_copy(model_source(name, known=PRESETS))).n_routed_experts
    )
    return plan_topologies(fewest, most, config.ep_size, config.dp_replicate_size, n_experts)


def _check_space(config: RunConfig, topology: Topology) -> list[Finding]:
    if config.model_name_or_path in PRESETS:
        return [Finding("space", "ok", "driver", "a preset's checkpoints are small")]
    model = read_config(local_copy(model_source(config.model_name_or_path)), overrides_of(config))
    return check_space(config, checkpoint_bytes(model, topology, config.optimizer_state))


def show(findings: Sequence[Finding], console: Console) -> int:
    """Print a table of all findings, errors last. Returns the exit code: 2 if there are errors."""
    table = Table(*(Column(heading, overflow="fold") for heading in ("check", "", "where", "finding", "remedy")))
    styles = {"ok": "green", "warning": "yellow", "error": "red"}  # in the order of the rows
    for finding in sorted(findings, key=lambda each: list(styles).index(each.level)):
        value = "" if finding.value is None else f" = {finding.value!r}"
        named = f"{finding.field}{value}: " if finding.field else ""
        level = Text(finding.level, styles[finding.level])
        table.add_row(finding.check, level, finding.where, named + finding.text, finding.remedy)
    console.print(table)
    count = sum(finding.level == "error" for finding in findings)
    print_line(console, "No problem was found." if not count else f"{count} of these would end a run.")
    return 2 if count else 0
