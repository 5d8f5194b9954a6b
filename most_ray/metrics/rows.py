"""What trackers have of a run: the lines of metrics.jsonl as rows of scalars, and which of them a tracker's own files hold already."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from most_ray.io import storage
from most_ray.io.run_folder import RunFolder

Key = tuple[str, int]  # kind and step: names a line, each of which a tracker shall hold once
AXES = {"train": "train/step", "experts": "layers/step", "evaluation": "eval/step"}  # of the lines by kind, the others have no row
_MOST_EXPERTS = 16  # with more, what an expert carries is no scalar of its own; nor is a layer, with more of those
_MOST_LAYERS = 32
_NO_SCALARS = ("kind", "step", "time", "mix", "layers", "expert_load")
_BLOCK = 32768  # bytes, of LevelDB's log format


def key_of(line: Mapping[str, Any]) -> Key:
    """Lines without a kind are of training: older runs wrote no other."""
    return line.get("kind", "train"), int(line["step"])


def row_of(line: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, float]:
    """A line's scalars by name, what is null left out: train/*, mix/SOURCE and experts/* of a `train` line, layers/* of an `experts`
    line, eval/* of an `evaluation`. `start`: the newest `start` line, for the experts' groups and the number of the first layer."""
    kind = key_of(line)[0]
    rows = {"train": _train_row, "experts": _layers_row, "evaluation": lambda line, _: _evaluation_row(line)}
    row = rows[kind](line, start) if kind in rows else {}
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _train_row(line: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    row = {f"mix/{source}": part.get("share") for source, part in line.get("mix", {}).items()}
    for name, value in line.items():
        if name in _NO_SCALARS:
            continue
        group = "experts" if name.startswith("expert_") or name in ("leaked", "rank_load_max_over_mean") else "train"
        name = name.removeprefix("expert_")
        if isinstance(value, dict):
            row |= {f"{group}/{name}/{part}": figure for part, figure in value.items()}
        else:
            row[f"{group}/{name}"] = value
    for modality, load in line.get("expert_load", {}).items():
        if len(load) <= _MOST_EXPERTS:
            row |= {f"experts/load/{modality}/{expert}": load[expert] for expert in _group(start, modality, load)}
    return row


def _group(start: Mapping[str, Any], modality: str, load: list[float]) -> list[int]:
    """The experts of a modality; without a `start` line, all."""
    return list(start.get("experts", {}).get(modality) or range(len(load)))


def _layers_row(line: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """Per modality the busiest expert's load over its group's mean, layer by layer where they are few, and in the worst one."""
    row: dict[str, Any] = {}
    first = int(start.get("first_expert_layer", 0))
    for modality, by_layer in line.get("load", {}).items():
        ratios = {}
        for layer, load in enumerate(by_layer, first):
            used = [load[expert] for expert in _group(start, modality, load)]
            if sum(used):
                ratios[layer] = max(used) * len(used) / sum(used)
        if ratios:
            row[f"layers/{modality}/worst_max_over_mean"] = max(ratios.values())
        if len(by_layer) <= _MOST_LAYERS:
            row |= {f"layers/{modality}/max_over_mean/{layer:02d}": ratio for layer, ratio in ratios.items()}
    return row


def _evaluation_row(line: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"eval/seconds": line.get("seconds")}
    if "sets" not in line:  # older runs wrote rates and losses alone
        row |= {f"eval/asr/{name}/wer": rate for name, rate in line.get("wer", {}).items()}
        row |= {f"eval/{name}/loss": loss for name, loss in line.get("validation_loss", {}).items()}
    sections = {**line.get("sets", {}), **{f"overall/{task}": figures for task, figures in line.get("overall", {}).items()}}
    for name, figures in sections.items():
        row |= {f"eval/{name}/{figure}": value for figure, value in figures.items() if not isinstance(value, dict)}
        for part, called in (
            ("words", "wer"),
            ("characters", "cer"),
            ("units", "unit_error_rate"),
            ("cycle", "cycle_wer"),
            ("outside", "outside_wer"),
        ):
            rates = figures.get(part) or {}
            low, high = rates.get("interval") or (None, None)
            row |= {f"eval/{name}/{called}": rates.get("rate"), f"eval/{name}/{called}_low": low, f"eval/{name}/{called}_high": high}
    return row


def rows_in_wandb_files(root: Path, run_id: str) -> dict[int, Key | None]:
    """By W&B's own step, the lines that the local files of a run hold (None: a row that is no line). Where a killed start's rows never
    reached the server, the next start counts on from the server's: so the newer file tells what a step is.

    The format is LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of protocol buffers; a tail that a killed
    writer has torn is passed over."""
    from wandb.proto import wandb_internal_pb2

    found: dict[int, Key | None] = {}
    # The folders: (offline-)run-TIME-ID, and with -1 and on behind it those that began within the same second.
    for path in sorted(root.glob(f"*run-*/run-{run_id}.wandb"), key=lambda path: path.parent.name.removeprefix("offline-")):
        for data in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(data)
            except Exception:  # noqa: BLE001 - protobuf's own error is no stable name; a torn record holds nothing
                continue
            if record.WhichOneof("record_type") == "history":
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                kinds = [kind for kind, axis in AXES.items() if axis in values]
                found[record.history.step.num] = (kinds[0], int(float(values[AXES[kinds[0]]]))) if kinds else None
    return found


def _log_records(data: bytes, start: int = 7) -> Iterator[bytes]:
    """Records behind a header of `start` bytes: blocks of chunks of checksum, length and type (1: whole; 2, 3, 4: first, middle, last)."""
    parts: list[bytes] = []
    while start + 7 <= len(data):
        room = _BLOCK - start % _BLOCK
        if room < 7:  # filled up with zeros
            start += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        chunk = data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 2):
            parts.clear()
        parts.append(chunk)
        if kind in (1, 4) and len(chunk) == length:
            yield b"".join(parts)


def lines_in_event_files(root: Path) -> set[Key]:
    """The lines whose scalars TensorBoard's files in `root` show: a start at a step hides what older files hold from there on."""
    from tensorboardX.proto import event_pb2

    groups = {axis.split("/")[0]: kind for kind, axis in AXES.items()}
    found: set[Key] = set()
    for path in sorted(root.glob("events.out.tfevents.*")):
        for data in event_records(path.read_bytes()):
            event = event_pb2.Event()
            event.ParseFromString(data)
            if event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START:
                found = {key for key in found if key[1] < event.step}
            found |= {(groups[group], event.step) for value in event.summary.value if (group := value.tag.split("/")[0]) in groups}
    return found


def event_records(data: bytes) -> Iterator[bytes]:
    """The whole records of a TFRecord file: length (8 bytes), its checksum (4), the data, its checksum (4)."""
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        if start + 16 + length > len(data):
            return
        yield data[start + 12 : start + 12 + length]
        start += 16 + length


def exchange(folder: RunFolder, name: str) -> None:
    """Bring what a folder of the run holds here and at the run's place together. Its files only grow: the longer one is the newer.
    Does nothing on a path."""
    if not folder.remote:
        return
    here = folder.local / name
    local = {path.relative_to(here).as_posix(): path.stat().st_size for path in here.rglob("*") if path.is_file() and not path.is_symlink()}
    remote = {entry.name: entry for entry in storage.list_files(folder.at(name), ("",))} if storage.exists(folder.at(name)) else {}
    for part, entry in remote.items():
        if local.get(part, -1) < entry.size:
            (here / part).parent.mkdir(parents=True, exist_ok=True)
            storage.download(entry.uri, here / part)
    folder.push(*(f"{name}/{part}" for part, size in local.items() if part not in remote or remote[part].size < size))
