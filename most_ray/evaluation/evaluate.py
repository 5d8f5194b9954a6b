"""Evaluation as `most-ray evaluate`, validation during training and the end of a run all call it: open the sets, merge the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from most_ray.data.ingest import Recipe, check_rejected, ingest_directory
from most_ray.data.plan import check_units as common_units
from most_ray.data.plan import distinct_names
from most_ray.errors import DataError
from most_ray.evaluation.hypotheses import Row, evaluation_result, hypotheses_path, write_hypotheses, write_result
from most_ray.evaluation.origins import add_origins
from most_ray.evaluation.scoring import EvalShard, EvaluationSet, EvaluationSettings, asr_instruction
from most_ray.evaluation.wer import NORMALISER_VERSION
from most_ray.io import storage
from most_ray.model.build import check_template, check_units
from most_ray.model.configuration import MostConfig
from most_ray.model.routing import load_summary
from most_ray.records.files import REJECTED
from most_ray.records.record import TASKS, Task
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import vocabulary_of
from most_ray.records.units_manifest import seconds_per_unit


@dataclass(frozen=True)
class Directories:
    """Directories of records by task, as paths or URIs."""

    asr: tuple[str, ...] = ()
    tts: tuple[str, ...] = ()
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A model's evaluation on some sets."""

    header: dict[str, Any]  # first line of hypotheses.jsonl
    rows: list[Row]  # its further lines
    result: dict[str, Any]  # computed from both, see `hypotheses.evaluation_result`

    def write(self, path: Path) -> None:
        """Write the result to `path`, and the hypotheses to `hypotheses_path(path)`; each write is atomic."""
        write_hypotheses(hypotheses_path(path), self.header, self.rows)
        write_result(path, self.result)

    def within(self, run_uri: str) -> Evaluation:
        """The evaluation for the folder of the run at `run_uri`: it names the model, and the files of rejected records, relative to that
        folder, where they are in it or beside it."""

        def way(text: str) -> str:
            shown = storage.redact(run_uri)
            return (storage.relative_to(shown, text, storage.parent(shown)) or text).removeprefix("./")

        settings = self.header["settings"] | {"model": way(self.header["settings"]["model"])}
        about = {name: {**each, "rejected_file": way(each["rejected_file"])} for name, each in self.header["sets"].items()}
        sets = {name: {**each, "rejected_file": about[name]["rejected_file"]} for name, each in self.result["sets"].items()}
        header, result = {**self.header, "settings": settings, "sets": about}, {**self.result, "settings": settings, "sets": sets}
        return replace(self, header=header, result=result)


def open_sets(
    config: MostConfig, tokenizer: Any, uri: str, directories: Directories, settings: EvaluationSettings, store_root: str
) -> list[EvaluationSet]:
    """Open the token stores, below `store_root`, of the records to evaluate the model at `uri` on; stores of new or changed records are
    built.

    Raises:
        UserError: a directory is missing or has too many bad records; the model was trained with another template, or on other units.
    """
    check_template(config, uri)
    vocabulary = vocabulary_of(tokenizer)
    named: list[tuple[Task, str]] = [(task, directory) for task in TASKS for directory in getattr(directories, task)]
    # Every record that fits into the model's positions is scored, however long the rows of training were.
    limit = config.max_position_embeddings
    stores = [ingest_directory(directory, Recipe(task, vocabulary, limit, "reject"), store_root) for task, directory in named]
    check_rejected(stores, settings.max_rejected_fraction, storage.join(str(store_root), REJECTED))
    check_units(config, common_units(stores), uri)
    names = distinct_names([directory for _, directory in named], [task for task, _ in named])
    sets = zip(named, names, stores, strict=True)
    return [EvaluationSet(f"{task}/{name}", task, store, directory) for (task, directory), name, store in sets]


def merge_shards(
    shards: Sequence[EvalShard], sets: Sequence[EvaluationSet], settings: EvaluationSettings, config: MostConfig, tokenizer: Any, uri: str
) -> Evaluation:
    """Merge the shards of all ranks to one evaluation, with its records in the order of the sets. `uri`, of the model, goes into the
    settings. Raises DataError if a record was scored twice, or not at all."""
    rows: dict[tuple[int, int], Row] = {}
    for shard in shards:
        if twice := rows.keys() & shard.rows.keys():
            raise DataError("evaluation", shard.rows[min(twice)]["id"], "was scored twice.")
        rows |= shard.rows
    wanted = [(index, row) for index, each in enumerate(sets) for row in range(len(each.store))]
    if len(rows) != len(wanted):
        raise DataError("evaluation", f"{len(rows)} of {len(wanted)}", "records were scored.")
    about: dict[str, dict[str, Any]] = {}
    for each in sets:
        about[each.name] = {"task": each.task, "records": len(each.store), "rejected": each.store.manifest["n_rejected"]}
        if each.task == "tts":
            about[each.name]["seconds_per_unit"] = seconds_per_unit(each.store.manifest.get("units"))
        about[each.name]["rejected_file"] = storage.redact(storage.join(each.store.uri, REJECTED))
    used = {"model": uri, **asdict(settings), "template": template_hash(), "units": getattr(config, "units_identity", None)}
    used = {name: storage.redact(value) if isinstance(value, str) else value for name, value in used.items()}
    routing = load_summary(torch.from_numpy(np.sum([shard.load for shard in shards], axis=0)), config)
    used |= {"asr_instruction": asr_instruction(tokenizer, sets), "normaliser_version": NORMALISER_VERSION}
    used |= {"directories": {each.name: storage.redact(each.directory) for each in sets}}
    header = {"settings": used, "sets": about, "routing": routing}
    ordered = add_origins([rows[key] for key in wanted], sets, vocabulary_of(tokenizer).ids)
    return Evaluation(header, ordered, evaluation_result(header, ordered))
