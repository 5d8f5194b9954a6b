from __future__ import annotations

import pytest

from most_ray.data.plan import Plan
from tests.support.builders import make_plan, tiny_model


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
