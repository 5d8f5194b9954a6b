"""Lines of metrics.jsonl about training, computed over the steps since the previous line. `metrics.schema` declares their keys."""

from __future__ import annotations

import logging
import math
import operator
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from most_ray.distributed.devices import peak_flops
from most_ray.distributed.ranks import this_rank, world_size
from most_ray.metrics.flops import model_flops
from most_ray.metrics.notes import ADVICE, is_overloaded, most_load
from most_ray.model.configuration import MostConfig
from most_ray.model.placement import rank_load_ratio
from most_ray.model.routing import expert_groups, load_summary
from most_ray.records.record import TASKS
from most_ray.train.step import StepResult

logger = logging.getLogger(__name__)
EXPERTS_STEPS = 100  # steps between lines of kind `experts`
_LINES_BETWEEN_ALERTS = 100
_ALERT_SELECTIONS = 16  # mean selections per expert below which chance alone makes the largest several times the mean
_MAX_EXPONENT = 700.0  # exp of a larger number is no float


@dataclass
class _Sums:
    """Sums over the steps since the previous line. The names are part of checkpoints."""

    losses: list[float] = field(default_factory=lambda: [0.0] * len(TASKS))  # by task, in the order of TASKS; without skipped steps
    counts: list[int] = field(default_factory=lambda: [0] * len(TASKS))  # supervised tokens by task; without skipped steps
    aux: float = 0.0  # balance loss; without skipped steps
    norm: float = 0.0  # of the gradient, of the last step that was not skipped
    rate: float = 0.0  # learning rate of the last step
    wait: float = 0.0  # seconds of waiting for data
    stall: float = 0.0  # seconds in which checkpoints held up training
    steps: int = 0
    skipped: int = 0  # steps
    tokens: int = 0
    samples: int = 0  # records
    capacity: int = 0  # tokens that the packed rows have room for
    targets: int = 0  # supervised tokens, with those of skipped steps
    attended: int = 0  # see StepResult

    @property
    def made(self) -> int:
        return self.steps - self.skipped


class Meter:
    """Computes lines of metrics from steps. All values but times and memory follow from sums over all ranks, so each rank has the same.

    Args:
        ranks: the experts of each expert-parallel rank (`placement.experts_of_ranks`); None: there is one rank.
        load_alert: rank 0 logs a warning if an expert has more than so many times the mean load of its modality's experts, or nearly the
            greatest load that there can be (0: never).
        device, dtype: where and in which type (None: float32) matrix products are computed, for their peak rate.
    """

    def __init__(
        self,
        config: MostConfig,
        ranks: Sequence[Sequence[int]] | None = None,
        load_alert: float = 0.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        dtype: torch.dtype | None = None,
    ) -> None:
        self._config, self._ranks, self._alert_above = config, ranks, load_alert
        self._device, self._dtype, self._flops = device, dtype, model_flops(config)
        self._lines = self._step = self._steps_since_experts = 0
        self._alerted: dict[str, int] = {}
        self._load_since_experts: torch.Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums = _Sums()
        self._load: torch.Tensor | None = None
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Start the clock of the first line."""
        peak_flops(self._device, self._dtype)  # measured now if it has to be
        self._started = time.perf_counter()

    def add(self, result: StepResult, n_tokens: int, capacity: int, data_wait: float, n_records: int = 0) -> None:
        """Add a step.

        Args:
            n_tokens, n_records: of the step's batch on all ranks.
            capacity: tokens that the step's rows have room for.
            data_wait: seconds of waiting for the batch.
        """
        sums = self._sums
        if not result.skipped:  # a sum with a value that is not finite would hide the line's other steps
            sums.losses = list(map(operator.add, sums.losses, result.loss_sums))
            sums.counts = list(map(operator.add, sums.counts, result.token_counts))
            sums.aux += result.aux_loss
            sums.norm = result.grad_norm
        self._step, sums.rate = result.step, result.learning_rate
        sums.wait += data_wait
        sums.steps += 1
        sums.skipped += result.skipped
        sums.tokens += n_tokens
        sums.samples += n_records
        sums.capacity += capacity
        sums.targets += sum(result.token_counts)
        sums.attended += result.attended
        self._load = result.load if self._load is None else self._load + result.load
        self._load_since_experts = result.load if self._load_since_experts is None else self._load_since_experts + result.load
        self._steps_since_experts += 1

    def stalled(self, seconds: float) -> None:
        """Add seconds in which checkpoints held up training. They count for the next line, as checkpoints follow a line that is due."""
        self._sums.stall += seconds

    def paused(self, seconds: float) -> None:
        """Leave seconds in which training stood still for an evaluation out of the line's time."""
        self._started += seconds

    def line(self) -> dict[str, Any]:
        """Return the line of kind `train` and start the next one."""
        line = {"kind": "train", "step": self._step, **self._quality(), **self._speed()}
        if self._load is not None and len(self._load):
            line |= load_summary(self._load, self._config)
            if self._ranks:
                line["rank_load_max_over_mean"] = round(rank_load_ratio(self._load, self._ranks), 4)
            self._alert(line)
        self._lines += 1
        self._clear()
        return line

    def experts_line(self) -> dict[str, Any]:
        """Return the line of kind `experts` and start the next one. At least one step was added since the previous one."""
        assert self._load_since_experts is not None
        groups = expert_groups(self._load_since_experts, self._config)
        load = {modality: selections.tolist() for modality, (selections, _) in groups.items()}
        line = {"kind": "experts", "step": self._step, "steps": self._steps_since_experts, "load": load}
        self._load_since_experts, self._steps_since_experts = None, 0
        return line

    def state(self) -> dict[str, Any]:
        """What was summed since the previous lines, as JSON values: part of checkpoints, so that a restart continues the lines."""
        return {
            "sums": asdict(self._sums),
            "seconds": self._seconds(),
            "load": _packed(self._load),
            "load_since_experts": _packed(self._load_since_experts),
            "steps_since_experts": self._steps_since_experts,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from another meter's `state`."""
        self._sums = _Sums(**state["sums"])
        self._seconds_before, self._started = state["seconds"], time.perf_counter()
        self._load, self._load_since_experts = _unpacked(state["load"]), _unpacked(state["load_since_experts"])
        self._steps_since_experts = state["steps_since_experts"]

    def _seconds(self) -> float:
        return max(self._seconds_before + time.perf_counter() - self._started, 1e-9)

    def _quality(self) -> dict[str, Any]:
        """Losses, perplexities, and values of the optimizer."""
        sums = self._sums
        means = {"": sum(sums.losses) / max(1, sum(sums.counts)) if sums.made else None}
        means |= {f"{task}_": loss / count for task, loss, count in zip(TASKS, sums.losses, sums.counts, strict=True) if count}
        return {
            **{f"{name}loss": mean for name, mean in means.items()},
            **{f"{name}perplexity": perplexity(mean) for name, mean in means.items()},
            "aux_loss": sums.aux / sums.made if sums.made else None,
            "grad_norm": sums.norm if sums.made else None,
            "learning_rate": sums.rate,
            "skipped_steps": sums.skipped,
        }

    def _speed(self) -> dict[str, Any]:
        """Amounts, times, rates, and memory."""
        sums, seconds, supervised = self._sums, self._seconds(), sum(self._sums.counts)
        peak = peak_flops(self._device, self._dtype) * world_size()
        flops = self._flops.of_training(self._trained_tokens(), sums.attended, sums.targets)
        return {
            "tokens": sums.tokens,
            "supervised_tokens": supervised,
            "samples": sums.samples,
            "fill": sums.tokens / max(1, sums.capacity),
            "tokens_per_second": sums.tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "samples_per_second": sums.samples / seconds,
            "step_time": seconds / sums.steps,
            "data_wait": sums.wait / sums.steps,
            "save_stall": sums.stall,
            "mfu": flops / (seconds * peak),
            "memory_gb": peak_memory(self._device) / 1e9,
        }

    def _trained_tokens(self) -> int:
        """Tokens that went through the model: fewer than planned if noise dropped units. Each selects top-k experts in a layer."""
        if self._load is None or not len(self._load):
            return self._sums.tokens
        return int(self._load.sum()) // (len(self._load) * self._config.num_experts_per_tok)

    def _alert(self, line: dict[str, Any]) -> None:
        """Log a warning about overloaded experts, for each modality once in so many lines."""
        if not self._alert_above or this_rank() != 0:
            return
        assert self._load is not None
        groups, layers = expert_groups(self._load, self._config), line["layers"]
        for modality, worst in line["expert_max_over_mean"].items():
            recent = modality in self._alerted and self._lines - self._alerted[modality] < _LINES_BETWEEN_ALERTS
            selections, experts = groups[modality]
            selected = self._config.num_experts_per_tok
            if recent or not is_overloaded(worst, len(experts), selected, self._alert_above):
                continue
            if float(selections[0, experts].double().mean()) < _ALERT_SELECTIONS:
                continue
            self._alerted[modality] = self._lines
            index = layers["expert_max_over_mean"][modality].index(worst)
            layer, expert = index + self._config.first_k_dense_replace, layers["busiest_expert"][modality][index]
            text = "step %d: in layer %d expert %d has %.2f times the mean load of the %s experts, of at most %.2f (load_alert is %g). %s"
            most = most_load(len(experts), selected)
            logger.warning(text, line["step"], layer, expert, worst, modality, most, self._alert_above, ADVICE)


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None if there is no loss, or if the result is no float."""
    return None if loss is None or loss > _MAX_EXPONENT else math.exp(loss)


def peak_memory(device: torch.device) -> int:
    """The most bytes since this process began: of a GPU, what torch had allocated; otherwise, what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _packed(load: torch.Tensor | None) -> dict[str, Any] | None:
    """A load as JSON values, its numbers in one string: state.json of a checkpoint has a line for each item of a list."""
    return None if load is None else {"shape": list(load.shape), "values": " ".join(map(str, load.flatten().tolist()))}


def _unpacked(packed: dict[str, Any] | None) -> torch.Tensor | None:
    if packed is None:
        return None
    return torch.tensor([int(value) for value in packed["values"].split()], dtype=torch.long).view(packed["shape"])
