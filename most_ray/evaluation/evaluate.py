"""The one evaluation: `most-ray evaluate`, validation beside training and in between, and the end of a run all call this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from most_ray.data.ingest import Recipe, check_rejected, ingest_directory
from most_ray.data.plan import check_units as one_unit_identity
from most_ray.data.plan import distinct_names
from most_ray.errors import DataError
from most_ray.evaluation.hypotheses import Row, evaluation_result, write_hypotheses, write_result
from most_ray.evaluation.scoring import EvalShard, EvaluationSet, EvaluationSettings, asr_instruction
from most_ray.io import storage
from most_ray.model.build import check_template, check_units
from most_ray.model.configuration import MostConfig
from most_ray.model.routing import load_summary
from most_ray.records.files import REJECTED
from most_ray.records.record import TASKS, Task
from most_ray.records.template import template_hash
from most_ray.records.tokenizer import vocabulary_of


@dataclass(frozen=True)
class Directories:
    """Of records, by task: paths or URIs."""

    asr: tuple[str, ...] = ()
    tts: tuple[str, ...] = ()
    text: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.asr or self.tts or self.text)


@dataclass(frozen=True)
class Evaluation:
    """result: the figures (see `hypotheses.figures`); header and rows: the content of hypotheses.jsonl that they come from."""

    header: dict[str, Any]
    rows: list[Row]
    result: dict[str, Any]

    def write(self, path: Path) -> None:
        """The figures to `path`, and beside it `hypotheses_path(path)`, each in place in one move."""
        write_hypotheses(hypotheses_path(path), self.header, self.rows)
        write_result(path, self.result)


def hypotheses_path(path: Path) -> Path:
    """The records' file beside a file of figures: NAME.hypotheses.jsonl."""
    return path.with_name(f"{path.name.removesuffix('.json')}.hypotheses.jsonl")


def open_sets(
    config: MostConfig, tokenizer: Any, uri: str, directories: Directories, settings: EvaluationSettings, store_root: str
) -> list[EvaluationSet]:
    """The records to score the model of `place` on, as token stores: those that are there, and new ones for what is new or has changed.

    Raises:
        UserError: a directory is missing or holds too many bad records; the model was trained with another template, or on other units.
    """
    check_template(config, uri)
    vocabulary = vocabulary_of(tokenizer)
    named: list[tuple[Task, str]] = [(task, directory) for task in TASKS for directory in getattr(directories, task)]
    # A record that the model can read is scored, however long the rows of training were.
    limit = config.max_position_embeddings
    stores = [ingest_directory(directory, Recipe(task, vocabulary, limit, "reject"), store_root) for task, directory in named]
    check_rejected(stores, settings.max_rejected_fraction, storage.join(str(store_root), REJECTED))
    check_units(config, one_unit_identity(stores), uri)
    names = distinct_names([directory for _, directory in named], [task for task, _ in named])
    return [EvaluationSet(f"{task}/{name}", task, store) for (task, _), name, store in zip(named, names, stores, strict=True)]


def merge_shards(
    shares: Sequence[EvalShard], sets: Sequence[EvaluationSet], settings: EvaluationSettings, config: MostConfig, tokenizer: Any, uri: str
) -> Evaluation:
    """Every rank's share as one evaluation of the model of `place`, its records in the order of the sets.

    Raises:
        DataError: a record was scored twice, or not at all.
    """
    rows: dict[tuple[int, int], Row] = {}
    for share in shares:
        twice = rows.keys() & share.rows.keys()
        if twice:
            raise DataError("evaluation", share.rows[min(twice)]["id"], "was scored twice.")
        rows |= share.rows
    wanted = [(index, row) for index, each in enumerate(sets) for row in range(len(each.store))]
    if len(rows) != len(wanted):
        raise DataError("evaluation", f"{len(rows)} of {len(wanted)}", "records were scored.")
    header = {
        "settings": {
            "model": storage.redact(uri),
            **asdict(settings),
            "template": template_hash(),
            "units": getattr(config, "units_identity", None),
            "asr_instruction": asr_instruction(tokenizer, sets),
        },
        "sets": {each.name: _about(each) for each in sets},
        "routing": load_summary(torch.from_numpy(np.sum([share.load for share in shares], axis=0)), config),
    }
    ordered = [rows[uri] for uri in wanted]
    return Evaluation(header, ordered, evaluation_result(header, ordered))


def _about(each: EvaluationSet) -> dict[str, Any]:
    rejected_file = storage.redact(storage.join(each.store.uri, REJECTED))
    return {"task": each.task, "records": len(each.store), "rejected": each.store.manifest["n_rejected"], "rejected_file": rejected_file}
