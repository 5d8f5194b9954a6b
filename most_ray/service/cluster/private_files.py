"""Ray's files on this machine that let in whoever can read or replace them: its token, and the folder with its sockets.

Ray 2.60 writes the token by the umask, by default readable by everyone, and gives everyone the right to write to its folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shlex
import stat
import tempfile
from pathlib import Path

from most_ray.errors import ConfigError, count_of, nearest
from most_ray.service.cluster.ray_internals import require_token

logger = logging.getLogger(__name__)
_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_MODES = ("token", "disabled")  # of RAY_AUTH_MODE; Ray takes any other word for the second
_TOKEN_BYTES = 4096  # that a token has at most
_TOKEN_FEWEST = 8  # bytes of a file that may be a copy of one
_TOKEN_WORD = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[\w+=~-]{32,}", re.ASCII)  # what a program makes as a token: no word of any language
# Names by which a folder with the state of a cluster is recognised: of up.sh, of train.sbatch, of Ray (its sockets, its logs).
_STATE_NAMES = (("auth_token", "lock"), ("token", "head.log"), ("session_latest",), ("ray_current_cluster",))
# Of the folder for Ray: names of sockets have at most 107 bytes, of which Ray needs 64 (`/session_TIME_PID/sockets/plasma_store`).
_FOLDER_BYTES = 43
_TMP = Path("/tmp")
_FOLDER_REMEDY = "Name a folder of your own with a short path."


def check_token() -> None:
    """Check the token that Ray presents, without changing anything. Raises ConfigError where there is one that others can read or change,
    or that is none, and for an unknown RAY_AUTH_MODE."""
    if _auth_mode() == "disabled":
        return
    if token := os.environ.get(_TOKEN):
        if not _is_token(token):
            raise ConfigError(_TOKEN, None, "holds no token: it is one line of letters and digits.")
        return
    named, path = os.environ.get(_TOKEN_PATH), token_path()
    if path is None or not (named or os.path.lexists(path)):
        return
    if problem := _problem(path):
        raise ConfigError(_TOKEN_PATH if named else "token", str(path), *problem)


def token_path() -> Path | None:
    """The file that Ray reads its token from, whether it is there or not; None where there is none."""
    named = os.environ.get(_TOKEN_PATH)
    return None if os.environ.get(_TOKEN) else Path(named) if named else home_token()


def home_token() -> Path | None:
    """The file where Ray keeps the user's token, `~/.ray/auth_token`; None where there is no home folder."""
    return Path(home) / ".ray" / "auth_token" if (home := os.environ.get("HOME")) else None


def is_state_folder(folder: Path) -> bool:
    """Whether a folder is, or was, the state of a cluster: its token, logs and sockets. By what it holds, so that it is found whoever has
    started the cluster, and by the settings that name it (MOST_RAY_CLUSTER_DIR, by default below `~/.most_ray`)."""
    if any(all(os.path.lexists(folder / name) for name in names) for names in _STATE_NAMES):
        return True
    named = [Path(path) for path in (os.environ.get("MOST_RAY_CLUSTER_DIR"),) if path]
    if home := os.environ.get("HOME"):
        named.append(Path(home) / ".most_ray")
    real = os.path.realpath(folder)
    return any(os.path.realpath(each) == real for each in named)


def holds_token(path: Path, in_use: str | None) -> bool:
    """Whether a file is for its owner alone and holds nothing but what a program makes as a token, or is a copy of the token in use.
    `in_use`: see `token_in_use`."""
    status = path.stat()
    if status.st_size > _TOKEN_BYTES or status.st_size < _TOKEN_FEWEST:
        return False
    try:
        text = path.read_bytes().decode("ascii", "replace").strip()
    except OSError:  # which Ray does not pack either
        return False
    return text == in_use or (not status.st_mode & 0o077 and _TOKEN_WORD.fullmatch(text) is not None)


def token_in_use() -> str | None:
    """The token that this process would present; None where there is none, or it cannot be read."""
    if token := os.environ.get(_TOKEN):
        return token.strip()
    try:
        path = token_path()
        return (
            path.read_bytes()[: _TOKEN_BYTES + 1].decode("ascii", "replace").split("\n", 1)[0].strip() if path and path.is_file() else None
        )
    except OSError:
        return None


def open_token() -> Path | None:
    """The user's own token file where others can read it, and no setting names another token. `require_private_token` closes it."""
    path = None if os.environ.get(_TOKEN) or os.environ.get(_TOKEN_PATH) else home_token()
    return path if path is not None and path.is_file() and path.stat().st_mode & 0o077 else None


def require_private_token() -> None:
    """Let the Ray that this process is about to start require a token that no one else can read: that of the environment's settings, else
    the user's own, which is made where it is missing. One that was open is closed, and this run has another, for someone may have read it.
    Raises ConfigError as `check_token`."""
    if _auth_mode() == "disabled":
        logger.warning("%s=disabled is not used: every user of this machine could run code in a Ray without a token", _MODE)
        del os.environ[_MODE]
    if path := open_token():
        _close(path)
        os.environ[_TOKEN] = secrets.token_hex(32)
    elif not (os.environ.get(_TOKEN) or os.environ.get(_TOKEN_PATH)):
        _make_token(home_token())
    check_token()
    require_token()


def _auth_mode() -> str | None:
    """The value of RAY_AUTH_MODE; None where it is not set."""
    given = os.environ.get(_MODE)
    if given and given.lower() not in _MODES:  # Ray takes it for "disabled", in silence
        raise ConfigError(_MODE, given, "is not one of its choices.", nearest(given, _MODES))
    return given.lower() if given else None


def _problem(path: Path) -> tuple[str, str] | None:
    """The rule that a token's file breaks, if any, and the remedy."""
    try:  # O_NONBLOCK: a pipe is not waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        return f"cannot be read ({error.strerror}).", "Name the file that holds the cluster's token."
    try:
        mode = os.fstat(descriptor).st_mode
        text = os.read(descriptor, _TOKEN_BYTES + 1) if stat.S_ISREG(mode) else b""
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(mode):
        return "is no file.", "Name the file that holds the cluster's token."
    if mode & 0o077:
        rule = f"can be read or changed by other users of this machine (mode {stat.S_IMODE(mode):o})."
        return rule, f"chmod 600 {shlex.quote(str(path))}, and make a new token where one of them may have read it."
    if not _is_token(text.decode("ascii", "replace")):
        return "holds no token: it is one line of letters and digits.", "Copy the cluster's token to it, or remove it."
    return None


def _is_token(text: str) -> bool:
    """Whether Ray finds a token in a text: its first line."""
    token = text.split("\n", 1)[0].strip()
    return bool(token) and len(text) <= _TOKEN_BYTES and token.isascii() and token.isprintable()


def _close(path: Path) -> None:
    """Take a token's file away from other users, where that is permitted."""
    mode = stat.S_IMODE(path.stat().st_mode)
    with contextlib.suppress(OSError):
        path.chmod(0o600)
    text = (
        "%s could be read or changed by other users of this machine (mode %o): this run has a token of its own, and the file is closed to "
    )
    logger.warning(text + "them (600). Remove it where one of them may have read it: the next run makes a new one", path, mode)


def _make_token(path: Path | None) -> None:
    """Make the user's token, unless there is one, in a file that never exists with another mode or half written. Without a home folder that
    can be written to, the token is in the environment of Ray's processes alone."""
    token = secrets.token_hex(32)
    try:
        if path is None:
            raise FileNotFoundError
        if os.path.lexists(path):
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".auth_token-") as stream:  # for its owner alone
            stream.write(token)
            stream.flush()
            with contextlib.suppress(FileExistsError):  # another run is starting, and its token serves both
                os.link(stream.name, path)
    except OSError:
        os.environ[_TOKEN] = token


def ray_folder() -> str:
    """A folder for Ray that no other user can enter or replace: below RAY_TMPDIR, else TMPDIR, else /tmp. Ray makes the folder itself, open
    to everyone; the one above it is closed. Raises ConfigError where RAY_TMPDIR cannot be used."""
    if named := os.environ.get("RAY_TMPDIR"):
        folder, problem = _private_below(Path(named).absolute())
        if problem:
            raise ConfigError("RAY_TMPDIR", named, problem, _FOLDER_REMEDY)
        return str(folder)
    if (given := os.environ.get("TMPDIR")) and Path(given).absolute() != _TMP:
        folder, problem = _private_below(Path(given).absolute())
        if not problem:
            return str(folder)
        logger.warning("TMPDIR = %r %s Ray's files are below %s instead; RAY_TMPDIR names another folder for them", given, problem, _TMP)
    folder, problem = _private_below(_TMP)
    if problem:
        raise ConfigError(str(_TMP), None, problem, "Name a folder for Ray's files by RAY_TMPDIR.")
    return str(folder)


def check_ray_folder() -> None:
    """Raise ConfigError where `ray_folder` would because of what RAY_TMPDIR names, without leaving anything."""
    if not (named := os.environ.get("RAY_TMPDIR")):
        return
    base = Path(named).absolute()
    problem = _unusable(base)
    if problem is None:
        try:
            with tempfile.TemporaryDirectory(dir=_existing(base)):
                return
        except OSError as error:
            problem = f"cannot be written to ({error.strerror})."
    raise ConfigError("RAY_TMPDIR", named, problem, _FOLDER_REMEDY)


def _existing(base: Path) -> Path:
    """The folder itself, or the first one above it that exists."""
    return next(each for each in (base, *base.parents) if each.exists())


def _private_below(base: Path) -> tuple[Path, str | None]:
    """The folder for Ray below `base`, which is made where it is missing, and why it cannot be used, if so."""
    if problem := _unusable(base):
        return base, problem
    try:
        above = _above(base)
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = above.stat(follow_symlinks=above == base)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise FileExistsError
        above.chmod(0o700)
    except FileExistsError:  # another user has taken the name
        above = Path(tempfile.mkdtemp(prefix="ray-", dir=base))
    except OSError as error:
        return base, f"cannot be written to ({error.strerror})."
    return above / "ray", None


def _above(base: Path) -> Path:
    """The closed folder around Ray's: `base` where it is closed or will be made, else a folder for each user in it."""
    if not base.exists():
        return base
    status = base.stat()
    return base if status.st_uid == os.geteuid() and not status.st_mode & 0o077 else base / f"ray-{os.geteuid()}"


def _unusable(base: Path) -> str | None:
    """Why no folder for Ray can be below `base`, if so."""
    try:
        existing = _existing(base)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            return f"cannot be written to: {existing} is no folder that you may write to."
        excess = len(os.fsencode(_above(base) / "ray")) - _FOLDER_BYTES
        if excess > 0:
            return f"is {count_of(excess, 'byte')} too long for Ray's sockets, whose names have at most 107."
        for each in {*base.parents, base.resolve(), *base.resolve().parents}:
            mode = each.stat().st_mode if each.exists() else 0
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"can be replaced by other users of this machine: {each} is open to everyone (mode {stat.S_IMODE(mode):o})."
    except OSError as error:  # one that may not even be looked into
        return f"cannot be used ({error.strerror})."
    return None
