"""Configuration files: read by path, URI or the name of one that the package ships; and the files that a run or a sweep writes of its own
configuration, whose paths move with its folder.

The latter name what is in the run's folder or beside it relative to the file, as `./kept` or `../store`, below a line `_PORTABLE`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from most_ray.errors import ConfigError, DataError
from most_ray.io import storage
from most_ray.io.run_folder import COMMIT, LEDGER
from most_ray.io.uris import expand
from most_ray.io.yaml_values import MAX_BYTES, parse_yaml
from most_ray.options import Option, to_plain

# What a shell or another program hands over: a pipe that is written to, as `<(command)`, or a file. (Of other pipes that is not known.)
_PIPED = re.compile(r"/dev/(stdin|fd/\d+)")
_PORTABLE = "# Paths that begin with a dot are relative to the folder of this file.\n"
_DOTTED = re.compile(r"\.\.?(/|$)")
_BESIDE = ("environment.json", LEDGER, COMMIT)  # of which one is in each folder that such a file is written to
OWN, SWEEP = "config.yaml", "sweep.yaml"  # in the folder of a run, and of a sweep
_BESIDE_OWN = {OWN: "metrics.jsonl", SWEEP: LEDGER}  # what such a folder has beside it
_PACKAGE = Path(__file__).resolve().parent  # in which `jobs` holds the shipped configurations and their data
_CONFIGS = _PACKAGE / "jobs" / "configs"


def shipped_names(kind: str = "") -> list[str]:
    """Names of the configurations that the package ships: those of a `kind`, "run" or "sweep", or all."""
    names = sorted(path.stem for path in _CONFIGS.glob("*.yaml"))
    return [name for name in names if kind in ("", "sweep" if name.startswith("sweep-") else "run")]


def is_shipped(uri: str | Path) -> bool:
    """Whether what a user names as a configuration is one that the package ships: it is no file, and the name of one."""
    return str(uri).removesuffix(".yaml") in shipped_names() and not Path(uri).is_file()


def read_yaml(uri: str | Path, options: Mapping[str, Option] = {}, of_package: bool = False) -> dict[str, Any]:
    """The keys and values of a configuration, as `parse_yaml` reads them: of a file, or of a shipped one by its name.

    Args:
        options: those that are paths get them as they are to be opened, where the file names them relative to something else than the
            working directory. A config.yaml in a run's folder is of that run, wherever the folder was when it was written.
        of_package: a shipped configuration names it, so that the data is the package's own, as that of a shipped one is.

    Raises:
        ConfigError: the file is missing, is not YAML that is read (see `parse_yaml`), or is no mapping; or it is a copy of a file whose
            paths are relative to a folder that it is no longer in.
    """
    shown = storage.redact(str(uri))
    if is_shipped(uri):
        content = (_CONFIGS / f"{str(uri).removesuffix('.yaml')}.yaml").read_bytes()
        return _changed(_mapping(shown, content), options, _in_package)
    content = _content(str(uri), shown, "sweep" if "base" in options else "run")
    values = _mapping(shown, content)
    if content.startswith(_PORTABLE.encode()):
        folder = storage.parent(storage.absolute(expand("config", str(uri))))
        if not any(storage.exists(storage.join(folder, name)) for name in _BESIDE):
            rule = "is a copy of a run's configuration, in which paths that begin with a dot are relative to the run's folder."
            raise ConfigError("config", shown, rule, "Name the file in that folder; or write these paths out, and delete the first line.")
        values = _changed(values, options, partial(_beside, folder))
    elif of_package:
        values = _changed(values, options, _in_package)
    return {**values, **_own_place(uri)} if options else values


def _content(uri: str, shown: str, kind: str) -> bytes:
    """The content of a configuration file. Raises ConfigError, which says what is shipped of a kind where the file is missing."""
    try:
        return _read_piped(uri) if _PIPED.fullmatch(uri) else storage.read_small(expand("config", uri), MAX_BYTES)
    except (OSError, DataError) as error:
        missing = isinstance(error, FileNotFoundError)
        remedy = f"Check the path, or name a shipped one: {', '.join(shipped_names(kind))}." if missing else ""
        raise ConfigError("config", shown, f"cannot be read ({error}).", remedy) from error


def _mapping(shown: str, content: bytes) -> dict[str, Any]:
    try:
        values = parse_yaml(content)
    except UnicodeDecodeError as error:
        raise ConfigError("config", shown, f"cannot be read ({error}).") from error
    except ValueError as error:
        raise ConfigError("config", shown, f"{error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError("config", shown, "holds no `key: value` lines.")
    return values


def _read_piped(name: str) -> bytes:
    """What comes through an open descriptor of this process, up to one byte more than a configuration has."""
    with open(name, "rb") as stream:
        return stream.read(MAX_BYTES + 1)


def _changed(values: dict[str, Any], options: Mapping[str, Option], change: Any) -> dict[str, Any]:
    """The values with `change(option, text)` in place of each path, also in lists."""

    def of(name: str, value: Any) -> Any:
        option = options.get(name)
        if option is None or not option.location:
            return value
        if isinstance(value, list | tuple):
            return [change(option, each) if isinstance(each, str) else each for each in value]
        return change(option, value) if isinstance(value, str) else value

    return {name: of(name, value) for name, value in values.items()}


def _in_package(option: Option, text: str) -> str:
    """A path of a shipped configuration: the package's own file where it has one, unless that is what it means here already."""
    own = _PACKAGE / text
    if not (option.location and option.location.access == "read" and _DOTTED.match(text) is None and own.exists()):
        return text
    return text if Path(text).exists() and Path(text).samefile(own) else str(own)


def _beside(folder: str, _option: Option, text: str) -> str:
    return storage.located(folder, text) if _DOTTED.match(text) else text


def _own_place(uri: str | Path) -> dict[str, str]:
    """The keys that say where the run or sweep is in whose folder a configuration is; empty for any other configuration."""
    if _PIPED.fullmatch(str(uri)):
        return {}
    place = storage.absolute(expand("config", str(uri)))
    folder, beside = storage.parent(place), _BESIDE_OWN.get(storage.base_name(place))
    if beside is None or not storage.exists(storage.join(folder, beside)):
        return {}
    return {"output_dir": storage.parent(folder), "name": storage.base_name(folder)}


def portable_yaml(values: Mapping[str, Any], options: Mapping[str, Option], folder: str, root: str | None, note: str = "") -> str:
    """A configuration as YAML, for a file in `folder`, without credentials. What is in `root`, a folder above, is named relative to
    `folder`, so that it is found when `root` as a whole has another place (None: as it is). `note`: a comment above."""
    moving = False

    def written(_option: Option, text: str) -> str:
        nonlocal moving
        way = storage.relative_to(folder, text, root) if root else None
        moving = moving or way is not None
        return way or text

    def absolute(_option: Option, text: str) -> str:
        return storage.absolute(text) if _DOTTED.match(text) else text

    plain = to_plain(values)
    if (found := _changed(plain, options, written)) and moving:
        # A dot means the file's folder now: what it has meant is written out.
        found = _changed(_changed(plain, options, absolute), options, written)
    shown = _changed(found, options, lambda _, text: storage.redact(text))
    return (_PORTABLE if moving else "") + note + yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
