from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def imported() -> None:
    """What commands import, once for all: each case is a fork of this process."""
    import ray  # noqa: F401
    import soundfile  # noqa: F401

    import most_ray.cli
    import most_ray.evaluation.evaluate
    import most_ray.evaluation.hypotheses
    import most_ray.model.build
    import most_ray.planner.screen
    import most_ray.report
    import most_ray.runs.resolve
    import most_ray.service.preflight.checks
    import most_ray.service.tune.runner
    import most_ray.speech.units.prepare
    import most_ray.speech.vocoder.prepare_vocoder  # noqa: F401
