"""A run on a local cluster can be watched: its figures in Prometheus, its workers and data on Ray's dashboard, behind a token.

The pictures in docs/ are made anew by `SCREENSHOTS=docs python -m pytest tests/cluster/test_watching.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from most_ray.io.journal import read_journal
from tests.cluster.conftest import LocalCluster
from tests.conftest import ROOT

T = TypeVar("T")
RUN = "watched"
DASHBOARD = json.loads((ROOT / "cluster/monitoring/grafana/dashboards/most_ray.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@dataclass(frozen=True)
class Watched:
    """A run that is under way; submission: its job's id; began: Unix time."""

    cluster: LocalCluster
    submission: str
    folder: Path
    began: float

    def job(self) -> dict[str, Any]:
        return dict(self.cluster.get(f"/api/jobs/{self.submission}"))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Its range of values since the job began, by series; also of what is gone by now."""
        asked = {"query": expression.replace("$run", RUN), "start": self.began, "end": time.time(), "step": 5}
        url = f"{self.cluster.prometheus}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return list(json.load(answer)["data"]["result"])


def awaited(what: str, attempt: Callable[[], T], limit_s: float) -> T:
    """What an attempt comes to, once that is something."""
    deadline = time.monotonic() + limit_s
    while not (found := attempt()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(1)  # between two looks at another process
    return found


@pytest.fixture(scope="module")
def watched(local_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two workers with their experts spread over both, so that every figure has a value."""
    if shutil.which("prometheus") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Prometheus: sh .ci/prometheus.sh, as root")
    folder = tmp_path_factory.mktemp("runs")
    flags = f"--name {RUN} --output_dir {folder} --max_steps 90 --eval_steps 30 --save_steps 20 --num_workers 2 --ep_size 2"
    train = f"python jobs/train.py --config jobs/configs/digits.yaml {flags}".split()
    submit = [str(ROOT / ".venv/bin/ray"), "job", "submit", "--no-wait", "--submission-id", RUN, "--", *train]
    began = time.time()
    subprocess.run(submit, cwd=ROOT, env=local_cluster.env, check=True, capture_output=True, timeout=120)
    yield Watched(local_cluster, RUN, folder / RUN, began)
    if Watched(local_cluster, RUN, folder, began).job()["status"] in ("PENDING", "RUNNING"):
        subprocess.run([*submit[:2], "stop", RUN], cwd=ROOT, env=local_cluster.env, check=False, capture_output=True, timeout=120)


def running(watched: Watched) -> bool:
    status = watched.job()["status"]
    assert status in ("PENDING", "RUNNING"), watched.job()["message"]
    return bool(status == "RUNNING")


def logged_in(browser: Browser, cluster: LocalCluster) -> Page:
    page = browser.new_page(viewport={"width": 1300, "height": 1900})
    page.goto(cluster.dashboard)
    page.get_by_placeholder("Enter your authentication token").fill(cluster.token)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("Authentication Token Required")).to_be_hidden(timeout=20_000)
    return page


def kept(picture: Path) -> None:
    """A picture is small enough for the repository, and goes there where that was asked for."""
    assert 10_000 < picture.stat().st_size <= 200_000
    if folder := os.environ.get("SCREENSHOTS"):
        shutil.copy(picture, ROOT / folder / picture.name)


def test_train_lists_the_run_with_both_workers(watched: Watched) -> None:
    def workers() -> list[dict[str, Any]]:
        running(watched)
        try:
            runs = watched.cluster.get("/api/train/v2/runs/v1")["train_runs"]
        except urllib.error.HTTPError:  # 500 until there is a run
            return []
        runs = [run for run in runs if run["job_details"] and run["job_details"]["submission_id"] == RUN]  # others may have been there
        return [worker for run in runs for attempt in run["attempts"] for worker in attempt["workers"]]

    found = awaited("workers of the run", workers, 300)
    assert sorted(worker["world_rank"] for worker in found) == [0, 1] and {worker["status"] for worker in found} == {"ALIVE"}


def test_data_lists_the_stream(watched: Watched) -> None:
    def stream() -> bool:
        job = watched.job()["job_id"]
        datasets = watched.cluster.get(f"/api/data/datasets/{job}")["datasets"] if job else []
        return any("_fetch" in operator.get("name", "") for dataset in datasets for operator in dataset["operators"])

    awaited("the stream", stream, 300)


def test_a_wrong_token_opens_nothing(local_cluster: LocalCluster, browser: Browser) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer " + "0" * 64}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(urllib.request.Request(f"{local_cluster.dashboard}/api/jobs/", headers=headers), timeout=30)
        assert refusal.value.code == status
    page = browser.new_page()
    page.goto(local_cluster.dashboard)
    page.get_by_placeholder("Enter your authentication token").fill("0" * 64)
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("Invalid authentication token")).to_be_visible(timeout=20_000)
    page.close()


def test_everything_listens_on_loopback_alone(watched: Watched) -> None:
    """But for the store of rank 0's process group, which torch opens on all addresses while a run lasts."""
    listening = {}
    for process in watched.cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            name = " ".join(process.cmdline())
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and "RayTrainWorker" not in name:
                    listening[name, connection.laddr.port] = connection.laddr.ip.removeprefix("::ffff:")
    assert any("raylet" in name for name, _ in listening) and any("prometheus" in name for name, _ in listening)
    assert set(listening.values()) == {"127.0.0.1"}, listening


def test_the_job_page_shows_workers_and_data(watched: Watched, browser: Browser, tmp_path: Path) -> None:
    page = logged_in(browser, watched.cluster)
    page.goto(f"{watched.cluster.dashboard}/#/jobs/{RUN}")
    expect(page.get_by_text("Logs", exact=True)).to_have_count(2, timeout=60_000)  # the first leads to another page
    for section in ("Logs", "Task Timeline (beta)", "Cluster status and autoscaler"):
        page.get_by_text(section, exact=True).last.click()
    for section in ("Ray Data Overview", "Actor Table"):
        page.get_by_text(section, exact=True).click()
    page.get_by_label("Class", exact=True).fill("RayTrainWorker")
    page.get_by_label("Class", exact=True).press("Enter")
    expect(page.locator("td", has_text="dataset_").first).to_be_visible(timeout=60_000)
    expect(page.locator("td", has_text="RayTrainWorker")).to_have_count(2, timeout=60_000)
    expect(page.locator("td", has_text="TrainController")).to_have_count(0)
    expect(page.get_by_text("0 / 0")).to_have_count(0, timeout=60_000)  # the stream has come to something
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=tmp_path / "dashboard-job.png")
    page.close()
    kept(tmp_path / "dashboard-job.png")


def test_every_query_of_the_grafana_dashboard_finds_the_run(watched: Watched) -> None:
    """Promise 35 of docs/promises.md: no panel is empty."""
    missing = set(QUERIES)

    def complete() -> bool:
        missing.difference_update({query for query in missing if watched.query(query)})
        return not missing or watched.job()["status"] not in ("PENDING", "RUNNING")

    awaited("figures of the run", complete, 900)
    assert not missing


def take_picture_of_figures(watched: Watched, browser: Browser, picture: Path) -> None:
    """Of Prometheus' own page: Grafana is not in Debian."""
    names = {"Loss", "Tokens per second", "Word error rate"}
    shown = [panel["targets"][0]["expr"].replace("$run", RUN) for panel in DASHBOARD["panels"] if panel["title"] in names]
    first = min(float(series["values"][0][0]) for series in watched.query(shown[0]))
    minutes = int((time.time() - first) / 60) + 1
    asked: dict[str, str | int] = {}
    for index, query in enumerate(shown):
        asked |= {f"g{index}.expr": query, f"g{index}.tab": 0, f"g{index}.range_input": f"{minutes}m", f"g{index}.step_input": 5}
    page = browser.new_page(viewport={"width": 1000, "height": 2260})
    page.goto(f"{watched.cluster.prometheus}/graph?{urllib.parse.urlencode(asked)}")
    expect(page.get_by_text("Total time series")).to_have_count(len(names), timeout=30_000)
    expect(page.locator("svg path").first).to_be_visible(timeout=30_000)
    page.screenshot(path=picture)
    page.close()


def test_alerts_are_loaded_and_none_fires_for_a_healthy_run(watched: Watched) -> None:
    with urllib.request.urlopen(f"{watched.cluster.prometheus}/api/v1/rules", timeout=30) as answer:
        (group,) = json.load(answer)["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"} and len(group["rules"]) >= 7
    assert watched.query('ALERTS{alertname=~"MostRay.*", alertstate="firing"}') == []


def test_prometheus_has_what_the_run_wrote_down_until_it_ends(watched: Watched, browser: Browser, tmp_path: Path) -> None:
    awaited("the end of the run", lambda: watched.job()["status"] == "SUCCEEDED" or not running(watched), 900)
    assert watched.job()["status"] == "SUCCEEDED", watched.job()["message"]
    lines = read_journal(watched.folder / "metrics.jsonl")
    written = {round(line["loss"], 6) for line in lines if line["kind"] == "train"}
    (series,) = watched.query('max by (run) (ray_most_ray_loss{run="$run", task="(all)"})')
    read = {round(float(value), 6) for _, value in series["values"]}
    assert len(read) >= 3 and read <= written
    (starts,) = watched.query('max by (run) (ray_most_ray_starts{run="$run"})')
    assert {value for _, value in starts["values"]} == {"1"}

    def gone() -> bool:
        asked = urllib.parse.urlencode({"query": f'ray_most_ray_step{{run="{RUN}"}}'})
        with urllib.request.urlopen(f"{watched.cluster.prometheus}/api/v1/query?{asked}", timeout=30) as answer:
            return not json.load(answer)["data"]["result"]

    awaited("that the run's figures vanish", gone, 90)
    take_picture_of_figures(watched, browser, tmp_path / "dashboard-metrics.png")
    kept(tmp_path / "dashboard-metrics.png")


def test_up_says_that_it_is_up_and_keeps_secrets_to_its_user(local_cluster: LocalCluster) -> None:
    before = {process.pid for process in local_cluster.processes()}
    again = subprocess.run(["sh", "cluster/local/up.sh"], cwd=ROOT, env=local_cluster.env, text=True, capture_output=True, check=True)
    assert "is up already" in again.stdout and local_cluster.dashboard in again.stdout and local_cluster.token not in again.stdout
    assert {int(path.read_text().split()[0]) for path in local_cluster.folder.glob("*.pid")} <= before
    for name in ("", "auth_token", "env", "ray.log"):
        assert (local_cluster.folder / name).stat().st_mode & 0o077 == 0
