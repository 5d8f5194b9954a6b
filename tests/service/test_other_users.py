"""Another user of the machine gets nowhere in a local run: not by the token, not by the folder of the sockets, not by a port.

Each attack is tried on Ray's own settings too, where it succeeds: what fails here fails because of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.hosts import require_namespaces
from tests.support.other_user import OLD


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can look into, as a home folder or /tmp, with a short name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        for folder, mode in (("home", 0o755), ("t", 0o1777), ("open", 0o1777)):
            (Path(name) / folder).mkdir()
            (Path(name) / folder).chmod(mode)
        yield Path(name)


def attacked(settings: str, folder: Path) -> dict[str, Any]:
    """What came of the attacks on a Ray with these settings."""
    require_namespaces()
    if os.geteuid() != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs root, to become another user")
    inside = 'ip link set lo up && umask 022 && exec "$0" -m tests.support.other_user "$@"'
    apart = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = [*apart, "sh", "-c", inside, sys.executable, settings, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_rays_own_settings_let_others_in(shared_folder: Path) -> None:
    found = attacked("rays", shared_folder)
    assert found["post_job"] == f"ran as user {os.geteuid()}"
    assert found["replace_socket"] == "replaced" and found["post_old_token"] == "HTTP 403"


def test_ours_do_not(shared_folder: Path) -> None:
    """Not even with a token that was open before."""
    old = shared_folder / "home" / ".ray" / "auth_token"
    old.parent.mkdir()
    old.write_text(OLD)
    old.chmod(0o644)
    found = attacked("ours", shared_folder)
    assert found["post_job"] == found["replace_socket"] == "PermissionError" and found["post_old_token"] == "HTTP 403"
    assert found["post_without_token"] == "HTTP 401, HTTP 403"
    assert list((shared_folder / "open").iterdir()) == []
    for each in found["sockets"]:
        above = [parent for parent in Path(each).parents if parent.is_relative_to(shared_folder / "t") and parent != shared_folder / "t"]
        assert any(parent.stat().st_mode & 0o077 == 0 for parent in above), each
    listening = found["listening"]
    assert len(listening) >= 10 and all(ip_address(each["address"]).is_loopback for each in listening)
    answers = {"grpc: refused", "http: refused", "http: metrics"}
    unprotected = [each for each in listening if each["answer"] not in answers]
    # torch's store and the two ranks' own sockets, which ask nobody who it is.
    assert [each["process"] for each in unprotected] == ["ray::Worker"] * 3, unprotected
