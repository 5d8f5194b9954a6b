from __future__ import annotations

import pytest

from tests.support.pages import chromium

browser = pytest.fixture(scope="module", name="browser")(chromium)
