"""Lines of metrics.jsonl: token-weighted means over the steps since the line before."""

from __future__ import annotations

import time
from typing import Any

import torch

from most_ray.model.configuration import MostConfig
from most_ray.model.routing import load_summary
from most_ray.records import TASKS
from most_ray.train.step import StepResult


class Meter:
    """Collects steps and makes a line of them."""

    def __init__(self, config: MostConfig) -> None:
        self._config = config
        self._clear()

    def _clear(self) -> None:
        self._losses = [0.0] * len(TASKS)
        self._counts = [0] * len(TASKS)
        self._aux = self._norm = self._wait = 0.0
        self._steps = self._tokens = self._capacity = self._skipped = 0
        self._load: torch.Tensor | None = None
        self._started = time.perf_counter()

    def add(self, result: StepResult, n_tokens: int, capacity: int, data_wait: float) -> None:
        """`capacity`: tokens that the step's rows have room for; `data_wait`: seconds."""
        for index in range(len(TASKS)):
            self._losses[index] += result.loss_sums[index]
            self._counts[index] += result.token_counts[index]
        self._aux += result.aux_loss
        self._norm = result.grad_norm
        self._wait += data_wait
        self._steps += 1
        self._tokens += n_tokens
        self._capacity += capacity
        self._skipped += result.skipped
        self._load = result.load if self._load is None else self._load + result.load
        self._last = result

    def line(self) -> dict[str, Any]:
        """The line, and a new start.

        loss: mean cross-entropy over all supervised tokens, unweighted; asr_loss, tts_loss, text_loss: over those of one task;
        aux_loss: weighted balance loss, mean over steps; fill: share of the packed rows that holds records;
        expert_load: selections by modality and expert, summed over layers;
        expert_max_over_mean: busiest expert of a modality's group over the group's mean; leaked: selections across the border.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        line: dict[str, Any] = {"step": self._last.step, "loss": sum(self._losses) / max(1, sum(self._counts))}
        for task, loss, count in zip(TASKS, self._losses, self._counts, strict=True):
            if count:
                line[f"{task}_loss"] = loss / count
        line |= {
            "aux_loss": self._aux / self._steps,
            "grad_norm": self._norm,
            "learning_rate": self._last.learning_rate,
            "tokens": self._tokens,
            "fill": self._tokens / max(1, self._capacity),
            "supervised_tokens": sum(self._counts),
            "tokens_per_second": self._tokens / seconds,
            "step_time": seconds / self._steps,
            "data_wait": self._wait / self._steps,
            "skipped_steps": self._skipped,
        }
        if self._load is not None and len(self._load):
            line |= load_summary(self._load, self._config)
        self._clear()
        return line
