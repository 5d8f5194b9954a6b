"""The memory of a rank in training and the size of checkpoints, from the model's shapes alone: no weight is allocated.

Weights, gradients and moments follow from the layout and are exact, and so are checkpoints but for the headers of other ranks' files.
Activations that autograd keeps are summed term by term, and a test compares the sum with autograd's own; what FSDP gathers and the head's
logits are peaks. Not counted: a device's context, its libraries' buffers, gradients of activations, fragmentation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from most_ray.checkpoint.reader import random_shards
from most_ray.checkpoint.shards import Staging, TensorShard, shard_of
from most_ray.config import Moments, Recompute
from most_ray.distributed.topology import Topology
from most_ray.model.configuration import MostConfig
from most_ray.model.head import logits_block
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.placement import plan_placement
from most_ray.optim.optimizer import block_size
from most_ray.optim.train_state import BALANCE_LOAD

FLOAT32_BYTES = 4  # the type of weights, gradients, moments and the residual stream, with autocast or without
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that holds the most."""

    weights: int  # its shards, in float32, like the next two
    gradients: int
    moments: int  # both of AdamW's
    gathered: int  # peak of what FSDP gathers
    copies: int  # autocast's weights in half precision; of routed experts those of one layer
    activations: int  # that autograd keeps, of all layers
    selective: int  # the same if the backward pass recomputes attention, a layer at a time
    recomputed: int  # the same if it recomputes whole layers
    logits: int  # of a block of the head, with their gradients

    def total(self, recompute: Recompute) -> int:
        """Return the sum, with the activations of a kind of recomputation."""
        kept = {"none": self.activations, "selective": self.selective, "full": self.recomputed}[recompute]
        return self.weights + self.gradients + self.moments + self.gathered + self.copies + kept + self.logits


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of a rank, and the types that it computes in."""

    rows: int
    length: int  # tokens in a row
    supervised: int  # supervised tokens in all rows
    half: bool  # under autocast in a type of two bytes
    on_gpu: bool  # where autocast covers attention too
    moment: float = FLOAT32_BYTES  # bytes of each of AdamW's two moments of a parameter

    @property
    def width(self) -> int:
        """Bytes of a number in linear layers."""
        return 2 if self.half else FLOAT32_BYTES


class ModelShapes:
    """A model's parameters and saved state without storage."""

    def __init__(self, config: MostConfig) -> None:
        self.config = config
        with torch.device("meta"):
            model = MostForCausalLM(config)
        self.parameters: dict[str, torch.Size] = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.state: dict[str, torch.Tensor] = model.state_dict()  # on the meta device, with the buffers that are saved
        # Names of the weights that autocast casts; routers and routed experts are not among them.
        self.linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self.layers = len(model.model.layers)

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.parameters.values()))

    def rows(self, name: str, topology: Topology, rank: int) -> range:
        """Return the rows of a parameter, in the order of the running model, that a rank of a replica holds. FSDP2 cuts the first dimension
        into `fsdp` chunks of equal size, the last of which may be short or empty; of experts it cuts those of the expert-parallel rank."""
        n, size, start = self.parameters[name][0], topology.fsdp, 0
        if _EXPERTS in name and topology.ep > 1:
            n //= topology.ep
            start, size, rank = (rank % topology.ep) * n, size // topology.ep, rank // topology.ep
        chunk = -(-n // size)
        return range(start + min(rank * chunk, n), start + min((rank + 1) * chunk, n))

    @property
    def _by_modality(self) -> tuple[Sequence[int], Sequence[int]]:
        config = self.config
        return (config.text_expert_indices or (), config.audio_expert_indices or ()) if config.use_modality_aware_routing else ((), ())

    @property
    def groups(self) -> tuple[frozenset[int], ...]:
        """The experts that a token of each modality may use."""
        aware = self.config.use_modality_aware_routing
        return tuple(map(frozenset, self._by_modality if aware else [range(self.config.n_routed_experts)]))

    def placement(self, ep_size: int) -> tuple[int, ...]:
        """Return the expert in each row of the expert tensors."""
        return plan_placement(*self._by_modality, self.config.n_routed_experts, ep_size)

    def units(self) -> dict[str, tuple[int, int]]:
        """Return the units that FSDP2 gathers at once, as transformers wraps DeepSeek-V2: name -> number of parameters other than routed
        experts', and of routed experts. The last norm belongs to the head's unit."""
        found: dict[str, tuple[int, int]] = {}
        for name, shape in self.parameters.items():
            unit = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name.removesuffix(".weight")
            unit = "lm_head" if unit == "model.norm" else unit
            (dense, experts), count = found.get(unit, (0, 0)), math.prod(shape)
            found[unit] = (dense, experts + count) if _EXPERTS in name else (dense + count, experts)
        return found

    def parameters_on(self, topology: Topology, rank: int) -> int:
        """Return the number of parameters on a rank of a replica."""
        return sum(len(self.rows(name, topology, rank)) * math.prod(shape[1:]) for name, shape in self.parameters.items())


def memory_of(shapes: ModelShapes, topology: Topology, forward: ForwardPass) -> Memory:
    """Return the peak memory of the first rank of a replica, which never holds less than another."""
    config, count, tokens = shapes.config, shapes.parameters_on(topology, 0), forward.rows * forward.length
    activations, largest_layer = _activations(config, forward, topology.ep > 1)
    attention = tokens * (_attention(config, forward) - _attention_input(config, forward))
    return Memory(
        weights=FLOAT32_BYTES * count,
        gradients=FLOAT32_BYTES * count,
        moments=round(2 * forward.moment * count),
        gathered=_gathered(shapes, topology),
        copies=_copies(shapes, topology) if forward.half else 0,
        activations=activations,
        selective=activations - shapes.layers * attention + attention,
        recomputed=shapes.layers * FLOAT32_BYTES * config.hidden_size * tokens + largest_layer,
        logits=_logits(config.vocab_size, forward),
    )


def _copies(shapes: ModelShapes, topology: Topology) -> int:
    """Return autocast's copies: of linear layers for the whole pass; of experts while their layer runs, after FSDP has gathered them."""
    linear = sum(math.prod(shapes.parameters[name]) for name in shapes.linear if name != "lm_head.weight")
    return 2 * (linear + max(experts for _, experts in shapes.units().values()) // topology.ep)


def _logits(vocabulary: int, forward: ForwardPass) -> int:
    """Return the logits of one of the blocks that the head cuts the vocabulary into; in half precision also as float32, and as the input of
    the next products. If one block is all, the backward pass holds those of the forward pass too."""
    block = logits_block(forward.supervised, vocabulary)
    each = (2 + FLOAT32_BYTES + 2 if forward.half else FLOAT32_BYTES) + (FLOAT32_BYTES if block == vocabulary else 0)
    return each * forward.supervised * block


def _gathered(shapes: ModelShapes, topology: Topology) -> int:
    """Return a layer's weights and gradients, the weights of the next layer that are being gathered and the gradients of the previous one
    that are being reduced; or the same of the head and a layer, if that is more."""
    if topology.world_size == 1:
        return 0
    units = {name: FLOAT32_BYTES * (dense + experts // topology.ep) for name, (dense, experts) in shapes.units().items()}
    largest = max(size for unit, size in units.items() if unit.startswith("model.layers."))
    return max(4 * largest, 2 * units["lm_head"] + 2 * largest)


def _activations(config: MostConfig, forward: ForwardPass, exchanged: bool) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a forward pass on full rows: in all layers, and in the largest layer alone."""
    attention, tokens = _attention(config, forward), forward.rows * forward.length
    n_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    n_experts = config.num_hidden_layers - n_dense
    dense, experts = attention + _mlp(config, config.intermediate_size, forward), attention + _experts(config, forward, exchanged)
    last = _norm(config.hidden_size)
    shared = 4 * 8 + FLOAT32_BYTES * config.qk_rope_head_dim  # ids, positions, record numbers, and angles as complex numbers
    return tokens * (n_dense * dense + n_experts * experts + last + shared), tokens * max(dense * (n_dense > 0), experts * (n_experts > 0))


# The following are bytes that autograd keeps for each token of a layer.


def _norm(width: int) -> int:
    """An RMS norm's input in float32, and its factor."""
    return FLOAT32_BYTES * width + FLOAT32_BYTES


def _inner_norm(width: int, forward: ForwardPass) -> int:
    """The library's norm between two linear layers: its input in float32, and in the layers' type the normalised values and the second
    one's input."""
    return (FLOAT32_BYTES + 2 * forward.width) * width + FLOAT32_BYTES


def _attention_input(config: MostConfig, forward: ForwardPass) -> int:
    """The norm before attention, and attention's input: all that selective recomputation keeps of it."""
    return _norm(config.hidden_size) + forward.width * config.hidden_size


def _attention(config: MostConfig, forward: ForwardPass) -> int:
    """Attention and the norm before it: queries, keys, values and output in the width of keys, the normaliser, and the output in its own
    width."""
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    kept = _attention_input(config, forward) + _inner_norm(config.kv_lora_rank, forward)
    kept += 0 if forward.half else FLOAT32_BYTES * config.qk_rope_head_dim
    if config.q_lora_rank is not None:
        kept += _inner_norm(config.q_lora_rank, forward)
    products = (2 if forward.half and forward.on_gpu else FLOAT32_BYTES) * 4 * key
    return kept + config.num_attention_heads * (products + forward.width * config.v_head_dim + FLOAT32_BYTES)


def _mlp(config: MostConfig, intermediate: int, forward: ForwardPass) -> int:
    """An MLP and the norm before it: its input, gate, up projection and the input of the down projection."""
    return _norm(config.hidden_size) + forward.width * (config.hidden_size + 3 * intermediate)


def _experts(config: MostConfig, forward: ForwardPass, exchanged: bool) -> int:
    """Router, routed experts and shared experts. All take the norm's output, the router in float32."""
    hidden, intermediate, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    masks = 2 if config.use_modality_aware_routing else 0
    router = (2 * FLOAT32_BYTES + masks) * config.n_routed_experts + (8 + FLOAT32_BYTES) * chosen
    # Of each pair of token and expert: gate, up projection and three indices; if exchanged, the row as received and as returned.
    pair = 2 * forward.width * intermediate + 3 * 8 + (2 * forward.width * hidden + 8 if exchanged else 0)
    shared = _mlp(config, intermediate * config.n_shared_experts, forward)
    return shared + (FLOAT32_BYTES * hidden if forward.half else 0) + router + chosen * pair


class _FileSize(Staging):
    """The writer's layout of a file, without its bytes."""

    def prepare(self, shards: Sequence[TensorShard]) -> None:
        del shards
        self._buffer = torch.empty(1 << 62, dtype=torch.uint8, device="meta")


def checkpoint_sizes(shapes: ModelShapes, topology: Topology, moments: Moments) -> tuple[int, int]:
    """Return the bytes of the first rank's file, which is the largest, and of all ranks' files. Headers of other ranks are assumed to be as
    long as the first one's. The tokenizer and the JSON files, some megabytes at most, are not counted."""
    random, shards = random_shards(), list(_first_rank_shards(shapes, topology, moments))
    first, replica = _FileSize(), _FileSize()
    first.plan([*shards, *random])
    replica.plan(random)  # a rank of a further replica writes only its random states
    each = len(first._header) + sum(shard.global_bytes for shard in random)
    total = sum(shard.global_bytes for shard in shards) + topology.fsdp * each + (topology.world_size - topology.fsdp) * replica.nbytes
    return first.nbytes, total


def _first_rank_shards(shapes: ModelShapes, topology: Topology, moments: Moments) -> Iterator[TensorShard]:
    """Yield what the first rank writes, in the order of `checkpoint.reader.state_shards`."""
    sharded = {name: _shard(shapes, topology, name, shape, torch.float32) for name, shape in shapes.parameters.items()}
    for name, tensor in shapes.state.items():
        key = f"model.{name}"
        yield dataclasses.replace(sharded[name], name=key) if name in sharded else shard_of(key, tensor, rank=0)
    for name, shard in sharded.items():
        stored = _moment(shapes, topology, name, shard) if moments == "int8" else {"": shard}
        for moment in ("exp_avg", "exp_avg_sq"):
            for form, each in stored.items():
                yield dataclasses.replace(each, name=f"optimizer.{name}.{moment}{form}")
        yield shard_of(f"optimizer.{name}.step", torch.empty((), device="meta"), rank=0)
    if not shapes.config.seq_aux and shapes.config.aux_loss_alpha > 0:
        layers = sum(name.endswith(".mlp.gate.weight") for name in shapes.parameters)
        load = torch.empty(layers, shapes.config.n_routed_experts, dtype=torch.int64, device="meta")
        yield shard_of(f"state.{BALANCE_LOAD}", load, rank=0)


def _moment(shapes: ModelShapes, topology: Topology, name: str, shard: TensorShard) -> dict[str, TensorShard]:
    """Return the first rank's shards of a moment in 8 bits by the suffixes of `optimizer.saved_state`; a small moment stays in float32."""
    shape = shapes.parameters[name]
    block = block_size(torch.empty(shape, device="meta"))
    if block is None:
        return {"": shard}
    scale = (shape[0], math.prod(shape[1:]) // block)
    return {"_codes": _shard(shapes, topology, name, shape, torch.uint8), "_scale": _shard(shapes, topology, name, scale, torch.float32)}


def _shard(shapes: ModelShapes, topology: Topology, name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorShard:
    """Return the first rank's shard of a tensor of a global shape, whose rows are laid out like a parameter's."""
    rows = shapes.rows(name, topology, 0)
    order = [shapes.placement(topology.ep)[row] for row in rows] if _EXPERTS in name else rows
    local = torch.empty((len(rows), *shape[1:]), dtype=dtype, device="meta")
    return dataclasses.replace(shard_of(name, local, order, rank=0), shape=tuple(shape))


def checkpoint_bytes(config: MostConfig, topology: Topology, moments: Moments) -> int:
    """Return the bytes of a checkpoint's weights, moments and random states on a layout."""
    return checkpoint_sizes(ModelShapes(config), topology, moments)[1]
