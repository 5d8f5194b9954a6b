"""Model folders in Hugging Face layout, before a library reads them: that their files are what they should be and choose no code.

transformers lets configurations name code, kernels and other files. A folder comes from anywhere, so what chooses code is refused here, for
models, speech encoders, recognisers and vocoders, and any error of the libraries that read the rest is the user's (`loading`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from most_ray.errors import CheckpointError, UserError, count_of, one_line, printable, shown
from most_ray.io.json_values import parse_json
from most_ray.io.uris import redact

logger = logging.getLogger(__name__)
CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = (CONFIG, "generation_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# Keys, at any depth, by which a configuration makes the library load code, kernels or other files than those of the folder.
_CHOOSE_CODE = frozenset(
    {"custom_generate", "custom_pipelines", "distributed_config", "fusion_config", "gguf_file", "init_inputs", "kernel_config"}
    | {"quantization_config", "transformers_weights", "trust_remote_code", "use_kernels"}
)
IMPLEMENTATIONS: Mapping[str, tuple[str, ...]] = {  # keys that name functions; those known here, others may be fetched from the hub
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("batched_mm", "eager", "grouped_mm", "most_ray"),
}
_NOT_READ = {  # files that the library would follow, though they are not named
    "adapter_config.json": "is an adapter of another model",
    ".metadata": "has weights as pickled objects (a distributed checkpoint)",
}
_CONFIG_BYTES = 16 << 20  # largest configuration that is read
_MOST_LAYERS, _MOST = 1 << 10, 1 << 31  # of any model
_SHARD = re.compile(r"[\w.-]+\.safetensors")
_REMEDY = "Get it again from where it came."


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning about a user's files, once in a process however often they are read."""
    logger.warning("%s", printable(text))


def read_json_object(folder: str | Path, name: str, field: str = "model_name_or_path") -> dict[str, Any] | None:
    """The content of a JSON file in a model folder; None if there is none. Raises CheckpointError unless it is an object."""
    path = Path(folder) / name
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f"is no file of at most {_CONFIG_BYTES >> 20} MiB")
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("is no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(field, redact(str(folder)), f"has a {name} that cannot be read ({one_line(error)}).", _REMEDY) from error
    return content


def check_foreign_model(folder: str | Path, field: str) -> None:
    """`check_model_files` for a model of any kind, whose configuration the library reads: a speech encoder, recogniser or vocoder."""
    check_model_files(folder, field)
    check_sizes(read_json_object(folder, CONFIG, field), folder, field)


def check_model_files(folder: str | Path, field: str = "model_name_or_path") -> None:
    """Raise CheckpointError if the configurations in a model folder are not JSON objects or choose code, or the folder holds something that
    the library would read in place of its weights."""
    for name, what in _NOT_READ.items():
        if (Path(folder) / name).exists():
            raise CheckpointError(field, redact(str(folder)), f"{what}: it holds {name}.", "Name a folder with weights in safetensors.")
    for entry in os.scandir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):  # a link to nothing, as in a cache of which a part was deleted
            if not stat.S_ISREG(mode := os.stat(entry.path).st_mode) and not stat.S_ISDIR(mode):
                raise CheckpointError(field, redact(str(folder)), f"holds {entry.name}, a pipe or a device.", "Remove it.")
    for name in CONFIGS:
        check_chooses_no_code(read_json_object(folder, name, field), folder, name, field)


def check_sizes(content: object, folder: str | Path, field: str) -> None:
    """Raise CheckpointError if the configuration of any kind of model states a number that no model has, at any depth: by its number of
    layers alone a library can work for days before it looks at the weights."""
    for value in content if isinstance(content, list) else ():
        check_sizes(value, folder, field)
    for key, value in content.items() if isinstance(content, dict) else ():
        most = _MOST_LAYERS if "layers" in str(key) else _MOST
        if isinstance(value, int) and abs(value) > most:
            rule = f"has a {CONFIG} in which {key} is {shown(value)}, beyond {most:,}."
            raise CheckpointError(field, redact(str(folder)), rule, _REMEDY)
        check_sizes(value, folder, field)


def check_chooses_no_code(content: object, folder: str | Path, name: str, field: str = "model_name_or_path") -> None:
    """Raise CheckpointError for a key in the content of a configuration, `folder`/`name`, by which the library would load code."""
    if isinstance(content, list):
        for each in content:
            check_chooses_no_code(each, folder, name, field)
    for key, value in content.items() if isinstance(content, dict) else ():
        known = IMPLEMENTATIONS.get(str(key).removeprefix("_").removesuffix("_internal"))
        wrong = known is not None and any(each not in (None, *known) for each in (value.values() if isinstance(value, dict) else [value]))
        if wrong or (key in _CHOOSE_CODE and value not in (None, False)):
            rule = f"has a {name} that chooses code to load: {key} is {shown(value)[:200]}"
            remedy = f"Remove {key} from it" + (f", or set it to one of {', '.join(known)}." if known else ".")
            raise CheckpointError(field, redact(str(folder)), f"{rule}.", remedy)
        check_chooses_no_code(value, folder, name, field)


def weight_files(folder: str | Path, field: str = "model_name_or_path", prefix: str = "") -> list[Path]:
    """The safetensors files of a model folder; of those in an index, the ones with tensors whose names begin with `prefix`, if there are
    any. Raises CheckpointError if the folder has none, its index is damaged, or one of them is missing."""
    path, where = Path(folder), redact(str(folder))
    if (path / WEIGHTS).is_file():
        if (path / INDEX).exists():
            warn_once(f"{where} holds {WEIGHTS} and {INDEX}: the former is read")
        return [path / WEIGHTS]
    index = read_json_object(folder, INDEX, field)
    if index is None:
        others = sorted(each.name for each in path.glob("pytorch_model*.bin"))[:1]
        rule = f"holds no {WEIGHTS}" + (f", and {others[0]} is not read: pickled weights can run code." if others else ".")
        raise CheckpointError(field, where, rule, "Only weights in safetensors are read: convert them where you trust them.")
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names.values()):
        rule = f"has a {INDEX} whose weight_map does not name safetensors files of the folder."
        raise CheckpointError(field, where, rule, _REMEDY)
    wanted = {name for key, name in names.items() if key.startswith(prefix)} or set(names.values())
    files = [path / name for name in sorted(wanted)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(field, where, f"lacks {missing[0]}, which its {INDEX} names.", _REMEDY)
    return files


def weight_shapes(folder: str | Path, field: str = "model_name_or_path") -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in the weights of a model folder, by name, from the files' headers. Raises CheckpointError as
    `weight_files`, and for a damaged file."""
    shapes: dict[str, tuple[int, ...]] = {}
    files = weight_files(folder, field)
    named = (read_json_object(folder, INDEX, field) or {}).get("weight_map", {}) if files[0].name != WEIGHTS else {}
    for file in files:
        read = loading(CheckpointError, field, str(folder), f"has weights that cannot be read: {file.name}")
        with read, safe_open(file, "numpy") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    if lost := sorted(named.keys() - shapes):
        rule = f"lacks {count_of(len(lost), 'tensor')} that its {INDEX} names, the first {lost[0]}."
        raise CheckpointError(field, redact(str(folder)), rule, _REMEDY)
    return shapes


def check_weight_count(wanted: int, held: Mapping[str, tuple[int, ...]], where: str, field: str = "model_name_or_path") -> None:
    """Raise CheckpointError if a model that has `wanted` weights by its config.json needs far more than the tensors `held`: memory is
    allocated for the model, so a wrong configuration must be found before. (Which tensors differ is found when they are read.)"""
    found = sum(math.prod(shape) for shape in held.values())
    if wanted > 2 * found + (1 << 20):
        rule = f"has a {CONFIG} that describes a model of {count_of(wanted, 'weight')}, and its files hold {found:,}."
        raise CheckpointError(field, redact(where), rule, "They belong to different models, or files are missing.")


@contextlib.contextmanager
def loading(error_type: type[UserError], field: str, value: str | None, rule: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Around a library's calls that read files of a user: whatever it raises becomes an error of the user's, "FIELD = VALUE: RULE (error).
    REMEDY". Among it are panics of Rust code, which are no Exceptions (what they write to standard error, `no_panic_output` drops)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: the libraries promise none
        raise error_type(field, value and redact(value), f"{rule} ({one_line(error) or type(error).__name__}).", remedy) from error
    except BaseException as error:  # PanicException is none of Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise error_type(field, value and redact(value), f"{rule} ({one_line(error)}).", remedy) from None


@contextlib.contextmanager
def no_panic_output() -> Iterator[None]:
    """Keep what is written to standard error until the end, and drop it if Rust code panicked meanwhile: the error says what it said."""
    try:
        own = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:  # as in `loading`; raised again
            panicked = type(error).__name__ == "PanicException"
            raise
        finally:
            os.dup2(own, 2)
            os.close(own)
            kept.seek(0)
            if not panicked and (written := kept.read()):
                os.write(2, written)
