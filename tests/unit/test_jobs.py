"""`most-ray jobs`: which jobs there are, which one is meant by a name, and what is said while a dashboard does not answer."""

from __future__ import annotations

import io
import json
import socket
from typing import Any

import pytest
from ray.job_submission import JobDetails

from most_ray.cli import jobs_command, main
from most_ray.console.terminal import Terminal
from most_ray.errors import ConfigError
from most_ray.io import waits
from most_ray.service.cluster import submit as service
from most_ray.service.cluster.jobs import Job, find_job, jobs_of
from tests.unit.test_submit import Dashboard, dashboard, interrupt, job  # noqa: F401 - a fixture

TRAIN = "python -m most_ray.cli train --config configs/digits.yaml --max_steps 5"


def made(name: str, status: str = "RUNNING", start: int = 1000, **fields: Any) -> dict[str, Any]:
    return {**job(name, status, TRAIN), "start_time": 1000 * start, **fields}


def known(*jobs: dict[str, Any]) -> list[Job]:
    return jobs_of(JobDetails(**each) for each in jobs)


def test_a_job_is_known_by_its_run_its_state_and_its_age() -> None:
    found = known(
        made("digits-0a1b2c", "FAILED", 10, end_time=20_000, metadata={"run": "digits-0a1b2c"}, message="no\n room"),
        made("digits-0a1b2c-2", "RUNNING", 30),
        made("raysubmit_x", "SUCCEEDED", 40, entrypoint="python jobs/train.py --config c --name mine"),
        {"type": "DRIVER", "job_id": "01", "status": "RUNNING", "entrypoint": ""},  # a driver that nobody has submitted
        made("old", "STOPPED", 1, start_time=None, entrypoint="python x.py --key s3://user:sekret@b/c"),
    )
    assert [each.submission for each in found] == ["digits-0a1b2c-2", "raysubmit_x", "digits-0a1b2c", "old"]
    assert [each.name for each in found] == ["digits", "mine", "digits", ""]
    assert found[0].run == found[2].run == "digits-0a1b2c"
    assert (found[0].under_way, found[0].age(90.0), found[0].ended) == (True, 60.0, None)
    assert (found[2].state, found[2].ended, found[2].message) == ("FAILED", 20.0, "no room")
    assert found[3].age(1.0) is None and "sekret" not in found[3].command
    assert found[0].short_command == "train --config configs/digits.yaml --max_steps 5"
    assert found[1].short_command == "jobs/train.py --config c --name mine"


JOBS = known(
    made("digits-0a1b2c", "FAILED", 1),
    made("digits-0a1b2c-2", "RUNNING", 2),
    made("other-aaaaaa", "STOPPED", 1),
    made("other-aaaaaa-2", "FAILED", 2),
    made("twice-aaaaaa", "RUNNING", 1),
    made("twice-bbbbbb", "PENDING", 1),
    made("byhand", "RUNNING", 1),
)


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("digits", "digits-0a1b2c-2"),
        ("digits-0a1b2c", "digits-0a1b2c-2"),  # the run's first job stands for the one that runs
        ("digits-0a1b2c-2", "digits-0a1b2c-2"),
        ("other", "other-aaaaaa-2"),  # the newest
        ("other-aaaaaa", "other-aaaaaa"),
        ("twice-bbbbbb", "twice-bbbbbb"),
        ("byhand", "byhand"),
    ],
)
def test_a_name_means_the_job_that_is_under_way_or_the_newest(named: str, meant: str) -> None:
    assert find_job("stop", named, JOBS).submission == meant


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("digit", "stop = 'digit': is no job of this cluster. Did you mean 'digits'?"),
        ("other-aaaaa", "Did you mean 'other-aaaaaa"),
        ("", "stop = '': is no job of this cluster. Known: byhand, digits"),
        ("twice", "is the name of 2 jobs that are under way: twice-aaaaaa, twice-bbbbbb. Name one of these."),
    ],
)
def test_a_name_that_means_none_or_several_is_refused(named: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_job("stop", named, JOBS)
    assert said in str(refused.value)
    with pytest.raises(ConfigError, match="It has none"):
        find_job("stop", "x", [])


def test_jobs_are_listed(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert main(["jobs", "--address", dashboard.url]) == 0
    assert capsys.readouterr().out == f"{dashboard.url} has no jobs. `most-ray submit` makes one.\n"
    dashboard.jobs = [made("digits-0a1b2c", "RUNNING"), made("x\x1b[31m", "FAILED", entrypoint=f"python a.py {'y' * 100}")]
    assert main(["jobs", "--address", dashboard.url]) == 0
    said = capsys.readouterr().out
    assert "digits" in said and "RUNNING" in said and "train --config configs/digits.yaml" in said and r"x\x1b[31m" in said
    assert "a.py yyy" in said and "y" * 80 not in said and "\x1b" not in said


def test_a_long_list_ends_with_the_newest_that_have_ended() -> None:
    console = Terminal(file=io.StringIO(), width=120)
    jobs = known(*(made(f"a{number}", "FAILED", number) for number in range(1, 31)), made("b", "RUNNING", 2))
    jobs_command.show(jobs, "http://x", 100.0, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a30" in text and "a11" in text and "a10" not in text and text.index("RUNNING") < text.index("FAILED")


def test_a_command_takes_what_a_line_has_left() -> None:
    jobs = known(made("digits-0a1b2c", "RUNNING"), made("digits-0a1b2c-2", "FAILED"))
    for width, shown in ((80, "train --config configs/digit..."), (120, "train --config configs/digits.yaml --max_steps 5")):
        console = Terminal(file=io.StringIO(), width=width)
        jobs_command.show(jobs, "http://x", 1100.0, console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert sum(shown in line for line in lines) == 2 and len(lines) == 7 and max(map(len, lines)) <= width


def test_jobs_as_json_are_all_and_nothing_else(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    dashboard.jobs = [made(f"run{number}-0a1b2c", "FAILED") for number in range(40)]
    assert main(["jobs", "--address", dashboard.url, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 40 and listed[0]["state"] == "FAILED" and listed[0]["started"] == 1000.0
    assert set(listed[0]) == {"name", "submission", "run", "state", "under_way", "started", "ended", "command", "message"}


@pytest.mark.parametrize("named", ["digits", "digits-0a1b2c"])
def test_a_job_is_stopped_by_its_runs_name(
    dashboard: Dashboard,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    named: str,
) -> None:
    dashboard.jobs = [made("digits-0a1b2c", "FAILED"), made("digits-0a1b2c-2", "RUNNING")]
    log = "step 3\nmost-ray: stopped: SIGTERM: was received: a checkpoint was written, the run has stopped.\n"
    monkeypatch.setattr(service._Client, "get_job_logs", lambda *_: log)
    assert main(["jobs", "--address", dashboard.url, "--stop", named]) == 0
    assert dashboard.stops == ["digits-0a1b2c-2"]
    assert capsys.readouterr().out == (
        "digits-0a1b2c-2 says: SIGTERM: was received: a checkpoint was written, the run has stopped.\n"
        "digits-0a1b2c-2: STOPPED. Submit it again: it resumes from its newest checkpoint, where it has one.\n"
    )


def test_a_job_is_followed_by_its_runs_name(
    dashboard: Dashboard,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dashboard.jobs = [made("digits-0a1b2c", "RUNNING")]
    followed: list[str] = []
    monkeypatch.setattr(service, "follow", lambda client, submission, *_: followed.append(submission) or 75)
    assert main(["jobs", "--address", dashboard.url, "--follow", "digits"]) == 75 and followed == ["digits-0a1b2c"]
    monkeypatch.setattr(service, "follow", interrupt)
    assert main(["jobs", "--address", dashboard.url, "--follow", "digits"]) == 0
    assert f"Stop it: most-ray jobs --stop digits-0a1b2c --address {dashboard.url}" in capsys.readouterr().out
    assert main(["jobs", "--address", dashboard.url, "--follow", "digit"]) == 2
    assert "follow = 'digit': is no job of this cluster. Did you mean 'digits'?" in capsys.readouterr().err


def test_a_job_that_does_not_stop_is_not_waited_for_without_end(
    dashboard: Dashboard,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dashboard.jobs = [made("digits-0a1b2c", "RUNNING")]
    for name, value in {"_STOP_S": 0.01, "_REQUEST_S": 0.02, "_POLL_S": 0.001}.items():
        monkeypatch.setattr(service, name, value)
    monkeypatch.setattr(service._Client, "stop_job", lambda *_: True)
    monkeypatch.setattr(service._Client, "get_job_info", lambda self, name: JobDetails(**dashboard.jobs[0]))
    monkeypatch.setattr(waits, "_FIRST_S", 0.001)
    assert main(["jobs", "--address", dashboard.url, "--stop", "digits"]) == 2
    said = capsys.readouterr()
    assert "stop = 'digits-0a1b2c': has not stopped within 0 s. The same command waits for it again" in said.err
    assert "waiting for digits-0a1b2c to stop, a run after a checkpoint: 0 s, until 0 s" in said.out


@pytest.mark.parametrize("command", [["jobs"], ["jobs", "--json"], ["jobs", "--stop", "x"], ["submit", "--stop", "x"]])
def test_a_dashboard_that_takes_connections_and_does_not_answer_is_named_and_given_up(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is put back
    monkeypatch.setattr(service, "use_token", lambda: None)
    monkeypatch.setattr(service, "_FIRST_S", 0.1)
    monkeypatch.setattr(waits, "_FIRST_S", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main([*command, "--address", url]) == 2
    said = capsys.readouterr()
    line = f"waiting for the dashboard at {url}: 0 s, until 0 s"
    assert line in (said.err if "--json" in command else said.out) and ("--json" not in command or said.out == "")
    assert f"address = '{url}': does not answer as a Ray dashboard." in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("answer", ["[]", "{}", "null", "3", "<html>", '{"ray_version": null}', '{"ray_version": "x.y"}'])
def test_what_is_no_dashboard_is_said_in_one_line(
    dashboard: Dashboard,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
) -> None:
    monkeypatch.setattr(json, "dumps", lambda *_, **__: answer)
    assert main(["jobs", "--address", dashboard.url]) == 2
    said = capsys.readouterr().err
    assert "does not answer as a Ray dashboard" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stop", "a", "--follow", "b"], "stop: and follow exclude each other."),
        (["--stop", "a", "--json"], "stop: and json exclude each other."),
        (["--follow", "a", "--json"], "follow: and json exclude each other."),
        (["digits"], "belongs to no flag"),
        (["--stp", "a"], "Did you mean 'stop'?"),
        (["--stop"], "expected one argument"),
    ],
)
def test_wrong_uses_end_before_a_cluster_is_asked(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "open_client", lambda *_, **__: pytest.fail("asked"))
    assert main(["jobs", *words]) == 2
    assert said in capsys.readouterr().err
