"""Lines of metrics.jsonl: token-weighted means over the steps since the line before."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from most_ray.model.configuration import MostConfig
from most_ray.model.placement import rank_load_ratio
from most_ray.model.routing import expert_groups, load_summary
from most_ray.records import TASKS
from most_ray.train.ranks import this_rank
from most_ray.train.step import StepResult

logger = logging.getLogger(__name__)
_LINES_BETWEEN_ALERTS = 100
_ALERT_SELECTIONS = 16  # fewer per expert, on average, and chance alone makes the largest some times the mean


class Meter:
    """Collects steps and makes a line of them.

    Args:
        ranks: the experts that each expert-parallel rank holds (`placement.experts_of_ranks`), or None.
        load_alert: rank 0 warns when an expert has so many times the mean load of its modality's experts in a line (0: never).
    """

    def __init__(self, config: MostConfig, ranks: Sequence[Sequence[int]] | None = None, load_alert: float = 0.0) -> None:
        self._config, self._ranks, self._alert_above = config, ranks, load_alert
        self._lines = 0
        self._alerted: dict[str, int] = {}
        self._clear()

    def _clear(self) -> None:
        self._losses = [0.0] * len(TASKS)
        self._counts = [0] * len(TASKS)
        self._aux = self._norm = self._wait = self._stall = 0.0
        self._steps = self._tokens = self._capacity = self._skipped = 0
        self._load: torch.Tensor | None = None
        self._started = time.perf_counter()

    def add(self, result: StepResult, n_tokens: int, capacity: int, data_wait: float) -> None:
        """`capacity`: tokens that the step's rows have room for; `data_wait`: seconds."""
        if not result.skipped:  # what is not finite would hide the line's other steps
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

    def stalled(self, seconds: float) -> None:
        """Checkpoints held up the training for so long. Counts for the line that follows: they are made behind the one due."""
        self._stall += seconds

    def line(self) -> dict[str, Any]:
        """The line, and a new start.

        loss: mean cross-entropy over all supervised tokens, unweighted; asr_loss, tts_loss, text_loss: over those of one task;
        aux_loss: weighted balance loss, mean over steps. None of these counts skipped steps (null: all were skipped).
        fill: share of the packed rows that holds records; save_stall: seconds since the line before in which checkpoints held up the
        training;
        rank_load_max_over_mean: busiest expert-parallel rank's selections over the mean rank's, in the worst layer;
        the rest: `routing.load_summary`.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        made = self._steps - self._skipped
        line: dict[str, Any] = {"step": self._last.step, "loss": sum(self._losses) / max(1, sum(self._counts)) if made else None}
        for task, loss, count in zip(TASKS, self._losses, self._counts, strict=True):
            if count:
                line[f"{task}_loss"] = loss / count
        line |= {
            "aux_loss": self._aux / made if made else None,
            "grad_norm": self._norm if made else None,
            "learning_rate": self._last.learning_rate,
            "tokens": self._tokens,
            "fill": self._tokens / max(1, self._capacity),
            "supervised_tokens": sum(self._counts),
            "tokens_per_second": self._tokens / seconds,
            "step_time": seconds / self._steps,
            "data_wait": self._wait / self._steps,
            "save_stall": self._stall,
            "skipped_steps": self._skipped,
        }
        if self._load is not None and len(self._load):
            line |= load_summary(self._load, self._config)
            if self._ranks:
                line["rank_load_max_over_mean"] = round(rank_load_ratio(self._load, self._ranks), 4)
            self._alert(line)
        self._lines += 1
        self._clear()
        return line

    def _alert(self, line: dict[str, Any]) -> None:
        """Warn of experts that are crowded, of each modality once in a while."""
        if not self._alert_above or this_rank() != 0:
            return
        layers = line["layers"]
        for modality, worst in line["expert_max_over_mean"].items():
            recent = modality in self._alerted and self._lines - self._alerted[modality] < _LINES_BETWEEN_ALERTS
            if worst <= self._alert_above or recent or self._mean_load(modality) < _ALERT_SELECTIONS:
                continue
            self._alerted[modality] = self._lines
            index = layers["expert_max_over_mean"][modality].index(worst)
            logger.warning(
                "step %d: in layer %d expert %d has %.1f times the mean load of the %s experts (load_alert is %g). "
                "Raise aux_loss_alpha or balance_bias_rate.",
                line["step"],
                index + self._config.first_k_dense_replace,
                layers["busiest_expert"][modality][index],
                worst,
                modality,
                self._alert_above,
            )

    def _mean_load(self, modality: str) -> float:
        """Selections of an expert of the modality in one layer, on average."""
        assert self._load is not None
        selections, experts = expert_groups(self._load, self._config)[modality]
        return float(selections[0, experts].double().mean())
