"""Models by folder or by name: a path of this machine, `hf:OWNER/NAME` on the Hugging Face hub, or a name that its cache holds already.

Only the prefix makes anything be fetched: otherwise a folder that is missing or misspelt, as `models/most`, would be somebody else's model.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path

from most_ray.errors import CheckpointError, one_line
from most_ray.io.uris import is_remote, local, redact
from most_ray.io.waits import waiting_for

PREFIX = "hf:"  # of a name on the hub
# The published models that a run's model is made of by `init-model --from_deepseek`, by the folder that the shipped configurations expect
# it in: the last parts of its path.
_FOLDERS = {
    "most-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "most-v2": "deepseek-ai/DeepSeek-V2",
}
_TRAINED = ("model_name_or_path", "model")  # fields of models that have been made for speech
_RUNS = "runs/"  # the default output_dir: a run is meant, though there is none yet
_ANSWER_S = 8.0  # seconds for the hub to answer the first question; the library itself would wait for minutes
# Files of a model's repository, at its root, that are fetched: weights in safetensors, configurations and tokenizers, no code.
_FILES = ("model.safetensors", "model-*-of-*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")


def model_folder(source: str, field: str = "model_name_or_path", pickled: bool = False) -> str:
    """The folder of a model: `source` itself where it is a path; of a name on the hub, that in the cache, fetched where it has the prefix.

    Args:
        field: the flag or key that names the model, for errors.
        pickled: fetch pytorch_model.bin where the repository has no safetensors.

    Raises:
        CheckpointError: there is no such folder, or it cannot be fetched.
    """
    if is_remote(source):
        raise CheckpointError(field, redact(source), "is not on this machine.", "Copy it here and name the copy.")
    check_model_name(source, field)
    if os.path.exists(path := model_path(source)):
        return path
    return _fetch(source.removeprefix(PREFIX), field, pickled) if source.startswith(PREFIX) else str(_cached(source))


def check_model_name(source: str, field: str = "model_name_or_path", known: Collection[str] = ()) -> None:
    """Raise CheckpointError unless `source` is a folder, a URI, a name on the hub with its prefix, or a name that this machine's cache of
    the hub holds. Nothing is fetched. `known`: other names that the field takes, to suggest the nearest."""
    if is_remote(source) or os.path.isdir(path := model_path(source)):
        return
    if os.path.exists(path):
        raise CheckpointError(field, redact(source), "is a file, not a folder.", "Name the folder with config.json.")
    if source.startswith(PREFIX):
        if (base := base_model(source)) and field in _TRAINED:
            rule = "is DeepSeek-V2 as it was published, whose tokenizer knows no speech units."
            raise CheckpointError(field, redact(source), rule, _make(base, "models/most"))
        return
    if _cached(source) is None:
        raise missing_model(source, field, known)


def missing_model(source: str, field: str = "model_name_or_path", known: Collection[str] = ()) -> CheckpointError:
    """The error of a model that is neither a folder nor in the cache, with what to do: correct the path, fetch it, or make it. `known`: see
    `check_model_name`."""
    rule = "is neither a folder nor in this machine's cache of hub models."
    folder, name = os.path.split(model_path(source).rstrip("/"))
    owner_and_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)
    fetch = f"from the hub it is {PREFIX}{source}, or, downloaded by `hf download {source} --local-dir DIR`, that folder."
    base = base_model(source)
    if close := difflib.get_close_matches(source, known, n=1):
        remedy = f"Did you mean {close[0]!r}?"
    elif base:
        is_folder = source != base
        rule = "does not exist." if is_folder else rule
        remedy = _make(base, source if is_folder else "models/most")
    elif source.startswith((".", "/", "~", _RUNS)) or (folder and os.path.isdir(folder)):
        rule = "does not exist."
        others = [entry.name for entry in os.scandir(folder) if entry.is_dir()] if os.path.isdir(folder or ".") else []
        close = difflib.get_close_matches(name, others, n=1)
        remedy = f"Did you mean {redact(os.path.join(folder, close[0]))!r}?" if close else "Check the path."
    elif owner_and_name:
        remedy = f"Check the path; {fetch}"
    else:
        remedy = f"Check the path; a model on the hub is {PREFIX}OWNER/NAME."
    return CheckpointError(field, redact(source), rule, remedy)


def _make(base: str, folder: str) -> str:
    """The remedy for a model that is to be made of a published one."""
    return f"Make it once, and name its folder: most-ray init-model --from_deepseek {PREFIX}{base} --output {redact(folder)}."


def base_model(source: str) -> str | None:
    """The published model that a name on the hub, or the last part of a folder's path, stands for; None if there is none."""
    plain = source.removeprefix(PREFIX)
    return plain if plain in _FOLDERS.values() else _FOLDERS.get(os.path.basename(plain.rstrip("/")))


def cached_folder(source: str) -> str | None:
    """The folder of a name on the hub, with or without its prefix, in this machine's cache; None if it is not there."""
    found = _cached(source.removeprefix(PREFIX))
    return None if found is None else str(found)


def model_path(source: str) -> str:
    """The path that `source` is, if it is one."""
    return str(local(source)) if source.startswith("file:") else source


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # takes a moment to import, and few commands take names
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except (HFValidationError, OSError, ValueError):  # not a valid name, nor one of a file
        return None
    return Path(found).parent if isinstance(found, str) else None


def _fetch(name: str, field: str, pickled: bool) -> str:
    """The folder of a model's files from the hub. With HF_HUB_OFFLINE=1, or without a network, it is that in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    silent = _why_silent(name)
    try:
        with waiting_for(f"the Hugging Face hub to send {name}"):
            folder = snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=["*/*"], local_files_only=bool(silent))
            if pickled and not any(Path(folder).glob("*.safetensors")):
                folder = snapshot_download(name, allow_patterns=list(_PICKLED), ignore_patterns=["*/*"], local_files_only=bool(silent))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        why = f"it does not answer: {silent}; and this machine's cache does not hold it" if silent else one_line(error)
        remedy = f"Check the name and the network, or download it where there is one (hf download {redact(name)} --local-dir DIR)"
        rule = f"cannot be fetched from the hub ({why})."
        raise CheckpointError(field, PREFIX + redact(name), rule, f"{remedy} and name that folder.") from error
    return folder


def _why_silent(name: str) -> str | None:
    """Why the hub cannot be asked about a model; None where it answers, be it with an error. It has `_ANSWER_S` seconds: the library has no
    limit of its own for looking up the hub's address, and tries again and again where the network drops what is sent."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=_ANSWER_S)
            found.append(None)
        except (HfHubHTTPError, HFValidationError):
            found.append(None)
        except Exception as error:  # noqa: BLE001 - of the library that it connects by, which changes with its version
            found.append(one_line(error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ANSWER_S + 1)
    return found[0] if found else f"nothing came within {_ANSWER_S:g} s"
