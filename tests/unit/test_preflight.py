"""What would fail on a cluster is found before a worker starts, and said with its remedy (promise 32 of docs/promises.md)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from rich.console import Console

from most_ray.cli import build_parser
from most_ray.cli.job_files import find, job_home, resolve_paths, to_read, to_write
from most_ray.cli.parser import config_of_flags
from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.service.cluster import connection, ray_internals
from most_ray.service.cluster.address import check_address
from most_ray.service.cluster.probe import NodeReport, Probe, remove_marker, run_probe, versions, write_marker
from most_ray.service.preflight import checks
from most_ray.service.preflight.checks import (
    Finding,
    NodeAnswer,
    assess_nodes,
    check_safety,
    check_space,
    check_tracking,
    read_uris,
    report_findings,
    written_uris,
)

OWN = {"python": "3.11", "ray": "2.60.0", "most_ray": "abc"}


def report(host: str, **changes: object) -> NodeReport:
    base = NodeReport(host, dict(OWN), 1000.0, 65536)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def answer(found: NodeReport | None, node: str = "a", asked: float = 999.0, answered: float = 1001.0) -> NodeAnswer:
    return NodeAnswer(node, found, asked, answered)


def test_nodes_alike_are_nothing_to_speak_of() -> None:
    assert assess_nodes([answer(report("a")), answer(report("b"))], OWN) == []


def test_another_version_on_a_node_is_an_error_that_names_both() -> None:
    others = [answer(report(name, versions={**OWN, "ray": "2.9.0"})) for name in ("b", "c")]
    (finding,) = assess_nodes([answer(report("a")), *others], OWN)
    assert finding.level == "error"
    assert str(finding.error()) == "ray: b, c have ray 2.9.0, the driver 2.60.0. Install the same on all nodes."


def test_a_library_that_a_node_does_not_have_is_said() -> None:
    (finding,) = assess_nodes([answer(report("b", versions={name: version for name, version in OWN.items() if name != "ray"}))], OWN)
    assert finding.text == "b has ray missing, the driver 2.60.0"


@pytest.mark.parametrize(("clock", "seconds"), [(1000.0, None), (1005.9, None), (1006.1, 5), (994.1, None), (993.5, 6)])
def test_only_what_lies_outside_of_question_and_answer_is_skew(clock: float, seconds: int | None) -> None:
    """A node that answers late is not one with a wrong clock."""
    findings = assess_nodes([answer(report("a", time=clock))], OWN)
    assert [finding.text for finding in findings] == ([] if seconds is None else [f"is {seconds} s off the driver's"])
    assert all(finding.level == "warning" for finding in findings)


def test_a_silent_node_is_named_and_ends_nothing_unless_all_are() -> None:
    (finding,) = assess_nodes([answer(None, "b"), answer(report("a"))], OWN)
    assert (finding.level, finding.where) == ("warning", "b")
    (finding,) = assess_nodes([answer(None, "b"), answer(None, "c")], OWN)
    assert finding.level == "error"


def test_a_node_that_cannot_load_this_package_is_no_silent_one() -> None:
    missing = dataclasses.replace(answer(None, "b"), failure="ModuleNotFoundError: No module named 'most_ray'")
    (finding,) = assess_nodes([missing, answer(report("a"))], OWN)
    assert str(finding.error()).startswith("most_ray: b cannot run this package: ModuleNotFoundError: No module named 'most_ray'. Install")


def test_what_a_wheel_was_built_for_is_no_other_version() -> None:
    """A head without GPUs has torch+cpu, its workers torch+cu130."""
    own = {"torch": "2.13.0+cpu"}
    others = [answer(report(name, versions={"torch": version})) for name, version in (("a", "2.13.0+cu130"), ("b", "2.13.0"))]
    assert assess_nodes(others, own) == []
    assert assess_nodes([answer(report("a", versions={"torch": "2.12.0+cpu"}))], own)[0].level == "error"


def test_few_open_files_are_warned_of() -> None:
    assert [f.check for f in assess_nodes([answer(report("a", open_files=1024))], OWN)] == ["limits"]
    assert assess_nodes([answer(report("a", open_files=-1))], OWN) == []  # no limit


def test_a_place_that_only_the_driver_has_is_one_finding_for_all_nodes(tmp_path: Path) -> None:
    """As a run's folder on the head's own disk."""
    reports = []
    for name in ("b", "c"):
        probe = Probe("m", (("output_dir", str(tmp_path / "not-mounted")),), (("val_asr_dirs", str(tmp_path / "no-data")),))
        reports.append(dataclasses.replace(run_probe(probe), host=name))
    first, second = assess_nodes([answer(report("a")), *map(answer, reports)], versions() | OWN)[:2]
    said = sorted(str(finding.error()) for finding in (first, second))
    assert said[0].endswith(
        "is not there on b, c, unlike on the driver's machine. Name a folder that all nodes mount, or a URI as s3://bucket/folder."
    )
    assert said[0].startswith("output_dir = ")
    assert said[1].startswith("val_asr_dirs = ")


def test_an_empty_folder_is_a_file_system_that_is_not_mounted(tmp_path: Path) -> None:
    (problem,) = run_probe(Probe("m", reads=(("val_asr_dirs", str(tmp_path)),))).problems
    assert problem.rule == "is empty" and problem.missing
    (tmp_path / "parts").mkdir()
    assert run_probe(Probe("m", reads=(("val_asr_dirs", str(tmp_path)),))).problems == ()


def test_the_probe_writes_renames_reads_and_leaves_nothing(tmp_path: Path) -> None:
    write_marker(str(tmp_path), "mark")
    seen = run_probe(Probe("mark", (("output_dir", str(tmp_path)),), (("train_asr_dirs", str(tmp_path)),)))
    assert seen.problems == ()
    assert [path.name for path in tmp_path.iterdir()] == [".probe-mark"]
    remove_marker(str(tmp_path), "mark")
    assert list(tmp_path.iterdir()) == []


def test_another_folder_of_the_same_name_is_told_from_the_drivers(tmp_path: Path) -> None:
    """Every node may have a /data of its own: the driver's mark is missing there."""
    (problem,) = run_probe(Probe("mark", (("output_dir", str(tmp_path)),))).problems
    assert problem.missing
    (tmp_path / ".probe-mark").write_text("something else")
    (problem,) = run_probe(Probe("mark", (("output_dir", str(tmp_path)),))).problems
    assert problem.rule == "reads other bytes than were written"


def test_a_folder_that_cannot_be_written_to_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_marker(str(tmp_path), "mark")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("most_ray.io.storage.write_bytes", refuse)
    (problem,) = run_probe(Probe("mark", (("output_dir", str(tmp_path)),))).problems
    assert problem.rule == "cannot be written to (No space left on device)"
    assert not problem.missing


def test_what_a_run_writes_and_reads(tmp_path: Path) -> None:
    config = config_from({"output_dir": str(tmp_path), "name": "r", "train_asr_dirs": ["a"], "val_tts_dirs": ["s3://b/c"]})
    assert written_uris(config) == (("output_dir", str(tmp_path / "r")), ("output_dir", str(tmp_path / "store")))
    assert read_uris(config) == (("train_asr_dirs", str(Path("a").absolute())), ("val_tts_dirs", "s3://b/c"))
    (tmp_path / "asr").mkdir()
    names = {"model_name_or_path": "tiny", "recogniser": "openai/whisper-tiny", "vocoder": str(tmp_path / "asr")}
    assert read_uris(config_from(names)) == (("vocoder", str(tmp_path / "asr")),)  # the others are no folders here, but names
    assert read_uris(config_from({"resume_from_checkpoint": "c"})) == (("resume_from_checkpoint", str(Path("c").absolute())),)


def test_room_for_the_checkpoints_that_lie_there_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep_last and the one that is being written; two must fit in any case."""
    config = config_from({"output_dir": str(tmp_path), "keep_last": 3})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 30))
    levels = {size: check_space(config, int(size * 2**30))[0].level for size in (2.4, 2.6, 4.9, 5.1)}
    assert levels == {2.4: "ok", 2.6: "warning", 4.9: "warning", 5.1: "error"}
    assert check_space(config_from({"output_dir": "s3://bucket/runs"}), 1 << 60) == []


def test_a_run_that_goes_on_has_the_room_that_its_checkpoints_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GiB, checkpoints of 40, one of them there: the same command goes on."""
    config = config_from({"output_dir": str(tmp_path), "name": "r", "keep_last": 1})
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=60 << 30))
    assert check_space(config, 40 << 30)[0].level == "error"
    (tmp_path / "r" / "checkpoints" / "step-000000001").mkdir(parents=True)
    (tmp_path / "r" / "checkpoints" / "step-000000001" / "commit.json").write_text("{}")
    assert check_space(config, 40 << 30)[0].level == "ok"


def test_a_run_without_a_key_of_its_tracker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "wandb_key", lambda _: None)
    assert check_tracking(config_from({})) == []
    (finding,) = check_tracking(config_from({"wandb_project": "p"}))
    assert finding.level == "warning"
    (finding,) = check_tracking(config_from({"wandb_project": "p", "wandb_mode": "offline"}))
    assert finding.level == "ok"


def test_warnings_are_said_and_all_that_fails_before_the_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("clock", "warning", "b", "is 9 s off the driver's", "Let NTP set it"),
        Finding("storage", "error", "b", "is not there on b", "Mount it", "output_dir", "/data"),
        Finding("data", "error", "b", "is [bold]not there[/] on b", "Mount it", "val_asr_dirs", "/x"),
    ]
    with pytest.raises(ConfigError, match=r"^output_dir = '/data': is not there on b\. Mount it\.$"):
        report_findings(findings, Console(width=60))
    said = capsys.readouterr().out
    assert "Warning: b: is 9 s off the driver's. Let NTP set it." in said
    assert "Also wrong: val_asr_dirs = '/x': is [bold]not there[/] on b. Mount it." in said
    report_findings(findings[:1], Console())


JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "x"}}'}


def test_only_a_submitted_job_has_a_home() -> None:
    assert job_home({}) is None
    assert job_home({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) is None
    assert job_home({"RAY_JOB_CONFIG_JSON_ENV_VAR": "no json"}) is None
    assert job_home({"RAY_JOB_CONFIG_JSON_ENV_VAR": "[]"}) is None
    assert job_home({"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": null}'}) is None
    assert job_home({**JOB, "MOST_RAY_HOME": "/shared"}) == Path("/shared")
    assert job_home(JOB) == Path.home()


def test_a_job_writes_below_its_home_and_reads_what_went_along_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that went along is a copy that Ray removes: a run there would be lost."""
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home / "models" / "m", home / "data", work / "data", work / "models"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    values = {"train_asr_dirs": ["data", "s3://b/x", "/abs"], "val_asr_dirs": ["nowhere"], "model_name_or_path": "models/m"}
    config = config_from({**values, "store_dir": "s3://b/store", "trace_records": "t.jsonl"})
    inside = resolve_paths(config, home)
    assert inside.output_dir == str(home / "runs")
    assert inside.trace_records == str(home / "t.jsonl")
    assert inside.store_dir == "s3://b/store"
    assert inside.train_asr_dirs == ("data", "s3://b/x", "/abs")
    assert inside.val_asr_dirs == ("nowhere",)
    assert inside.model_name_or_path == str(home / "models" / "m")
    assert resolve_paths(config_from({"model_name_or_path": "tiny"}), home).model_name_or_path == "tiny"
    assert find(home, "deepseek-ai/DeepSeek-V2-Lite") == "deepseek-ai/DeepSeek-V2-Lite"
    assert resolve_paths(config) == config


def test_the_flags_of_other_commands_are_resolved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `evaluate`: figures that were written beside the job's own folder would be lost."""
    (tmp_path / "model").mkdir()
    words = ["evaluate", "--output", "e.json", "--model", "model", "--asr_dirs", "x", "/y", "--store_dir", "stores", "--num_workers", "2"]
    monkeypatch.setattr("most_ray.cli.job_files.job_home", lambda: tmp_path)
    args = build_parser().parse_args(words)
    assert (args.output, args.model, args.asr_dirs) == (tmp_path / "e.json", str(tmp_path / "model"), ["x", "/y"])
    config = config_of_flags(args, {"store_dir": "store_dir", "num_workers": "eval_workers"})
    assert (config.store_dir, config.eval_workers) == (str(tmp_path / "stores"), 2)
    assert to_write(str)("s3://bucket/e") == "s3://bucket/e" and to_read(str)("nowhere") == "nowhere"
    monkeypatch.setattr("most_ray.cli.job_files.job_home", lambda: None)
    assert build_parser().parse_args(words).output == Path("e.json")


class Gcs(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    version = ray.__version__
    asks = False

    def CheckAlive(self, request: object, context: grpc.ServicerContext) -> object:  # noqa: N802 - Ray's name
        if self.asks:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return gcs_service_pb2.CheckAliveReply(ray_version=self.version)


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gcs, str]]:
    """What answers as a cluster's head does, and its address."""
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr("most_ray.service.cluster.address.use_token", lambda: None)  # this machine may have one
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    server, service = grpc.server(futures.ThreadPoolExecutor(2)), Gcs()
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    server.stop(None)


def test_a_head_that_can_be_joined_passes(gcs: tuple[Gcs, str]) -> None:
    check_address(gcs[1])
    check_address("auto")


def test_an_old_ray_is_named_with_both_versions(gcs: tuple[Gcs, str]) -> None:
    gcs[0].version = "2.9.0"
    with pytest.raises(ConfigError, match=rf"runs Ray 2\.9\.0, this is {ray.__version__}\. Install the same on both\."):
        check_address(gcs[1])


def test_a_head_that_wants_a_token_is_told_from_one_that_wants_another(gcs: tuple[Gcs, str], monkeypatch: pytest.MonkeyPatch) -> None:
    gcs[0].asks = True
    with pytest.raises(ConfigError, match=r"requires a token, and none is set here\. Set RAY_AUTH_MODE=token"):
        check_address(gcs[1])
    monkeypatch.setattr("most_ray.service.cluster.address.is_token_auth_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"does not accept this token\. Set RAY_AUTH_MODE=token"):
        check_address(gcs[1])


def test_whether_a_cluster_asks_for_a_token_is_asked_of_it(gcs: tuple[Gcs, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of this process, which may have one all the same."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(checks.ray, "nodes", lambda: [{"NodeManagerAddress": "10.0.0.5", "Alive": True}])
    monkeypatch.setattr(checks.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(checks.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=gcs[1]))
    config = config_from({"ray_address": gcs[1]})
    assert "requires no token" in check_safety(config)[0].text
    gcs[0].asks = True
    assert check_safety(config) == []


def test_a_cluster_that_grows_is_found_by_either_autoscaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second version stands in Ray's store; the first tells its nodes' types; one that only watches calls them by the node."""
    monkeypatch.setattr(ray_internals, "is_autoscaler_v2", lambda fetch_from_server: True)
    assert ray_internals.has_autoscaler()
    monkeypatch.setattr(ray_internals, "is_autoscaler_v2", lambda fetch_from_server: False)
    for types, grows in (({"a": "node_a"}, False), ({"a": "ray.head.default"}, True), (None, False)):
        report = json.dumps({"autoscaler_report": {"node_type_mapping": types}}).encode()
        monkeypatch.setattr(ray_internals.internal_kv, "_internal_kv_get", lambda _, report=report: report)
        assert ray_internals.has_autoscaler() == grows
    monkeypatch.setattr(ray_internals.internal_kv, "_internal_kv_get", lambda _: None)
    assert not ray_internals.has_autoscaler()


@pytest.mark.parametrize(
    ("grows", "largest", "refused"), [(False, None, True), (True, None, False), (True, 64.0, True), (True, 256.0, False)]
)
def test_a_cluster_that_may_become_large_enough_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, grows: bool, largest: float | None, refused: bool
) -> None:
    monkeypatch.setattr(connection, "has_autoscaler", lambda: grows)
    monkeypatch.setattr(connection, "largest_resources", lambda: ({"CPU": largest or 4.0}, largest is not None))
    monkeypatch.setattr(connection, "nodes_now", lambda: {"head": {"CPU": 4.0}})
    monkeypatch.setattr(connection, "nodes_to_come", lambda: [{"CPU": largest}] if largest else [])
    config = config_from({"eval_inline": True})
    if refused:
        with pytest.raises(ConfigError, match=r"num_workers = 128: needs 128\.25 CPU, the cluster has"):
            connection.check_resources(config, 128, 128, False)
    else:
        connection.check_resources(config, 128, 128, False)


def test_workers_that_no_single_node_could_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of 4 CPUs have 12 together, and no room for a worker of 6: the run would wait without end."""
    monkeypatch.setattr(connection, "has_autoscaler", lambda: False)
    monkeypatch.setattr(connection, "largest_resources", lambda: ({"CPU": 12.0}, False))
    monkeypatch.setattr(connection, "nodes_now", lambda: {name: {"CPU": 4.0} for name in "abc"})
    monkeypatch.setattr(connection, "nodes_to_come", list)
    connection.check_resources(config_from({"cpus_per_worker": 3.0}), 3, 3, False)
    with pytest.raises(ConfigError, match=r"num_workers = 1: needs room for as many workers of 6 CPU, each on one node: .* room for 0\."):
        connection.check_resources(config_from({"cpus_per_worker": 6.0}), 1, 1, False)
    monkeypatch.setattr(connection, "nodes_to_come", lambda: [{"CPU": 8.0}])  # which the autoscaler may add
    connection.check_resources(config_from({"cpus_per_worker": 6.0}), 1, 1, False)


def test_what_is_no_head_is_refused_within_seconds() -> None:
    with pytest.raises(ConfigError, match="nothing listens there"):
        check_address("a..b:6379")
    with pytest.raises(ConfigError, match="nothing listens there"):
        check_address("127.0.0.1:1")
    with pytest.raises(ConfigError, match="is a dashboard's address"):
        check_address("http://127.0.0.1:8265")
