from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: busy cores are the rule in tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("busy", deadline=None)  # cores are shared: a slow example is no failure
settings.load_profile("busy")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real recordings and the original's numbers, which lie beside the checkout where the project is developed."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail("../shared is missing, and CI always has it")
        pytest.skip("needs ../shared (real recordings and reference vectors), which is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def digits() -> Path:
    return ROOT / "jobs" / "data" / "digits"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The one local Ray of all tests that need it; its address."""
    import ray

    from most_ray.service.cluster import start_local_ray

    start_local_ray(6, include_dashboard=True)  # for its state API
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
