"""Places on a local path, in fsspec's memory and behind a real S3 protocol; retries, redaction and the node's cache."""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import moto.settings
import pytest

from most_ray.errors import ConfigError, DataError
from most_ray.io import retries, storage
from most_ray.io.node_cache import NodeCache, node_cache


@pytest.fixture
def memory() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["local", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    uris = {"local": str(tmp_path / "root"), "file": f"file://{tmp_path}/root"}
    return storage.join(uris.get(request.param) or request.getfixturevalue(request.param), "data")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been slept."""
    seconds: list[float] = []
    monkeypatch.setattr(retries, "sleep", seconds.append)
    return seconds


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", 1000)


def failing(*errors: Exception) -> tuple[Callable[[], str], list[int]]:
    """An operation that raises these errors, then succeeds; and the list that grows with each call."""
    calls: list[int] = []

    def operation() -> str:
        calls.append(1)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]
        return "done"

    return operation, calls


def test_files_of_every_place_are_written_listed_read_and_removed(root: str) -> None:
    packed = gzip.compress(b"{}")
    files = {"b.json": b"beta", "a b/c%20d#x.json": b"", "a/deep/z.json.gz": packed, ".tmp.json": b"-", ".git/x.json": b"-", "no.txt": b"-"}
    for name, data in files.items():
        storage.write_bytes(storage.join(root, name), data)
    entries = storage.list_files(root, (".json", ".json.gz"))
    assert [(entry.name, entry.size) for entry in entries] == [("a b/c%20d#x.json", 0), ("a/deep/z.json.gz", len(packed)), ("b.json", 4)]
    assert [storage.read_bytes(entry.uri) for entry in entries] == [b"", packed, b"beta"]
    (only,) = storage.list_files(entries[2].uri, (".json",))
    assert (only.name, storage.read_bytes(only.uri)) == ("b.json", b"beta")
    assert only.stamp == entries[2].stamp
    assert storage.list_files(root, (".wav",)) == []
    storage.write_bytes(only.uri, b"new")
    assert storage.read_bytes(only.uri) == b"new"
    assert storage.exists(only.uri) and storage.exists(root) and not storage.exists(storage.join(root, "b"))
    for uri in (only.uri, only.uri, root, root):
        storage.remove(uri)
        assert not storage.exists(uri)


def test_what_is_missing_is_said(root: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        storage.list_files(root, ("",))
    for read in (storage.read_bytes, storage.open_read):
        with pytest.raises(FileNotFoundError):
            read(storage.join(root, "none"))


def test_stamps_change_with_the_file(root: str) -> None:
    uri = storage.join(root, "x.json")
    stamps = set()
    for data in (b"one", b"two"):
        storage.write_bytes(uri, data)
        stamps |= {entry.stamp for entry in storage.list_files(root, (".json",))}
        time.sleep(1.05 if root.startswith("s3") else 0.01)  # S3 counts in seconds
    assert len(stamps) == 2


def test_reading_by_ranges(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CHUNK", 1 << 20)
    monkeypatch.setattr(storage, "_FLUSH", 3)
    data = os.urandom(1 << 16) * 200  # 12.5 MiB: several parts
    uri = storage.join(root, "large.bin")
    storage.write_bytes(uri, data)
    with storage.open_read(uri) as stream:
        stream.seek(5_000_000)
        assert stream.read(3) == data[5_000_000:5_000_003]
        assert stream.seek(-2, os.SEEK_END) == len(data) - 2
        assert stream.read(10) == data[-2:] and stream.read(10) == b""
        stream.seek(0)
        assert stream.read() == data


def test_publish_brings_the_mark_last_and_keeps_the_first(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    upload = storage._upload
    monkeypatch.setattr(storage, "_upload", lambda uri, *rest: (order.append(uri.removeprefix(root + "/")), upload(uri, *rest)))
    for content in (b"first", b"second"):
        folder = tmp_path / content.decode()
        for name in ("sub/a.arrow", "done.json", "z.arrow"):
            storage.write_bytes(str(folder / name), content)
        storage.publish(folder, root, "done.json")
        assert storage.is_remote(root) or not folder.exists()
    assert {entry.name: storage.read_bytes(entry.uri) for entry in storage.list_files(root, ("",))} == dict.fromkeys(
        ("done.json", "sub/a.arrow", "z.arrow"), b"first"
    )
    assert order == (["sub/a.arrow", "z.arrow", "done.json"] if storage.is_remote(root) else [])
    with pytest.raises(FileNotFoundError):
        storage.publish(tmp_path / "nothing", storage.join(root, "other"), "done.json")


def test_publish_keeps_a_local_folder_without_mark(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "theirs" / "thesis.txt", b"dear")
    storage.write_bytes(tmp_path / "ours" / "done", b"")
    with pytest.raises(DataError, match="exists, but without done"):
        storage.publish(tmp_path / "ours", str(tmp_path / "theirs"), "done")
    assert storage.read_bytes(tmp_path / "theirs" / "thesis.txt") == b"dear"
    storage.publish(tmp_path / "ours", str(tmp_path / "ours"), "done")
    assert (tmp_path / "ours" / "done").exists()


def test_linked_folders_are_listed_once_and_circles_end(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "elsewhere" / "x.json", b"1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "shard").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    assert [entry.name for entry in storage.list_files(str(tmp_path / "root"), (".json",))] == ["shard/x.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(tmp_path / "x", b"old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(tmp_path / "x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and storage.read_bytes(tmp_path / "x") == b"old"


@pytest.mark.parametrize("kind", [OSError("curlCode: 7"), OSError(errno.ESTALE, "stale"), ConnectionResetError(), TimeoutError("slow")])
def test_transient_errors_are_tried_again(kind: Exception, waits: list[float]) -> None:
    """Promise 31 of docs/promises.md, with growing pauses."""
    operation, calls = failing(kind, kind)
    assert storage.with_retries(operation, "x") == "done"
    assert len(calls) == 3
    assert [base <= wait <= 1.5 * base for base, wait in zip((0.5, 1.0), waits, strict=True)] == [True, True]


def test_five_tries_then_one_line_without_secrets(waits: list[float], caplog: pytest.LogCaptureFixture) -> None:
    operation, calls = failing(*[OSError(errno.EIO, "cut at s3://key:hidden@bucket/x?token=hidden")] * 9)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="failed after 5 tries") as caught:
        storage.with_retries(operation, "s3://key:hidden@bucket/x?token=hidden")
    assert (len(calls), len(waits), len(caplog.records)) == (5, 4, 4)
    assert "hidden" not in caplog.text + str(caught.value) and "s3://***@bucket/x" in caplog.text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__  # no traceback shows them either


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("x"),
        IsADirectoryError("x"),
        FileExistsError("x"),
        OSError(errno.ENOSPC, "full"),
        KeyError("x"),
    ],
)
def test_lasting_errors_are_not_tried_again(error: Exception) -> None:
    operation, calls = failing(error)
    with pytest.raises(type(error)):
        storage.with_retries(operation, "x")
    assert len(calls) == 1


def test_a_failed_range_is_read_anew(memory: str, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    uri = storage.join(memory, "x")
    storage.write_bytes(uri, b"0123456789")
    real, opened = storage._filesystem, []

    class Flaky:
        def __init__(self, file: Any) -> None:
            self.size = file.size
            self.read_at = lambda count, offset: b"" if len(opened) < 3 else file.read_at(count, offset)

    class System:
        def open_input_file(self, path: str) -> Flaky:
            opened.append(path)
            return Flaky(real(uri)[0].open_input_file(path))

    monkeypatch.setattr(storage, "_filesystem", lambda uri: (System(), real(uri)[1]))
    with storage.open_read(uri) as stream:
        stream.seek(4)
        assert stream.read() == b"456789"
    assert (len(opened), len(waits)) == (3, 2)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:se/c@ret@bucket/x", "s3://***@bucket/x"),
        ("at 's3://user@bucket/x?region=a&secret=b', again", "at 's3://***@bucket/x?***', again"),
        ("s3://bucket/user@home", "s3://bucket/user@home"),
        ("s3:/key:se/c@ret@bucket/x", "s3:/***@bucket/x"),
        ("s3:/bucket/user@home", "s3:/bucket/user@home"),
        ("/data/a@b", "/data/a@b"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    assert storage.redact(text) == shown


def test_missing_buckets_and_refused_keys_are_data_errors(s3: str, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="bucket that does not exist"):
        storage.write_bytes(s3 + "-none/x", b"1")
    with pytest.raises(DataError, match="does not exist"):
        storage.list_files(s3 + "-none", ("",))
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    operations: list[Callable[[], object]] = [
        lambda: storage.write_bytes(s3 + "/x", b"1"),
        lambda: storage.read_bytes(s3 + "/x"),
        lambda: storage.list_files(s3, ("",)),
    ]
    for operation in operations:
        with pytest.raises(DataError, match="may not be used with these credentials"):
            operation()
    assert waits == []


def test_endpoint_in_the_place(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = f"?endpoint_override={s3_server.removeprefix('http://')}&scheme=http"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    uri = storage.join(s3.replace("://", "://key:secret@") + options, "a", "x.json")
    storage.write_bytes(uri, b"1")
    (entry,) = storage.list_files(s3.replace("://", "://key:secret@") + "/a" + options, (".json",))
    assert entry.uri == uri and storage.read_bytes(entry.uri) == b"1"


def test_unusable_schemes_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"unknown scheme hdf://.*'hdfs'"):
        storage.exists("hdf://host/x")
    with pytest.raises(DataError, match="cannot be used") as caught:
        storage.exists("s3://key:se/cret@bucket/x")
    assert "cret" not in str(caught.value) and caught.value.__suppress_context__
    for key in ("a//b", "../other/x"):
        with pytest.raises(DataError, match="cannot be used"):
            storage.read_bytes(f"s3://bucket/{key}")

    def absent(uri: str) -> None:
        raise ImportError("Install ossfs to access it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(DataError, match=r"needs a package for oss://\. Install ossfs"):
        storage.exists("oss://bucket/x")


def test_places() -> None:
    assert storage.is_remote("s3://b/k") and not any(map(storage.is_remote, ("/a", "a", "file:///a", Path("/a"))))
    assert storage.local("file:///a%20b") == storage.local("file://localhost/a%20b") == Path("/a b")
    assert storage.join("s3://b/k/?region=x", "a/b", "c") == "s3://b/k/a/b/c?region=x"
    assert (storage.join("s3://b", "a"), storage.join("hdfs:///d/", "a"), storage.join("d", "a")) == ("s3://b/a", "hdfs:///d/a", "d/a")
    for uri in ("s3://b/k", Path("s3://b/k")):  # a Path takes a slash away
        with pytest.raises(DataError, match="not a local path"):
            storage.local(uri)
    for whole in ("s3://bucket/", "/"):
        with pytest.raises(DataError, match="whole bucket"):
            storage.remove(whole)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a//b", ".", "a\0b"])
def test_hostile_names_do_not_escape(name: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("/data", memory):
        with pytest.raises(DataError, match="plain name"):
            storage.join(uri, name)
    storage.write_bytes(memory + "/x", b"1")
    if name and name != ".":
        monkeypatch.setattr(storage, "_list_remote", lambda system, path: [(name, 1, "")])
        with pytest.raises(DataError, match="plain name"):
            storage.list_files(memory, ("",))


def test_one_download_for_many_threads(memory: str, cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(memory + "/x.gz", b"data")
    download, downloads, start = storage._download, [], threading.Barrier(8)

    def slow(*args: Any) -> None:
        downloads.append(args)
        time.sleep(0.05)
        download(*args)

    def fetch(_: int) -> Path:
        start.wait()
        return cache.fetch(memory + "/x.gz")

    monkeypatch.setattr(storage, "_download", slow)
    with ThreadPoolExecutor(8) as pool:
        (path,) = set(pool.map(fetch, range(8)))
    assert path.read_bytes() == b"data" and len(downloads) == 1
    assert cache.fetch(path) == path and cache.fetch(f"file://{path}") == path


def test_one_download_for_several_processes(s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage.write_bytes(s3 + "/x.bin", b"data")
    code = "import sys; from most_ray.io.node_cache import node_cache; print(node_cache().fetch(sys.argv[1]).read_bytes())"
    environment = os.environ | {"MOST_RAY_CACHE_DIR": str(tmp_path / "new" / "cache")}
    with caplog.at_level(logging.INFO, "werkzeug"):
        command = [sys.executable, "-c", code, s3 + "/x.bin"]
        running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        assert [process.communicate(timeout=60)[0] for process in running] == ["b'data'\n"] * 3
    assert len(re.findall(r'"GET /bucket-\w+/x.bin', caplog.text)) == 1


def test_the_least_recently_used_go(memory: str, cache: NodeCache) -> None:
    paths = []
    (cache.directory / "precious.txt").write_bytes(b"x" * 5000)  # nothing of ours
    for index in range(3):
        storage.write_bytes(f"{memory}/{index}", b"x" * 400)
        paths.append(cache.fetch(f"{memory}/{index}"))
        os.utime(paths[-1], (index, index)) if paths[-1].exists() else None
        if index == 1:
            cache.fetch(f"{memory}/0")  # a hit: now the second is the oldest
    assert [path.exists() for path in paths] == [True, False, True]
    storage.write_bytes(f"{memory}/large", b"x" * 4000)
    assert cache.fetch(f"{memory}/large").stat().st_size == 4000
    assert not any(path.exists() for path in paths) and (cache.directory / "precious.txt").exists()


def test_a_cut_download_is_not_taken(memory: str, cache: NodeCache, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    storage.write_bytes(memory + "/x", b"0123456789")
    copy = storage.shutil.copyfileobj
    for cuts, outcome in ((1, b"0123456789"), (9, None)):
        left = [cuts]

        def cut(source: Any, sink: Any, length: int, left: list[int] = left) -> None:
            left[0] -= 1
            sink.write(b"01234") if left[0] >= 0 else copy(source, sink, length)

        monkeypatch.setattr(storage.shutil, "copyfileobj", cut)
        if outcome:
            assert cache.fetch(memory + "/x").read_bytes() == outcome
            cache.fetch(memory + "/x").unlink()
        else:
            with pytest.raises(DataError, match="5 of 10 bytes came"):
                cache.fetch(memory + "/x")
    assert [path.name for path in cache.directory.iterdir() if not path.name.startswith(".lock-")] == []


def test_cached_names_stay_in_the_cache(memory: str, cache: NodeCache) -> None:
    for name in ("..\\..\\evil", "a;rm -rf~", "x" * 200, "日本.json"):
        storage.write_bytes(storage.join(memory, name), b"1")
        path = cache.fetch(storage.join(memory, name))
        assert path.parent == cache.directory and re.fullmatch(r"[\w.-]{1,120}", path.name, re.ASCII)


def test_the_cache_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv("MOST_RAY_CACHE_DIR", raising=False)
    monkeypatch.delenv("MOST_RAY_CACHE_GB", raising=False)
    cache = node_cache()
    assert (cache.directory, cache.max_bytes) == (tmp_path / f"most_ray-cache-{os.getuid()}", 64 * 10**9)
    assert cache.directory.stat().st_mode & 0o777 == 0o700
    cache.directory.rmdir()
    (tmp_path / "target").mkdir()
    cache.directory.symlink_to(tmp_path / "target")
    with pytest.raises(DataError, match="not a directory of this user"):
        node_cache()
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("MOST_RAY_CACHE_GB", "0.5")
    assert (node_cache().directory, node_cache().max_bytes) == (tmp_path / "own", 5 * 10**8)
    for size in ("0", "-1", "nan", "much"):
        monkeypatch.setenv("MOST_RAY_CACHE_GB", size)
        with pytest.raises(ConfigError, match="positive number"):
            node_cache()
    monkeypatch.delenv("MOST_RAY_CACHE_GB")
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(DataError, match="not a directory of this user"):
        node_cache()


def test_pipes_sockets_and_devices_are_not_read(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        controller, terminal = os.openpty()
        try:
            for path in (tmp_path / "pipe", tmp_path / "socket", os.ttyname(terminal)):
                for read in (storage.open_read, storage.read_bytes, storage.read_small):
                    with pytest.raises(DataError, match="is not a regular file"):
                        read(str(path))
        finally:
            os.close(controller)
            os.close(terminal)
    with pytest.raises(IsADirectoryError):
        storage.read_small(tmp_path)


def test_small_files_are_small(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert storage.read_small(tmp_path / "a", 5) == b"12345"
    with pytest.raises(DataError, match="has more than 4 bytes"):
        storage.read_small(tmp_path / "a", 4)


@pytest.mark.parametrize("name", ["a\0b", "half \ud800"])
def test_names_that_no_file_can_have_are_said(name: str) -> None:
    with pytest.raises(DataError, match="is a name that no file can have"):
        storage.exists(name)
    assert not storage.exists("bytes \udcff")
