"""Paths and URIs as text: pure functions that touch no storage.

Everywhere in this package a `uri` is a path, `file://...` or `scheme://authority/key[?options]`. Keys are taken as written (no
percent-encoding); options are those of pyarrow (`?region=...`).
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

from most_ray.errors import ConfigError, DataError, redact

ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")  # handled by pyarrow; others by fsspec
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")  # as a shell writes it
_URI = re.compile(r"([A-Za-z][\w+.-]*)(://[^/?]*)/*(.*?)/*(\?[\w.-]+=.*)?", re.DOTALL)


def expand(field: str, text: str) -> str:
    """A path or URI as a user has written it, with the home folder where it begins with `~`.

    Raises:
        ConfigError: it is empty, holds a NUL character, names a variable as `$HOME`, which nothing would replace, or begins with the `~` of
            an unknown user.
    """
    if not text.strip():
        raise ConfigError(field, text, "is empty.", "Name a file or folder; . is the current one.")
    if "\0" in text:
        raise ConfigError(field, text, "holds a NUL character.")
    if (variable := _VARIABLE.search(redact(text))) and (is_remote(text) or not os.path.lexists(text)):
        remedy = "Write out what it stands for; ~ is the home folder."
        raise ConfigError(field, text, f"holds {variable[0]}: variables are not replaced here.", remedy)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(field, text, "names the home folder of a user who is not known here.", "Write it out.")
    return expanded


def is_remote(uri: str | Path) -> bool:
    """Whether `uri` has a scheme other than file://."""
    match = _URI.fullmatch(uri) if isinstance(uri, str) else None
    return match is not None and match[1].lower() != "file"


def local(uri: str | Path) -> Path:
    """The path of a local URI.

    Raises:
        DataError: the URI is remote, or was (making a Path of `s3://x` removes a slash from its scheme); no file can have the name.
    """
    text = str(uri)
    if "\0" in text or (not text.isascii() and not _encodable(text)):
        raise DataError("path", text, "is a name that no file can have: it holds NUL or half a surrogate pair.", "Check it.")
    if is_remote(text) or re.match(rf"({'|'.join(ARROW_SCHEMES)}|memory):/", text):
        raise DataError("path", redact(text), "is not a local path.", "Give a path; keep URIs as text.")
    return Path(unquote(re.sub("(?i)^file://(localhost(?=/))?", "", text)) if text.lower().startswith("file://") else text)


def _encodable(text: str) -> bool:
    """Whether a name can be given to the file system."""
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:
        return False


def split(uri: str) -> tuple[str, str, str]:
    """Split a remote URI into scheme with authority ("s3://bucket"), key without slashes around it, and options ("?..." or "")."""
    match = _URI.fullmatch(uri)
    assert match is not None, "called for remote URIs only"
    return match[1].lower() + match[2], match[3], match[4] or ""


def join(uri: str, *names: str) -> str:
    """The URI of a file or folder below `uri`; names may contain "/".

    Raises:
        DataError: a name could lead elsewhere ("..", "/x", "a//b", "?a=b").
    """
    for name in names:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name or (is_remote(uri) and re.search(r"\?[\w.-]+=", name)):
            raise DataError("name", redact(name), "is not a plain name of a file below its folder.", "Rename the file.")
    if not is_remote(uri):
        return str(local(uri).joinpath(*names))
    root, key, options = split(uri)
    return "/".join(part for part in (root, key, *names) if part) + options


def absolute(uri: str | Path) -> str:
    """`uri` in a form that means the same in every process, whatever its working directory."""
    return str(uri) if is_remote(uri) else str(local(uri).absolute())


def parent(uri: str) -> str:
    """The URI of the folder that contains `uri`."""
    if not is_remote(uri):
        return str(local(uri).parent)
    root, key, options = split(uri)
    return "/".join(part for part in (root, *key.split("/")[:-1]) if part) + options


def base_name(uri: str) -> str:
    """The last part of a path or of a URI's key."""
    return split(uri)[1].rpartition("/")[2] if is_remote(uri) else local(uri).name


def relative_to(folder: str, uri: str, root: str) -> str | None:
    """The way from `folder` to `uri`, as `./checkpoints` or `../store`, where both are in `root` or are `root` itself; None elsewhere, and
    where `uri` depends on the working directory."""
    if is_remote(uri) != is_remote(folder) or not (is_remote(uri) or local(uri).is_absolute()):
        return None
    (kind, begin), (other, end), (outer, top) = map(_place, (folder, uri, root))
    if not kind == other == outer or any(posixpath.commonpath([top, each]) != top for each in (begin, end)):
        return None
    way = posixpath.relpath(end, begin)
    return way if way.split("/")[0] in (".", "..") else f"./{way}"


def located(folder: str, way: str) -> str:
    """What a file of `folder` names by a path relative to `folder`; an absolute path or URI, as earlier versions wrote them, as it is."""
    if is_remote(way) or local(way).is_absolute():
        return way
    if not is_remote(folder):
        return posixpath.normpath(posixpath.join(str(local(folder)), way))
    root, key, options = split(folder)
    return "/".join(part for part in (root, posixpath.normpath(posixpath.join("/", key, way)).strip("/")) if part) + options


def _place(uri: str) -> tuple[tuple[str, str], str]:
    """A path or URI as what it is on, with its options, and an absolute path there."""
    if not is_remote(uri):
        return ("", ""), posixpath.normpath(absolute(uri))
    root, key, options = split(uri)
    return (root, options), posixpath.normpath(f"/{key}")
