"""The cards of runs: what the model is, what data it was trained on, and how the run was started. What a run does not say is unknown."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from most_ray.report.cells import Cell, Content, Row
from most_ray.report.collect import RunData, entries, mapping, number
from most_ray.report.run_tables import Table, run_names

Runs = Sequence[RunData]
_TASKS = {"asr": "recognition", "tts": "synthesis"}
_SHOWN_COMMANDS = 3  # of a run that was started with several
_SIZES = (  # keys of a config.json from which the number of parameters follows
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("n_routed_experts", "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
_VERSIONS = ("most_ray", "torch", "transformers", "ray")


@dataclass(frozen=True)
class Card:
    """A title, names and values for each run, and tables below."""

    title: str
    rows: Sequence[Row]
    tables: Sequence[Table] = ()


def cards(runs: Runs) -> list[Card]:
    """The cards of the model, of the data and of the run."""
    return [
        Card("Model", _by_run(runs, _MODEL)),
        Card("Data", _by_run(runs, _DATA), _sources(runs)),
        Card("Run", _by_run(runs, _RUN)),
    ]


def _by_run(runs: Runs, makers: Mapping[str, Callable[[RunData], Content]]) -> list[Row]:
    return [(name, *(make(run) for run in runs)) for name, make in makers.items()]


# The model.


def parameters(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """All parameters of a model, and those that a token goes through, by its config.json; None where that lacks a size.

    Latent attention, dense and expert layers are those of DeepSeek-V2 (sections 2.1 and 2.2 of arXiv 2405.04434)."""
    sizes = [number(config.get(name)) for name in _SIZES]
    if any(size is None for size in sizes):
        return None
    vocabulary, hidden, dense, inner, layers, heads, experts, chosen, rank, nope, rope, value = (int(size or 0) for size in sizes)
    shared, first = (int(number(config.get(name)) or 0) for name in ("n_shared_experts", "first_k_dense_replace"))
    query_rank, bias = int(number(config.get("q_lora_rank")) or 0), bool(config.get("attention_bias"))
    query = (hidden + 1 + heads * (nope + rope)) * query_rank if query_rank else hidden * heads * (nope + rope)
    compressed = hidden * (rank + rope) + rank + rank * heads * (nope + value)
    attention = query + compressed + heads * value * hidden + (bias * (query_rank + rank + rope + hidden))
    sparse = max(0, layers - min(first, layers))
    expert = 3 * hidden * inner
    total = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2) + hidden
    total += layers * (attention + 2 * hidden) + (layers - sparse) * 3 * hidden * dense
    total += sparse * (expert * (experts + shared) + experts * hidden)
    return total, total - sparse * expert * (experts - min(chosen, experts))


def _parameters(run: RunData) -> Content:
    found = parameters(run.model)
    return None if found is None else [f"{found[0]:,}", Cell(small=f"{found[1]:,} of them for each token")]


def _layers(run: RunData) -> Content:
    layers, dense = (number(run.model.get(key)) for key in ("num_hidden_layers", "first_k_dense_replace"))
    if layers is None:
        return None
    return f"{layers:.0f}" + (f", the first {'' if dense == 1 else f'{dense:.0f} '}without experts" if dense else "")


def _experts(run: RunData) -> Content:
    routed, shared = (number(run.model.get(key)) for key in ("n_routed_experts", "n_shared_experts"))
    if routed is None:
        return None
    groups = [entries(run.model.get(f"{what}_expert_indices")) for what in ("text", "audio")]
    aware = run.model.get("use_modality_aware_routing", True) and all(groups)
    of = f": {len(groups[0])} for text, {len(groups[1])} for speech" if aware else ", for both text and speech"
    return f"{routed:.0f} routed{of}" + (f"; {shared:.0f} shared" if shared else "")


def _chosen(run: RunData) -> Content:
    chosen, shared = (number(run.model.get(key)) for key in ("num_experts_per_tok", "n_shared_experts"))
    if chosen is None:
        return None
    of = " of its modality's" if run.model.get("use_modality_aware_routing", True) else ""
    return f"top {chosen:.0f}{of}" + (", and the shared one" if shared == 1 else f", and the {shared:.0f} shared" if shared else "")


def _vocabulary(run: RunData) -> Content:
    size, first, last = (number(run.model.get(key)) for key in ("vocab_size", "first_audio_token", "last_audio_token"))
    if size is None:
        return None
    return f"{size:,.0f} tokens" + (f", {last - first + 1:,.0f} of them of speech" if first is not None and last is not None else "")


def _start_of(run: RunData) -> Content:
    model, checkpoint = (run.config.get(key) for key in ("model_name_or_path", "resume_from_checkpoint"))
    return None if model is None else [str(model), *([Cell(small=f"from {checkpoint}")] if checkpoint else [])]


def _precision(run: RunData) -> Content:
    start = run.starts[-1] if run.starts else {}
    return str(start["precision"]) if start.get("precision") else None


def _optimizer(run: RunData) -> Content:
    config = run.config
    if config.get("learning_rate") is None:
        return None
    about = [f"learning rate {config['learning_rate']}", *([str(config["lr_scheduler"])] if config.get("lr_scheduler") else [])]
    about += [f"weight decay {config['weight_decay']}"] if config.get("weight_decay") is not None else []
    about += [f"moments in {config['optimizer_state']}"] if config.get("optimizer_state") else []
    return ["AdamW", Cell(small=", ".join(about))]


_MODEL: Mapping[str, Callable[[RunData], Content]] = {
    "Preset or starting model": _start_of,
    "Parameters": _parameters,
    "Layers": _layers,
    "Hidden size": lambda run: None if (size := number(run.model.get("hidden_size"))) is None else f"{size:,.0f}",
    "Experts of a layer": _experts,
    "Experts for a token": _chosen,
    "Vocabulary": _vocabulary,
    "Precision": _precision,
    "Optimizer": _optimizer,
}

# The data.


def _listed(run: RunData, use: str) -> list[dict[str, Any]]:
    """The sources of `training` or `validation` that cards.json describes."""
    return [source for source in entries(mapping(run.cards.get("data")).get(use)) if isinstance(source, dict)]


def _units_of(run: RunData) -> dict[str, Any]:
    """What the run's units mean, as units.json has it: by its data, else by its folder speech/."""
    found = next((mapping(source["units"]) for source in _listed(run, "training") if source.get("units")), None)
    return found or {**mapping(run.units.get("identity")), **({"encoder": run.units["encoder"]} if "encoder" in run.units else {})}


def hours(seconds: float) -> str:
    """A length of speech."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 36_000 else f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _speech_of(source: Mapping[str, Any], key: str = "seconds") -> tuple[float, str] | None:
    """The seconds of a source's speech and a word on how they are known; None where they are not."""
    seconds, exact = number(source.get(key)), source.get("exact") is not False
    if seconds is not None:
        return seconds, "" if exact else "about "
    units, rate = number(source.get("speech_units")), number(mapping(source.get("units")).get("rate_hz"))
    if not units or not rate or key != "seconds":
        return None
    repeats = mapping(source.get("units")).get("repeats_removed")
    return units / rate, "" if exact and repeats is False else "at least " if repeats is not False else "about "


def _speech(run: RunData) -> Content:
    lines: list[Content] = []
    for task, called in _TASKS.items():
        sources = [source for source in _listed(run, "training") if str(source.get("name", "")).startswith(f"{task}/")]
        found = [known for source in sources if (known := _speech_of(source))]
        if not found or len(found) < len(sources):
            continue
        own = [known[0] for source in sources if (known := _speech_of(source, "own_speed_seconds"))]
        total = math.fsum(seconds for seconds, _ in found)
        word = next((word for _, word in found if word), "")
        copies = f"{hours(math.fsum(own))} without speed copies" if len(own) == len(found) and math.fsum(own) < total else ""
        lines.append(Cell(f"{called}: {word}{hours(total)}", small=copies))
    return lines or None


def _speakers(run: RunData) -> Content:
    data = mapping(run.cards.get("data"))
    training, validation = (number(mapping(data.get("speakers")).get(use)) for use in ("training", "validation"))
    if training is None:
        return None
    least = "" if all(source.get("exact") is not False for source in _listed(run, "training")) else "at least "
    unseen = number(data.get("unseen"))
    more = (
        f"{validation:,.0f} in validation" + ("" if unseen is None else f", {unseen:,.0f} of them unseen in training") if validation else ""
    )
    return [f"{least}{training:,.0f} in training", *([Cell(small=more)] if more else [])]


def _units(run: RunData) -> Content:
    found = _units_of(run)
    count, rate = number(found.get("n_units")), number(found.get("rate_hz"))
    if count is None:
        return None
    repeats = found.get("repeats_removed")
    about = [f"{rate:g} a second"] if rate is not None else []
    about += [] if repeats is None else ["repeats removed" if repeats else "repeats kept"]
    return f"{count:,.0f}" + "".join(f", {each}" for each in about)


def _encoder(run: RunData) -> Content:
    found = _units_of(run)
    if not found.get("features"):
        return None
    layer = mapping(found.get("settings")).get("layer")
    name = found.get("encoder", "")
    if found["features"] == "mfcc":
        return "none: MFCC"
    return str(found["features"]) + (f", layer {layer}" if layer is not None else "") + (f", {name}" if name else "")


def _licence(run: RunData) -> Content:
    stated = [source.get("licence") for source in _listed(run, "training")] or [run.units.get("licence")]
    known = list(dict.fromkeys(str(each) for each in stated if each))
    return None if not known else [*known, *([Cell(small="of some sources it is unknown")] if not all(stated) else [])]


_DATA: Mapping[str, Callable[[RunData], Content]] = {
    "Speech for training": _speech,
    "Speakers": _speakers,
    "Units": _units,
    "Encoder": _encoder,
    "Licence": _licence,
}


def _sources(runs: Runs) -> list[Table]:
    """A line for each source of each run."""
    rows, several = list[Row](), len(runs) > 1
    for run, name in zip(runs, run_names(runs), strict=True):
        targets = mapping(next((start["wanted_mix"] for start in reversed(run.starts) if start.get("wanted_mix")), {}))
        for use in ("training", "validation"):
            for source in _listed(run, use):
                records, share = number(source.get("records")), number(targets.get(str(source.get("name"))))
                speech, speakers = _speech_of(source), number(source.get("speakers"))
                cells: Iterable[Content] = (
                    use,
                    None if records is None else f"{records:,.0f}",
                    f"{share:.1%}" if share is not None and use == "training" else "",
                    None if speech is None else f"{speech[1]}{hours(speech[0])}",
                    None if speakers is None else f"{speakers:,.0f}",
                    str(source["licence"]) if source.get("licence") else None,
                )
                rows.append((str(source.get("name", "")), *([name] if several else []), *cells))
    head = ("source", *(["run"] if several else []), "used for", "records", "share", "speech", "speakers", "licence")
    return [Table("Sources", head, rows)] if rows else []


# The run.


def _time(seconds: Any) -> str | None:
    """A Unix time as a date, in UTC: the page is the same wherever it is made."""
    value = number(seconds)
    if value is None or not 0 < value < 1e11:
        return None
    return f"{dt.datetime.fromtimestamp(value, dt.UTC):%Y-%m-%d %H:%M} UTC"


def _ended(run: RunData) -> Content:
    times = [value for lines in (run.train, run.experts) for line in lines[-1:] if (value := number(line.get("time"))) is not None]
    shown = _time(max(times, default=None))
    return shown if run.complete else shown and [shown, Cell(small="last line; it is not complete")]


def _commands(run: RunData) -> Content:
    """What was typed, the newest last."""
    typed = list(dict.fromkeys(str(start["command"]) for start in run.starts if start.get("command")))
    more = [Cell(small=f"and {len(typed) - _SHOWN_COMMANDS} before")] if len(typed) > _SHOWN_COMMANDS else []
    return [*more, *(Cell(command, "command") for command in typed[-_SHOWN_COMMANDS:])] or None


def _device(run: RunData) -> Content:
    start = run.starts[-1] if run.starts else {}
    device, workers = start.get("device"), number(start.get("workers"))
    name = run.environment.get("cpu") if device == "cpu" else device
    if not name:
        return str(device) if device else None
    return f"{workers:.0f} x {name}" if workers is not None and device != "cpu" else str(name)


def _versions(run: RunData) -> Content:
    versions = mapping(run.environment.get("versions"))
    found = [f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name)]
    found += [f"Python {run.environment['python']}"] if run.environment.get("python") else []
    commit, modified = run.environment.get("commit"), run.environment.get("modified")
    about = [Cell(small=f"commit {str(commit)[:12]}{', modified' if modified else ''}")] if commit else []
    return [", ".join(found), *about] if found else None


_RUN: Mapping[str, Callable[[RunData], Content]] = {
    "Begun": lambda run: _time(run.starts[0].get("time")) if run.starts else None,
    "Ended": _ended,
    "Command": _commands,
    "Device": _device,
    "Versions": _versions,
}
