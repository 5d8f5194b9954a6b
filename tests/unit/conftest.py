from __future__ import annotations

import ctypes
import gc
import importlib.util
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs

from most_ray.data.plan import Plan
from most_ray.service.cluster import connection
from tests.conftest import ROOT
from tests.support.builders import make_plan, tiny_model
from tests.support.fresh import FreshPython

_LIBC = ctypes.CDLL(None)
_CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_written: list[str] = []  # by this process, since a test has begun
_at_import: list[str] = []  # before the first test of all; tests of other folders may come before those of this one


def _note_what_is_written(event: str, arguments: tuple[Any, ...]) -> None:
    path = None
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = arguments[0] if (arguments[2] or 0) & _CREATES else None
    elif event == "os.mkdir":
        path = None if os.path.isdir(arguments[0]) else arguments[0]
    elif event in ("os.rename", "os.link", "os.symlink"):
        path = arguments[1]
    if path is not None:
        _written.append(os.path.abspath(os.fsdecode(path)))


if hasattr(_LIBC, "mallopt"):  # glibc: threads share one heap (M_ARENA_MAX), of which the unused part can be given back
    _LIBC.mallopt(-8, 1)
tempfile.gettempdir()  # tries the folder out; libraries ask for it when they are imported
sys.addaudithook(_note_what_is_written)


def pytest_collection_finish() -> None:
    _at_import[:] = _written


@pytest.fixture(scope="package", autouse=True)
def writable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Where tests may write: below pytest's folder, in which temporary files and caches of libraries lie too; and devices. (What Python,
    pytest and hypothesis keep for the next run is their own.)"""
    base = tmp_path_factory.getbasetemp()
    at_import = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # which torch sets, and makes
    made = (str(base), str(base.parent), str(base.parent / "pytest-current"), at_import)
    _written[:] = [path for path in _at_import if path not in made]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TMPDIR", "XDG_CACHE_HOME", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            folder = base / name[0].lower() / name.rpartition("_")[0].lower()  # short: sockets lie in it
            folder.mkdir(parents=True, exist_ok=True)
            patch.setenv(name, str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(base / "inductor"))
        patch.setattr(tempfile, "tempdir", None)
        yield [f"{base}/", "/dev/", "/proc/", *(f"{ROOT / name}/" for name in (".pytest_cache", ".hypothesis"))]


@pytest.fixture(autouse=True)
def written_below_tmp_path(writable: list[str]) -> Iterator[None]:
    """No test writes elsewhere, nor fails for what lies there; of what this process's Python opens, makes or renames."""
    yield
    elsewhere = {path for path in _written if not f"{path}/".startswith(tuple(writable)) and "__pycache__" not in path}
    _written.clear()
    assert not elsewhere, f"written outside of tmp_path: {sorted(elsewhere)}"


@pytest.fixture
def short_folder(tmp_path_factory: pytest.TempPathFactory, writable: list[str]) -> Iterator[Path]:
    """A folder whose name is short enough for sockets in it, whatever the user is called."""
    folder = tmp_path_factory.mktemp("s")
    if len(str(folder)) <= 26:  # in which `ray-UID/ray` and Ray's sockets have room
        yield folder
        return
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        writable.append(name)
        yield Path(name)  # it stays in the list: the check comes after this fixture's end


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors of unit tests are small, and where other processes have the cores too, threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def collected() -> Iterator[None]:
    """What the garbage collector need not look through each time is put aside meanwhile."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def memory_given_back(collected: None) -> None:
    """What the file before has needed is given back. What is left is there to stay, from the imports a million objects."""
    gc.collect()
    gc.freeze()
    pyarrow.default_memory_pool().release_unused()
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)


@pytest.fixture(autouse=True)
def told() -> Iterator[list[object]]:
    """What transformers logs meanwhile: nothing that anything is deprecated. (Python's warnings of calls in most_ray are errors by
    pyproject.toml.)"""
    heard: list[object] = []
    ear, logger = logging.Handler(), logging.getLogger("transformers")
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(ear)
    yield heard
    logger.removeHandler(ear)
    assert [line for line in map(str, heard) if "deprecat" in line.lower()] == []


@pytest.fixture(autouse=True)
def without_ray() -> Iterator[None]:
    """No unit test starts Ray: many of Ray's calls do by themselves, and the tests behind would find it running. Nor does a run, which
    begins to before it has found every mistake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "start_beside", lambda config, workers: lambda: None)
        yield
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        ray.shutdown()
        pytest.fail("the test has started Ray")


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshPython]:
    """Processes that have imported nothing of ours yet."""
    python = FreshPython(tmp_path_factory.mktemp("fresh"), ROOT)
    yield python
    python.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """An ASR and a TTS source of unequal record lengths, mixed 3:2; test files may have their own."""
    return make_plan(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new, empty bucket."""
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", s3_server)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fs.S3FileSystem(endpoint_override=s3_server, allow_bucket_creation=True).create_dir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    """.ci/docs.py, which writes the generated pages."""
    spec = importlib.util.spec_from_file_location("docs_generator", ROOT / ".ci" / "docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
