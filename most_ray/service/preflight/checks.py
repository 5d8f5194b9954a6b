"""What would fail on a cluster, found before a worker starts: room, storage, data, versions, clocks, limits; each with its remedy."""

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from most_ray.checkpoint import catalog
from most_ray.config import OPTIONS, RunConfig
from most_ray.errors import ConfigError, DataError, UserError
from most_ray.io import storage
from most_ray.model.build import PRESETS
from most_ray.service.cluster.address import requires_token
from most_ray.service.cluster.capacity import usable_nodes
from most_ray.service.cluster.connection import cluster_address
from most_ray.service.cluster.probe import NodeReport, Probe, remove_marker, run_probe, versions, write_marker
from most_ray.trackers.select import uses_wandb, wandb_key

Level = Literal["ok", "warning", "error"]
ANSWER_S = 25.0  # for a node to come up with a process and to try everything
_SKEW_S = 5.0  # between clocks: from here on the times of two nodes' logs mislead
_OPEN_FILES = 8192  # a node of Ray with its workers, shards and connections needs a few thousand


@dataclass(frozen=True)
class Finding:
    """check: what was looked at. where: the nodes concerned, or the driver. field, value: the setting at fault, where it is one."""

    check: str
    level: Level
    where: str
    text: str
    remedy: str = ""
    field: str = ""
    value: object = None

    def sentence(self) -> str:
        """What was found where, and what to do."""
        where = f"{self.where}: " if self.where not in ("driver", "cluster") and self.where not in self.text else ""
        return f"{where}{self.text}." + (f" {self.remedy}." if self.remedy else "")

    def error(self) -> UserError:
        """As what ends the command."""
        return ConfigError(self.field or self.check, self.value, f"{self.text}.", f"{self.remedy}." if self.remedy else "")


@dataclass(frozen=True)
class Answer:
    """A node's report, or None where it gave none in time, or could not (`failure`); asked and answered: the driver's clock around it,
    UNIX seconds."""

    node: str
    report: NodeReport | None
    asked: float
    answered: float
    failure: str = ""


def check_cluster(config: RunConfig) -> list[Finding]:
    """The run's cluster asked, node by node, what the run will need of it. Ray is joined already."""
    probe = Probe(uuid.uuid4().hex[:12], places_written(config), places_read(config))
    findings, left = [], []
    for name, uri in probe.writes:
        try:
            write_marker(uri, probe.marker)
            left.append(uri)
        except (OSError, DataError) as error:
            reason = error.rule if isinstance(error, DataError) else f"cannot be written to ({error.strerror or error})."
            remedy = "Name a folder or URI that can be written to"
            findings.append(Finding("storage", "error", "driver", reason.rstrip("."), remedy, name, storage.redact(uri)))
    here = {(each.field, each.uri): each.rule for each in run_probe(Probe(probe.marker, (), probe.reads)).problems}
    for (name, uri), rule in here.items():
        findings.append(Finding("data", "error", "driver", rule, "Check it", name, storage.redact(uri)))
    try:
        reads = tuple(read for read in probe.reads if read not in here)
        answers = ask_nodes(Probe(probe.marker, tuple((n, p) for n, p in probe.writes if p in left), reads))
    finally:
        for uri in left:
            remove_marker(uri, probe.marker)
    return findings + judge(answers, versions())


def report_findings(findings: Sequence[Finding], console: Console) -> None:
    """Say what was found. Where something will fail, all of that is said and the command ends.

    Raises:
        ConfigError: the first of what will fail.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in findings:
        if finding.level == "warning":
            console.print(f"Warning: {finding.sentence()}", highlight=False, soft_wrap=True, markup=False)
    for finding in errors[1:]:
        console.print(f"Also wrong: {finding.error()}", highlight=False, soft_wrap=True, markup=False)
    if errors:
        raise errors[0].error()


def places_written(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """The folders that every node writes to or reads what others have written there, by their settings."""
    uris = {config.run_uri: "output_dir"}
    uris.setdefault(config.store_uri, "store_dir" if config.store_dir else "output_dir")
    return tuple((name, uri) for uri, name in uris.items())


def places_read(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """What tasks on any node may have to open, by their settings."""
    found = []
    for option in OPTIONS.values():
        if option.location and option.location.access == "read":
            for uri in option.listed(getattr(config, option.name)):
                # What is on no disk here is a name on a hub, which each node fetches by itself.
                if not option.location.names or (uri not in PRESETS and storage.exists(uri)):
                    found.append((option.name, storage.absolute(uri)))
    return tuple(found)


def ask_nodes(probe: Probe) -> list[Answer]:
    """Every node that Ray takes for alive, at once, for at most `ANSWER_S`."""
    asked: dict[ray.ObjectRef, str] = {}
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    began = time.time()
    for node in sorted(usable_nodes()):
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(run_probe).remote(probe)] = names[node]
    answers, waiting, until = [], list(asked), time.monotonic() + ANSWER_S
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()))
        if not done:
            break
        report, failure = _report(done[0])
        answers.append(Answer(asked[done[0]], report, began, time.time(), failure))
    for reference in waiting:
        ray.cancel(reference, force=True)
    return answers + [Answer(asked[reference], None, began, time.time()) for reference in waiting]


def _report(reference: ray.ObjectRef) -> tuple[NodeReport | None, str]:
    """What a node has answered, or why it could not."""
    try:
        report: NodeReport = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # as where this package is missing, or an older one
        return None, str(error).strip().splitlines()[-1][:200]
    except ray.exceptions.RuntimeEnvSetupError as error:
        return None, " ".join(str(error).split())[:200]
    except ray.exceptions.RayError:  # the node went meanwhile, or its process died: said as a node that does not answer
        return None, ""
    return report, ""


def judge(answers: Sequence[Answer], own: Mapping[str, str]) -> list[Finding]:
    """What the nodes' answers mean. Pure. `own`: the driver's versions."""
    findings = []
    for reason in sorted({answer.failure for answer in answers if answer.failure}):
        nodes = [answer.node for answer in answers if answer.failure == reason]
        text = f"{_names(nodes)} cannot run this package: {reason}"
        findings.append(Finding("nodes", "error", _names(nodes), text, "Install the same on all nodes", "most_ray"))
    silent = [answer.node for answer in answers if answer.report is None and not answer.failure]
    if silent and len(silent) == len(answers):
        text = f"no node gave an answer within {ANSWER_S:g} s"
        findings.append(Finding("nodes", "error", "cluster", text, "Look at the nodes' raylet.out", "ray_address", "..."))
    elif silent:
        rule = f"gave no answer within {ANSWER_S:g} s"
        remedy = "Look at that node's raylet.out; the run goes on without it where the others have room"
        findings.append(Finding("nodes", "warning", _names(silent), rule, remedy))
    reports = [(answer, answer.report) for answer in answers if answer.report]
    findings += _storage([report for _, report in reports])
    for name, version in own.items():
        # Behind "+" stands what a wheel was built for: a head without GPUs may have another one.
        shown = {report.host: report.versions.get(name, "missing") for _, report in reports}
        others = {host: found for host, found in shown.items() if found.partition("+")[0] != version.partition("+")[0]}
        if others:
            found = ", ".join(sorted(set(others.values())))
            text = f"{_names(others)} {'has' if len(others) == 1 else 'have'} {name} {found}, the driver {version}"
            findings.append(Finding("versions", "error", _names(others), text, "Install the same on all nodes", name))
    for answer, report in reports:
        # Somewhere between question and answer the node looked at its clock.
        skew = max(answer.asked - report.time, report.time - answer.answered, 0.0)
        if skew > _SKEW_S:
            text = f"is {skew:.0f} s off the driver's"
            findings.append(Finding("clock", "warning", report.host, text, "Let NTP or chrony set it"))
    for report in (report for _, report in reports if 0 <= report.open_files < _OPEN_FILES):
        text = f"{report.open_files} open files are all that a process may have"
        findings.append(Finding("limits", "warning", report.host, text, f"Raise it to {_OPEN_FILES} or more: ulimit -n, LimitNOFILE"))
    return findings


def _storage(reports: Sequence[NodeReport]) -> list[Finding]:
    """One finding for each place and reason, whatever the number of nodes."""
    findings = []
    found = Counter((each.field, each.uri, each.rule, each.missing) for report in reports for each in report.problems)
    for (name, uri, rule, missing), _ in sorted(found.items()):
        hosts = [report.host for report in reports if any((t.field, t.uri, t.rule) == (name, uri, rule) for t in report.problems)]
        text = f"{rule} on {_names(hosts)}, unlike on the driver's machine" if missing else f"{rule} on {_names(hosts)}"
        remedy = "Name a folder that all nodes mount, or a URI as s3://bucket/folder" if missing else "Mend it there, or name another"
        location = OPTIONS[name].location
        check = "storage" if location and location.access == "write" else "data"
        findings.append(Finding(check, "error", _names(hosts), text, remedy, name, storage.redact(uri)))
    return findings


def _names(hosts: Sequence[str] | Mapping[str, object]) -> str:
    shown = sorted(set(hosts))
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def check_space(config: RunConfig, checkpoint_bytes: int) -> list[Finding]:
    """Free space of a local output_dir, with that of the checkpoints that are there and will go, against those that will lie there at
    once. `checkpoint_bytes`: of one of them."""
    if storage.is_remote(config.run_uri):
        return []
    path = storage.local(config.run_uri)
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    free += len(catalog.committed(storage.join(config.run_uri, "checkpoints"))) * checkpoint_bytes
    most = config.keep_last + config.keep_best + 1  # the one that is being written comes before an old one goes
    shown, needed = f"{free / 2**30:.1f} GiB are free or its own", f"{most} checkpoints of {checkpoint_bytes / 2**30:.1f} GiB at once"
    if free < 2 * checkpoint_bytes:
        text = f"{shown}, and a checkpoint takes {checkpoint_bytes / 2**30:.1f} GiB: not even two have room"
        return [Finding("space", "error", "driver", text, "Free some, or name another", "output_dir", config.output_dir)]
    if free < most * checkpoint_bytes:
        remedy = "Free some, or lower keep_last or keep_best"
        return [Finding("space", "warning", "driver", f"{shown}, the run will hold {needed}", remedy)]
    return [Finding("space", "ok", "driver", f"{shown}, the run will hold {needed}")]


def check_tracking(config: RunConfig) -> list[Finding]:
    """Whether W&B will be reached, as far as that can be told without asking it."""
    if not uses_wandb(config):
        return []
    if config.wandb_mode == "offline" or wandb_key(config):
        return [Finding("tracking", "ok", "driver", "Weights & Biases is offline" if config.wandb_mode == "offline" else "a key is there")]
    text = "no key of Weights & Biases is there: the run is kept offline"
    return [Finding("tracking", "warning", "driver", text, "Set WANDB_API_KEY where the driver runs, or wandb_mode: offline")]


def check_safety(config: RunConfig) -> list[Finding]:
    """Whether who can reach the ports of the cluster that was joined may do everything on it."""
    # Asked first: these calls of Ray's start a Ray where there is none, which listens on all addresses.
    if not cluster_address(config) or not ray.is_initialized() or requires_token(ray.get_runtime_context().gcs_address):
        return []
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    if all(node.startswith("127.") for node in nodes):
        return []
    text = "the cluster asks for no token: whoever reaches its ports runs what they like on it"
    return [Finding("safety", "warning", "cluster", text, "Start all nodes with RAY_AUTH_MODE=token and one token (cluster/README.md)")]
