from __future__ import annotations

from typing import Any

import pytest
from ray.data import DataContext

from most_ray.service.tasks import batch_stream


def test_ray_datas_scheduling_loop_pauses_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs beside training, in its process, and would hold the interpreter's lock."""

    class StartedError(Exception):
        pass

    def start(*_: Any, **__: Any) -> None:
        raise StartedError

    monkeypatch.setattr(batch_stream, "_store_budget", lambda *_: 1 << 20)
    monkeypatch.setattr(batch_stream.ray.data, "range", start)
    context = DataContext.get_current().copy()
    monkeypatch.setattr(batch_stream.DataContext, "get_current", lambda: context)
    with pytest.raises(StartedError):
        next(batch_stream._stream_span(None, 1, 8, 4, batch_stream._FetchStatus(1)))  # type: ignore[arg-type]
    paused: list[float] = []
    monkeypatch.setattr(batch_stream.time, "sleep", paused.append)
    for callback in context.custom_execution_callback_classes:
        callback().on_execution_step(None)  # type: ignore[arg-type]
    assert sum(paused) >= 0.01
