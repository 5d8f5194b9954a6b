"""What each line of metrics.jsonl holds, as data. docs/metrics.md is generated from it by `.ci/docs.py`."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Key:
    """type: a Python type (an int is a float too), a list of one, or an Each, Many or Fixed; when: what must be so for the key to be
    there, empty: it always is."""

    type: Any
    unit: str
    meaning: str
    when: str = ""


@dataclass(frozen=True)
class Fixed:
    """An object whose keys are known; `name` is for the documentation."""

    name: str
    keys: Mapping[str, Key]


@dataclass(frozen=True)
class Each:
    """An object with a value (its type as in `Key`) for each of what `of` says."""

    of: str
    value: Any


@dataclass(frozen=True)
class Many:
    """A list of objects."""

    value: Fixed


_BY_MODALITY = "modality (text, audio)"
_NUMBER = float | None

TOPOLOGY = Fixed(
    "topology",
    {
        "dp_replicate": Key(int, "", "replicas of the model"),
        "fsdp": Key(int, "ranks", "over which a replica is sharded"),
        "ep": Key(int, "ranks", "that share out the experts, within `fsdp`"),
    },
)

START: Mapping[str, Key] = {
    "kind": Key(Literal["start"], "", "an attempt began: the first one, or one that goes on after a stop or a failure"),
    "step": Key(int, "steps", "made before it; it goes on from there"),
    "time": Key(float, "s", "Unix time"),
    "workers": Key(int, "", "ranks"),
    "topology": Key(TOPOLOGY, "", "how they are laid out"),
    "device": Key(str, "", '"cpu", or the GPU\'s name'),
    "threads": Key(int, "", "CPU threads of each rank"),
    "precision": Key(Literal["float32", "bfloat16", "float16"], "", "type of matrix products; sums, weights and moments are float32"),
    "exact": Key(bool, "", "it goes on just as an uninterrupted run would: nothing that decides on the data has changed"),
    "changed": Key(list[str], "", "what has changed and was accepted"),
    "global_batch_size": Key(int, "records", "of a step"),
    "total_steps": Key(int, "steps", "the run's goal"),
    "first_expert_layer": Key(int, "", "number of the first layer with experts; lists by layer begin with it"),
    "experts": Key(Each(_BY_MODALITY, list[int]), "", "the experts that its tokens may use"),
    "n_experts": Key(int, "", "routed experts of a layer"),
    "wanted_mix": Key(Each("source", float), "share", "of each source in training, as asked for"),
}

MIX = Fixed(
    "share of a source",
    {
        "records": Key(int, "records", "trained on since the run's first step"),
        "tokens": Key(int, "tokens", "of these records, before noise"),
        "share": Key(float, "share", "of all records, or of all tokens where `weight_unit` is tokens"),
        "target": Key(float, "share", "that was asked for"),
    },
)

LAYERS = Fixed(
    "layers",
    {
        "expert_max_over_mean": Key(Each(_BY_MODALITY, list[float]), "ratio", "by layer, as above"),
        "expert_entropy": Key(Each(_BY_MODALITY, list[float]), "0 to 1", "by layer, as above"),
        "busiest_expert": Key(Each(_BY_MODALITY, list[int]), "expert", "the one with most selections, by layer"),
    },
)

_TASKS = (("asr", "ASR"), ("tts", "TTS"), ("text", "text-only"))
_WITH_TOKENS = "a step that counts had such tokens"

TRAIN: Mapping[str, Key] = {
    "kind": Key(Literal["train"], "", "training since the line of this kind before (`logging_steps` steps; fewer at the run's end)"),
    "step": Key(int, "steps", "made, with the last one of this line"),
    "time": Key(float, "s", "Unix time"),
    "epoch": Key(float, "passes", "over the source that has been seen least"),
    "loss": Key(
        _NUMBER, "nats per token", "mean cross-entropy over all supervised tokens of all ranks, unweighted; null: every step was skipped"
    ),
    **{f"{task}_loss": Key(float, "nats per token", f"the same over those of {name} records", _WITH_TOKENS) for task, name in _TASKS},
    "perplexity": Key(_NUMBER, "", "exp(loss); null where that is no number"),
    **{f"{task}_perplexity": Key(_NUMBER, "", f"exp({task}_loss)", _WITH_TOKENS) for task, _ in _TASKS},
    "aux_loss": Key(
        _NUMBER, "nats", "balance loss times `aux_loss_alpha`, as added to the loss; mean over steps; null: every step was skipped"
    ),
    "grad_norm": Key(_NUMBER, "", "Euclidean norm of the gradient over all parameters, before clipping; of the last step not skipped"),
    "learning_rate": Key(float, "", "of the last step"),
    "skipped_steps": Key(
        int, "steps", "not made as a loss or gradient was not finite; they count in no loss, nor in grad_norm and supervised_tokens"
    ),
    "tokens": Key(int, "tokens", "of the records, prompts as well, before noise"),
    "supervised_tokens": Key(int, "tokens", "that the loss is a mean over"),
    "samples": Key(int, "records", "trained on"),
    "fill": Key(float, "share", "of the packed rows' places that hold tokens"),
    "tokens_per_second": Key(float, "tokens/s", "of all ranks, in the same time: stalls and waiting for data included"),
    "supervised_tokens_per_second": Key(float, "tokens/s", "the same"),
    "samples_per_second": Key(float, "records/s", "the same"),
    "step_time": Key(
        float,
        "s",
        "mean over steps, from the line before to this one; not while training stands still for an evaluation, nor while a run is stopped",
    ),
    "data_wait": Key(float, "s", "of step_time, waiting for the next batch; on rank 0"),
    "save_stall": Key(float, "s", "in which checkpoints held up training since the line before, in all; on rank 0"),
    "mfu": Key(
        float,
        "share",
        "model FLOPs utilisation: operations of the model's matrix products, forward and backward, without padding and recomputation, "
        "over what all ranks' devices can do in the time (PaLM, arXiv 2204.02311, appendix B). Of skipped steps as well. Peak of a "
        "device: its data sheet's, dense, in the type that is trained in; of CPUs and unknown GPUs the best of some large products, "
        "measured at the start with as many threads",
    ),
    "memory_gb": Key(
        float,
        "10^9 bytes",
        "most memory since the process began, on rank 0: of a GPU, what torch had allocated; without one, what was resident",
    ),
    "expert_load": Key(Each(_BY_MODALITY, list[int]), "selections", "of its tokens by expert, summed over layers and steps"),
    "expert_max_over_mean": Key(
        Each(_BY_MODALITY, float), "ratio", "the busiest expert's selections over its modality's mean expert's, in the worst layer"
    ),
    "expert_entropy": Key(
        Each(_BY_MODALITY, float),
        "0 to 1",
        "of the selections over the modality's experts, over its maximum: 1 where all have the same, 0 where one has all; mean of layers",
    ),
    "leaked": Key(int, "selections", "of an expert by a token of the other modality: 0, or the routing is wrong"),
    "layers": Key(LAYERS, "", "layer by layer, from the first with experts"),
    "rank_load_max_over_mean": Key(
        float, "ratio", "the busiest expert-parallel rank's selections over the mean rank's, in the worst layer", "`ep_size` is above 1"
    ),
    "mix": Key(Each("source", MIX), "", "what the run has trained on so far"),
}

EXPERTS: Mapping[str, Key] = {
    "kind": Key(Literal["experts"], "", "where tokens went, in full; every 100 steps and at the last one"),
    "step": Key(int, "steps", "made, with the last one of this line"),
    "time": Key(float, "s", "Unix time"),
    "steps": Key(int, "steps", "that it covers: those since the line of this kind before"),
    "load": Key(Each(_BY_MODALITY, list[list[int]]), "selections", "of its tokens by layer (from the first with experts) and expert"),
}

ERRORS = Fixed(
    "error rate",
    {
        "rate": Key(_NUMBER, "share", "(substitutions + deletions + insertions) / reference, over all records; null: no reference"),
        "substitutions": Key(int, "words", "or characters, or units"),
        "deletions": Key(int, "words", "the same"),
        "insertions": Key(int, "words", "the same"),
        "reference": Key(int, "words", "the same, in all references"),
        "interval": Key(list[float] | None, "share", "[low, high], 95 % confidence interval of the rate; null: no reference"),
    },
)

_ASR, _TTS, _SPEECH, _OF_A_SET = "`task` is asr", "`task` is tts", "`task` is asr or tts", "it is of one set"
FIGURES = Fixed(
    "figures",
    {
        "task": Key(Literal["asr", "tts", "text"], "", ""),
        "records": Key(int, "records", "evaluated"),
        "loss": Key(_NUMBER, "nats per token", "mean cross-entropy over supervised tokens"),
        "perplexity": Key(_NUMBER, "", "exp(loss)"),
        "supervised_tokens": Key(int, "tokens", ""),
        "rejected": Key(int, "records", "that could not be used", _OF_A_SET),
        "rejected_file": Key(str, "", "where these are listed, if there are any", _OF_A_SET),
        "words": Key(ERRORS, "", "word error rate", _ASR),
        "characters": Key(ERRORS, "", "character error rate; counts are characters", _ASR),
        "empty_rate": Key(_NUMBER, "share", "of the hypotheses that are empty", _ASR),
        "confusions": Key(
            list[list[str | int]],
            "",
            '[reference word, hypothesis word, count], most frequent first; "" is nothing (deletion, insertion)',
            _ASR,
        ),
        "loop_rate": Key(_NUMBER, "share", "of the hypotheses that say something four times in a row, over eight tokens at least", _SPEECH),
        "length_cap_rate": Key(_NUMBER, "share", "of the hypotheses cut off at the length cap", _SPEECH),
        "units": Key(ERRORS, "", "unit error rate against the recording's units; counts are units", _TTS),
        "cycle": Key(ERRORS, "", "word error rate of the text that the model recognises in its own speech", _TTS),
        "outside": Key(ERRORS, "", "word error rate of the text that another recogniser hears", "`task` is tts and there is one"),
        "duration_ratio": Key(_NUMBER, "ratio", "units spoken over the recording's", _TTS),
        "end_of_audio_rate": Key(_NUMBER, "share", "of the hypotheses that end with the end of the audio", _TTS),
        "foreign_rate": Key(_NUMBER, "share", "of the hypotheses that mix in tokens of the other modality", _SPEECH),
    },
)

SAMPLE = Fixed(
    "sample",
    {
        "set": Key(str, "", "task/set"),
        "id": Key(str, "", "the record's"),
        "reference": Key(str, "", ""),
        "hypothesis": Key(str, "", ""),
    },
)

EVALUATION: Mapping[str, Key] = {
    "kind": Key(
        Literal["evaluation"], "", "a checkpoint was evaluated; may stand behind lines of later steps, as training goes on meanwhile"
    ),
    "step": Key(int, "steps", "made when the checkpoint was written"),
    "time": Key(float, "s", "Unix time at which the evaluation ended"),
    "seconds": Key(float, "s", "that it took"),
    "wer": Key(Each("ASR set, by its folder", _NUMBER), "share", "word error rate; null: no reference words"),
    "validation_loss": Key(Each("task/set", _NUMBER), "nats per token", "mean cross-entropy over supervised tokens"),
    "sets": Key(Each("task/set", FIGURES), "", "all figures"),
    "overall": Key(Each("task (asr, tts, text)", FIGURES), "", "the same over all sets of a task"),
    "samples": Key(Many(SAMPLE), "", "a few references and hypotheses"),
}

FAILURE: Mapping[str, Key] = {
    "kind": Key(Literal["failure"], "", "something that training does not depend on did not come about; the next start tries again"),
    "step": Key(int, "steps", "that it was for"),
    "time": Key(float, "s", "Unix time"),
    "what": Key(Literal["evaluation", "tracking"], "", ""),
    "reason": Key(str, "", ""),
}

KINDS: Mapping[str, Mapping[str, Key]] = {
    "start": START,
    "train": TRAIN,
    "experts": EXPERTS,
    "evaluation": EVALUATION,
    "failure": FAILURE,
}


def check_line(line: Mapping[str, Any]) -> list[str]:
    """What is wrong with a line: keys that are unknown or missing, values of another type. Empty where it is as documented."""
    keys = KINDS.get(str(line.get("kind")))
    return [f"kind: {line.get('kind')!r} is unknown"] if keys is None else _check_keys(line, keys, "")


def _check_keys(found: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> list[str]:
    complaints = [f"{where}{name}: unknown key" for name in found if name not in keys]
    for name, key in keys.items():
        if name in found:
            complaints += _check_value(found[name], key.type, f"{where}{name}")
        elif not key.when:
            complaints.append(f"{where}{name}: missing key")
    return complaints


def _check_value(value: Any, kind: Any, where: str) -> list[str]:
    """As `_check_keys`, of a value that is to be of a type."""
    if isinstance(kind, Fixed):
        return _check_keys(value, kind.keys, f"{where}.") if isinstance(value, dict) else [f"{where}: is no object"]
    if isinstance(kind, Each):
        if not isinstance(value, dict):
            return [f"{where}: is no object"]
        return [complaint for name, item in value.items() for complaint in _check_value(item, kind.value, f"{where}.{name}")]
    inner = kind.value if isinstance(kind, Many) else typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    if inner is not None:
        if not isinstance(value, list):
            return [f"{where}: is no list"]
        return [complaint for index, item in enumerate(value) for complaint in _check_value(item, inner, f"{where}[{index}]")]
    if isinstance(kind, types.UnionType):
        return [] if any(not _check_value(value, option, where) for option in typing.get_args(kind)) else _wrong(value, kind, where)
    return [] if _is(value, kind) else _wrong(value, kind, where)


def _is(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def _wrong(value: Any, kind: Any, where: str) -> list[str]:
    return [f"{where}: {value!r} is not of type {_words(kind)}"]


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null"}


def _words(kind: Any) -> str:
    """A type, as the documentation calls it."""
    if isinstance(kind, Fixed):
        return f"object, see *{kind.name}*"
    if isinstance(kind, Each):
        return f"for each {kind.of}: {_words(kind.value)}"
    if isinstance(kind, Many):
        return f"list of objects, see *{kind.value.name}*"
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"list of {_words(arguments[0])}"
    if typing.get_origin(kind) is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    return " or ".join(map(_words, arguments)) if arguments else _NAMES[kind]


def _objects(kind: Any) -> list[Fixed]:
    """The objects that a type refers to, itself first, each with those in it."""
    if isinstance(kind, Fixed):
        return [kind, *(found for key in kind.keys.values() for found in _objects(key.type))]
    return _objects(kind.value) if isinstance(kind, (Each, Many)) else []


def _table(keys: Mapping[str, Key]) -> list[str]:
    rows = ["| key | type | unit | meaning |", "|---|---|---|---|"]
    for name, key in keys.items():
        meaning = f"{key.meaning} (only where {key.when})" if key.when else key.meaning
        rows.append(f"| `{name}` | {_words(key.type)} | {key.unit} | {meaning.strip()} |".replace("  ", " "))
    return rows


_HEAD = """\
# metrics.jsonl

One JSON object a line; `kind` says which of the kinds below it is. Rank 0 writes it. However often a run is interrupted, each step has
its line of kind `train`, `experts` or `evaluation` once, without gaps: a run that goes on cuts back what lies behind its checkpoint. A
line that a checkpoint cuts in two goes on where it was, so that all but times and memory equals what an uninterrupted run writes.
Each start leaves a line of kind `start`. A number that is none (not finite) is null. Sums and means are over all ranks and forward
passes of a step unless it says otherwise, and depend neither on the number of ranks nor on how records are packed.

Generated from most_ray/metrics/schema.py by `.venv/bin/python .ci/docs.py`.
"""


def markdown() -> str:
    """The page docs/metrics.md."""
    parts = [_HEAD]
    objects: dict[str, Fixed] = {}
    for kind, keys in KINDS.items():
        rest = {name: key for name, key in keys.items() if name != "kind"}
        parts += [f"## `{kind}`: {keys['kind'].meaning}", "", *_table(rest), ""]
        objects |= {found.name: found for key in rest.values() for found in _objects(key.type)}
    parts.append("## Objects\n")
    for name, found in objects.items():
        parts += [f"### {name[0].upper()}{name[1:]}", "", *_table(found.keys), ""]
    return "\n".join(parts).rstrip("\n") + "\n"
