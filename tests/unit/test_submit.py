"""Jobs: one run is one job at a time, under a name of its own; what goes along is weighed; what a job waits for is said."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray._private.runtime_env import packaging

from most_ray.cli import cluster_commands as command
from most_ray.cli import main
from most_ray.errors import ConfigError
from most_ray.service.cluster import submit as service
from most_ray.service.cluster.job_package import EXCLUDES, package_of
from most_ray.service.cluster.submit import job_name, next_job, open_client, why_pending

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
    for name, size in {
        "a/b.bin": 3000,
        "c.txt": 100,
        ".git/x": 9999,
        ".venv/lib/y": 9999,
        ".venv-newest/y": 9999,
        "runs/z": 9999,
        "big.log": 5000,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("*.log\n")
    found = package_of(tmp_path)
    assert found.largest[:2] == [("a/b.bin", 3000), ("c.txt", 100)]
    assert 3100 <= found.bytes < 4000


def test_the_weight_is_that_of_rays_archive_to_the_byte(tmp_path: Path) -> None:
    """Ray stores files, it does not compress them: so the limit can be told without packing."""
    folder = tmp_path / "folder"
    for name in ("a/b.bin", "a/äö.txt", "c.txt", "runs/z", "d/.keep", "d/log.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 5000)
    (folder / "d" / ".gitignore").write_text("*.txt\n")
    (folder / "empty").mkdir()
    (folder / "gone").symlink_to("nowhere")
    archive = tmp_path / "archive.zip"
    packaging.create_package(str(folder), archive, include_gitignore=True, excludes=list(EXCLUDES))
    assert package_of(folder).bytes == archive.stat().st_size
    assert package_of(folder).files == {"a/b.bin", "a/äö.txt", "c.txt", "d/.keep", "d/.gitignore"}


def test_a_folder_over_the_dashboards_limit_is_refused_at_once(tmp_path: Path) -> None:
    """The dashboard takes 100 MiB in one request, less than the 512 of what keeps it."""
    with (tmp_path / "weights.bin").open("wb") as stream:
        stream.truncate(99 << 20)  # a hole: nothing is written
        package_of(tmp_path).check_size()
        stream.truncate(100 << 20)
    with pytest.raises(ConfigError, match=r"holds 100 MiB, a job takes at most 100: weights.bin 100 MiB. List in .gitignore"):
        package_of(tmp_path).check_size()
    with pytest.raises(ConfigError, match="is no folder"):
        package_of(tmp_path / "nothing")


def test_what_a_pending_job_waits_for_is_said(tmp_path: Path) -> None:
    """Promise 33 of docs/promises.md: the cause that is printed."""
    package = package_of(tmp_path)
    waiting = SimpleNamespace(driver_agent_http_address=None, message="Job has not started yet.")
    assert "no node" in why_pending(waiting, {"nodes": 0}, package)  # type: ignore[arg-type]
    assert "working directory" in why_pending(waiting, {"nodes": 1}, package)  # type: ignore[arg-type]
    started = SimpleNamespace(driver_agent_http_address="http://x", message="Job has not started yet.")
    assert why_pending(started, {"nodes": 1}, package) == "Job has not started yet."  # type: ignore[arg-type]


@dataclass
class Dashboard:
    """Answers as Ray's job server does. jobs: those that there are; posts: what was submitted; on_post: what it does then (None: takes it);
    on_put: its answer to a package; stops: the jobs that were asked to stop."""

    version: str = ray.__version__
    status: int = 200
    jobs: list[dict[str, Any]] = field(default_factory=list)
    posts: list[dict[str, Any]] = field(default_factory=list)
    on_post: Callable[[], str] | None = None
    on_put: tuple[int, str] = (200, "{}")
    stops: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    state = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: Any, status: int | None = None) -> None:
            self.send_response(status or state.status)
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
            if self.path.startswith("/api/packages/"):
                return self.answer("", 404)
            if self.path == "/api/jobs/":
                return self.answer(state.jobs)
            name = self.path.split("/")[3]
            found = [each for each in state.jobs if each["submission_id"] == name]
            return self.answer(found[0]) if found else self.answer(f"Job {name} does not exist", 404)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(state.on_put[1], state.on_put[0])

        def do_POST(self) -> None:
            if self.path.endswith("/stop"):
                state.stops.append(self.path.split("/")[3])
                for each in state.jobs:
                    each["status"] = "STOPPED" if each["submission_id"] == state.stops[-1] else each["status"]
                return self.answer({"stopped": True})
            if state.on_post:
                return self.answer(state.on_post(), 400)
            state.posts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"job_id": state.posts[-1]["submission_id"], "submission_id": state.posts[-1]["submission_id"]})

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", state.url)  # so that it is put back
    monkeypatch.setattr(service, "use_token", lambda: None)  # this machine may have one
    yield state
    server.shutdown()
    server.server_close()


def job(name: str, status: str, entrypoint: str = "x") -> dict[str, Any]:
    return {"type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": entrypoint}


def submitted(dashboard: Dashboard, *words: str) -> int:
    return main(["submit", "train", "--config", DIGITS, "--address", dashboard.url, "--working_dir", "jobs", "--detach", *words])


def test_a_job_is_named_by_its_run_and_has_time_to_stop(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(dashboard, "--max_steps", "5") == 0
    (post,) = dashboard.posts
    assert post["submission_id"] == job_name("digits", "runs/digits")
    assert post["entrypoint"] == "python -m most_ray.cli train --config configs/digits.yaml --max_steps 5"
    assert int(post["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    said = capsys.readouterr().out
    assert "(1 node, 4 CPU, 0 GPU)" in said
    assert f"most-ray submit --stop {post['submission_id']}" in said


def test_submitting_twice_continues_and_never_doubles(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    """Promise 36 of docs/promises.md."""
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
        (401, ray.__version__, "requires a token, and none is set here. Set RAY_AUTH_MODE=token"),
        (403, ray.__version__, "does not accept this token. Set RAY_AUTH_MODE=token"),
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
    monkeypatch.setattr(service, "LOCAL_DASHBOARD", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is put back
    monkeypatch.setattr(service, "use_token", lambda: None)
    with pytest.raises(ConfigError, match=r"does not answer.*cluster/local/up.sh"):
        open_client(None, {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--config", DIGITS, "--max_step", "5"], "Did you mean 'max_steps'"),
        (["trian"], "Did you mean 'train'"),
        ([], "cannot be submitted"),
        (["report", "x"], "cannot be submitted"),
        (["train", "--config", "nothing.yaml"], "cannot be read"),
        (["train", "--config", DIGITS, "--output_dir", "s3://key:secret@bucket/runs"], "contains credentials"),
        (["--stop", "x", "train"], "takes no command"),
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
    assert "is outside of the folder that is sent with the job" in capsys.readouterr().err


def test_what_is_stopped_must_be_there(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.jobs = [job("digits-ab", "RUNNING")]
    assert main(["submit", "--address", dashboard.url, "--stop", "digit-ab"]) == 2
    assert "Did you mean 'digits-ab'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "train", ["python -m most_ray.cli train --config x", "python jobs/train.py", "python -m most_ray.cli sweep --config x"]
)
def test_a_run_that_is_stopped_is_said_to_go_on(dashboard: Dashboard, capsys: pytest.CaptureFixture[str], train: str) -> None:
    dashboard.jobs = [job("digits-ab", "RUNNING", train)]
    assert main(["submit", "--address", dashboard.url, "--stop", "digits-ab"]) == 0
    assert dashboard.stops == ["digits-ab"]
    assert "digits-ab: STOPPED. Submit it again: it resumes from its newest checkpoint, where it has one." in capsys.readouterr().out


@pytest.mark.parametrize("other", ["prepare units --output train", "doctor", "train --config x --dry_run H100"])
def test_what_has_no_checkpoint_is_not_said_to_go_on(dashboard: Dashboard, capsys: pytest.CaptureFixture[str], other: str) -> None:
    dashboard.jobs = [job("x-ab", "RUNNING", f"python -m most_ray.cli {other}")]
    assert main(["submit", "--address", dashboard.url, "--stop", "x-ab"]) == 0
    assert capsys.readouterr().out == "x-ab: STOPPED.\n"


def test_a_job_that_has_ended_is_not_stopped_again(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.jobs = [job("digits-ab", "FAILED", "python -m most_ray.cli train")]
    assert main(["submit", "--address", dashboard.url, "--stop", "digits-ab"]) == 0
    assert capsys.readouterr().out == "digits-ab has ended already (FAILED).\n"
    assert dashboard.stops == []


def test_interrupting_a_stop_leaves_it_going(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard.jobs = [job("digits-ab", "RUNNING")]
    monkeypatch.setattr(service._Client, "stop_job", lambda *_: True)
    monkeypatch.setattr(service.time, "sleep", interrupt)
    assert main(["submit", "--address", dashboard.url, "--stop", "digits-ab"]) == 130
    assert "the job is still stopping" in capsys.readouterr().out


def interrupt(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("made", [True, False])
def test_interrupted_while_submitting_says_whether_there_is_a_job(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    name = job_name("digits", "runs/digits")

    def submit_job(*_: object, **__: object) -> None:
        dashboard.jobs = [job(name, "PENDING")] if made else []
        raise KeyboardInterrupt

    monkeypatch.setattr(service._Client, "submit_job", submit_job)
    assert submitted(dashboard) == (0 if made else 130)
    said = capsys.readouterr().out
    assert (
        f"Detached, the job continues. The same command follows it again. Stop it after a checkpoint: most-ray submit --stop {name}" in said
    ) == made
    assert ("has no job of this run under way" in said) != made


def test_the_hint_to_stop_names_the_cluster_that_was_named(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(dashboard) == 0
    assert f"most-ray submit --stop {job_name('digits', 'runs/digits')} --address {dashboard.url}" in capsys.readouterr().out


def test_a_faster_submitter_is_joined_and_any_other_refusal_is_said(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    name = job_name("digits", "runs/digits")
    dashboard.on_post = lambda: "the runtime environment names a package already installed"
    assert submitted(dashboard) == 2
    assert "was refused (Request failed with status code 400: the runtime environment names" in capsys.readouterr().err

    def other() -> str:
        dashboard.jobs = [job(name, "PENDING")]
        return "taken"

    dashboard.on_post = other
    assert submitted(dashboard) == 0
    assert "under way already" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [(413, "Request Entity Too Large"), (500, "aiohttp.web_exceptions.HTTPRequestEntityTooLarge: ...")])
def test_a_package_that_a_cluster_finds_too_large_is_said_with_its_remedy(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str], answer: tuple[int, str]
) -> None:
    """The dashboard's own refusal is a 500 around a traceback; a proxy's is a 413."""
    dashboard.on_put = answer
    assert submitted(dashboard) == 2
    assert "more than the cluster takes: data/" in (error := capsys.readouterr().err)
    assert "List in .gitignore or .rayignore" in error


@pytest.mark.parametrize(
    ("place", "ignore", "said"),
    [
        ("runs/a/config.yaml", "", "runs never is"),
        ("own/config.yaml", "own/", "/.gitignore excludes it"),
        ("own/config.yaml", "*.yaml", "/.gitignore excludes it"),
    ],
)
def test_a_configuration_that_stays_here_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str, ignore: str, said: str
) -> None:
    monkeypatch.setattr(service, "open_client", lambda address: pytest.fail("asked"))
    (tmp_path / ".gitignore").write_text(ignore)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text("name: a\n")
    assert main(["submit", "--working_dir", str(tmp_path), "train", "--config", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert f"config = {place!r}: is not sent with the job: " in error
    assert said in error


@pytest.mark.parametrize(
    ("words", "content"),
    [
        (["train"], "train_asr_dirs: ['s3://key:secret@bucket/records']"),
        (["prepare", "store"], "store_dir: s3://key:secret@bucket/store"),
        (["sweep"], "train_asr_dirs: ['s3://key:secret@bucket/records']\nval_asr_dirs: [v]\nspace: {learning_rate: 1 | 2}"),
        (["prepare", "tts"], '[{"dataset_name": "a", "input_dir": "s3://key:secret@bucket/a", "output_dir": "b", "file_pattern": "*"}]'),
    ],
)
def test_credentials_in_a_configuration_do_not_go_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], content: str
) -> None:
    monkeypatch.setattr(service, "open_client", lambda address: pytest.fail("asked"))
    (tmp_path / "a.yaml").write_text(content)
    assert main(["submit", "--working_dir", str(tmp_path), *words, "--config", str(tmp_path / "a.yaml")]) == 2
    error = capsys.readouterr().err
    assert "contains credentials" in error
    assert "the cluster keeps what is sent with a job" in error
    assert "secret" not in error


def identity(*words: str) -> tuple[str, str, list[str]]:
    made = command._check_command(list(words), Path(DIGITS).parents[1])
    return made.name, made.uri, made.command


def test_commands_that_may_run_at_once_have_names_of_their_own() -> None:
    units = ("prepare", "units", "--input", "x", "--features", "mfcc")
    tts = ("prepare", "tts", "--input_dir", "a")
    different = [
        ("train", "--config", DIGITS),
        ("train", "--config", DIGITS, "--dry_run"),
        ("prepare", "store", "--config", DIGITS),
        ("prepare", "store", "--config", DIGITS, "--verify"),
        ("prepare", "store", "--config", DIGITS, "--name", "other"),
        ("prepare", "store", "--config", DIGITS, "--store_dir", "other"),
        (*units, "--output", "a"),
        (*units, "--output", "b"),
        ("prepare", "vocoder", "--input", "x", "--records", "a"),
        ("prepare", "vocoder", "--input", "x", "--records", "b"),
        (*tts, "--output_dir", "b"),
        (*tts, "--output_dir", "c"),
    ]
    made = [job_name(*identity(*words)[:2]) for words in different]
    assert len(set(made)) == len(made)
    assert made == [job_name(*identity(*words)[:2]) for words in different]
    assert made[1].startswith("dry-digits-")


def test_every_commands_configuration_is_named_as_the_job_will_see_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert identity("prepare", "store", "--config", DIGITS)[2] == ["prepare", "store", "--config", "configs/digits.yaml"]
    monkeypatch.chdir(tmp_path)
    Path("tts.json").write_text('{"dataset_name": "a", "input_dir": "a", "output_dir": "b", "file_pattern": "*"}')
    made = command._check_command(["prepare", "tts", "--config=./tts.json"], tmp_path)
    assert made.command == ["prepare", "tts", "--config=tts.json"]
    with pytest.raises(ConfigError, match="is outside of the folder"):
        identity("prepare", "tts", "--config", "./tts.json")
