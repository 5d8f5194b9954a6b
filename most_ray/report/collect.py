"""Reads a run's folder: the run may have ended, be running, or have been written by an older version.

Missing and incomplete files, lines and values are left out; only a folder without metrics.jsonl is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from most_ray.config import OPTIONS
from most_ray.config_files import OWN
from most_ray.data.plan import distinct_names
from most_ray.errors import DataError
from most_ray.evaluation.wer import confusions
from most_ray.io import storage
from most_ray.io.json_values import parse_json, parse_lines
from most_ray.io.yaml_values import parse_yaml
from most_ray.metrics.columns import TrainLines, number
from most_ray.metrics.rows import kind_of
from most_ray.metrics.totals import COUNTED, RunClock, Totals
from most_ray.options import stored_values
from most_ray.records.files import SPEECH_FOLDER, UNITS_MANIFEST, VOCODER

_SPOKEN = 5  # utterances with players
_UNITS = re.compile(r"\s*(?:\[Hu\d+\]\s*)+")  # a text of speech units alone


@dataclass(frozen=True)
class Rate:
    """An error rate."""

    value: float  # errors per reference word, character or unit
    low: float | None = None  # of the 95% interval; None: unknown
    high: float | None = None
    reference: int | None = None  # words, characters or units of the reference
    substitutions: int | None = None
    deletions: int | None = None
    insertions: int | None = None


@dataclass(frozen=True)
class Hypothesis:
    """A record's reference and its transcription, both as words after normalisation."""

    id: str
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the record: texts, numbers and flags
    spoken: Mapping[str, Any] = field(default_factory=dict)  # its units and recording, see evaluation.origins; of a few with errors

    @property
    def wrong(self) -> bool:
        return self.reference != self.hypothesis


@dataclass(frozen=True)
class SpeechSample:
    """An utterance that the model synthesised."""

    id: str
    text: str
    recognised: str  # the model's own transcription of its speech
    model: tuple[int, ...]  # units that the model generated
    reference: tuple[int, ...]  # units of the recording


@dataclass(frozen=True)
class Evaluation:
    """The results of one step, by "task/set"."""

    step: int
    sets: dict[str, dict[str, Any]]  # all values of each set
    losses: dict[str, float]
    rates: dict[str, float]  # WERs of lines that hold nothing else of a set

    def rate(self, name: str, what: str) -> Rate | None:
        """An error rate of a set; `what` is words, characters, units, cycle or outside."""
        rate = rate_of(self.sets.get(name, {}), what)
        return Rate(self.rates[name]) if rate is None and what == "words" and name in self.rates else rate

    def names(self, task: str) -> list[str]:
        """The sets of a task."""
        return sorted({name for name in (*self.sets, *self.losses, *self.rates) if name.split("/", 1)[0] == task})


@dataclass(frozen=True)
class RunData:
    """The content of one run's folder; lines are those of metrics.jsonl, in the order of their steps."""

    name: str
    starts: list[dict[str, Any]]  # lines of starts and restarts, in the order of the file
    train: TrainLines
    mix: dict[str, Any]  # of the newest train line that has it
    experts: list[dict[str, Any]]  # the newest line alone
    evaluations: list[Evaluation]
    summary: dict[str, Any]  # content of summary.json, as are the next two of their files
    config: dict[str, Any]
    environment: dict[str, Any]
    hypotheses: dict[str, list[Hypothesis]]  # of the last evaluation, by "task/set"
    speech: list[SpeechSample]  # of the last evaluation
    kit: str | None  # URI of the folder speech/; None where it has no vocoder, or there is nothing to say
    cards: dict[str, Any] = field(default_factory=dict)  # content of cards.json
    model: dict[str, Any] = field(default_factory=dict)  # config.json of the model
    units: dict[str, Any] = field(default_factory=dict)  # content of speech/units.json
    directories: dict[str, str] = field(default_factory=dict)  # of the evaluated records, by "task/set", paths or URIs

    @property
    def step(self) -> int:
        return int(self.train[-1]["step"]) if self.train else 0

    @property
    def total_steps(self) -> int | None:
        """The step at which the run ends; None where it is unknown."""
        wanted = number(self.starts[-1].get("total_steps")) if self.starts else number(self.config.get("max_steps"))
        return None if wanted is None else int(wanted)

    @property
    def complete(self) -> bool:
        return bool(self.summary) and self.step >= (self.total_steps or 0)

    @property
    def restarts(self) -> list[dict[str, Any]]:
        """All starts but the first."""
        return self.starts[1:]

    @property
    def last_evaluation(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @cached_property
    def steps(self) -> np.ndarray:
        """The steps of the train lines, ascending."""
        return self.train.values("step")

    @cached_property
    def tokens_so_far(self) -> np.ndarray | None:
        """Tokens trained on up to each train line; None where they are not recorded."""
        tokens = self.train.values("tokens")
        return None if np.isnan(tokens).all() else np.cumsum(np.nan_to_num(tokens))

    @cached_property
    def _clock(self) -> RunClock:
        clock, seen = RunClock(), 0
        columns = [self.train.values(key).tolist() for key in COUNTED]
        for attempt, *row in zip(self.train.attempts.tolist(), *columns, strict=True):
            for start in self.starts[seen:attempt]:
                clock.add({**start, "step": clock.totals.step if seen else start.get("step")})
            seen = max(seen, attempt)
            clock.add(dict(zip(COUNTED, row, strict=True)))
        return clock

    @property
    def totals(self) -> Totals:
        """The run's time, speed and amounts: the same as on its screen, in summary.json and in trackers."""
        return self._clock.totals

    @cached_property
    def seconds_so_far(self) -> np.ndarray | None:
        """Training time up to each train line; None where times are not recorded."""
        seconds = np.array(self._clock.seconds)
        return seconds if len(seconds) and seconds[-1] > 0 else None

    def column(self, key: str) -> list[float | None]:
        """A value of each train line; None where a line lacks it."""
        return [None if value != value else value for value in self.train.values(key).tolist()]


def collect(uris: Sequence[str]) -> list[RunData]:
    """Read the runs at these paths or URIs; they are named after their folders.

    Files are read directly rather than through a run folder's working copy, which, on the machine of a live run, the run itself writes.

    Raises:
        DataError: no path or URI is given, or one has no metrics.jsonl.
    """
    if not uris:
        raise DataError("run", None, "names no run.", "Give the folder of a run, as runs/NAME.")
    for uri in uris:
        if not storage.exists(uri) or not storage.exists(storage.join(uri, "metrics.jsonl")):
            raise DataError("run", storage.redact(uri), "holds no metrics.jsonl.", "Give the folder of a run, as runs/NAME.")
    names = distinct_names(uris, ["run"] * len(uris))
    seen: dict[str, int] = {}
    runs = []
    for uri, name in zip(uris, names, strict=True):
        seen[name] = seen.get(name, 0) + 1  # the same run given twice
        runs.append(_read(uri, name if seen[name] == 1 else f"{name} ({seen[name]})"))
    return runs


def _read(uri: str, name: str) -> RunData:
    by_step: dict[int, dict[str, Any]] = {}  # evaluations
    starts: list[dict[str, Any]] = []
    train = TrainLines()
    experts: dict[str, Any] = {}
    mix: dict[str, Any] = {}
    with storage.open_read(storage.join(uri, "metrics.jsonl")) as stream:  # line by line: of a long run there are gigabytes
        for line in parse_lines(stream):
            step, kind = number(line.get("step")), kind_of(line)
            if kind == "start":
                starts.append(line)
            elif kind == "train" and step is not None:
                train.append(line, len(starts))
                mix = line["mix"] if isinstance(line.get("mix"), dict) else mix
            elif kind == "experts" and step is not None:
                experts = line if step >= experts.get("step", step) else experts
            elif kind == "evaluation" and step is not None:
                by_step[int(step)] = line
    evaluations = [by_step[step] for step in sorted(by_step)]
    summary, final, environment = (read_mapping(uri, f"{file}.json") for file in ("summary", "evaluation", "environment"))
    config = _settings(uri)
    if final:
        last = number(final.get("step")) or number(summary.get("step")) or (train[-1]["step"] if train else 0)
        if int(last) not in by_step:
            evaluations.append({**final, "step": int(last)})
            evaluations.sort(key=lambda line: int(line["step"]))
    settings, said = _hypothesis_lines(uri, evaluations[-1] if evaluations else {})
    hypotheses, speech = parse_hypotheses(said), parse_speech(said)
    audible = speech or any(entry.spoken for entries_ in hypotheses.values() for entry in entries_)
    kit = storage.join(uri, SPEECH_FOLDER) if audible and storage.exists(storage.join(uri, SPEECH_FOLDER, VOCODER)) else None
    judged = [_evaluation(line, hypotheses if line is evaluations[-1] else {}) for line in evaluations]
    cards = read_mapping(uri, "cards.json")
    model = mapping(cards.get("model")) or _model_config(uri)
    directories = {str(key): str(value) for key, value in mapping(settings.get("directories")).items()}
    units = read_mapping(storage.join(uri, SPEECH_FOLDER), UNITS_MANIFEST)
    about: dict[str, Any] = {"cards": cards, "model": model, "units": units, "directories": directories}
    found = (starts, train, mix, [experts] if experts else [], judged, summary, config, environment, hypotheses, speech, kit)
    return RunData(name, *found, **about)


def _model_config(uri: str) -> dict[str, Any]:
    """config.json of a run's export, else of its newest checkpoint: runs of earlier versions have no cards.json."""
    if found := read_mapping(uri, "export/config.json"):
        return found
    checkpoints = storage.join(uri, "checkpoints")
    names = [entry.name for entry in storage.list_files(checkpoints, ("config.json",))] if storage.exists(checkpoints) else []
    return read_mapping(checkpoints, max(names)) if names else {}


def _settings(uri: str) -> dict[str, Any]:
    """The content of config.yaml, with the run's name that its folder has now, and without the place that the folder has had."""
    config = stored_values(OPTIONS, read_mapping(uri, OWN, parse_yaml))
    place = str(config.get("output_dir", ""))
    if "name" in config:
        config["name"] = storage.base_name(storage.absolute(uri))
    if place.startswith((".", "/")) or storage.is_remote(place):
        del config["output_dir"]
    return config


def parse_hypotheses(lines: Sequence[dict[str, Any]]) -> dict[str, list[Hypothesis]]:
    """Hypotheses by "task/set", in the order of the file, normalised; of synthesised speech, the text and the model's transcription."""
    found: dict[str, list[Hypothesis]] = {}
    for line in filter(_is_hypothesis, lines):
        keys = ("text", "recognised") if "recognised" in line else ("reference", "hypothesis")
        reference, hypothesis = (line.get(f"normalised_{key}", line.get(key)) for key in keys)
        more = mapping(line.get("metadata")), mapping(line.get("spoken"))
        entry = Hypothesis(str(line.get("id", "")), words_of(reference), words_of(hypothesis), *more)
        found.setdefault(_full_name(str(line["set"]), line.get("task")), []).append(entry)
    return found


def parse_speech(lines: Sequence[dict[str, Any]]) -> list[SpeechSample]:
    """The first five synthesised utterances whose units are known, each with another text, alternating between sets sorted by name."""
    by_set: dict[str, list[SpeechSample]] = {}
    for line in filter(_is_hypothesis, lines):
        model, reference = (units_in(line.get(side)) for side in ("hypothesis", "reference"))
        if line.get("task") == "tts" and "text" in line and model is not None and reference is not None and (model or reference):
            identity, words, recognised = (str(line.get(key, "")) for key in ("id", "text", "recognised"))
            by_set.setdefault(str(line["set"]), []).append(SpeechSample(identity, words, recognised, model, reference))
    chosen: dict[str, SpeechSample] = {}
    for _ in range(_SPOKEN):
        for name in sorted(by_set):
            if new := next((sample for sample in by_set[name] if sample.text not in chosen), None):
                chosen[new.text] = new
    return list(chosen.values())[:_SPOKEN]


def words_of(value: Any) -> tuple[str, ...]:
    """The words of a text, or the numbers of speech units, which are given as `[Hu7][Hu90]` or as a list."""
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    text = "" if value is None else str(value)
    return tuple(re.findall(r"\d+", text) if _UNITS.fullmatch(text) else text.split())


def _is_hypothesis(line: dict[str, Any]) -> bool:
    return line.get("kind", "hypothesis") == "hypothesis" and "hypothesis" in line and "set" in line


def units_in(value: Any) -> tuple[int, ...] | None:
    """Units of speech; None where a word cannot be a unit's number."""
    words = words_of(value)
    return tuple(map(int, words)) if all(re.fullmatch("[0-9]{1,9}", word) for word in words) else None


def rate_of(figures: dict[str, Any], what: str) -> Rate | None:
    """An error rate among a set's values; older versions wrote it as `errors`, without an interval."""
    errors = mapping(figures.get(what, figures.get("errors") if what == "words" else None))
    value = number(errors.get("rate", errors.get("wer")))
    if value is None:
        return None
    interval = entries(errors.get("interval"))
    low, high = map(number, interval) if len(interval) == 2 else (None, None)
    counts = {key: number(errors.get(key)) for key in ("substitutions", "deletions", "insertions")}
    counts["reference"] = number(errors.get("reference", errors.get("words")))
    return Rate(value, low, high, **{key: None if count is None else int(count) for key, count in counts.items()})


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def entries(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def numbers(values: Any) -> dict[str, float]:
    """The entries of a mapping that are finite numbers."""
    return {str(key): found for key, value in mapping(values).items() if (found := number(value)) is not None}


def _evaluation(line: dict[str, Any], hypotheses: dict[str, list[Hypothesis]]) -> Evaluation:
    sets = {name: dict(figures) for name, figures in mapping(line.get("sets")).items() if isinstance(figures, dict)}
    losses = numbers(line.get("validation_loss"))
    for name, figures in sets.items():
        if (loss := number(figures.get("loss"))) is not None:
            losses.setdefault(name, loss)
        if name.startswith("asr/") and "confusions" not in figures and name in hypotheses:
            said = [" ".join(entry.reference) for entry in hypotheses[name]]
            figures["confusions"] = confusions(said, [" ".join(entry.hypothesis) for entry in hypotheses[name]])
    rates = {_full_name(name, "asr"): rate for name, rate in numbers(line.get("wer")).items()}
    return Evaluation(int(line["step"]), sets, losses, rates)


def _hypothesis_lines(uri: str, evaluation: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of the last evaluation and its hypotheses: from its file, else from the file of the run's end, else from the evaluation
    itself."""
    names = [f"evaluations/step-{int(evaluation['step']):09d}.hypotheses.jsonl"] if "step" in evaluation else []
    for name in (*names, "hypotheses.jsonl"):
        lines = list(parse_lines(read_file(uri, name) or b""))
        if found := list(filter(_is_hypothesis, lines)):
            return mapping(lines[0].get("settings")), found
    return {}, _samples(evaluation)


def _samples(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Hypotheses inside an evaluation: a few samples, or all of them as older versions wrote them."""
    inner = [
        {**mapping(entry), "set": name}
        for name, figures in mapping(evaluation.get("sets")).items()
        for entry in entries(mapping(figures).get("hypotheses"))
    ]
    lines = filter(None, map(mapping, inner or entries(evaluation.get("samples"))))
    return [
        {**line, **{f"normalised_{key}": " ".join(words_of(line.get(key))).lower() for key in ("reference", "hypothesis")}}
        for line in lines
    ]


def _full_name(name: str, task: Any) -> str:
    return name if name.split("/", 1)[0] in ("asr", "tts", "text") and "/" in name else f"{task or 'asr'}/{name}"


def read_file(uri: str, name: str) -> bytes | None:
    """The content of a file in a folder; None where there is no such file."""
    try:
        return storage.read_bytes(storage.join(uri, name))
    except FileNotFoundError:
        return None


def read_mapping(uri: str, name: str, parse: Callable[[bytes], Any] = parse_json) -> dict[str, Any]:
    """The mapping in a file in a folder; empty where the file is missing or damaged (cut off while it was written), or holds none."""
    try:
        return mapping(parse(read_file(uri, name) or b""))
    except ValueError:  # the page says what is absent
        return {}
