"""Checks before a worker starts of what would fail on a cluster: storage, data, versions, clocks, limits, disk space, tracking and safety.
Each problem comes with a remedy."""

from __future__ import annotations

import shutil
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ray
import ray.exceptions
from rich.console import Console

from most_ray.checkpoint import catalog
from most_ray.config import OPTIONS, RunConfig
from most_ray.console.terminal import print_line
from most_ray.errors import ConfigError, DataError, UserError, count_of, one_line
from most_ray.io import storage
from most_ray.io.outputs import failure_rule
from most_ray.io.waits import waiting_for
from most_ray.presets import PRESETS
from most_ray.runs.room import cluster_address
from most_ray.service.cluster.address import requires_token
from most_ray.service.cluster.capacity import start_on_nodes, usable_nodes
from most_ray.service.cluster.connection import check_local
from most_ray.service.cluster.private_files import open_token
from most_ray.service.cluster.probe import NodeReport, Probe, remove_marker, run_probe, versions, write_marker
from most_ray.trackers.select import uses_wandb, wandb_key, with_environment

Level = Literal["ok", "warning", "error"]
ANSWER_S = 25.0  # seconds for a node to start a process and make all checks
_SKEW_S = 5.0  # seconds between clocks above which the times in two nodes' logs mislead
_OPEN_FILES = 8192  # open files that a process may need: a node with its workers, shards and connections has a few thousand


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    check: str  # its subject, as "storage"
    level: Level
    where: str  # the nodes concerned, "driver" or "cluster"
    text: str
    remedy: str = ""
    field: str = ""  # the setting at fault, if it is one
    value: object = None  # of that setting

    def sentence(self) -> str:
        """The finding and its remedy, with the nodes concerned."""
        where = f"{self.where}: " if self.where not in ("driver", "cluster") and self.where not in self.text else ""
        return f"{where}{self.text}." + (f" {self.remedy}." if self.remedy else "")

    def error(self) -> UserError:
        """The finding as the error that ends the command."""
        return ConfigError(self.field or self.check, self.value, f"{self.text}.", f"{self.remedy}." if self.remedy else "")


@dataclass(frozen=True)
class NodeAnswer:
    """A node's answer to a probe."""

    node: str  # its host name
    report: NodeReport | None  # None: no answer in time, or a failure
    asked: float  # of the driver's clock before the probe, UNIX seconds
    answered: float  # of the driver's clock after the answer, UNIX seconds
    failure: str = ""  # why the node could not run the probe


def check_cluster(config: RunConfig) -> list[Finding]:
    """Check on every node of the cluster that was joined what the run needs of it."""
    probe = Probe(uuid.uuid4().hex[:12], written_uris(config), read_uris(config))
    findings, marked = [], []
    for name, uri in probe.writes:
        try:
            write_marker(uri, probe.marker)
            marked.append(uri)
        except (OSError, DataError) as error:
            rule, remedy = failure_rule(error, "written to"), "Name a folder or URI that can be written to"
            findings.append(Finding("storage", "error", "driver", rule, remedy, name, storage.redact(uri)))
    own = {(each.field, each.uri): each.rule for each in run_probe(Probe(probe.marker, (), probe.reads)).problems}
    for (name, uri), rule in own.items():
        findings.append(Finding("data", "error", "driver", rule, "Check it", name, storage.redact(uri)))
    try:
        writes, reads = (write for write in probe.writes if write[1] in marked), (read for read in probe.reads if read not in own)
        answers = probe_nodes(Probe(probe.marker, tuple(writes), tuple(reads)))
    finally:
        for uri in marked:
            remove_marker(uri, probe.marker)
    return findings + assess_nodes(answers, versions())


def report_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the warnings and all errors but the first, which is raised."""
    errors = [finding.error() for finding in findings if finding.level == "error"]
    lines = [f"Warning: {finding.sentence()}" for finding in findings if finding.level == "warning"]
    for line in (*lines, *(f"Also wrong: {error}" for error in errors[1:])):
        print_line(console, line)
    if errors:
        raise errors[0]


def written_uris(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """(setting, URI) of the folders that the run writes to, from any node."""
    uris = {config.run_uri: "output_dir"}
    uris.setdefault(config.store_uri, "store_dir" if config.store_dir else "output_dir")
    return tuple((name, uri) for uri, name in uris.items())


def read_uris(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """(setting, URI) of the files and folders that tasks on any node may read."""
    return tuple(
        (option.name, storage.absolute(uri))
        for option in OPTIONS.values()
        if option.location and option.location.access == "read"
        for uri in option.elements(getattr(config, option.name))
        # Otherwise a name on a hub, which each node downloads by itself.
        if not option.location.may_be_name or (uri not in PRESETS and storage.exists(uri))
    )


def probe_nodes(probe: Probe) -> list[NodeAnswer]:
    """Run a probe on all usable nodes at once, and wait at most `ANSWER_S` seconds for their answers."""
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    began = time.time()
    tasks = start_on_nodes(run_probe, sorted(usable_nodes()), probe)
    answers, waiting, until = [], list(tasks), time.monotonic() + ANSWER_S
    with waiting_for(f"{len(tasks)} node(s) of the cluster to answer", ANSWER_S):
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                break
            report, failure = _report(done[0])
            answers.append(NodeAnswer(hosts[tasks[done[0]]], report, began, time.time(), failure))
    for reference in waiting:
        ray.cancel(reference, force=True)
    return answers + [NodeAnswer(hosts[tasks[reference]], None, began, time.time()) for reference in waiting]


def _report(reference: ray.ObjectRef) -> tuple[NodeReport | None, str]:
    """A node's report, or why it could not make one."""
    try:
        return ray.get(reference), ""
    except ray.exceptions.RayTaskError as error:  # for example because this package is missing there, or is older
        return None, str(error).strip().splitlines()[-1][:200]
    except ray.exceptions.RuntimeEnvSetupError as error:
        return None, one_line(error)[:200]
    except ray.exceptions.RayError:  # the node was lost, or its process died: reported as a node that does not answer
        return None, ""


def assess_nodes(answers: Sequence[NodeAnswer], own: Mapping[str, str]) -> list[Finding]:
    """The findings from the nodes' answers. Pure. `own`: the driver's versions, see `versions`."""
    findings = []
    for reason in sorted({answer.failure for answer in answers if answer.failure}):
        nodes = [answer.node for answer in answers if answer.failure == reason]
        text = f"{_host_list(nodes)} cannot run this package: {reason}"
        findings.append(Finding("nodes", "error", _host_list(nodes), text, "Install the same on all nodes", "most_ray"))
    silent = [answer.node for answer in answers if answer.report is None and not answer.failure]
    if silent and len(silent) == len(answers):
        text = f"no node gave an answer within {ANSWER_S:g} s"
        findings.append(Finding("nodes", "error", "cluster", text, "Look at the nodes' raylet.out", "ray_address", "..."))
    elif silent:
        rule = f"gave no answer within {ANSWER_S:g} s"
        remedy = "Look at that node's raylet.out; the run continues without it if the others have room"
        findings.append(Finding("nodes", "warning", _host_list(silent), rule, remedy))
    reports = [(answer, answer.report) for answer in answers if answer.report]
    findings += _assess_uris([report for _, report in reports])
    for name, version in own.items():
        # After "+" a version names the device that a wheel was built for: a head without GPUs may have another one.
        shown = {report.host: report.versions.get(name, "missing") for _, report in reports}
        others = {host: found for host, found in shown.items() if found.partition("+")[0] != version.partition("+")[0]}
        if others:
            found = ", ".join(sorted(set(others.values())))
            text = f"{_host_list(others)} {'has' if len(others) == 1 else 'have'} {name} {found}, the driver {version}"
            findings.append(Finding("versions", "error", _host_list(others), text, "Install the same on all nodes", name))
    for answer, report in reports:
        # The node read its clock at some time between the question and the answer.
        skew = max(answer.asked - report.time, report.time - answer.answered, 0.0)
        if skew > _SKEW_S:
            text = f"is {skew:.0f} s off the driver's"
            findings.append(Finding("clock", "warning", report.host, text, "Let NTP or chrony set it"))
    for report in (report for _, report in reports if 0 <= report.open_files < _OPEN_FILES):
        text = f"a process may open only {count_of(report.open_files, 'file')}"
        findings.append(Finding("limits", "warning", report.host, text, f"Raise it to {_OPEN_FILES} or more: ulimit -n, LimitNOFILE"))
    return findings


def _assess_uris(reports: Sequence[NodeReport]) -> list[Finding]:
    """One finding for each URI and problem, whatever the number of nodes."""
    findings = []
    found = Counter((each.field, each.uri, each.rule, each.missing) for report in reports for each in report.problems)
    for (name, uri, rule, missing), _ in sorted(found.items()):
        hosts = [report.host for report in reports if any((t.field, t.uri, t.rule) == (name, uri, rule) for t in report.problems)]
        text = f"{rule} on {_host_list(hosts)}" + (", unlike on the driver's machine" if missing else "")
        remedy = "Name a folder that all nodes mount, or a URI as s3://bucket/folder" if missing else "Fix it there, or name another"
        check = "storage" if (location := OPTIONS[name].location) and location.access == "write" else "data"
        findings.append(Finding(check, "error", _host_list(hosts), text, remedy, name, storage.redact(uri)))
    return findings


def _host_list(hosts: Sequence[str] | Mapping[str, object]) -> str:
    """Host names for a sentence: the first five, and the number of the others."""
    shown = sorted(set(hosts))
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def check_space(config: RunConfig, checkpoint_bytes: int) -> list[Finding]:
    """Compare the free space of a local output_dir, plus that of the run's own checkpoints, with what its checkpoints will take at once."""
    if storage.is_remote(config.run_uri):
        return []
    path = storage.local(config.run_uri)
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    free += len(catalog.committed(storage.join(config.run_uri, "checkpoints"))) * checkpoint_bytes
    most = config.keep_last + config.keep_best + 1  # a new checkpoint is written before an old one is deleted
    shown, needed = f"{free / 2**30:.1f} GiB are free or its own", f"{most} checkpoints of {checkpoint_bytes / 2**30:.1f} GiB at once"
    if free < 2 * checkpoint_bytes:
        text = f"{shown}, and a checkpoint takes {checkpoint_bytes / 2**30:.1f} GiB: not even two have room"
        return [Finding("space", "error", "driver", text, "Free some, or name another", "output_dir", config.output_dir)]
    if free < most * checkpoint_bytes:
        remedy = "Free some, or lower keep_last or keep_best"
        return [Finding("space", "warning", "driver", f"{shown}, the run will hold {needed}", remedy)]
    return [Finding("space", "ok", "driver", f"{shown}, the run will hold {needed}")]


def check_tracking(config: RunConfig) -> list[Finding]:
    """Whether W&B can be used, as far as that is known without a request to it."""
    if not uses_wandb(config):
        return []
    if with_environment(config).wandb_mode == "offline":
        return [Finding("tracking", "ok", "driver", "Weights & Biases is offline")]
    if wandb_key(config):
        return [Finding("tracking", "ok", "driver", "a key is set")]
    text = "no key of Weights & Biases is set: the run is kept offline"
    return [Finding("tracking", "warning", "driver", text, "Set WANDB_API_KEY where the driver runs, or wandb_mode: offline")]


def check_safety(config: RunConfig) -> list[Finding]:
    """Whether the cluster that was joined accepts requests of anyone who can reach its ports."""
    # Without a connection the calls below would start a Ray, which listens on all addresses.
    if not cluster_address(config) or not ray.is_initialized() or requires_token(ray.get_runtime_context().gcs_address):
        return []
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    anyone = "every user of this machine" if all(node.startswith("127.") for node in nodes) else "anyone who can reach its ports"
    text = f"the cluster requires no token: {anyone} can run code on it"
    return [Finding("safety", "warning", "cluster", text, "Start all nodes with RAY_AUTH_MODE=token and one token (cluster/README.md)")]


def check_own_files(config: RunConfig) -> list[Finding]:
    """Whether others can read the token of a Ray that a run would start on this machine, or replace the folder of its sockets."""
    if path := open_token():
        text = f"other users of this machine can read or change the token in {path}, which a run closes to them"
        return [Finding("safety", "warning", "driver", text, "Remove it, for a new one, where one of them may have read it")]
    try:
        check_local(config)
    except ConfigError as error:
        return [Finding("safety", "error", "driver", error.rule.rstrip("."), error.remedy.rstrip("."), error.field, error.value)]
    return []
