"""Other ways to train the same model on the same records, each in its ordinary documented form, to be measured beside ours.

- `TransformersPeer`: transformers' DeepSeek-V2 in a plain PyTorch loop on our packed rows, in float32.
- `train_with_trainer`: Hugging Face's Trainer with its default arguments and a padding collator, in float32.
- `OriginalPeer`: as the original MoST does it, whose code is not here: reconstructed from its README (DeepSeek-V2, routing by modality),
  from what is known of its router and losses, and from the modelling code that DeepSeek-V2 was published with, which it was made from:
  tokens repeated for each of their experts and a loop over experts that masks them, eager attention, full float32 logits. Its documented
  batch is one record, accumulated; here all records of a step are one padded batch, which is faster.

Shapes: M forward passes, B rows, S positions, T tokens (padding too), D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP, DeepseekV2Moe
from transformers.trainer_callback import PrinterCallback

from most_ray.config import OptimizerOptions
from most_ray.data.batch import Batch
from most_ray.model.build import quiet_transformers
from most_ray.model.configuration import MostConfig
from most_ray.model.modeling import MostForCausalLM
from most_ray.records.template import IGNORE, PADDING
from tests.benchmarks.common import Took

Record = dict[str, list[int]]  # input_ids and labels


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Took:
        return Took(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def records_of(batch: Batch) -> list[Record]:
    """The records of packed rows, one by one."""
    found: list[Record] = []
    arrays = (batch.input_ids, batch.labels, batch.positions, batch.modality)
    for ids, labels, positions, modality in zip(*(array.reshape(-1, array.shape[-1]) for array in arrays), strict=True):
        used = int((modality != PADDING).sum())
        borders = [*np.flatnonzero(positions[:used] == 0).tolist(), used]
        found += [{"input_ids": ids[a:b].tolist(), "labels": labels[a:b].tolist()} for a, b in itertools.pairwise(borders)]
    return found


@dataclasses.dataclass(frozen=True)
class PaddingCollator:
    """Rows of one record each, as long as the longest: input_ids, labels, attention_mask, int64 (B, S)."""

    pad: int

    def __call__(self, records: Sequence[Record]) -> dict[str, torch.Tensor]:
        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

        return {
            "input_ids": padded([record["input_ids"] for record in records], self.pad),
            "labels": padded([record["labels"] for record in records], IGNORE),
            "attention_mask": padded([[1] * len(record["input_ids"]) for record in records], 0),
        }


def stock_model(ours: MostForCausalLM, attention: str = "sdpa", experts: str = "grouped_mm") -> Any:
    """transformers' DeepseekV2ForCausalLM with our weights; it knows no modalities and no balance loss."""
    names = {field.name for field in dataclasses.fields(DeepseekV2Config) if field.init} & ours.config.to_dict().keys()
    values = {name: value for name, value in ours.config.to_dict().items() if name in names and name not in ("architectures", "dtype")}
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            DeepseekV2Config(**values), attn_implementation=attention, experts_implementation=experts, dtype=torch.float32
        )
    weights = ours.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.train()


class _Loop:
    """What every plain loop does behind the backward pass: clip, update, schedule."""

    def __init__(self, model: nn.Module, options: OptimizerOptions, total_steps: int) -> None:
        self.model, self._clip = model, options.max_grad_norm
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        self._scheduler = get_scheduler("cosine", self._optimizer, options.warmup_steps, total_steps)

    def update(self) -> float:
        """The gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return float(norm)


class TransformersPeer:
    """A plain loop over packed rows. `dtype`: autocast type, or None for float32."""

    def __init__(self, ours: MostForCausalLM, options: OptimizerOptions, total_steps: int, dtype: torch.dtype | None = None) -> None:
        self._model, self._dtype = stock_model(ours), dtype
        self._loop = _Loop(self._model, options, total_steps)

    def step(self, batch: Batch) -> tuple[float, float]:
        """One optimizer step; its loss, a mean over forward passes, and gradient norm."""
        passes, total = len(batch.input_ids), 0.0
        for index in range(passes):
            ids, positions, labels = (torch.from_numpy(a[index]).long() for a in (batch.input_ids, batch.positions, batch.labels))
            with torch.autocast("cpu", self._dtype, enabled=self._dtype is not None):
                # Without a mask and without a cache the library tells records apart by positions that begin anew.
                loss = self._model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, labels=labels).loss / passes
            loss.backward()
            total += float(loss.detach())
        return total, self._loop.update()


class _Clock(TrainerCallback):
    def __init__(self, told: Callable[[Took], None]) -> None:
        self._told = told

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._watch = Stopwatch()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._told(self._watch.read())
        self._watch = Stopwatch()


def train_with_trainer(
    ours: MostForCausalLM, steps: Sequence[Sequence[Record]], folder: str | Path, told: Callable[[Took], None] = lambda _: None
) -> float:
    """Hugging Face's Trainer over `steps` of equally many records each; the mean loss.

    Arguments are the default ones but for the batch size, the order, which is the given one, and that nothing is logged or saved. `told`
    gets what each step took, its data included; what it does itself counts in none of them.
    """
    size = len(steps[0])
    assert all(len(step) == size for step in steps), "the Trainer's batches are of one size"
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    assert ours.config.pad_token_id is not None
    with quiet_transformers():
        trainer = Trainer(
            stock_model(ours),
            arguments,
            data_collator=PaddingCollator(ours.config.pad_token_id),
            train_dataset=[record for step in steps for record in step],
            callbacks=[_Clock(told)],
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss)


class _AddGradient(torch.autograd.Function):
    """A tensor as it is, with a scalar loss whose gradient joins in the backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.dtype = loss.dtype
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], torch.ones((), dtype=ctx.dtype)


class MaskedLoopMoe(nn.Module):
    """Experts one after the other, each on the tokens that a mask finds for it; padding is routed like text.

    audio: (B, S) bool, set before each forward pass; None where routing does not look at modality.
    """

    audio: torch.Tensor | None

    def __init__(self, moe: DeepseekV2Moe, config: MostConfig) -> None:
        super().__init__()
        self._config, self.audio = config, None
        self.weight = nn.Parameter(moe.gate.weight.detach().clone())
        self.shared_experts = moe.shared_experts
        self.experts = nn.ModuleList()
        for gate_up, down in zip(moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach(), strict=True):
            gate, up = gate_up.chunk(2)
            expert = DeepseekV2MLP(config, intermediate_size=config.moe_intermediate_size)
            expert.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down})
            self.experts.append(expert)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        weights, indices, aux_loss = self._route(hidden)
        chosen = indices.view(-1)
        repeated = hidden.view(-1, hidden.shape[-1]).repeat_interleave(indices.shape[-1], dim=0)
        outputs = torch.empty_like(repeated)
        for index, expert in enumerate(self.experts):
            outputs[chosen == index] = expert(repeated[chosen == index])
        mixed = (outputs.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1).view_as(hidden)
        if self._config.aux_loss_alpha > 0:
            mixed = _AddGradient.apply(mixed, aux_loss)
        return mixed + self.shared_experts(hidden)

    def _route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """weights, indices (T, K) and the weighted balance loss, sequence-wise."""
        config = self._config
        experts, top_k = config.n_routed_experts, int(config.num_experts_per_tok or 1)
        scores = nn.functional.linear(hidden.view(-1, hidden.shape[-1]).float(), self.weight.float()).softmax(dim=-1)
        if self.audio is not None:
            allowed = torch.zeros(2, experts, dtype=torch.bool)
            allowed[0, config.text_expert_indices] = True
            allowed[1, config.audio_expert_indices] = True
            scores = scores.masked_fill(~allowed[self.audio.view(-1).long()], 0.0)
        weights, indices = torch.topk(scores, top_k, dim=-1, sorted=False)
        if config.norm_topk_prob and top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        rows, length = hidden.shape[:2]
        counts = torch.zeros(rows, experts).scatter_add_(1, indices.view(rows, -1), torch.ones(rows, length * top_k))
        frequency = counts * experts / (length * top_k)
        aux_loss = (frequency * scores.view(rows, length, -1).mean(dim=1)).sum(dim=1).mean() * config.aux_loss_alpha
        return weights * config.routed_scaling_factor, indices, aux_loss


class OriginalPeer:
    """A loop over padded rows with experts, attention and loss computed as the original does."""

    def __init__(self, ours: MostForCausalLM, options: OptimizerOptions, total_steps: int) -> None:
        self._model, self._config = stock_model(ours, attention="eager", experts="eager"), ours.config
        self._moes: list[MaskedLoopMoe] = []
        for layer in self._model.model.layers:
            if isinstance(layer.mlp, DeepseekV2Moe):
                layer.mlp = MaskedLoopMoe(layer.mlp, ours.config)
                self._moes.append(layer.mlp)
        assert ours.config.pad_token_id is not None
        self._collate = PaddingCollator(ours.config.pad_token_id)
        self._loop = _Loop(self._model, options, total_steps)

    def step(self, records: Sequence[Record]) -> tuple[float, float]:
        """One optimizer step on all records in one forward pass; its loss and gradient norm."""
        batch, config = self._collate(records), self._config
        ids, labels = batch["input_ids"], batch["labels"]
        audio = (ids >= config.first_audio_token) & (ids <= config.last_audio_token)
        for moe in self._moes:
            moe.audio = audio if config.use_modality_aware_routing else None
        hidden = self._model.model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
        logits = self._model.lm_head(hidden).float()
        logits, targets = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        loss = nn.CrossEntropyLoss()(logits.view(-1, logits.shape[-1]), targets.view(-1))
        loss.backward()
        return float(loss.detach()), self._loop.update()
