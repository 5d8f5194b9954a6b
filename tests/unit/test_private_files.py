"""Ray's token and folder are closed to other users of the machine before Ray starts, and what is open is refused."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from most_ray.cli import main
from most_ray.config import config_from
from most_ray.errors import ConfigError
from most_ray.service.cluster import connection, private_files
from most_ray.service.cluster.address import check_address, use_token
from most_ray.service.cluster.private_files import check_ray_folder, check_token, ray_folder, require_private_token
from most_ray.service.preflight.checks import check_own_files
from tests.conftest import ROOT

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token, and an environment without Ray's settings."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(private_files, "require_token", lambda: None)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def token_in(folder: Path, mode: int, text: str = TOKEN) -> Path:
    path = folder / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_token_is_made_for_its_owner_alone_whatever_the_umask(home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        require_private_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_text()) == 64
    assert [each.name for each in path.parent.iterdir()] == ["auth_token"]
    made = path.read_text()
    require_private_token()
    assert path.read_text() == made


def test_two_runs_that_start_at_once_have_one_token(home: Path) -> None:
    program = "from most_ray.service.cluster.private_files import _make_token, home_token; input(); _make_token(home_token())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment) for _ in range(2)]
    for each in runs:
        each.communicate(b"\n", timeout=60)
    assert [each.returncode for each in runs] == [0, 0]
    assert len((home / ".ray" / "auth_token").read_text()) == 64


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o666])
def test_a_users_own_token_that_is_open_is_closed_with_a_warning(home: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    path = token_in(home, mode)
    connection.check_local(config_from({}))
    assert stat.S_IMODE(path.stat().st_mode) == mode
    require_private_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == TOKEN
    assert f"(mode {mode:o}): this run has a token of its own, and the file is closed to them (600). Remove it where" in caplog.text
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_TOKEN"] != TOKEN  # someone may have read that one


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o666])
def test_a_token_that_others_can_read_is_refused_and_left_alone(home: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a setting, and the user's own where a cluster is joined."""
    path = token_in(home, mode)
    for check in (use_token, lambda: check_address("auto")):
        with pytest.raises(ConfigError, match=rf"token = .*can be read or changed by other users .*\(mode {mode:o}\)\. chmod 600 "):
            check()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    for check in (use_token, require_private_token, lambda: connection.check_local(config_from({}))):
        with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH = .*can be read or changed by other users"):
            check()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    path.chmod(0o600)
    check_token()
    path.chmod(0o400)
    check_token()


def test_a_run_is_refused_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = token_in(tmp_path, 0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    records = str(ROOT / "jobs" / "data" / "digits" / "train_asr")
    assert main(["train", "--train_asr_dirs", records, "--output_dir", str(tmp_path / "runs")]) == 2
    assert "chmod 600" in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "cannot be read (No such file or directory)"),
        (lambda path: path.mkdir(), "is no file"),
        (lambda path: os.mkfifo(path, 0o600), "is no file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no file"),
        (lambda path: path.touch(0o600), "holds no token"),
        (lambda path: (path.touch(0o600), path.write_text("\n\n")), "holds no token"),
        (lambda path: (path.touch(0o600), path.write_bytes(b"\xff\xfeabc")), "holds no token"),
        (lambda path: (path.touch(0o600), path.write_bytes(b"abc\x1b[31m")), "holds no token"),
        (lambda path: (path.touch(0o600), path.write_text("a" * 10_000)), "holds no token"),
    ],
)
def test_what_is_no_token_is_refused_without_showing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object, says: str) -> None:
    path = tmp_path / "token"
    make(path)  # type: ignore[operator]
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(ConfigError) as refused:
        check_token()
    assert says in str(refused.value) and "abc" not in str(refused.value)


def test_a_token_of_the_environment_has_no_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    require_private_token()
    assert not (home / ".ray").exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "café sekret")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN: holds no token") as refused:
        check_token()
    assert "sekret" not in str(refused.value)


def test_without_a_home_that_can_be_written_to_the_token_is_in_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("/proc/nowhere", None):
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
        require_private_token()
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_ray_of_ones_own_always_has_a_token(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    require_private_token()
    assert "RAY_AUTH_MODE=disabled is not used: every user of this machine could run code" in caplog.text
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("mode", ["tokn", "on", "true"])
def test_a_mode_that_ray_would_take_for_disabled_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE = .*is not one of its choices"):
        check_token()


def test_the_doctor_looks_at_the_token_and_changes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_own_files(config_from({})) == []
    path = token_in(home, 0o644)
    (finding,) = check_own_files(config_from({}))
    assert (finding.check, finding.level) == ("safety", "warning") and "other users of this machine can read" in finding.text
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    (finding,) = check_own_files(config_from({}))
    assert (finding.field, finding.level) == ("RAY_AUTH_TOKEN_PATH", "error") and "chmod 600" in finding.remedy
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    assert check_own_files(config_from({})) == []


# The folder of the sockets


@pytest.fixture
def base(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What TMPDIR names; /tmp is a folder in it."""
    folder, tmp = short_folder / "b", short_folder / "t"
    folder.mkdir()
    tmp.mkdir()
    monkeypatch.setattr(private_files, "_TMP", tmp)
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def all_closed(folder: str, base: Path) -> bool:
    """Whether no other user can pass to `folder` through what is between it and `base`."""
    above = Path(folder).parent
    return above.is_relative_to(base) and above.stat().st_uid == os.geteuid() and not above.stat().st_mode & 0o077


@pytest.mark.parametrize(("mode", "below"), [(0o700, "ray"), (0o755, f"ray-{os.geteuid()}/ray"), (0o1777, f"ray-{os.geteuid()}/ray")])
def test_rays_folder_is_in_one_that_no_one_else_can_enter(base: Path, mode: int, below: str) -> None:
    base.chmod(mode)
    folder = ray_folder()
    assert folder == str(base / below) and all_closed(folder, base)
    assert ray_folder() == folder  # the same for the next run, as its logs are looked for there


def test_a_folder_that_was_opened_is_closed_again(base: Path) -> None:
    base.chmod(0o1777)
    (base / f"ray-{os.geteuid()}").mkdir(0o777)
    (base / f"ray-{os.geteuid()}").chmod(0o777)
    assert all_closed(ray_folder(), base)


@pytest.mark.parametrize("planted", ["link", "file"])
def test_a_name_that_another_user_has_taken_is_not_used(base: Path, tmp_path: Path, planted: str) -> None:
    base.chmod(0o1777)
    taken = base / f"ray-{os.geteuid()}"
    taken.symlink_to(tmp_path) if planted == "link" else taken.touch()
    folder = ray_folder()
    assert Path(folder).parent != taken and all_closed(folder, base) and len(os.fsencode(folder)) <= 43


def test_a_long_tmpdir_is_told_and_a_short_folder_taken(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = base / ("long" * 12)
    monkeypatch.setenv("TMPDIR", str(long))
    folder = ray_folder()
    assert folder.startswith(str(base.parent / "t")) and all_closed(folder, base.parent / "t")
    assert "bytes too long for Ray's sockets, whose names have at most 107." in caplog.text and not long.exists()
    monkeypatch.setenv("RAY_TMPDIR", str(long))  # which means Ray, and nothing else
    for check in (ray_folder, check_ray_folder):
        with pytest.raises(ConfigError, match=r"RAY_TMPDIR = .*bytes too long for Ray's sockets.*short path"):
            check()
    assert not long.exists()


def test_characters_of_several_bytes_count_as_such(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(base / ("資" * 10)))
    with pytest.raises(ConfigError, match="bytes too long"):
        check_ray_folder()


def test_a_folder_that_others_can_rename_is_not_used(base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without the sticky bit whoever can write to a folder can put another in the place of what is in it."""
    base.chmod(0o777)
    assert ray_folder().startswith(str(base.parent / "t"))
    assert "is open to everyone (mode 777)" in caplog.text
    monkeypatch.setenv("RAY_TMPDIR", str(base / "mine"))
    for check in (ray_folder, check_ray_folder):
        with pytest.raises(ConfigError, match="can be replaced by other users of this machine"):
            check()


@pytest.mark.parametrize("named", ["/proc/nowhere", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", named)
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR = .*cannot be written to"):
        ray_folder()


def test_ray_is_started_with_both(base: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []
    monkeypatch.setattr(connection.ray, "init", lambda **arguments: started.append(arguments))
    monkeypatch.setattr(connection, "keep_loopback", lambda: None)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "")  # so that it is put back
    logging.getLogger("most_ray").setLevel(logging.INFO)
    connection.connect(config_from({}), 4)
    (arguments,) = started
    assert arguments["_temp_dir"] == str(base / f"ray-{os.geteuid()}" / "ray") and arguments["_node_ip_address"] == "127.0.0.1"
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600


@pytest.mark.parametrize("raised", [Exception("The current node timed out\nduring startup."), OSError("no room")])
def test_a_ray_that_does_not_come_up_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    """As on a machine with too much to do: Ray raises an Exception of no class of its own. Errors of another class stay what they are."""

    def init(**_: object) -> None:
        raise raised

    for name in ("require_private_token", "keep_loopback"):
        monkeypatch.setattr(connection, name, lambda: None)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setattr(connection.ray, "init", init)
    with pytest.raises(ConfigError if type(raised) is Exception else OSError) as caught:
        connection.start_local_ray(1, _temp_dir="/none")
    if isinstance(caught.value, ConfigError):
        assert str(caught.value).startswith(
            "ray_address: names no cluster, and Ray did not start on this machine (The current node timed out"
        )
        assert "\n" not in str(caught.value)
