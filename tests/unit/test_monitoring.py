"""The local cluster starts and stops what is its own and nothing else; alerts fire where they should; the dashboard asks for what is there.

Ray, Prometheus and Grafana are stand-ins here, tests/cluster has the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from most_ray.service.cluster.prometheus import METRICS
from tests.conftest import ROOT, tool

MONITORING = ROOT / "cluster" / "monitoring"
NAMES = ("RAY_PORT", "DASHBOARD_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
STAND_IN = """#!{python} -ES
import json, os, pathlib, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

name, state = pathlib.Path(sys.argv[0]).name, pathlib.Path(os.environ["MOST_RAY_CLUSTER_DIR"])
(state / (name + ".json")).write_text(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ)}}))
mode = os.environ.get("STAND_IN", "")
if name == "ray" and mode == "fails":
    sys.exit("no room for the object store")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if name == "ray":
    subprocess.Popen([sys.executable, "-ESc", "import signal; signal.pause()"], start_new_session=True)

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mode == "starting" else 200)
        self.end_headers()
    def log_message(self, *_):
        pass

flags = dict(zip(sys.argv, sys.argv[1:]))
ports = [flags.get("--dashboard-port"), flags.get("--metrics-export-port"), os.environ.get("GF_SERVER_HTTP_PORT")]
ports.append(flags.get("--web.listen-address", "").rpartition(":")[2])
servers = [ThreadingHTTPServer(("127.0.0.1", int(port)), Answer) for port in ports if port]
import threading
for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
servers[0].serve_forever()
"""


def asked(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool(program), *arguments], text=True, capture_output=True, check=False)


@dataclass
class Place:
    """A copy of the scripts beside stand-ins for Ray, Prometheus and Grafana."""

    root: Path
    settings: dict[str, str]

    @property
    def state(self) -> Path:
        return self.root / "state"

    def command(self, script: str, **env: str) -> dict[str, Any]:
        around = {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "HOME": str(self.root), "MOST_RAY_CLUSTER_DIR": str(self.state)}
        return {"args": ["sh", f"cluster/local/{script}"], "cwd": self.root, "env": {**around, **self.settings, **env}}

    def run(self, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(**self.command(script, **env), text=True, capture_output=True, timeout=60, check=False)

    def add(self, folder: str, *names: str) -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (self.root / folder / name).write_text(STAND_IN.format(python=sys.executable))
            (self.root / folder / name).chmod(0o755)

    def shorten(self) -> None:
        """How long processes are waited for."""
        script = self.root / "cluster" / "local" / "common.sh"
        script.write_text(re.sub(r"until_gone \d+", "until_gone 1", script.read_text()).replace("due=3", "due=0"))
        script = self.root / "cluster" / "local" / "up.sh"
        text = script.read_text().replace("READY_WITHIN=90", "READY_WITHIN=2").replace("due=3", "due=0")
        script.write_text(text.replace("timeout=4", "timeout=0.1"))

    def processes(self) -> list[psutil.Process]:
        """All that know of this place's state folder."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MOST_RAY_CLUSTER_DIR") == str(self.state):
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]

    def told(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.state / f"{name}.json").read_text()))


@pytest.fixture
def place(tmp_path: Path, short_folder: Path) -> Iterator[Place]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in NAMES]
    ports = {name: str(probe.getsockname()[1]) for name, probe in zip(NAMES, probes, strict=True)}
    for probe in probes:
        probe.close()
    place = Place(tmp_path, {**ports, "RAY_TMPDIR": str(short_folder)})
    shutil.copytree(ROOT / "cluster" / "local", tmp_path / "cluster" / "local")
    shutil.copytree(MONITORING, tmp_path / "cluster" / "monitoring")
    place.add(".venv/bin", "ray")
    (tmp_path / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -ES "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    place.add("bin", "prometheus", "grafana-server")
    yield place
    for process in place.processes():
        process.kill()


def test_where_the_states_folder_is_too_deep_for_sockets_they_lie_elsewhere(place: Place) -> None:
    assert place.run("up.sh", RAY_TMPDIR="").returncode == 0
    argv = place.told("ray")["argv"]
    folder = Path(argv[argv.index("--temp-dir") + 1])
    assert len(str(folder)) <= 39 < len(str(place.state / "ray")) and folder.parent.stat().st_mode & 0o777 == 0o700
    assert place.run("down.sh").returncode == 0 and place.run("up.sh", RAY_TMPDIR="").returncode == 0
    assert str(folder) in place.told("ray")["argv"]  # once, not at every start
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(("mode", "below"), [(0o700, "ray"), (0o755, f"ray-{os.geteuid()}/ray"), (0o1777, f"ray-{os.geteuid()}/ray")])
def test_rays_folder_is_in_one_that_no_one_else_can_enter(place: Place, short_folder: Path, mode: int, below: str) -> None:
    """Ray opens its own folder to everyone, without the sticky bit."""
    short_folder.chmod(mode)
    assert place.run("up.sh").returncode == 0
    argv = place.told("ray")["argv"]
    assert argv[argv.index("--temp-dir") + 1] == str(short_folder / below)
    assert (short_folder / below).parent.stat().st_mode & 0o777 == 0o700
    place.run("down.sh")


def test_a_folder_that_another_user_prepared_is_not_used(place: Place, short_folder: Path) -> None:
    short_folder.chmod(0o1777)
    (short_folder / f"ray-{os.geteuid()}").symlink_to(place.root)
    up = place.run("up.sh")
    assert up.returncode == 2 and "is a link: set RAY_TMPDIR to a folder of your own" in up.stderr and not place.processes()


def test_up_and_down_start_and_stop_what_is_theirs(place: Place) -> None:
    bystander = subprocess.Popen([sys.executable, "-ESc", "import signal; signal.pause()"])
    up = place.run("up.sh")
    assert (up.returncode, [line for line in up.stderr.splitlines() if not line.startswith("cluster: waiting for ")]) == (0, [])
    processes = place.processes()
    assert len(processes) == 4  # one of them is a child of Ray's in a session of its own
    again = place.run("up.sh")
    assert again.returncode == 0 and "is up already" in again.stdout and up.stdout in again.stdout
    assert {process.pid for process in place.processes()} == {process.pid for process in processes}
    down = place.run("down.sh")
    assert (down.returncode, down.stderr) == (0, "") and "is down" in down.stdout
    assert not place.processes() and bystander.poll() is None
    assert not list(place.state.glob("*.pid")) and not (place.state / "env").exists()
    assert "No cluster" in place.run("down.sh").stdout
    bystander.kill()
    bystander.wait()


def test_it_tells_how_to_use_and_to_stop_it_but_no_secret(place: Place) -> None:
    told = place.run("up.sh", RAY_AUTH_TOKEN="from outside").stdout
    token, password = (place.state / "auth_token").read_text(), (place.state / "grafana_password").read_text()
    assert len(token) == 64 and len(password) >= 16 and token not in told and password not in told
    for part in (
        f"http://127.0.0.1:{place.settings['DASHBOARD_PORT']}",
        "auth_token",
        "down.sh",
        f"127.0.0.1:{place.settings['RAY_PORT']}",
    ):
        assert part in told
    shown = subprocess.run(
        ["sh", "-c", f". {place.state}/env && env"], env={"RAY_AUTH_TOKEN": "x"}, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    exports = dict(line.split("=", 1) for line in shown)
    assert exports["RAY_API_SERVER_ADDRESS"] == f"http://127.0.0.1:{place.settings['DASHBOARD_PORT']}" and "RAY_AUTH_TOKEN" not in exports
    assert exports["RAY_ADDRESS"] == f"127.0.0.1:{place.settings['RAY_PORT']}"
    assert exports["RAY_AUTH_MODE"] == "token" and Path(exports["RAY_AUTH_TOKEN_PATH"]).read_text() == token
    for path in place.state.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    place.run("down.sh")
    assert (place.state / "auth_token").read_text() == token  # the next start has the same


def test_all_stay_on_loopback_and_send_nothing_anywhere(place: Place) -> None:
    place.run("up.sh", RAY_AUTH_TOKEN="from outside", RAY_AUTH_MODE="disabled", RAY_ADDRESS="10.0.0.1:6379")
    ray, prometheus, grafana = (place.told(name) for name in ("ray", "prometheus", "grafana-server"))
    flags = dict(zip(ray["argv"], ray["argv"][1:], strict=False))
    assert flags["--node-ip-address"] == flags["--dashboard-host"] == "127.0.0.1"
    assert ray["env"]["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_ADDRESS"} & set(ray["env"])
    assert ray["env"]["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and ray["env"]["RAY_USAGE_STATS_ENABLED"] == "0"
    assert ray["env"]["RAY_PROMETHEUS_HOST"] == f"http://127.0.0.1:{place.settings['PROMETHEUS_PORT']}"
    assert f"127.0.0.1:{place.settings['PROMETHEUS_PORT']}" in prometheus["argv"]
    env = grafana["env"]
    assert env["GF_SERVER_HTTP_ADDR"] == "127.0.0.1" and env["GF_AUTH_ANONYMOUS_ENABLED"] == env["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert env["GF_ANALYTICS_REPORTING_ENABLED"] == "false" and Path(env["GF_SECURITY_ADMIN_PASSWORD__FILE"]).exists()
    for file in Path(env["GF_PATHS_PROVISIONING"]).rglob("*.yml"):
        assert set(re.findall(r"\$\{(\w+)\}", file.read_text())) <= set(env), file
    assert (Path(env["MOST_RAY_DASHBOARDS"]) / "most_ray.json").exists()
    scraped = (place.state / "prometheus.yml").read_text()
    assert f"{flags['--temp-dir']}/prom_metrics_service_discovery.json" in scraped and "/tmp/ray/" not in scraped.replace(
        flags["--temp-dir"], ""
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_taken_port_is_told_in_one_sentence_and_nothing_is_left(place: Place, name: str) -> None:
    with socket.create_server(("127.0.0.1", int(place.settings[name]))):
        began = time.monotonic()
        up = place.run("up.sh")
        assert time.monotonic() - began < 5
    assert up.returncode == 2 and up.stdout == "" and len(up.stderr.splitlines()) == 1
    assert place.settings[name] in up.stderr and f"set {name} to a free one" in up.stderr
    assert not place.processes()


@pytest.mark.parametrize(
    ("setting", "value", "part"),
    [
        ("RAY_PORT", "x", "RAY_PORT=x is no port"),
        ("DASHBOARD_PORT", "70000", "DASHBOARD_PORT=70000 is no port"),
        ("NUM_CPUS", "two", "NUM_CPUS=two is no number"),
        ("NUM_CPUS", "0", "NUM_CPUS=0 is no number"),
        ("RAY_TMPDIR", "/tmp/" + "long" * 20, "at most 35 characters"),
    ],
)
def test_a_setting_that_cannot_be_is_told(place: Place, setting: str, value: str, part: str) -> None:
    up = place.run("up.sh", **{setting: value})
    assert up.returncode == 2 and part in up.stderr and len(up.stderr.splitlines()) == 1 and not place.processes()


def test_one_port_for_two_is_refused(place: Place) -> None:
    up = place.run("up.sh", DASHBOARD_PORT=place.settings["RAY_PORT"])
    assert up.returncode == 2 and "given twice" in up.stderr and not place.processes()


def test_a_ray_that_ends_at_once_is_told_with_what_it_said(place: Place) -> None:
    up = place.run("up.sh", STAND_IN="fails")
    assert up.returncode == 1 and "no room for the object store" in up.stderr and "ray.log" in up.stderr
    assert not place.processes() and not list(place.state.glob("*.pid")) and not (place.state / "env").exists()
    assert place.run("up.sh").returncode == 0


def test_a_dashboard_that_does_not_answer_is_told_while_it_is_waited_for_and_at_the_end(place: Place) -> None:
    place.shorten()
    up = place.run("up.sh", STAND_IN="starting")
    url = f"http://127.0.0.1:{place.settings['DASHBOARD_PORT']}"
    assert up.returncode == 1 and re.search(rf"cluster: waiting for Ray's dashboard at {url}: [01] s, until 2 s", up.stderr)
    assert f"Ray's dashboard did not answer at {url} within 2 s: look into {place.state}/ray.log, then down.sh and" in up.stderr
    assert not place.processes()


def test_a_cluster_that_is_up_but_does_not_answer_is_no_cluster_that_is_up(place: Place) -> None:
    assert place.run("up.sh").returncode == 0
    place.shorten()
    processes = place.processes()
    for process in processes:
        process.suspend()
    again = place.run("up.sh", DASHBOARD_PORT="1")
    for process in processes:
        process.resume()
    assert again.returncode == 1 and "is up already" not in again.stdout
    assert f"Ray's dashboard did not answer at http://127.0.0.1:{place.settings['DASHBOARD_PORT']} within" in again.stderr
    assert {process.pid for process in place.processes()} == {process.pid for process in processes}  # it may only be busy


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("MOST_RAY_CLUSTER_DIR", "{root}/state"),
        ("MOST_RAY_CLUSTER_DIR", "{root}"),
        ("MOST_RAY_CLUSTER_DIR", "deep/in/it"),
        ("MOST_RAY_CLUSTER_DIR", "./state/"),
        ("MOST_RAY_CLUSTER_DIR", "{short}/link/state"),
        ("MOST_RAY_CLUSTER_DIR", "{root}/../{name}/state"),
        ("RAY_TMPDIR", "{root}/t"),
        ("RAY_TMPDIR", "t"),
    ],
)
def test_state_inside_the_checkout_is_refused(place: Place, short_folder: Path, setting: str, value: str) -> None:
    """Whoever submits a job would send it along, token included."""
    (place.root / "pyproject.toml").touch()
    (short_folder / "link").symlink_to(place.root)
    before = sorted(place.root.rglob("*"))
    elsewhere = {"MOST_RAY_CLUSTER_DIR": str(short_folder / "s"), "RAY_TMPDIR": str(short_folder)}
    named = value.format(root=place.root, name=place.root.name, short=short_folder)
    up = place.run("up.sh", **{**elsewhere, setting: named})
    assert up.returncode == 2 and up.stdout == "" and len(up.stderr.splitlines()) == 1
    assert f"is inside this checkout, which `most-ray submit` sends with jobs: set {setting} to a folder elsewhere." in up.stderr
    assert sorted(place.root.rglob("*")) == before and not (short_folder / "s").exists()


def test_state_beside_the_checkout_is_taken(place: Place, short_folder: Path) -> None:
    """Also one whose name begins as the checkout's."""
    (place.root / "pyproject.toml").touch()
    beside = place.root.with_name(place.root.name + "-state")
    up = place.run("up.sh", MOST_RAY_CLUSTER_DIR=str(beside), NUM_CPUS="x")
    assert "NUM_CPUS=x is no number" in up.stderr and (beside / "lock").exists()


def test_a_start_that_is_broken_off_leaves_nothing(place: Place) -> None:
    with subprocess.Popen(**place.command("up.sh", STAND_IN="starting"), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as up:
        wait(lambda: (place.state / "ray.json").exists() and (place.state / "ray.json").stat().st_size > 0)
        up.terminate()
        assert up.wait(30) == 143
    wait(lambda: not place.processes())
    assert not list(place.state.glob("*.pid"))


def test_what_does_not_end_when_asked_is_killed(place: Place) -> None:
    place.shorten()
    assert place.run("up.sh", STAND_IN="stubborn").returncode == 0
    down = place.run("down.sh")
    assert down.returncode == 0 and not place.processes()
    assert all(line.startswith("cluster: waiting for processes to end: ") for line in down.stderr.splitlines())


def test_a_process_that_has_an_old_pid_of_ours_is_left_alone(place: Place) -> None:
    bystander = subprocess.Popen([sys.executable, "-ESc", "import signal; signal.pause()"])
    place.state.mkdir()
    (place.state / "ray.pid").write_text(f"{bystander.pid} 1\n")
    assert "No cluster" in place.run("down.sh").stdout and bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_without_prometheus_and_grafana_it_comes_up_and_says_what_to_install(place: Place) -> None:
    for name in ("prometheus", "grafana-server"):
        (place.root / "bin" / name).unlink()
    if shutil.which("prometheus", path="/usr/bin:/bin"):
        up = place.run("up.sh", PROMETHEUS_PORT="off")
        assert "Prometheus" not in up.stdout
    else:
        up = place.run("up.sh")
        assert "apt-get install prometheus" in up.stdout
    assert up.returncode == 0 and "Grafana" not in up.stdout
    assert place.told("ray")["env"]["RAY_GRAFANA_HOST"] == "DISABLED"


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # between two looks at another process


RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "most_ray.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def own_metrics(text: str) -> set[str]:
    return {name.removeprefix("ray_") for name in re.findall(r"\bray_most_ray_\w+", text)}


def promtool_tests(folder: Path) -> subprocess.CompletedProcess[str]:
    return asked("promtool", "test", "rules", str(folder / "rules_test.yml"))


def test_prometheus_takes_its_files() -> None:
    checked = subprocess.run(
        [tool("promtool"), "check", "config", "prometheus.yml"], cwd=MONITORING, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_each_alert_fires_where_it_should_and_not_elsewhere() -> None:
    tested = promtool_tests(MONITORING)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("expression", ["vector(1)", "vector(1) > 2"], ids=["always", "never"])
def test_an_alert_that_fires_always_or_never_would_be_noticed(tmp_path: Path, expression: str) -> None:
    """Of each alert there is a test in which it fires and one in which it does not."""
    shutil.copy(MONITORING / "rules_test.yml", tmp_path)
    rules = yaml.safe_load((MONITORING / "rules.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = expression
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    tested = promtool_tests(tmp_path)
    complaints = tested.stdout + tested.stderr
    assert tested.returncode != 0 and {rule["alert"] for rule in RULES} == {rule["alert"] for rule in RULES if rule["alert"] in complaints}


def test_each_alert_says_what_is_so_and_what_to_do() -> None:
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 80
        assert own_metrics(rule["expr"]) <= set(METRICS), rule["alert"]


def test_the_dashboard_shows_every_metric_and_none_that_is_not() -> None:
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    assert own_metrics(" ".join(queries)) == set(METRICS)
    for query in queries:
        assert "ray_most_ray" not in query or 'run=~"$run"' in query, query
        for tags, name in re.findall(r"max by \(([^)]*)\) \(ray_(most_ray_\w+)", query):
            assert set(tags.split(", ")) == {"run", *METRICS[name].tags}, query


def test_the_dashboard_can_be_read() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "run"]
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    for panel in PANELS:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        seconds = any(name.endswith("_seconds") for name in own_metrics(panel["targets"][0]["expr"]))
        assert (unit == "s") == (seconds and panel["title"] != "Newest evaluation"), panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"])


def test_queries_are_ones_that_prometheus_understands(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{index}", "expr": target["expr"].replace("$run", ".*")}
        for index, target in enumerate(target for panel in PANELS for target in panel["targets"])
    ]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    checked = subprocess.run(
        [tool("promtool"), "check", "rules", str(tmp_path / "panels.yml")], text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
