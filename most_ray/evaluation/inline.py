"""How a run's checkpoints are evaluated, and evaluation on the training workers between steps, which needs no Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from most_ray.config import RunConfig
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.errors import CheckpointError, ConfigError
from most_ray.evaluation.decode import Forward
from most_ray.evaluation.evaluate import Directories, Evaluation, merge_shards, open_sets
from most_ray.evaluation.external_asr import ExternalRecogniser
from most_ray.evaluation.hypotheses import EVALUATIONS
from most_ray.evaluation.scoring import EvaluationSet, EvaluationSettings, score_shard
from most_ray.io import storage
from most_ray.io.run_folder import RunFolder, local_copy, step_uri
from most_ray.model.configuration import MostConfig
from most_ray.records.files import UNITS_MANIFEST, VOCODER
from most_ray.records.record import TASKS
from most_ray.records.tokenizer import load_tokenizer
from most_ray.speech.units.assets import find_assets, require_units_manifest
from most_ray.speech.vocoder.vocoders import open_vocoder


@dataclass(frozen=True)
class EvaluationJob:
    """What is evaluated, and by how many tasks."""

    directories: Directories
    settings: EvaluationSettings
    store_dir: str  # of the token stores
    workers: int  # tasks that the records are divided among, each with the whole model
    gpus: float  # of each task
    training_threads: int = 0  # of all training workers on a node

    @classmethod
    def of(cls, config: RunConfig, training_threads: int = 0) -> EvaluationJob:
        """The evaluation of a run's validation sets."""
        directories = Directories(*(tuple(map(storage.absolute, config.directories("val", task))) for task in TASKS))
        settings = EvaluationSettings.of(config)
        return cls(directories, settings, config.store_uri, config.eval_workers, config.eval_gpus, training_threads)

    def sets(self, config: MostConfig, tokenizer: Any, uri: str) -> list[EvaluationSet]:
        """Open the sets; see `open_sets`."""
        return open_sets(config, tokenizer, uri, self.directories, self.settings, self.store_dir)


def open_external_recogniser(
    settings: EvaluationSettings, uri: str, units_identity: str | None, use_gpu: bool = True
) -> ExternalRecogniser | None:
    """Open the external recogniser that the settings name, with a vocoder: theirs, else the model's own. None if they name none. `uri` is
    the folder of the model or of the run's checkpoint, `units_identity` the `units_hash` of the model's units (None: unknown). Raises
    ConfigError if the settings name a vocoder without a recogniser; CheckpointError if one of them cannot be used, or the vocoder was made
    for other units."""
    recogniser, vocoder = settings.recogniser, settings.vocoder
    if recogniser is None:
        if vocoder is not None:
            raise ConfigError("vocoder", vocoder, "is of use only with a recogniser.", "Name one, or leave it out.")
        return None
    assets = find_assets(uri, units_identity)
    if vocoder is None and (assets is None or not storage.exists(storage.join(assets, VOCODER))):
        remedy = "Make one by `most-ray prepare vocoder` in the folder of the training records, or name one: vocoder."
        raise CheckpointError("recogniser", recogniser, f"needs a vocoder, and none goes with {storage.redact(uri)}.", remedy)
    folder = local_copy(assets, UNITS_MANIFEST) if assets else None
    identity = require_units_manifest(Path(folder))["identity"] if folder else None
    return ExternalRecogniser(open_vocoder(vocoder or str(folder), identity), recogniser, use_gpu)


def write_evaluation(evaluation: Evaluation, run_uri: str, step: int, seconds: float) -> dict[str, Any]:
    """Write evaluations/step-N.json and its hypotheses to the run's folder. Returns the row for metrics.jsonl; `seconds` is its time."""
    folder, name, evaluation = RunFolder(run_uri), f"{EVALUATIONS}/step-{step:09d}", evaluation.within(run_uri)
    evaluation.write(folder.local / f"{name}.json")
    folder.push(f"{name}.hypotheses.jsonl", f"{name}.json")
    keys = ("wer", "validation_loss", "sets", "overall", "samples")
    return {"kind": "evaluation", "step": step, "seconds": round(seconds, 3), **{key: evaluation.result[key] for key in keys}}


class InlineEvaluation:
    """Evaluates on the training workers between steps: every rank scores its shard of the records, with the model as it is distributed."""

    def __init__(self, job: EvaluationJob, run_uri: str, model_path: str) -> None:
        self._job, self._run_uri, self._model_path = job, run_uri, model_path
        self._recogniser: list[ExternalRecogniser | None] = []  # opened at the first evaluation; empty: not yet

    def __call__(self, model: Any, step: int) -> dict[str, Any] | None:
        """Evaluate the model. Collective. Returns the row for metrics.jsonl on rank 0, None on other ranks."""
        began, rank, world = time.time(), this_rank(), world_size()
        tokenizer = load_tokenizer(local_copy(self._model_path))
        sets = self._job.sets(model.config, tokenizer, self._model_path)
        if not self._recogniser:
            self._recogniser = [open_external_recogniser(self._job.settings, self._run_uri, getattr(model.config, "units_identity", None))]
        forward = Forward(model, collective=world > 1)
        shard = score_shard(forward, tokenizer, sets, self._job.settings, rank, world, self._recogniser[0])
        for module in (module for module in model.modules() if isinstance(module, FSDPModule)):
            module.reshard()  # as training expects; the outermost module stays unsharded after a forward pass
        shards: list[Any] = [shard] * world
        if world > 1:
            dist.gather_object(shard, shards if rank == 0 else None, dst=0)
        if rank != 0:
            return None
        uri = step_uri(storage.join(self._run_uri, "checkpoints"), step)
        evaluation = merge_shards(shards, sets, self._job.settings, model.config, tokenizer, uri)
        return write_evaluation(evaluation, self._run_uri, step, time.time() - began)
