"""The folder that is sent with a job: which of its files Ray packs, and how large the archive becomes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env import packaging

from most_ray.errors import ConfigError

# Patterns of what is never sent; .gitignore and .rayignore add to them.
EXCLUDES = (".git", ".venv*", "venv", "runs", "wandb", "**/__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", ".pytest_cache")


@dataclass(frozen=True)
class Package:
    """The files of a folder that are sent with a job."""

    folder: Path
    bytes: int  # of the archive that Ray makes
    largest: tuple[tuple[str, int], ...]  # (name, bytes) of the largest entries directly below the folder
    files: frozenset[str]  # paths relative to the folder, with "/"

    def check_size(self) -> None:
        """Raise ConfigError for an archive that is too large: Ray itself refuses it only after it has packed it for minutes."""
        limit = min(DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE - 1)
        if self.bytes > limit:
            raise self.too_large(f"a job takes at most {limit / 2**20:.0f}")

    def too_large(self, rule: str) -> ConfigError:
        """The error for an archive that breaks `rule`, which names its largest parts."""
        shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in self.largest)
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
            for parent in [self.folder, *(each for each in reversed(below) if each in step.parents)]:
                for name in (".gitignore", ".rayignore") if _honours_gitignore() else (".rayignore",):
                    ignores = packaging._get_ignore_file(parent, name)
                    if ignores and ignores(step):
                        return f"{parent / name} excludes it", "Change that file, or copy this one elsewhere in the folder."
        return "it is not a file of the folder", "Copy it there."


def _honours_gitignore() -> bool:
    return os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"


def package_of(folder: Path) -> Package:
    """Find the files of a folder that would be sent, and the size of their archive, without packing them."""
    if not folder.is_dir():
        raise ConfigError("working_dir", str(folder), "is no folder.", "Name the folder of the job's files.")
    sizes, files = Counter[str](), []
    overhead = 22  # bytes of a zip file's end record

    def count(path: Path) -> None:
        nonlocal overhead
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            sizes[name.split("/", 1)[0]] += path.stat().st_size
            files.append(name)
        elif path.is_dir() and next(path.iterdir(), None) is None:
            name += "/"
        else:
            return
        overhead += 76 + 2 * len(name.encode())  # the entry's two headers; Ray stores files without compression

    packaging._dir_travel(folder, [packaging._get_excludes(folder, list(EXCLUDES))], count, include_gitignore=_honours_gitignore())
    return Package(folder, sizes.total() + overhead, tuple(sizes.most_common(3)), frozenset(files))
