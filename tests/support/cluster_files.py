"""The files of cluster/ as tests look at them: Kubernetes manifests, Dockerfile instructions, what must never stand in any of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
_INSTRUCTIONS = frozenset(
    ["ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL"]
) | {"USER", "VOLUME", "WORKDIR"}
_BINARY = (".gz", ".npy", ".png", ".pyc", ".safetensors", ".opus", ".flac")

# What no line of cluster/ and jobs/ may hold outside comments, by pattern.
_EVERYWHERE = r"(?:host|address|bind|listen)[-_a-z]*[\"']?\s*[=:]?\s*[\"']?::(?:[\"'\s]|$)"
_UNASKED = r"--disable-[\w-]*auth|mode:\s*disabled|(?i:anonymous\S*\s*[=:]\s*true)"
_KEYS = r"AKIA[0-9A-Z]{16}|-----BEGIN|\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\beyJ[\w-]{10,}\.|(?<!@sha256:)\b[0-9a-f]{32,}\b"
FORBIDDEN = {
    "listens on every address": rf"(?<![\d.])0\.0\.0\.0(?![\d./])|\[::\]|{_EVERYWHERE}",
    "open to every address": r"0\.0\.0\.0/0|(?<![\w:])::/0",
    "open to the outside": r"\b(?:LoadBalancer|NodePort)\b",
    "no authentication": rf"RAY_AUTH_MODE[\"']?\s*(?:[=:]|,\s*value:)\s*[\"']?disabled|{_UNASKED}",
    "code from a model's repository": r"trust_remote_code",
    "a key": _KEYS,
}
_NAME = r"[\w.-]*(?:token|secret|passw(?:or)?d|api_?key|access_?key)[\w.-]*"
# NAME=value anywhere, `name: value` where YAML, JSON or Python have a key.
_ASSIGNED = re.compile(rf"(?:({_NAME})\s*=|(?:^|[{{,]|-\s)\s*[\"']?({_NAME})[\"']?\s*:)\s*[\"']?([^\s\"'#,}}]+)", re.IGNORECASE)
# What may stand behind such a name: a reference to where the value is, never the value.
_REFERENCE = re.compile(r"^(?:[$~/({\[&*|>%]|token$|true$|false$|null$|required$|cat$|most-ray-[a-z]+$|[a-z_]+\()")
_HARMLESS = ("_path", "secretname", "_file", "tokenizer")


def offences(text: str) -> Iterator[str]:
    """What a file of cluster/ or jobs/ must not hold, as `line number: what: line`."""
    for number, whole in enumerate(text.splitlines(), 1):
        line = "" if whole.lstrip().startswith(("#", "//")) else re.split(r"\s#\s", whole)[0]
        for what, pattern in FORBIDDEN.items():
            # A key is no better in a comment.
            if re.search(pattern, whole if what == "a key" else line):
                yield f"{number}: {what}: {whole.strip()}"
        for variable, key, value in _ASSIGNED.findall(line):
            name = variable or key
            if not _REFERENCE.match(value) and not name.lower().endswith(_HARMLESS):
                yield f"{number}: a value where a reference to a secret belongs ({name}): {whole.strip()}"


def manifests(folder: str) -> dict[str, dict[str, Any]]:
    """Each Kubernetes object of a folder of cluster/, by `FILE KIND`."""
    found = {}
    for path in sorted((CLUSTER / folder).glob("*.yaml")):
        for value in yaml.safe_load_all(path.read_text()):
            found[f"{path.name} {value['kind']}"] = value
    return found


def unknown_fields(value: object, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Paths of keys that the schema does not know: an API server drops them without a word."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{at}[{index}]")
    if not isinstance(value, dict):
        return
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key, below in value.items():
        if key in known:
            yield from unknown_fields(below, known[key], f"{at}.{key}")
        elif isinstance(others, dict):
            yield from unknown_fields(below, others, f"{at}.{key}")
        elif not others:
            yield f"{at}.{key}"


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions with their arguments, continued lines joined, comments left out.

    Raises:
        ValueError: a line is no instruction.
    """
    kept = "\n".join(line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))
    found = []
    for line in re.sub(r"\\\n", " ", kept).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name not in _INSTRUCTIONS or not rest.strip():
            raise ValueError(f"no instruction: {line}")
        found.append((name, " ".join(rest.split())))
    return found


def text_files(*folders: Path) -> Iterator[Path]:
    """Every text file below the folders: the data of jobs/ and pictures apart."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if (
                path.is_file()
                and path.suffix not in (".gz", ".npy", ".png", ".pyc", ".safetensors", ".opus", ".flac")
                and "data" not in path.parts
            ):
                yield path
