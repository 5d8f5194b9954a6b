"""Whatever does not answer is named while it is waited for; what is done at once is not mentioned."""

from __future__ import annotations

import contextlib
import threading
from types import ModuleType

import huggingface_hub
import pytest

from most_ray.config import config_from
from most_ray.io import hub, storage, waits
from most_ray.io.waits import waiting_for
from most_ray.service.cluster import connection


class Lines:
    """Takes lines; `reached` is set once there are `count`."""

    def __init__(self, count: int) -> None:
        self.taken: list[str] = []
        self.reached, self._count = threading.Event(), count

    def __call__(self, line: str) -> None:
        self.taken.append(line)
        if len(self.taken) >= self._count:
            self.reached.set()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_FIRST_S", 0.001)
    monkeypatch.setattr(waits, "_EVERY_S", 0.001)


@pytest.mark.usefixtures("quick")
def test_a_wait_says_again_and_again_what_for_and_until_when() -> None:
    lines = Lines(3)
    with waiting_for("the dashboard at http://user:sekret@x:1", 60.0, lines):
        assert lines.reached.wait(30)
    assert set(lines.taken) == {"waiting for the dashboard at http://***@x:1: 0 s, until 60 s"}
    assert not [thread for thread in threading.enumerate() if thread.name == "waiting"], "nothing is said after its end"


@pytest.mark.usefixtures("quick")
def test_without_a_limit_none_is_said() -> None:
    lines = Lines(1)
    with pytest.raises(ValueError, match="of the block"), waiting_for("Ray at x:1", None, lines):
        raise ValueError(lines.reached.wait(30) and "of the block")
    assert lines.taken[0] == "waiting for Ray at x:1: 0 s"


@pytest.mark.usefixtures("quick")
def test_a_wait_within_a_wait_is_silent_but_not_in_another_thread() -> None:
    outer, inner = Lines(2), Lines(1)

    def wait_as_well() -> None:
        with waiting_for("inner", None, inner):
            inner.reached.wait(30)

    with waiting_for("outer", None, outer):
        with waiting_for("inner", None, inner):
            assert outer.reached.wait(30)
        assert not inner.taken
        other = threading.Thread(target=wait_as_well)
        other.start()
        other.join()
    assert inner.taken and set(outer.taken) == {"waiting for outer: 0 s"}
    with waiting_for("again", None, again := Lines(1)):
        assert again.reached.wait(30)


def test_what_is_done_at_once_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with waiting_for("nothing"):
        pass
    assert caplog.messages == [] and waits._FIRST_S <= 5 and waits._EVERY_S <= 5


@pytest.mark.usefixtures("quick")
def test_a_screen_that_has_gone_does_not_matter() -> None:
    said = threading.Event()

    def gone(_: str) -> None:
        said.set()
        raise BrokenPipeError

    with waiting_for("x", None, gone):
        assert said.wait(30)


def named_by(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """What a module says that it waits for, however short that is."""
    named: list[str] = []

    def wait(what: str, *_: object) -> contextlib.AbstractContextManager[None]:
        named.append(what)
        return contextlib.nullcontext()

    monkeypatch.setattr(module, "waiting_for", wait)
    return named


def test_storage_the_hub_and_a_cluster_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    named = named_by(monkeypatch, storage)
    monkeypatch.setattr(storage, "_filesystem", lambda uri: (None, uri))
    assert storage._remote("s3://bucket/x", lambda _, path: path) == "s3://bucket/x" and named == ["s3://bucket/x"]

    named = named_by(monkeypatch, hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"/cache/{name}")
    assert hub._fetch("a/b", "model", False) == "/cache/a/b" and named == ["the Hugging Face hub to send a/b"]

    named = named_by(monkeypatch, connection)
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "check_address", lambda _: (_ for _ in ()).throw(RuntimeError("asked")))
    with pytest.raises(RuntimeError, match="asked"):
        connection.connect(config_from({"ray_address": "10.0.0.1:6379"}), 0)
    assert named == ["Ray at 10.0.0.1:6379"]
