"""MostForCausalLM: transformers' DeepSeek-V2 with the modality-aware router, balance losses and a loss per supervised token.

Shapes: B rows, S positions of a row, T tokens that are not padding, D hidden size, E routed experts, L layers with experts, N supervised
tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2DecoderLayer,
    DeepseekV2ForCausalLM,
    DeepseekV2Model,
    DeepseekV2Moe,
    DeepseekV2PreTrainedModel,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from most_ray.model.attention import MostAttention
from most_ray.model.compat import CACHE, resolve_cache
from most_ray.model.configuration import MostConfig, OriginalMostConfig
from most_ray.model.experts import DEFAULT_KERNEL
from most_ray.model.head import MostHead
from most_ray.model.kernels import MostMlp, MostNorm, MostUncastNorm, compute_dtype
from most_ray.model.packed import PackedRows, RecordLayout
from most_ray.model.routing import MostRouter, RouterStats, Routing, balance_loss, expert_load, make_routing, modality_of, record_routing
from most_ray.records.template import IGNORE, PADDING


@dataclass
class MostModelOutput(MoeModelOutputWithPast):
    """The library's output of the decoder stack, with statistics of the routing."""

    aux_loss: torch.Tensor | None = None  # scalar, the sum of RouterStats.aux_loss over layers
    expert_load: torch.Tensor | None = None  # int64 (L, 2, E), RouterStats.load of each layer


@dataclass
class MostCausalLMOutput(MoeCausalLMOutputWithPast):
    """The library's output, with statistics of the routing. `loss` is the mean over supervised tokens plus `aux_loss`, the weighted balance
    loss. With `token_losses_only` or `packed` there are token losses, but no loss and no logits."""

    aux_sum: torch.Tensor | None = None  # scalar, the balance loss of `MostModelOutput`, without weight or division
    token_losses: torch.Tensor | None = None  # float32 (N,)
    expert_load: torch.Tensor | None = None  # int64 (L, 2, E)


class MostMoe(DeepseekV2Moe):
    """Shared experts for every token, routed experts by modality. Padding is not routed: it takes no time and is not counted."""

    expert_slots: torch.Tensor | None  # (E,), the slot of each expert; None where slots are experts

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.gate = MostRouter(config)
        self.shared_experts = MostMlp(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)
        self.placement: tuple[int, ...] | None = None  # the expert in each slot (see `placement`); None where slots are experts
        self.ep_size = 1  # ranks that the slots are distributed over
        self.register_buffer("expert_slots", None, persistent=False)

    def place(self, placement: tuple[int, ...]) -> None:
        """Declare that the rows of the expert tensors are in this order."""
        self.placement = placement
        self.expert_slots = torch.tensor(placement, device=self.experts.down_proj.device).argsort()

    def forward(self, hidden_states: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, RouterStats]:
        """The sum of routed and shared experts for hidden states (B, S, D), in their shape, and statistics of the routing."""
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        n_real = len(routing.modality)
        # By index_select, whose backward adds rows; that of indexing scatters elements and would take a tenth of a small step.
        tokens = flat[:n_real] if routing.tokens is None else flat.index_select(0, routing.tokens)
        _, weights, indices, probabilities = self.gate(tokens, routing.allowed)
        slots = indices if self.expert_slots is None else self.expert_slots[indices]
        lowered = flat.to(compute_dtype(flat))  # cast once for all experts
        arguments = lowered[:n_real] if routing.tokens is None else lowered.index_select(0, routing.tokens), slots, weights
        # Where it is faster, counts are exchanged while the statistics are computed, and rows while the shared experts are.
        exchange = getattr(self.experts, "exchange", None)
        pending = exchange.start_dispatch(*arguments) if exchange and exchange.overlaps else None
        balanced = self.training and self.config.aux_loss_alpha > 0
        aux_loss = balance_loss(indices, probabilities, routing, self.config.seq_aux) if balanced else probabilities.new_zeros(())
        stats = RouterStats(aux_loss, expert_load(indices, routing.modality, probabilities.shape[-1]))
        if pending:
            arguments = pending.send_rows()
        shared = self.shared_experts(lowered)
        routed = self.experts(*arguments)
        if routing.tokens is None:
            routed = F.pad(routed, (0, 0, 0, len(flat) - n_real))
        else:
            routed = torch.zeros_like(lowered).index_copy(0, routing.tokens, routed)
        return (routed + shared).view_as(hidden_states), stats


class MostDecoderLayer(DeepseekV2DecoderLayer):
    """The library's decoder layer, which takes the routing and returns its statistics."""

    mlp: nn.Module

    def __init__(self, config: MostConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not DeepseekV2DecoderLayer's, which would build its own classes of these parts first
        has_experts = layer_idx >= config.first_k_dense_replace
        self.self_attn = MostAttention(config, layer_idx)
        self.mlp = MostMoe(config) if has_experts else MostMlp(config)
        self.input_layernorm = MostNorm(config.hidden_size, config.rms_norm_eps)
        post_norm = MostUncastNorm if has_experts else MostNorm
        self.post_attention_layernorm = post_norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, routing: Routing, **kwargs: Any) -> tuple[torch.Tensor, RouterStats | None]:
        """Hidden states (B, S, D) of the next layer, and statistics of the routing (None in layers without experts). `kwargs` are those of
        the attention."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, MostMoe):
            output, stats = self.mlp(normed, routing)
            return hidden_states + output, stats
        return hidden_states + self.mlp(normed), None


class MostPreTrainedModel(DeepseekV2PreTrainedModel):
    """The library's base class, with MoST's configuration, modules and default expert kernel."""

    config: MostConfig
    config_class = MostConfig
    _no_split_modules: ClassVar = ["MostDecoderLayer"]
    # The library looks for its decorator in this file's source, but the decorated experts are imported from DeepSeek-V2.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs: ClassVar = {
        "hidden_states": OutputRecorder(MostDecoderLayer, index=0),
        "attentions": MostAttention,
        "router_logits": OutputRecorder(MostRouter, index=0),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(DEFAULT_KERNEL if requested_experts is None else requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MostRouter) and module.e_score_correction_bias is not None:
            initialization.zeros_(module.e_score_correction_bias)


class MostModel(MostPreTrainedModel, DeepseekV2Model):
    """The decoder stack."""

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([MostDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = MostNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        modality: torch.Tensor | None = None,
        previous_load: torch.Tensor | None = None,
        records: RecordLayout | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MostModelOutput:
        """The library's forward of the decoder stack, with further arguments. `past_key_values` is the older name of `cache`.

        Args:
            modality: (B, S), TEXT, AUDIO or PADDING; by default it follows from input_ids and a two-dimensional attention mask.
            previous_load: (L, E), selections of the optimizer step before, for the batch-wise balance loss (see `Routing`).
            records: the layout of packed records, for tokens (1, T or more) without a mask or a cache.
        """
        cache = resolve_cache(cache, past_key_values)
        if modality is None:
            modality = self._modality(input_ids, attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if records is not None:
            n_real = len(records.segments)
            routing = record_routing(modality.view(-1)[:n_real], records.segments, len(records), self.config)
        else:
            packed = position_ids if cache is None and attention_mask is None else None
            routing = make_routing(modality, packed, self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        shared: dict[str, Any] = {"position_ids": position_ids, CACHE: cache}
        causal_mask = None
        if records is None:
            causal_mask = create_causal_mask(config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **shared)
        hidden_states = inputs_embeds
        shared |= {"attention_mask": causal_mask, "position_embeddings": self.rotary_emb(hidden_states, position_ids)}
        stats: list[RouterStats] = []
        for layer in self.layers:
            if previous_load is not None and isinstance(layer.mlp, MostMoe):
                routing = routing._replace(previous_load=previous_load[len(stats)])
            hidden_states, layer_stats = layer(hidden_states, routing=routing, use_cache=use_cache, records=records, **shared, **kwargs)
            if layer_stats is not None:
                stats.append(layer_stats)
        return MostModelOutput(
            last_hidden_state=self.norm(hidden_states),
            aux_loss=torch.stack([s.aux_loss for s in stats]).sum() if stats else hidden_states.new_zeros(()),
            expert_load=torch.stack([s.load for s in stats]) if stats else None,
            **{CACHE: cache},
        )

    def _modality(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The modality (B, S) of token ids (B, S); PADDING where a two-dimensional attention mask is 0."""
        if input_ids is None:
            raise ValueError("pass modality with inputs_embeds: it follows only from token ids")
        modality = modality_of(input_ids, self.config)
        if attention_mask is not None and attention_mask.dim() == 2:
            modality = modality.masked_fill(attention_mask[:, -modality.shape[1] :] == 0, PADDING)
        return modality


class MostForCausalLM(MostPreTrainedModel, DeepseekV2ForCausalLM):
    """MoST with its language-model head."""

    lm_head: nn.Linear

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.model = MostModel(config)
        self.post_init()
        self.lm_head = MostHead.from_linear(self.lm_head)  # after post_init, which would initialize a new module's weight again

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # The library would write rows in slot order; checkpoints and their export write them in the experts' order.
        assert all(getattr(layer.mlp, "placement", None) is None for layer in self.model.layers), "expert rows are in slot order"
        super().save_pretrained(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        modality: torch.Tensor | None = None,
        token_losses_only: bool = False,
        packed: PackedRows | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MostCausalLMOutput:
        """Next-token prediction: the library's forward with further arguments, and those of `MostModel.forward`.

        Args:
            labels: (B, S), aligned with input_ids and shifted here; IGNORE where unsupervised.
            token_losses_only: run the head on supervised positions only and return the loss of each, in the order of rows, as a trainer
                needs that divides by the global number of tokens.
            packed: rows without padding, in place of all other inputs; returns what `token_losses_only` returns, faster.
        """
        if packed is not None:
            outputs = self.model(
                input_ids=packed.input_ids,
                position_ids=packed.positions,
                modality=packed.modality,
                records=packed.records,
                use_cache=False,
                **kwargs,
            )
            return self._token_losses(outputs, outputs.last_hidden_state[0], packed.supervised, packed.targets)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=resolve_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            modality=modality,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None and token_losses_only:
            targets = labels[:, 1:]
            supervised = (targets != IGNORE).flatten().nonzero().squeeze(-1)
            return self._token_losses(outputs, hidden_states[:, :-1].flatten(0, 1), supervised, targets.flatten()[supervised])
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss, aux_loss = (None, None) if labels is None else self._mean_loss(outputs, logits, labels)
        return MostCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            aux_sum=outputs.aux_loss,
            logits=logits,
            **{name: getattr(outputs, name) for name in ("hidden_states", "attentions", "router_logits", "expert_load", CACHE)},
        )

    def _token_losses(
        self, outputs: MostModelOutput, hidden: torch.Tensor, supervised: torch.Tensor, targets: torch.Tensor
    ) -> MostCausalLMOutput:
        """The losses of targets (N,), predicted at the indices `supervised` (N,) of hidden states (tokens, D)."""
        losses = self.lm_head(hidden.index_select(0, supervised), targets)
        return MostCausalLMOutput(aux_sum=outputs.aux_loss, token_losses=losses, expert_load=outputs.expert_load)

    def _mean_loss(self, outputs: MostModelOutput, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss of labels (B, S) under logits (B, S, V) with the weighted balance loss, and the latter, both scalars."""
        targets = labels[:, 1:].reshape(-1)
        loss = F.cross_entropy(logits[:, :-1].reshape(len(targets), -1).float(), targets, ignore_index=IGNORE)
        # The original MoST adds the mean of the balance loss, here a sum over rows (sequence-wise) or tokens (batch-wise).
        n_summed = labels.shape[0] if self.config.seq_aux else labels.numel()
        assert outputs.aux_loss is not None
        aux_loss = self.config.aux_loss_alpha * outputs.aux_loss / n_summed
        return loss + aux_loss, aux_loss


class OriginalMostForCausalLM(MostForCausalLM):
    """MoST for folders whose config.json has `"model_type": "MoST"`."""

    config_class = OriginalMostConfig
    config: OriginalMostConfig


def register_auto_classes() -> None:
    """Register MoST with transformers' auto classes and its conversion of weights (keys per expert to and from fused experts)."""
    for config_class, model_class in ((MostConfig, MostForCausalLM), (OriginalMostConfig, OriginalMostForCausalLM)):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        mapping = get_checkpoint_conversion_mapping("deepseek_v2")
        register_checkpoint_conversion_mapping(config_class.model_type, mapping, overwrite=True)


# At import, so that the classes are registered wherever they are imported from (see most_ray/registration.py).
register_auto_classes()
