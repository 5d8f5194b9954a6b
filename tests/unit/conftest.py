from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from most_ray.data.plan import Plan
from tests.support.builders import make_plan, tiny_model


@pytest.fixture(autouse=True)
def without_ray() -> Iterator[None]:
    """No unit test starts Ray: many of Ray's calls do by themselves, and the tests behind would find it running."""
    yield
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        ray.shutdown()
        pytest.fail("the test has started Ray")


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
