"""Which part of a recording a row of a table means, or why nobody can tell."""

from __future__ import annotations

from typing import Any

import pytest

from most_ray.errors import RecordError
from most_ray.speech.corpora.audio import ANY_CHANNEL
from most_ray.speech.corpora.stretches import read_stretch


@pytest.mark.parametrize(
    ("row", "begin", "duration", "length"),
    [
        ({}, None, None, None),
        ({"start": "1", "duration": "2"}, 1, 2, None),
        ({"start": "1", "end": "2.5"}, 1, 1.5, None),
        ({"start": 1, "end": 2.5, "duration": 1.52}, 1, 1.52, None),
        ({"start": "1"}, 1, None, None),
        ({"start": "1", "duration": ""}, 1, None, None),
        ({"start": "", "duration": "2"}, None, 2, None),
        ({"offset": 1.0, "duration": 2}, 1, 2, None),
        ({"offset": 0, "duration": 2}, 0, 2, None),
        ({"offset": "", "start": "3"}, 3, None, None),
        ({"duration": "2"}, None, None, 2),
        ({"duration": "2:30"}, None, None, None),
        ({"start": "1", "duration": "2", "duration_ms": "2000", "length": 7}, 1, 2, None),
        ({"duration_ms": "2000", "num_samples": 32000}, None, None, None),
        ({"end": "yes", "endpoint": "7", "gender": "f", "date_from": "2020", "char_start": 3, "split": "test"}, None, None, None),
        ({"timestamp": "2020-01-02T10:00", "time": "noon", "segment": "3", "times": [1, 2, 3]}, None, None, None),
        ({"timestamp": "2020-01"}, None, None, None),
    ],
)
def test_what_is_understood(row: dict[str, Any], begin: float | None, duration: float | None, length: float | None) -> None:
    found = read_stretch(row)
    assert (found.begin, found.duration, found.length, found.channel) == (begin, duration, length, None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"start": "x"}, "not a number of seconds: 'x', None"),
        ({"start": "1", "duration": "0"}, "not a number of seconds: '1', '0'"),
        ({"offset": -1}, "not a number of seconds: -1, None"),
        ({"start": "9" * 5000}, "not a number of seconds"),
        ({"start": 10**400}, "not a number of seconds"),
        ({"end": "2"}, "an end that is not"),
        ({"start": "", "end": "2"}, "an end that is not"),
        ({"start": "2", "end": "1"}, "an end that is not"),
        ({"start": "1", "end": "0:02"}, "an end that is not"),
        ({"start": "1", "end": "3", "duration": "1"}, "contradict"),
        ({"start": 1, "offset": 1}, "a start and an offset"),
        ({"start_time": 0.5, "end_time": 1.5}, "'start_time'"),
        ({"Start": "1", "End": "2"}, "'Start'"),
        ({" start": "1"}, "' start'"),
        ({"startTime": 1}, "'startTime'"),
        ({"begin": 1}, "'begin'"),
        ({"onset": "1.5"}, "'onset'"),
        ({"xmin": 1, "xmax": 2}, "'xmin'"),
        ({"from": "0:10", "to": "0:12"}, "'from'"),
        ({"segment_start": "3"}, "'segment_start'"),
        ({"end_ms": 1500}, "'end_ms'"),
        ({"start": 1, "duration_ms": 500}, "'duration_ms'"),
        ({"start": 1, "length": "2"}, "'length'"),
        ({"start": 1, "num_samples": 16000}, "'num_samples'"),
        ({"timestamp": [0.5, 1.5]}, "'timestamp'"),
        ({"segment": {"start": 1, "end": 2}}, "'segment'"),
        ({"segment": "0.5-1.5"}, "'segment'"),
        ({"timestamps": "00:01 --> 00:02"}, "'timestamps'"),
    ],
)
def test_what_is_not(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as refused:
        read_stretch({"path": "a.wav", "text": "one", **row})
    assert reason in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("value", [0, 1, "1", "A", "left", "R"])
def test_a_channel_that_is_meant(value: object) -> None:
    assert read_stretch({"channel": value}).channel == ANY_CHANNEL


@pytest.mark.parametrize("value", ["telephone", "", None, True, "BBC"])
def test_a_channel_of_another_kind(value: object) -> None:
    assert read_stretch({"channel": value, "channels": 2}).channel is None
