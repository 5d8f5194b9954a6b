"""The files of cluster/: known to the systems that read them, and safe as they stand."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from most_ray import config as configuration
from tests.conftest import ROOT, tool
from tests.support.cluster_files import CLUSTER, instructions, manifests, offences, text_files, unknown_fields

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KUBERAY = manifests("kuberay")
RAY = {"RayJob": KUBERAY["rayjob.yaml RayJob"], "RayCluster": KUBERAY["raycluster.yaml RayCluster"]}
SHARED_PATH = "/mnt/most_ray"


def cluster_spec(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = RAY[kind]["spec"]
    return spec["rayClusterSpec"] if kind == "RayJob" else spec


def pods(kind: str) -> dict[str, dict[str, Any]]:
    """Every pod template of a manifest."""
    spec = cluster_spec(kind)
    found = {"head": spec["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    if kind == "RayJob":
        found["submitter"] = RAY[kind]["spec"]["submitterPodTemplate"]
    return found


ALL_PODS = [(kind, name) for kind in RAY for name in pods(kind)]


# Kubernetes


@pytest.fixture(scope="module")
def schemas(shared: Path) -> dict[str, dict[str, Any]]:
    return {kind: json.loads((shared / "data" / "kuberay" / f"{kind.lower()}s.v1.schema.json").read_text()) for kind in RAY}


@pytest.mark.parametrize("kind", RAY)
def test_kuberay_takes_every_field(kind: str, schemas: dict[str, dict[str, Any]]) -> None:
    """Types as published, and no field that an API server would drop in silence."""
    manifest = RAY[kind]
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    # The schemas are taken for right: to check them too takes seconds.
    assert [error.message for error in jsonschema.Draft202012Validator(schemas[kind]).iter_errors(manifest)] == []
    assert list(unknown_fields(manifest["spec"], schemas[kind]["properties"]["spec"])) == []


@pytest.mark.parametrize(
    "path", ["headGroupSpec", "headGroupSpec.template.spec", "workerGroupSpecs.0.template.spec.containers.0.resources"]
)
def test_a_misspelt_field_is_found(path: str, schemas: dict[str, dict[str, Any]]) -> None:
    spec = copy.deepcopy(cluster_spec("RayCluster"))
    uri: Any = spec
    for step in path.split("."):
        uri = uri[int(step) if step.isdigit() else step]
    uri["runAsNonRot"] = True
    found = list(unknown_fields(spec, schemas["RayCluster"]["properties"]["spec"]))
    assert len(found) == 1 and found[0].endswith(".runAsNonRot")


@pytest.mark.parametrize("kind", RAY)
def test_only_who_holds_the_token_comes_in(kind: str) -> None:
    spec = cluster_spec(kind)
    assert spec["authOptions"] == {"mode": "token", "secretName": "most-ray-auth"}
    containers = [pod["spec"]["containers"][0] for pod in pods(kind).values()]
    containers += [spec["autoscalerOptions"]] if spec.get("enableInTreeAutoscaling") else []
    for container in containers:
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert env["RAY_AUTH_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "most-ray-auth", "key": "auth_token"}}
        for name, entry in env.items():
            if re.search(r"TOKEN|KEY|SECRET|PASSWORD", name):
                assert "value" not in entry and entry["valueFrom"]["secretKeyRef"], name


@pytest.mark.parametrize("kind", RAY)
def test_the_head_is_reached_from_inside_only_and_counts_no_cpus(kind: str) -> None:
    head = cluster_spec(kind)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "dashboard-host" not in head["rayStartParams"]  # as KubeRay sets it; the policy and the token guard it


@pytest.mark.parametrize(("kind", "pod"), ALL_PODS)
def test_pods_run_without_rights(kind: str, pod: str) -> None:
    spec = pods(kind)[pod]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    if not (kind == "RayCluster" and pod == "head"):  # its autoscaler asks the API server for pods
        assert spec["automountServiceAccountToken"] is False


@pytest.mark.parametrize(("kind", "pod"), [each for each in ALL_PODS if each[1] != "submitter"])
def test_storage_is_at_one_path_and_the_object_store_in_memory(kind: str, pod: str) -> None:
    spec = pods(kind)[pod]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in spec["containers"][0]["volumeMounts"]}
    claim = KUBERAY["storage.yaml PersistentVolumeClaim"]
    assert mounts[SHARED_PATH]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert {"name": "MOST_RAY_HOME", "value": SHARED_PATH} in spec["containers"][0]["env"]  # of a submitted job's relative places


@pytest.mark.parametrize(("kind", "pod"), [each for each in ALL_PODS if each[1] != "submitter"])
def test_a_pod_that_must_go_leaves_time_for_a_checkpoint(kind: str, pod: str) -> None:
    spec = pods(kind)[pod]["spec"]
    env = {entry["name"]: entry.get("value") for entry in spec["containers"][0]["env"]}
    drain = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert spec["terminationGracePeriodSeconds"] > drain and spec["terminationGracePeriodSeconds"] >= 120
    assert drain == 0 if pod == "head" else drain >= 60  # the head has its hook, and actors that never end
    assert float(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60  # Ray's own 3 s would kill the driver inside its checkpoint


@pytest.mark.parametrize("kind", RAY)
def test_the_head_sends_its_driver_a_sigterm_first(kind: str) -> None:
    """The hook finds the driver, not the shells around it (the hook's own among them)."""
    hook = pods(kind)["head"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    found = re.search(r"driver='([^']*)'", hook[-1])
    assert found and 'pkill -TERM -f "$driver"' in hook[-1] and "pgrep -f" in hook[-1]
    entrypoint = RAY["RayJob"]["spec"]["entrypoint"]
    for driver in (entrypoint, "/usr/local/bin/python3.11 jobs/tune.py --config FILE", "python -m most_ray.cli train --config FILE"):
        assert re.search(found[1], driver), driver
    others = ("/usr/local/bin/python -m ray.dashboard.agent", "ray::TrainController.run")
    for other in (*others, "/bin/sh -c " + entrypoint, "bash -c -- " + entrypoint, " ".join(hook)):
        assert not re.search(found[1], other), other


def test_a_retried_job_is_the_same_run() -> None:
    """The command names the run and a folder that outlives the cluster; every flag is one that a run knows."""
    spec = RAY["RayJob"]["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] and "jobId" not in spec
    program, script, *words = shlex.split(spec["entrypoint"])
    flags = dict(zip(words[::2], words[1::2], strict=True))
    for uri in (script, flags["--config"]):
        assert (ROOT / Path(uri).relative_to("/opt/most_ray")).exists()
    assert flags["--output_dir"].startswith(SHARED_PATH) and flags["--store_dir"].startswith(SHARED_PATH)
    given = {flag.removeprefix("--"): value for flag, value in flags.items() if flag != "--config"}
    assert (
        program == "python"
        and configuration.load_config(ROOT / "jobs/configs" / Path(flags["--config"]).name, given).name == flags["--name"]
    )


def test_the_image_is_what_the_project_is() -> None:
    """One Ray version in the image, the manifests and pyproject.toml; every image is named with its version."""
    pin = next(found[1] for line in PROJECT["dependencies"] if (found := re.match(r"ray\[.*\]==([\d.]+)\.\*", line)))
    for kind in RAY:
        assert str(cluster_spec(kind)["rayVersion"]).startswith(pin + ".")
        assert {pod["spec"]["containers"][0]["image"] for pod in pods(kind).values()} == {f"REGISTRY/most_ray:{PROJECT['version']}"}


def test_the_network_lets_in_the_clusters_own_pods_the_operator_and_prometheus() -> None:
    policy = KUBERAY["networkpolicy.yaml NetworkPolicy"]["spec"]
    own = {"podSelector": policy["podSelector"]}
    assert policy["policyTypes"] == ["Ingress"] and policy["podSelector"]["matchLabels"]
    for kind, pod in ALL_PODS:
        assert policy["podSelector"]["matchLabels"].items() <= pods(kind)[pod]["metadata"]["labels"].items()
    assert len(policy["ingress"]) == 3
    for rule in policy["ingress"]:
        (source,) = rule["from"]
        if source != own:  # from elsewhere: a named place, and named ports
            assert source["namespaceSelector"]["matchLabels"] and rule["ports"] and all(port["port"] for port in rule["ports"])


def test_prometheus_finds_the_ports_that_it_asks_for() -> None:
    monitor = KUBERAY["podmonitor.yaml PodMonitor"]["spec"]
    policy = KUBERAY["networkpolicy.yaml NetworkPolicy"]["spec"]
    assert monitor["selector"] == policy["podSelector"]
    for kind in RAY:
        named = {port["name"]: port["containerPort"] for port in pods(kind)["head"]["spec"]["containers"][0]["ports"]}
        asked = {named[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]}
        assert asked == {port["port"] for port in policy["ingress"][-1]["ports"]}
        assert {"name": "metrics", "containerPort": 8080} in pods(kind)["gpu"]["spec"]["containers"][0]["ports"]


def test_workers_come_and_go_with_what_is_asked_for() -> None:
    spec = RAY["RayCluster"]["spec"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["idleTimeoutSeconds"] >= 60
    assert spec["autoscalerOptions"]["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for kind in RAY:
        for group in cluster_spec(kind)["workerGroupSpecs"]:
            assert (
                1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            )  # a run is refused where its fewest workers do not fit
    for pod in (pods(kind)[name]["spec"] for kind, name in ALL_PODS):
        assert pod.get("restartPolicy") == "Never"  # what the autoscaler's version 2 asks for


# Machines


@pytest.fixture(params=["aws", "gcp", "static"])
def machines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A file for `ray up`, as Ray prepares it in the repository's root."""
    monkeypatch.chdir(ROOT)
    loaded = yaml.safe_load((CLUSTER / "vm" / f"{request.param}.yaml").read_text())
    prepared: dict[str, Any] = prepare_config(loaded)
    validate_config(prepared)
    return prepared


def test_every_machine_asks_for_the_token(machines: dict[str, Any]) -> None:
    assert machines["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [line for of in ("head", "worker") for line in machines[f"{of}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line.split("ray start")[0] for line in starts)
    for of in ("head", "worker"):
        assert machines[f"{of}_setup_commands"][0] == "chmod 600 ~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in starts[0] and "--head" in starts[0]


def test_machines_get_the_working_copy(machines: dict[str, Any]) -> None:
    """All that an installation needs, nothing that is large or private."""
    mounts = {remote: local for remote, local in machines["file_mounts"].items() if "auth_token" not in remote}
    assert set(mounts.values()) == {".ci", "pyproject.toml", "README.md", "LICENSE", "most_ray", "jobs"}
    assert all(remote == f"~/most_ray/{local}" and (ROOT / local).exists() for remote, local in mounts.items())
    for of in ("head", "worker"):  # the same versions, from the lock
        assert "TORCH=cuda sh ~/most_ray/.ci/venv.sh run" in machines[f"{of}_setup_commands"]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_head_gets_its_clouds_packages_from_a_lock(cloud: str) -> None:
    loaded = yaml.safe_load((CLUSTER / "vm" / f"{cloud}.yaml").read_text())
    (install,) = loaded["head_setup_commands"]
    assert install.startswith("~/most_ray/.venv/bin/python -m pip install ")
    assert install.endswith(f" --no-deps --require-hashes --only-binary :all: --requirement ~/most_ray/.ci/locks/{cloud}.txt")


def test_machines_without_work_are_given_back(machines: dict[str, Any]) -> None:
    assert 0 < machines["idle_timeout_minutes"] <= 30
    if machines["provider"]["type"] == "local":
        return
    head = machines["available_node_types"][machines["head_node_type"]]
    assert head["max_workers"] == 0 and head["resources"]["CPU"] == 0
    worker = machines["available_node_types"]["gpu"]
    assert 1 <= worker["min_workers"] <= worker["max_workers"] <= machines["max_workers"]
    spot = worker["node_config"].get("InstanceMarketOptions", {}).get("MarketType"), worker["node_config"].get("scheduling", {})
    assert spot[0] == "spot" or spot[1]["provisioningModel"] == "SPOT"


def test_no_machine_of_aws_is_in_a_group_that_ray_makes() -> None:
    """Ray's own group lets SSH in from everywhere, whatever provider.security_group adds."""
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    made = _create_default_inbound_rules({"sg-own"}, [])
    assert any(entry["CidrIp"].endswith("/0") for rule in made for entry in rule.get("IpRanges", []))
    loaded = yaml.safe_load((CLUSTER / "vm" / "aws.yaml").read_text())
    assert "security_group" not in loaded["provider"]
    for machine in loaded["available_node_types"].values():
        assert machine["node_config"]["SecurityGroupIds"] and machine["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert machine["node_config"]["IamInstanceProfile"]["Name"].startswith("most-ray-")


def test_machines_of_gcp_are_in_a_network_of_their_own() -> None:
    loaded = yaml.safe_load((CLUSTER / "vm" / "gcp.yaml").read_text())
    for name, machine in loaded["available_node_types"].items():
        (interface,) = machine["node_config"]["networkInterfaces"]
        assert interface["subnetwork"].endswith("/most-ray")
        assert ("accessConfigs" in interface) == (name == "head")
        assert machine["node_config"]["serviceAccounts"][0]["email"].startswith("most-ray-")


# The image


DIGEST = (CLUSTER / "Dockerfile").read_text().partition("@sha256:")[2][:64]


def dockerfile_faults(text: str) -> Iterator[str]:
    """What is wrong with an image's recipe."""
    found = instructions(text)
    if found[0][0] != "FROM":
        yield "starts without FROM"
    for name, rest in found:
        if name == "FROM" and not re.fullmatch(r"[\w./-]+:(?!latest)[\w.-]+@sha256:[0-9a-f]{64}", rest.split()[0]):
            yield f"no version with its digest: {rest}"
        if name == "ADD":
            yield f"ADD: {rest}"
        if name in ("ENV", "ARG") and re.search(r"token|secret|passw|key", rest, re.IGNORECASE):
            yield f"a secret would stay in the image: {rest}"
        if name == "RUN" and re.search(r"curl|wget\s+http|\| *(?:ba)?sh\b", rest):
            yield f"runs what it fetches: {rest}"
    users = [rest for name, rest in found if name == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        yield "runs as root"


def test_the_image_is_safe_and_holds_the_working_copy() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert list(dockerfile_faults(text)) == []
    copied = [word for name, rest in instructions(text) if name == "COPY" for word in rest.split()[:-1]]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == let_in and all((ROOT / name).exists() for name in copied)
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    user = next(rest for name, rest in instructions(text) if name == "USER")
    assert int(user) == pods("RayJob")["head"]["spec"]["securityContext"]["runAsUser"]
    installs = [rest for name, rest in instructions(text) if name == "RUN" and "pip install" in rest]
    assert len(installs) == 4 and all("--no-deps" in rest for rest in installs)  # all that is installed is named
    locks = [re.findall(r"\.ci/locks/([a-z-]+(?:\$TORCH)?)\.txt", rest) for rest in installs if "--require-hashes" in rest]
    assert locks == [["pip"], ["torch-$TORCH"], ["run"]] and ("ARG", "TORCH=cuda") in instructions(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("python:3.11-slim-bookworm", "python:latest"),
        ("python:3.11-slim-bookworm", "python"),
        ("@sha256:", "@sha256:0"),
        (f"@sha256:{DIGEST}", ""),
        (f"python:3.11-slim-bookworm@sha256:{DIGEST}", "$BASE"),
        ("USER 1000", "USER root"),
        ("USER 1000", ""),
        ("COPY jobs jobs", "ADD https://example.org/jobs.tar.gz jobs"),
        ("ARG TORCH=", "ARG WANDB_API_KEY=1\nARG TORCH="),
    ],
)
def test_an_unsafe_image_is_found(old: str, new: str) -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert old in text and len(list(dockerfile_faults(text.replace(old, new)))) == 1


# All of them


@pytest.mark.parametrize("path", list(text_files(CLUSTER, ROOT / "jobs")), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_open_and_no_key_is_written_down(path: Path) -> None:
    assert list(offences(path.read_text())) == []
    for host in re.findall(r"dashboard[-_]host[\"']?[ =:]+[\"']?([^\s\"',)]+)", path.read_text()):
        assert host == "127.0.0.1"


@pytest.mark.parametrize(
    "line",
    [
        "ray start --head --dashboard-host=0.0.0.0",
        'dashboard-host: "0.0.0.0"',
        "--host ::",
        'listen = "[::]:9090"',
        "CidrIp: 0.0.0.0/0",
        "cidr: ::/0",
        "serviceType: LoadBalancer",
        "type: NodePort",
        "export RAY_AUTH_MODE=disabled",
        "{name: RAY_AUTH_MODE, value: disabled}",
        "  mode: disabled",
        "jupyter --disable-token-auth",
        "GF_AUTH_ANONYMOUS_ENABLED=true",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "WANDB_API_KEY: abc123",
        "export RAY_AUTH_TOKEN=hunter2",
        'password = "admin"',
        "aws_secret_access_key=wJalrXUtnFEMI",
        "# AKIAABCDEFGHIJKLMNOP",
        "value: " + "0123456789abcdef" * 2,
    ],
)
def test_an_open_door_is_found(line: str) -> None:
    assert list(offences(f"first: line\n{line}\n"))


@pytest.mark.parametrize(
    "line",
    [
        'export RAY_AUTH_TOKEN_PATH="$STATE/token"',
        "valueFrom: {secretKeyRef: {name: most-ray-auth, key: auth_token}}",
        "secretName: most-ray-auth",
        "authOptions: {mode: token}",
        "--dashboard-host=127.0.0.1",
        "ray::TrainWorker",
        "# never 0.0.0.0",
        "cidr: 10.0.0.0/8",
    ],
)
def test_what_is_closed_is_let_through(line: str) -> None:
    assert list(offences(line)) == []


# Slurm


def test_shell_scripts_are_clean() -> None:
    scripts = [path for path in text_files(CLUSTER, ROOT / "jobs", ROOT / ".ci") if path.suffix in (".sh", ".sbatch")]
    assert scripts
    done = subprocess.run(
        [tool("shellcheck"), "--external-sources", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
