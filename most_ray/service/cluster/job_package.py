"""The folder that is sent with a job: which of its files Ray packs, and how large the archive becomes."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env import packaging

from most_ray.errors import ConfigError, one_line, shown
from most_ray.io import storage
from most_ray.service.cluster.private_files import holds_token, is_state_folder, token_in_use, token_path

# Patterns of what is never sent; .gitignore and .rayignore add to them. Folders of runs stay here, but the package's own folder of that
# name goes: a job without it would take those modules from what is installed there, which may be of another version.
EXCLUDES = (
    *(".git", ".venv*", "venv", "runs", "!/most_ray/runs", "!/most_ray/runs/*.py", "wandb"),
    *("**/__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache"),
)
# Patterns of what is not sent because it may hold credentials, in small letters.
CREDENTIALS = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".pypirc", ".npmrc", ".pgpass", ".my.cnf", ".htpasswd"),
    *(".ssh", ".gnupg", ".password-store", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx"),
    *("*.jks", "*.keystore", "*.kdbx", ".aws", ".azure", ".kube", "kubeconfig", ".oci", ".boto", ".s3cfg", "rclone.conf", "*.tfstate*"),
    *("**/.config/gcloud", "**/.config/gh", "**/.docker/config.json", ".dockercfg", "**/.cargo/credentials*", ".modal.toml"),
    *("credentials", "credentials.json", "*_credentials.json", "client_secret*.json", "*service*account*.json", "kaggle.json"),
    *("secrets.json", "secrets.toml", "secrets.y*ml", ".secrets", "auth_token", "token.txt", "*.token", ".vault-token", ".databrickscfg"),
    *(".huggingface", "**/huggingface/token", "**/huggingface/stored_tokens", "grafana_password", ".*_history"),
    *(".ray", ".most_ray"),
)
_CREDENTIALS = re.compile("|".join(f"(?:.*/)?{fnmatch.translate(pattern.removeprefix('**/'))}" for pattern in CREDENTIALS))
_SHOWN = 8  # names in a sentence
_LARGEST = 10  # parts of a folder that is too large in the error about it
_NAME = 80  # characters of their names there


@dataclass(frozen=True)
class Package:
    """The files of a folder that are sent with a job."""

    folder: Path
    bytes: int  # of the archive that Ray makes
    sizes: Mapping[str, int]  # bytes of each file, by its path relative to the folder, with "/"
    withheld: tuple[str, ...] = ()  # paths that are not sent because they may hold credentials
    loops: tuple[str, ...] = ()  # links to a folder that they are in, which are not sent

    @property
    def files(self) -> frozenset[str]:
        """Paths relative to the folder, with "/"."""
        return frozenset(self.sizes)

    @property
    def largest(self) -> list[tuple[str, int]]:
        """The files and folders that make up most of it, see `largest_parts`."""
        return largest_parts(self.sizes, _LARGEST)

    @property
    def amount(self) -> str:
        """What is sent, as `120 files, 3.4 MiB`."""
        return f"{len(self.sizes):,} file{'' if len(self.sizes) == 1 else 's'}, {size_text(self.bytes)}"

    @property
    def excludes(self) -> list[str]:
        """Ray's patterns of what is not sent."""
        return [*EXCLUDES, *CREDENTIALS, *(_pattern(name) for name in (*self.withheld, *self.loops))]

    def omissions(self, reads: Iterable[tuple[str, str]]) -> list[str]:
        """What the user would miss in the job, as sentences. `reads`: (flag or key, path or URI) of what the job reads."""
        found = []
        for what, names in (("it may hold credentials", self.withheld), ("it is a link to a folder around it", self.loops)):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                text = (
                    f"Not sent with the job, as {what}: {', '.join(sorted(names)[:_SHOWN])}{more}. Copy what the job needs to another name."
                )
                found.append(text)
        for field, uri in reads:
            if (missing := self._missing(uri)) is not None:
                cause, remedy = self._why_excluded(missing)
                where = "below MOST_RAY_HOME of the cluster's machines (default: the home folder there)"
                found.append(f"{field} = {shown(uri)}: {missing} is not sent with the job, which looks for it {where}: {cause}. {remedy}")
        return found

    def _missing(self, uri: str) -> str | None:
        """A file that is not sent among those of a path that is read, relative to the folder; None where all are sent, or none is here."""
        root = self.folder / uri
        if storage.is_remote(uri) or Path(uri).is_absolute() or not os.path.lexists(root):
            return None
        below = (Path(each) / name for each, _, names in os.walk(root) for name in sorted(names) if not name.startswith("."))
        paths = (path.relative_to(self.folder).as_posix() for path in ([root] if root.is_file() else below))
        return next((path for path in paths if os.path.normpath(path) not in self.files), None)

    def check_size(self) -> None:
        """Raise ConfigError for an archive that is too large: Ray itself refuses it only after it has packed it for minutes."""
        limit = min(DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE - 1)
        if self.bytes > limit:
            raise self.too_large(f"a job takes at most {limit / 2**20:.0f}")

    def too_large(self, rule: str) -> ConfigError:
        """The error for an archive that breaks `rule`, which names its largest parts."""
        shown = ", ".join(f"{name if len(name) <= _NAME else '...' + name[-_NAME:]} {size_text(size)}" for name, size in self.largest)
        rule = f"holds {self.bytes / 2**20:.0f} MiB, {rule}: {shown}."
        return ConfigError("working_dir", str(self.folder), rule, "List in .gitignore or .rayignore what the job does not need.")

    def check_contains(self, config: str) -> None:
        """Raise ConfigError where a configuration is not sent with the job. `config`: its path relative to the folder."""
        if config not in self.files:
            cause, remedy = self._why_excluded(config)
            raise ConfigError("config", config, f"is not sent with the job: {cause}.", remedy)

    def _why_excluded(self, config: str) -> tuple[str, str]:
        """The pattern or the ignore file that excludes a path or one of its parents, and a remedy."""
        path = self.folder / config
        below = [path, *path.parents][: len(Path(config).parts)]
        for step in reversed(below):
            for pattern in EXCLUDES:
                if packaging._get_excludes(self.folder, [pattern])(step):
                    return f"{pattern} never is", "Copy it elsewhere in the folder."
            if _holds_credentials(step, step.relative_to(self.folder).as_posix()):
                return f"{step.relative_to(self.folder)} may hold credentials", "Copy it to another name in the folder."
            for parent in [self.folder, *(each for each in reversed(below) if each in step.parents)]:
                for name in (".gitignore", ".rayignore") if _honours_gitignore() else (".rayignore",):
                    ignores = packaging._get_ignore_file(parent, name)
                    if ignores and ignores(step):
                        return f"{parent / name} excludes it", "Change that file, or copy this one elsewhere in the folder."
        return "it is not a file of the folder", "Copy it there."


def size_text(size: int) -> str:
    """A number of bytes as text: `900 B`, `12 KiB`, `3.4 MiB` or `600 MiB`."""
    if size < 1 << 10:
        return f"{size} B"
    if size < 1 << 20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**20:.{1 if size < 10 << 20 else 0}f} MiB"


def largest_parts(sizes: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    """The files and folders (with a "/" at the end) that make up most of a folder, as (path, bytes), largest first. What is named is what a
    user would leave out: in place of a folder, what it holds, while one thing makes up half of it. Pure.

    Args:
        sizes: bytes of each file, by its path relative to the folder.
        most: parts that are returned.
    """
    totals, below = Counter[str](), dict[str, list[str]]()
    for file, size in sizes.items():
        ends = [index + 1 for index, letter in enumerate(file) if letter == "/"]
        for above, part in pairwise(["", *(file[:end] for end in ends), file]):
            if part not in totals:
                below.setdefault(above, []).append(part)
            totals[part] += size
    found, open_parts = [], list(below.get("", ()))
    while open_parts:
        part = open_parts.pop()
        inside = below.get(part, ())
        if inside and 2 * max(totals[each] for each in inside) >= totals[part]:
            open_parts += inside
        else:
            found.append((part, totals[part]))
    return sorted(found, key=lambda part: (-part[1], part[0]))[:most]


def _honours_gitignore() -> bool:
    return os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def package_of(folder: Path) -> Package:
    """Find the files of a folder that would be sent, and the size of their archive, without packing them. Raises ConfigError where it is no
    folder or cannot be packed, and where the state of a cluster is in what would be sent."""
    if not folder.is_dir():
        raise ConfigError("working_dir", str(folder), "is no folder.", "Name the folder of the job's files.")
    found = _Inventory(folder)
    try:
        packaging._dir_travel(folder, [found.is_excluded], found.count, include_gitignore=_honours_gitignore())
    except (OSError, ValueError) as error:  # the latter: a name or an ignore file that is not UTF-8, a pattern that is none
        rule = f"cannot be packed ({one_line(error)})."
        raise ConfigError("working_dir", str(folder), rule, "Correct that, or name a folder without it.") from error
    if found.states:
        raise _state_error(folder, found.states[0])
    return Package(folder, sum(found.sizes.values()) + found.overhead, found.sizes, tuple(found.withheld), tuple(found.loops))


def _state_error(folder: Path, state: str) -> ConfigError:
    """The error for a folder that would take the state of a cluster along. `state`: its path relative to the folder."""
    rule = (
        f"holds a cluster's state, {folder / state} (its token, which lets everyone in, logs and sockets): it would be sent with the job."
    )
    elsewhere = (
        "Stop that cluster, set MOST_RAY_CLUSTER_DIR or RAY_TMPDIR to a folder elsewhere, and remove this one; or list it in .gitignore."
    )
    remedy = "Name the folder of the job's files by --working_dir." if state == "." else elsewhere
    return ConfigError("working_dir", str(folder), rule, remedy)


class _Inventory:
    """What a walk through a folder finds."""

    def __init__(self, folder: Path) -> None:
        self.sizes: dict[str, int] = {}
        self.overhead = 22  # bytes of a zip file's end record
        self.withheld: list[str] = []
        self.loops: list[str] = []
        self.states: list[str] = []  # folders with the state of a cluster, once for each path in them
        self._state: Path | None = None  # the last such folder that the walk has come to
        self._token = token_in_use()
        self._folder, self._excluded = folder, packaging._get_excludes(folder, list(EXCLUDES))

    def is_excluded(self, path: Path) -> bool:
        """Whether the walk leaves out a path and all below it."""
        if self._excluded(path):
            return True
        if path.is_symlink() and path.is_dir() and path.parent.resolve().is_relative_to(path.resolve()):
            self.loops.append(path.relative_to(self._folder).as_posix())
            return True
        return False

    def count(self, path: Path) -> None:
        """Take up a path that neither the user nor `is_excluded` leaves out."""
        name = path.relative_to(self._folder).as_posix()
        if self._state and self._state in path.parents:  # not where an ignore file leaves out all that is in it
            self.states.append(self._state.relative_to(self._folder).as_posix())
        if path.is_dir() and is_state_folder(path):
            self._state = path
        if self.withheld and name.startswith(f"{self.withheld[-1]}/"):
            return
        if _holds_credentials(path, name) or (path.is_file() and holds_token(path, self._token)):
            self.withheld.append(name)
            return
        if path.is_file():
            self.sizes[name] = path.stat().st_size
        elif path.is_dir() and next(path.iterdir(), None) is None:
            name += "/"
        else:
            return
        self.overhead += 76 + 2 * len(name.encode())  # the entry's two headers; Ray stores files without compression


def _holds_credentials(path: Path, name: str) -> bool:
    """Whether a file or folder may hold credentials: by its name below the folder, by what it links to, or as the token in use."""
    names = [name]
    if path.is_symlink():
        target = path.resolve()
        names += [each.as_posix() for each in (target, *target.parents)]
        if any(map(is_state_folder, target.parents)):
            return True
    if any(_CREDENTIALS.fullmatch(each.lower()) for each in names):
        return True
    token = token_path()
    return token is not None and (path.is_symlink() or path.name == token.name) and path.resolve() == token.resolve()


def _pattern(name: str) -> str:
    """The pattern that matches this path alone."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)
