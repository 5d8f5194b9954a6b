"""How a run's checkpoints are scored, and the way that needs no Ray: on the training workers, in between steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from most_ray.evaluation.decode import Forward
from most_ray.evaluation.evaluate import Directories, Evaluation, combine, open_sets
from most_ray.evaluation.share import EvaluationSet, EvaluationSettings, score_share
from most_ray.model.configuration import MostConfig
from most_ray.model.tokenizer import load_tokenizer
from most_ray.train.folder import RunFolder, local_copy
from most_ray.train.ranks import this_rank, world_size


@dataclass(frozen=True)
class EvaluationJob:
    """workers: tasks that share the records out, each with the whole model; gpus: of each; training_threads: of all
    training workers on a node."""

    directories: Directories
    settings: EvaluationSettings
    store_dir: str
    workers: int = 1
    gpus: float = 0.0
    training_threads: int = 0

    def sets(self, config: MostConfig, tokenizer: Any, place: str) -> list[EvaluationSet]:
        return open_sets(config, tokenizer, place, self.directories, self.settings, self.store_dir)


def write_evaluation(evaluation: Evaluation, run_place: str, step: int, seconds: float) -> dict[str, Any]:
    """evaluations/step-N.json and the hypotheses, in the run's folder; the line for metrics.jsonl."""
    folder = RunFolder(run_place)
    name = f"evaluations/step-{step:09d}"
    evaluation.write(folder.local / f"{name}.json")
    folder.push(f"{name}.hypotheses.jsonl", f"{name}.json")
    keys = ("wer", "validation_loss", "sets", "overall", "samples")
    return {"kind": "evaluation", "step": step, "seconds": round(seconds, 3), **{key: evaluation.result[key] for key in keys}}


class InlineEvaluation:
    """Evaluations on the training workers, in between steps: every rank decodes its share with the model as the ranks hold it."""

    def __init__(self, job: EvaluationJob, run_place: str, model_path: str) -> None:
        self._job, self._run_place, self._model_path = job, run_place, model_path

    def __call__(self, model: Any, step: int) -> dict[str, Any] | None:
        """Score the model. Collective; the line for metrics.jsonl on rank 0."""
        began, rank, world = time.time(), this_rank(), world_size()
        tokenizer = load_tokenizer(local_copy(self._model_path))
        sets = self._job.sets(model.config, tokenizer, self._model_path)
        share = score_share(Forward(model, together=world > 1), tokenizer, sets, self._job.settings, rank, world)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # as training expects them; the outermost stays whole after a forward pass
        shares: list[Any] = [share]
        if world > 1:
            shares = [None] * world
            dist.gather_object(share, shares if rank == 0 else None, dst=0)
        if rank != 0:
            return None
        evaluation = combine(shares, sets, self._job.settings, model.config, tokenizer, f"{self._run_place} at step {step}")
        return write_evaluation(evaluation, self._run_place, step, time.time() - began)
