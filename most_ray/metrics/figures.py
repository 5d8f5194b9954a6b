"""The figures of an evaluation, declared once: meaning, unit, and names in trackers, Prometheus, sweeps, tables and screens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from most_ray.metrics.keys import Fixed, Gauge, Key, with_views

_NUMBER = float | None

ERRORS = Fixed(
    "error rate",
    {
        "rate": Key(_NUMBER, "share", "(substitutions + deletions + insertions) / reference, over all records; null: no reference"),
        "substitutions": Key(int, "words", "or characters, or units"),
        "deletions": Key(int, "words", "or characters, or units"),
        "insertions": Key(int, "words", "or characters, or units"),
        "reference": Key(int, "words", "or characters, or units, in all references"),
        "interval": Key(list[float] | None, "share", "[low, high], 95 % confidence interval of the rate; null: no reference"),
    },
    number="rate",
)

_ASR, _TTS, _SPEECH, _OF_A_SET = ("asr",), ("tts",), ("asr", "tts"), "the figures are of one set"
_TTS_SET = "the figures are of one set of TTS records"


def _share(meaning: str, tasks: tuple[str, ...], title: str) -> Key:
    return Key(_NUMBER, "share", meaning, tasks=tasks, title=title)


def _rate(meaning: str, tasks: tuple[str, ...], objective: str, title: str, when: str = "") -> Key:
    return Key(ERRORS, "", meaning, when, tasks=tasks, objective=objective, title=title)


def _seconds(meaning: str, title: str) -> Key:
    return Key(_NUMBER, "s", f"{meaning}; null where the length of a unit is not known", tasks=_TTS, title=title)


_GAUGES = {
    "loss": Gauge("most_ray_validation_loss", "Validation loss in nats per supervised token, of a set or all", ("task", "set")),
    "perplexity": Gauge("most_ray_validation_perplexity", "exp of the validation loss, of a set or all", ("task", "set")),
    "words": Gauge("most_ray_wer", "Word error rate of recognition, of a set or all, 0 to 1 and above", ("set",)),
    "cycle": Gauge("most_ray_cycle_wer", "Word error rate of the model's own speech as it recognises it, of a set or all", ("set",)),
}

_FIGURES = {
    "task": Key(Literal["asr", "tts", "text"], "", "of the set or sets"),
    "records": Key(int, "records", "evaluated", title="records"),
    "loss": Key(_NUMBER, "nats per token", "mean cross-entropy over supervised tokens", objective="loss", title="loss"),
    "perplexity": Key(_NUMBER, "", "exp(loss)", objective="perplexity", title="perplexity"),
    "supervised_tokens": Key(int, "tokens", "that the loss is a mean over"),
    "rejected": Key(int, "records", "that could not be used", _OF_A_SET),
    "rejected_file": Key(str, "", "the file that lists the rejected records", _OF_A_SET),
    "seconds_per_unit": Key(
        _NUMBER, "s", "that a unit stands for; null: the records' units.json does not say it, or repeated units are left out", _TTS_SET
    ),
    "words": _rate("word error rate", _ASR, "wer", "WER"),
    "characters": _rate("character error rate; counts are characters", _ASR, "cer", "CER"),
    "empty_rate": _share("of the hypotheses that are empty", _ASR, "empty"),
    "confusions": Key(
        list[list[str | int]],
        "",
        '[reference word, hypothesis word, count], most frequent first; "" stands for no word (deletion, insertion)',
        tasks=_ASR,
    ),
    "loop_rate": _share("of the hypotheses that repeat something four times in a row, over at least eight tokens", _SPEECH, "looping"),
    "length_cap_rate": _share("of the hypotheses cut off at the length cap", _SPEECH, "length cap"),
    "outside": _rate(
        "word error rate of the text that another recogniser finds in the model's speech",
        _TTS,
        "outside_wer",
        "outside WER",
        "`task` is tts and a recogniser is configured",
    ),
    "cycle": _rate("word error rate of the text that the model recognises in its own speech", _TTS, "cycle_wer", "cycle WER"),
    "units": _rate("unit error rate against the recording's units; counts are units", _TTS, "unit_error_rate", "unit error rate"),
    "generated_seconds": _seconds("mean length of the model's speech", "speech, mean s"),
    "generated_seconds_median": _seconds("median length of the model's speech", "median s"),
    "recorded_seconds": _seconds("mean length of the recordings", "recordings, mean s"),
    "recorded_seconds_median": _seconds("median length of the recordings", "recordings, median s"),
    "short_records": Key(
        int, "records", "in which the model's speech lasts less than half as long as the recording", tasks=_TTS, title="far too short"
    ),
    "duration_ratio": Key(
        _NUMBER,
        "ratio",
        "units of the model's speech over units of the recordings",
        tasks=_TTS,
        objective="duration_ratio",
        title="duration ratio",
    ),
    "end_of_audio_rate": _share("of the hypotheses that end with the end-of-audio marker", _TTS, "ended by marker"),
    "foreign_rate": _share("of the hypotheses that contain tokens of the other modality", _SPEECH, "foreign tokens"),
}

FIGURES = Fixed("figures", with_views(_FIGURES, "eval/{set}", ("task", "rejected_file", "seconds_per_unit", "confusions"), _GAUGES))

TITLES: Mapping[str, str] = {name: key.title for name, key in FIGURES.keys.items() if key.title}
# Names as objectives of a sweep, by key: of error rates (NAME/SET), and of other figures (NAME/TASK/SET).
RATES: Mapping[str, str] = {name: key.objective for name, key in FIGURES.keys.items() if key.type is ERRORS}
OBJECTIVES: Mapping[str, str] = {name: key.objective for name, key in FIGURES.keys.items() if key.objective and name not in RATES}

SAMPLE = Fixed(
    "sample",
    {
        "set": Key(str, "", "task/set"),
        "id": Key(str, "", "of the record"),
        "reference": Key(str, "", "the record's text"),
        "hypothesis": Key(str, "", "the text that was recognised"),
    },
)
