"""What commit.json and state.json of a checkpoint must hold: checked before a run resumes, so that a damaged one is skipped, not used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from most_ray.checkpoint.files import DamagedFileError
from most_ray.io.json_values import parse_json
from most_ray.io.run_folder import COMMIT

STATE = "state.json"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def _all(rules: Mapping[str, Callable[[Any], bool]]) -> Callable[[object], bool]:
    """The rule that a value is an object with these keys, whose values follow their rules."""

    def holds(value: object) -> bool:
        return isinstance(value, dict) and all(key in value and rule(value[key]) for key, rule in rules.items())

    return holds


def _packed(value: object) -> bool:
    """Whether a value is how `train.meter` writes a tensor of counts; None for no tensor."""
    if value is None:
        return True
    if not _all({"shape": _counts, "values": lambda text: isinstance(text, str)})(value):
        return False
    words = value["values"].split()  # type: ignore[index]
    return math.prod(value["shape"]) == len(words) and all(len(word) < 20 and word.isdecimal() for word in words)  # type: ignore[index]


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _numbers(value: object) -> bool:
    return all(map(_is_number, value)) if isinstance(value, list) else _is_number(value)


_STATE: Mapping[str, Callable[[Any], bool]] = {  # what every state.json has
    "step": _is_count,
    "skipped_in_row": _is_count,
    "n_tensors": _is_count,
    "scheduler": _all({"last_epoch": _is_count}),
    "loss_scale": _all(
        {"scale": _is_number, "growth_interval": _is_count, "good_steps": _is_count, "enabled": lambda value: isinstance(value, bool)}
    ),
}
_OF_A_RUN: Mapping[str, Callable[[Any], bool]] = {  # what it has beside that, where a run wrote it
    "cursor": _all({"fingerprint": lambda value: isinstance(value, str), "epoch": _is_number, "step": _is_count}),
    "ingredients": _all(
        {"vocabulary": lambda value: isinstance(value, dict), "global_batch_size": lambda value: _is_count(value) and value}
    ),
    "meter": _all(
        {
            "sums": lambda value: isinstance(value, dict) and all(map(_numbers, value.values())),
            "seconds": _is_number,
            "load": _packed,
            "load_since_experts": _packed,
            "steps_since_experts": _is_count,
        }
    ),
}


def parse_marker(data: bytes) -> dict[str, Any]:
    """The content of commit.json: `format`, and of today's format `step`, and `files` as name -> [bytes, xxh3_128]. Raises
    DamagedFileError."""
    marker = _parse(data, COMMIT)
    found = marker.setdefault("format", 1)
    if not _is_count(found):
        raise DamagedFileError(f"{COMMIT} is cut off or garbage (its format)")
    if not _is_count(marker.get("step")):
        raise DamagedFileError(f"{COMMIT} is cut off or garbage (its step)")
    return marker


def check_files(marker: Mapping[str, Any]) -> None:
    """Raise DamagedFileError unless the list of files in commit.json has a size and a hash for each plain name."""
    files = marker.get("files")
    if not isinstance(files, dict) or not files or not all(map(_is_file, files.items())):
        raise DamagedFileError(f"{COMMIT} is cut off or garbage (its list of files)")


def _is_file(item: tuple[str, object]) -> bool:
    name, entry = item
    plain = "\0" not in name and not {"", ".", ".."} & set(name.split("/"))
    return plain and isinstance(entry, list) and len(entry) == 2 and _is_count(entry[0]) and isinstance(entry[1], str)


def parse_state(data: bytes) -> dict[str, Any]:
    """The content of state.json. Raises DamagedFileError if it is none; its values are checked by `check_state`, if it has today's
    format."""
    content = _parse(data, STATE)
    if not _is_count(content.get("format")):
        raise DamagedFileError(f"{STATE} is garbage (its format)")
    return content


def check_state(content: Mapping[str, Any], step: int) -> None:
    """Raise DamagedFileError if state.json lacks a value or has one of another kind, or is of another step than `step`."""
    wrong = next((key for key, rule in _STATE.items() if key not in content or not rule(content[key])), None)
    wrong = wrong or next((key for key, rule in _OF_A_RUN.items() if key in content and not rule(content[key])), None)
    if wrong:
        raise DamagedFileError(f"{STATE} is garbage (its {wrong})")
    if content["step"] != step:
        raise DamagedFileError(f"{STATE} is of step {content['step']}, and {COMMIT} of {step}")


def _parse(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = parse_json(data)
    except ValueError as error:
        raise DamagedFileError(f"{name} is cut off or garbage ({error})") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{name} is cut off or garbage (no object)")
    return content
