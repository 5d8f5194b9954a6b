"""Jobs: one run is one job at a time, under a name of its own; what goes along is weighed; what a job waits for is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from most_ray.cli import main
from most_ray.errors import ConfigError
from most_ray.service import submit as service
from most_ray.service.submit import job_name, next_job, open_client, package_of, why_pending

DIGITS = str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "digits.yaml")


def test_a_run_has_one_name_and_another_folder_another() -> None:
    assert job_name("digits", "runs/digits") == job_name("digits", "runs/digits")
    assert job_name("digits", "runs/digits") != job_name("digits", "/shared/digits")
    assert job_name("a b", "runs/a b") != job_name("a-b", "runs/a-b")


@given(st.text(min_size=1, max_size=100))
def test_any_run_name_makes_a_plain_submission_id(name: str) -> None:
    """It becomes part of a URL and of a log file's name."""
    made = job_name(name, "runs")
    assert all(letter.isascii() and (letter.isalnum() or letter in "_.-") for letter in made)
    assert len(made) <= 70


def test_ids_count_up_and_a_job_under_way_is_taken() -> None:
    assert next_job("run-ab", []) == ("run-ab", False)
    assert next_job("run-ab", [("run-ab", True)]) == ("run-ab-2", False)
    assert next_job("run-ab", [("run-ab", False)]) == ("run-ab", True)
    assert next_job("run-ab", [("run-ab", True), ("run-ab-2", False)]) == ("run-ab-2", True)
    assert next_job("run-ab", [("run-ab-2", True), ("run-ab-10", True)]) == ("run-ab-11", False)
    others = [("run-abc", False), ("run-ab-x", False), ("xrun-ab", False), ("run-ab-2-2", False)]
    assert next_job("run-ab", others) == ("run-ab", False)


@given(st.lists(st.booleans(), max_size=20))
def test_submitting_again_and_again_never_doubles(ends: list[bool]) -> None:
    """Whatever ends in between, at most one job of a run is under way, and no id is used twice."""
    jobs: dict[str, bool] = {}
    for end in ends:
        name, going = next_job("run", list(jobs.items()))
        assert going == (name in jobs)
        jobs[name] = jobs.get(name, False)
        assert sum(not ended for ended in jobs.values()) == 1
        if end:
            jobs[name] = True


def test_what_goes_along_is_weighed_without_what_stays(tmp_path: Path) -> None:
    for name, size in {"a/b.bin": 3000, "c.txt": 100, ".git/x": 9999, ".venv/lib/y": 9999, "runs/z": 9999, "big.log": 5000}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("*.log\n")
    found = package_of(tmp_path)
    assert found.largest[:2] == (("a", 3000), ("c.txt", 100))
    assert 3100 <= found.bytes < 4000


def test_a_folder_over_rays_limit_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "weights.bin").open("wb") as stream:
        stream.truncate(600 << 20)  # a hole: nothing is written
    with pytest.raises(ConfigError, match=r"holds 600 MiB, a job takes at most 5\d\d: weights.bin 600 MiB. Name in .gitignore"):
        package_of(tmp_path).check()
    with pytest.raises(ConfigError, match="is no folder"):
        package_of(tmp_path / "nothing")


def test_what_a_pending_job_waits_for_is_said(tmp_path: Path) -> None:
    package = package_of(tmp_path)
    waiting = SimpleNamespace(driver_agent_http_address=None, message="Job has not started yet.")
    assert "no node" in why_pending(waiting, {"nodes": 0}, package)  # type: ignore[arg-type]
    assert "working directory" in why_pending(waiting, {"nodes": 1}, package)  # type: ignore[arg-type]
    started = SimpleNamespace(driver_agent_http_address="http://x", message="Job has not started yet.")
    assert why_pending(started, {"nodes": 1}, package) == "Job has not started yet."  # type: ignore[arg-type]


@dataclass
class Dashboard:
    """Answers as Ray's job server does. jobs: those that there are; posts: what was submitted."""

    version: str = ray.__version__
    status: int = 200
    jobs: list[dict[str, Any]] = field(default_factory=list)
    posts: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    state = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: Any) -> None:
            self.send_response(state.status)
            self.end_headers()
            self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

        def do_GET(self) -> None:
            if state.status == 401:
                return self.answer("Unauthorized: Missing authentication token")
            if state.status == 403:
                return self.answer("Forbidden: Invalid authentication token")
            if self.path == "/api/version":
                return self.answer({"version": "4", "ray_version": state.version, "ray_commit": "x", "session_name": "s"})
            if self.path.startswith("/api/v0/nodes"):
                nodes = [{"state": "ALIVE", "resources_total": {"CPU": 4.0}}, {"state": "DEAD", "resources_total": {"CPU": 9.0}}]
                return self.answer({"data": {"result": {"result": nodes}}})
            return self.answer(state.jobs if self.path == "/api/jobs/" else {})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({})

        def do_POST(self) -> None:
            state.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"job_id": state.posts[-1]["submission_id"], "submission_id": state.posts[-1]["submission_id"]})

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", state.url)  # so that it is put back
    monkeypatch.setattr(service, "use_token", lambda: None)  # this machine may have one
    yield state
    server.shutdown()
    server.server_close()


def job(name: str, status: str) -> dict[str, Any]:
    return {"type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": "x"}


def submitted(dashboard: Dashboard, *words: str) -> int:
    return main(["submit", "train", "--config", DIGITS, "--address", dashboard.url, "--working_dir", "jobs", "--detach", *words])


def test_a_job_is_named_by_its_run_and_has_time_to_stop(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(dashboard, "--max_steps", "5") == 0
    (post,) = dashboard.posts
    assert post["submission_id"] == job_name("digits", "runs/digits")
    assert post["entrypoint"] == "python -m most_ray.cli train --config configs/digits.yaml --max_steps 5"
    assert int(post["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    said = capsys.readouterr().out
    assert "(1 nodes, 4 CPU, 0 GPU)" in said
    assert f"most-ray submit --stop {post['submission_id']}" in said


def test_submitting_twice_continues_and_never_doubles(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    """Promise 36."""
    name = job_name("digits", "runs/digits")
    dashboard.jobs = [job(name, "RUNNING")]
    assert submitted(dashboard) == 0
    assert dashboard.posts == []
    assert "under way already" in capsys.readouterr().out
    dashboard.jobs = [job(name, "FAILED")]
    assert submitted(dashboard) == 0
    assert [post["submission_id"] for post in dashboard.posts] == [f"{name}-2"]


@pytest.mark.parametrize(
    ("status", "version", "said"),
    [
        (401, ray.__version__, "asks for a token, and none is here. Set RAY_AUTH_MODE=token"),
        (403, ray.__version__, "does not take this token. Set RAY_AUTH_MODE=token"),
        (200, "2.9.0", f"runs Ray 2.9.0, this is {ray.__version__}. Install the same on both."),
        (500, ray.__version__, "does not answer as a Ray dashboard. Check it."),
    ],
)
def test_a_cluster_that_does_not_take_jobs_is_said_in_one_line(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], status: int, version: str, said: str
) -> None:
    dashboard.status, dashboard.version = status, version
    assert submitted(dashboard) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_without_any_cluster_it_is_said_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "DEFAULT", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is put back
    monkeypatch.setattr(service, "use_token", lambda: None)
    with pytest.raises(ConfigError, match=r"does not answer.*cluster/local/up.sh"):
        open_client(None, {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--config", DIGITS, "--max_step", "5"], "Did you mean 'max_steps'"),
        (["trian"], "Did you mean 'train'"),
        ([], "is nothing that is submitted"),
        (["report", "x"], "is nothing that is submitted"),
        (["train", "--config", "nothing.yaml"], "cannot be read"),
        (["train", "--config", DIGITS, "--output_dir", "s3://key:secret@bucket/runs"], "holds credentials"),
        (["--stop", "x", "train"], "stands alone"),
    ],
)
def test_wrong_uses_end_before_a_cluster_is_asked(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "open_client", lambda address: pytest.fail("asked"))
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "secret" not in error


def test_a_configuration_outside_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--working_dir", str(tmp_path), "train", "--config", DIGITS]) == 2
    assert "lies outside of the folder that goes along" in capsys.readouterr().err


def test_what_is_stopped_must_be_there(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.jobs = [job("digits-ab", "RUNNING")]
    assert main(["submit", "--address", dashboard.url, "--stop", "digit-ab"]) == 2
    assert "Did you mean 'digits-ab'?" in capsys.readouterr().err
