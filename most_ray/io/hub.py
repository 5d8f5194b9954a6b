"""Models by folder or by name: a path of this machine, `hf:OWNER/NAME` on the Hugging Face hub, or a name that its cache holds already.

Only the prefix makes anything be fetched: otherwise a folder that is missing or misspelt, as `models/most`, would be somebody else's model.
"""

from __future__ import annotations

import os
from pathlib import Path

from most_ray.errors import CheckpointError, one_line
from most_ray.io.uris import is_remote, local, redact
from most_ray.io.waits import waiting_for

PREFIX = "hf:"  # of a name on the hub
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
    if os.path.exists(path := _path(source)):
        return path
    return _fetch(source.removeprefix(PREFIX), field, pickled) if source.startswith(PREFIX) else str(_cached(source))


def check_model_name(source: str, field: str = "model_name_or_path") -> None:
    """Raise CheckpointError unless `source` is a folder, a URI, a name on the hub with its prefix, or a name that this machine's cache of
    the hub holds. Nothing is fetched."""
    if is_remote(source) or os.path.isdir(path := _path(source)) or (not os.path.exists(path) and source.startswith(PREFIX)):
        return
    if os.path.exists(path):
        raise CheckpointError(field, redact(source), "is a file, not a folder.", "Name the folder with config.json.")
    if source.startswith((".", "/", "~")):
        raise CheckpointError(field, redact(source), "does not exist.", "Check the path.")
    if _cached(source) is None:
        rule = "is neither a folder nor in this machine's cache of hub models."
        raise CheckpointError(field, redact(source), rule, f"Check the path; a model on the hub is {PREFIX}OWNER/NAME.")


def cached_folder(source: str) -> str | None:
    """The folder of a name on the hub, with or without its prefix, in this machine's cache; None if it is not there."""
    found = _cached(source.removeprefix(PREFIX))
    return None if found is None else str(found)


def _path(source: str) -> str:
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

    try:
        with waiting_for(f"the Hugging Face hub to send {name}"):
            folder = snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=["*/*"])
            if pickled and not any(Path(folder).glob("*.safetensors")):
                folder = snapshot_download(name, allow_patterns=list(_PICKLED), ignore_patterns=["*/*"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        remedy = "Check the name and the network (with HF_HUB_OFFLINE=1, it must be in the cache), or name a folder."
        raise CheckpointError(field, PREFIX + redact(name), f"cannot be fetched from the hub ({one_line(error)}).", remedy) from error
    return folder
