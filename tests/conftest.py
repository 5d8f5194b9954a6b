from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch loads: busy cores are the rule in tests; and of what oneDNN makes ready for each shape of a product, and keeps a thousand of
# in each of two caches, a few will do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # read when Ray is imported: a call without Ray is an error, and starts none
# Whoever runs the tests in the background has it ignored, and so have the commands that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("busy", deadline=None)  # cores are shared: a slow example is no failure
settings.load_profile("busy")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


# Which marker a test has by the fixtures that it uses, and by its folder.
BY_FIXTURE = {"ray_cluster": "ray", "s3": "s3", "s3_server": "s3", "bucket": "s3", "browser": "browser", "shared": "shared"}
BY_FOLDER = {"distributed": "gloo", "browser": "browser"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Gives a test the markers of what it uses and where it is."""
    folder, *_ = item.path.relative_to(ROOT / "tests").parts
    names = {BY_FIXTURE[name] for name in getattr(item, "fixturenames", ()) if name in BY_FIXTURE}
    for name in sorted(names | {BY_FOLDER[folder]} if folder in BY_FOLDER else names):
        item.add_marker(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was captured may hold half surrogate pairs, as in names of files, which no process can send to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real recordings and the original's numbers, which lie beside the checkout where the project is developed."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail("../shared is missing, and CI always has it")
        pytest.skip("needs ../shared (real recordings and reference vectors), which is not beside this checkout")
    return SHARED


def tool(name: str) -> str:
    """A program that a test needs beside Python: of this environment, or of the machine."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"no {name}, and CI always has it (.ci/prometheus.sh, .ci/locks/dev.txt)")
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture(scope="session")
def digits() -> Path:
    return ROOT / "jobs" / "data" / "digits"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The one local Ray of all tests of this process that need it; its address."""
    import ray

    from most_ray.service.cluster.connection import start_local_ray

    start_local_ray(6, include_dashboard=True)  # for its state API
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
