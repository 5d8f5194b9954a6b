from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An S3 bucket on loopback; `%s` stands for a key. All that a task on another node needs to know is in the place itself."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("MOST_RAY_CACHE_DIR", str(tmp_path / "cache"))
    host, port = server.get_host_and_port()
    system = fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True)
    system.create_dir("most-ray")
    yield f"s3://key:secret@most-ray/%s?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()
