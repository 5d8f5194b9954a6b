"""MostForCausalLM: transformers' DeepSeek-V2 with the modality-aware router, balance losses and a loss per supervised token.

Shapes: B packs, S positions, D hidden, E experts, L layers with experts, N supervised tokens, V vocabulary.
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
    DeepseekV2MLP,
    DeepseekV2Model,
    DeepseekV2Moe,
    DeepseekV2PreTrainedModel,
    DeepseekV2RMSNorm,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from most_ray.model.attention import MostAttention
from most_ray.model.compat import CACHE, resolve_cache
from most_ray.model.configuration import MostConfig, OriginalMostConfig
from most_ray.model.experts import EXPERTS
from most_ray.model.head import MostHead
from most_ray.model.kernels import SwiGlu, compute_dtype, rms_norm
from most_ray.model.packed import PackedRows, RecordLayout
from most_ray.model.routing import MostRouter, RouterStats, Routing, balance_loss, expert_load, make_routing, modality_of, record_routing
from most_ray.records.template import IGNORE, PADDING


@dataclass
class MostModelOutput(MoeModelOutputWithPast):
    """aux_loss: scalar, summed over layers as RouterStats.aux_loss; expert_load: (L, 2, E)."""

    aux_loss: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None


@dataclass
class MostCausalLMOutput(MoeCausalLMOutputWithPast):
    """`loss` is the mean over supervised tokens plus the weighted balance loss, of which `aux_loss` is the latter part alone.

    With `token_losses_only` or `packed`: token_losses (N,) float32 and aux_sum (unweighted sums), no loss and no logits.
    """

    aux_sum: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None


class MostNorm(DeepseekV2RMSNorm):
    """RMS norm (..., D), its result in the type of the matrix products that take it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, compute_dtype(hidden_states))


class MostUncastNorm(DeepseekV2RMSNorm):
    """The same in the type of its input: what a router takes is not lowered."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, hidden_states.dtype)


class MostMlp(DeepseekV2MLP):
    """The library's gated MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(SwiGlu.apply(self.gate_proj(x), self.up_proj(x)))


class MostMoe(DeepseekV2Moe):
    """Shared experts for every token, routed experts by modality. Padding is not routed: it costs nothing and counts nowhere.

    placement: the expert in each slot (row) of the fused expert tensors, or None where slots are experts; ep_size: ranks that share
    them out (most_ray/model/placement.py).
    """

    expert_slots: torch.Tensor | None

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.gate = MostRouter(config)
        self.shared_experts = MostMlp(config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts)
        self.placement: tuple[int, ...] | None = None
        self.ep_size = 1
        self.register_buffer("expert_slots", None, persistent=False)

    def place(self, placement: tuple[int, ...]) -> None:
        """Take the rows of the expert tensors to be in this order."""
        self.placement = placement
        # The inverse permutation, (E,): expert -> slot.
        self.expert_slots = torch.tensor(placement, device=self.experts.down_proj.device).argsort()

    def forward(self, hidden_states: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, RouterStats]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        n_real = len(routing.modality)
        # index_select, whose backward adds rows; plain indexing's scatters elements and takes a tenth of a small step.
        tokens = flat[:n_real] if routing.tokens is None else flat.index_select(0, routing.tokens)
        _, weights, indices, probabilities = self.gate(tokens, routing.allowed)
        slots = indices if self.expert_slots is None else self.expert_slots[indices]
        lowered = flat.to(compute_dtype(flat))  # once for all that take it
        arguments = lowered[:n_real] if routing.tokens is None else lowered.index_select(0, routing.tokens), slots, weights
        # Where it pays, counts travel to other ranks' experts while the statistics are made, tokens while the shared experts are busy.
        exchange = getattr(self.experts, "exchange", None)
        outgoing = exchange.start_dispatch(*arguments) if exchange and exchange.overlaps else None
        if self.training and self.config.aux_loss_alpha > 0:
            aux_loss = balance_loss(indices, probabilities, routing, self.config.seq_aux)
        else:
            aux_loss = probabilities.new_zeros(())
        stats = RouterStats(aux_loss, expert_load(indices, routing.modality, probabilities.shape[-1]))
        if outgoing:
            arguments = outgoing.send_rows()
        shared = self.shared_experts(lowered)
        routed = self.experts(*arguments)
        if routing.tokens is None:
            routed = F.pad(routed, (0, 0, 0, len(flat) - n_real))
        else:
            routed = torch.zeros_like(lowered).index_copy(0, routing.tokens, routed)
        return (routed + shared).view_as(hidden_states), stats


class MostDecoderLayer(DeepseekV2DecoderLayer):
    """The library's layer, with the routing handed to its experts and their statistics handed back."""

    mlp: nn.Module

    def __init__(self, config: MostConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)  # not DeepseekV2DecoderLayer's, which would build its own classes of these parts first
        has_experts = layer_idx >= config.first_k_dense_replace
        self.self_attn = MostAttention(config, layer_idx)
        self.mlp = MostMoe(config) if has_experts else MostMlp(config)
        self.input_layernorm = MostNorm(config.hidden_size, config.rms_norm_eps)
        post_norm = MostUncastNorm if has_experts else MostNorm
        self.post_attention_layernorm = post_norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """(B, S, D) -> the same, and what the routing did (None in layers without experts); the other arguments are the attention's."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, MostMoe):
            output, stats = self.mlp(normed, routing)
            return hidden_states + output, stats
        return hidden_states + self.mlp(normed), None


class MostPreTrainedModel(DeepseekV2PreTrainedModel):
    config: MostConfig
    config_class = MostConfig
    _no_split_modules: ClassVar = ["MostDecoderLayer"]
    # The library looks for its decorator in this file's source; the experts that carry it are imported from DeepSeek-V2.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs: ClassVar = {
        "hidden_states": OutputRecorder(MostDecoderLayer, index=0),
        "attentions": MostAttention,
        "router_logits": OutputRecorder(MostRouter, index=0),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(EXPERTS if requested_experts is None else requested_experts)

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
        """`modality` (B, S): TEXT, AUDIO or PADDING per token; from the ids (and a 2-d attention mask) where it is not given.
        `previous_load` (L, E): selections of the optimizer step before, for the batch-wise balance loss (see `Routing`).
        `records`: where they lie, for tokens (1, T) of records one behind the other without padding; no mask, no cache.
        `past_key_values`: the older name of `cache`."""
        cache = resolve_cache(cache, past_key_values)
        if modality is None:
            if input_ids is None:
                raise ValueError("pass modality with inputs_embeds: it follows from token ids only")
            modality = modality_of(input_ids, self.config)
            if attention_mask is not None and attention_mask.dim() == 2:
                modality = modality.masked_fill(attention_mask[:, -modality.shape[1] :] == 0, PADDING)
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
        causal_mask = None
        if records is None:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        stats: list[RouterStats] = []
        for layer in self.layers:
            if previous_load is not None and isinstance(layer.mlp, MostMoe):
                routing = routing._replace(previous_load=previous_load[len(stats)])
            hidden_states, layer_stats = layer(
                hidden_states,
                routing=routing,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                records=records,
                **{CACHE: cache},
                **kwargs,
            )
            if layer_stats is not None:
                stats.append(layer_stats)
        return MostModelOutput(
            last_hidden_state=self.norm(hidden_states),
            aux_loss=torch.stack([s.aux_loss for s in stats]).sum() if stats else hidden_states.new_zeros(()),
            expert_load=torch.stack([s.load for s in stats]) if stats else None,
            **{CACHE: cache},
        )


class MostForCausalLM(MostPreTrainedModel, DeepseekV2ForCausalLM):
    """MoST with its language-model head."""

    lm_head: nn.Linear

    def __init__(self, config: MostConfig) -> None:
        super().__init__(config)
        self.model = MostModel(config)
        self.post_init()
        self.lm_head = MostHead.from_linear(self.lm_head)  # after post_init, which would initialize a new module's weight again

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # The library would write rows where they lie; a checkpoint and its export write them in the experts' order.
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
        """Next-token prediction; `labels` (B, S) are aligned with input_ids and shifted here, IGNORE where unsupervised.

        `token_losses_only` runs the head on supervised positions alone and returns their losses one by one, in row order: what
        a trainer needs that divides by the global number of tokens. `packed`, in the place of all other inputs, gives the same faster.
        `past_key_values`: the older name of `cache`.
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
            losses = self.lm_head(outputs.last_hidden_state[0].index_select(0, packed.supervised), packed.targets)
            return MostCausalLMOutput(aux_sum=outputs.aux_loss, token_losses=losses, expert_load=outputs.expert_load)
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
            losses = self.lm_head(hidden_states[:, :-1].flatten(0, 1).index_select(0, supervised), targets.flatten()[supervised])
            return MostCausalLMOutput(aux_sum=outputs.aux_loss, token_losses=losses, expert_load=outputs.expert_load)
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(logits[:, :-1].reshape(len(targets), -1).float(), targets, ignore_index=IGNORE)
            # aux_loss is a sum over rows (sequence-wise) or tokens (batch-wise): the mean is what the original adds.
            units = hidden_states.shape[0] if self.config.seq_aux else hidden_states.shape[:2].numel()
            assert outputs.aux_loss is not None
            aux_loss = self.config.aux_loss_alpha * outputs.aux_loss / units
            loss = loss + aux_loss
        return MostCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            aux_sum=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_load=outputs.expert_load,
            **{CACHE: getattr(outputs, CACHE)},
        )


class OriginalMostForCausalLM(MostForCausalLM):
    """The same class for folders whose config says `"model_type": "MoST"`."""

    config_class = OriginalMostConfig
    config: OriginalMostConfig


def register_auto_classes() -> None:
    """Make transformers' auto classes and weight conversion (per-expert keys <-> fused experts) know MoST."""
    for config_class, model_class in ((MostConfig, MostForCausalLM), (OriginalMostConfig, OriginalMostForCausalLM)):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        mapping = get_checkpoint_conversion_mapping("deepseek_v2")
        register_checkpoint_conversion_mapping(config_class.model_type, mapping, overwrite=True)


# At import, so that whoever has the classes, by whatever way, has them registered (see most_ray/__init__.py).
register_auto_classes()
