"""What a rank's training holds in memory and what its checkpoints weigh, from the model's shapes alone: no weight is made.

Weights, gradients and moments follow from the layout and are exact, and so are checkpoints but for headers of other ranks' files. What
autograd keeps for the backward pass is summed up term by term, and a test holds it against autograd's own account; what FSDP gathers and
the head's logits are peaks. Not counted: a device's context, its libraries' buffers, gradients of activations, fragmentation.
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

FULL = 4  # bytes of a float32: what weights, gradients, moments and the residual stream are in, autocast or not
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, the one that holds most. weights, gradients, moments: its shards in float32, AdamW's moments both. gathered: the
    peak of what FSDP puts together. copies: weights in half precision, which autocast keeps, of experts a layer's. activations: of all
    layers; selective, recomputed: the same where the backward pass computes attention or whole layers again, one at a time. logits: a
    block of the head's, with their gradients."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    copies: int
    activations: int
    selective: int
    recomputed: int
    logits: int

    def total(self, recompute: Recompute) -> int:
        """With what is computed again."""
        kept = {"none": self.activations, "selective": self.selective, "full": self.recomputed}[recompute]
        return self.weights + self.gradients + self.moments + self.gathered + self.copies + kept + self.logits


@dataclass(frozen=True)
class Load:
    """A forward pass of a rank: rows of length tokens, and how many of its tokens are supervised. half: under autocast in a type of two
    bytes; on_gpu: attention is in it too; moment: bytes of each of AdamW's two moments of a parameter."""

    rows: int
    length: int
    supervised: int
    half: bool
    on_gpu: bool
    moment: float = FULL


class Shapes:
    """The model's parameters and saved state by name, each a shape without storage."""

    def __init__(self, config: MostConfig) -> None:
        self.config = config
        with torch.device("meta"):
            model = MostForCausalLM(config)
        self.parameters: dict[str, torch.Size] = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.state: dict[str, torch.Tensor] = model.state_dict()  # with the buffers that are saved
        self.linear = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }  # what autocast casts: neither routers nor routed experts are
        self.layers = len(model.model.layers)

    @property
    def count(self) -> int:
        """Parameters of the model."""
        return sum(map(math.prod, self.parameters.values()))

    def rows(self, name: str, topology: Topology, rank: int) -> range:
        """The rows of a parameter, as they lie in the running model, that a rank within a replica holds: FSDP2 cuts the first
        dimension into `fsdp` pieces of equal size, of which the last ones may be short or empty; of experts, those of the rank."""
        n, size = self.parameters[name][0], topology.fsdp
        start = 0
        if _EXPERTS in name and topology.ep > 1:
            n //= topology.ep
            start, size, rank = (rank % topology.ep) * n, size // topology.ep, rank // topology.ep
        chunk = -(-n // size)
        return range(start + min(rank * chunk, n), start + min((rank + 1) * chunk, n))

    @property
    def groups(self) -> tuple[frozenset[int], ...]:
        """The experts that a token of each modality may use."""
        config = self.config
        if not config.use_modality_aware_routing:
            return (frozenset(range(config.n_routed_experts)),)
        return frozenset(config.text_expert_indices or ()), frozenset(config.audio_expert_indices or ())

    def placement(self, ep_size: int) -> tuple[int, ...]:
        """The expert in each row of the expert tensors."""
        config = self.config
        aware = config.use_modality_aware_routing
        groups = (config.text_expert_indices or (), config.audio_expert_indices or ()) if aware else ((), ())
        return plan_placement(*groups, config.n_routed_experts, ep_size)

    def units(self) -> dict[str, tuple[int, int]]:
        """What FSDP2 gathers in one piece, as transformers wraps DeepSeek-V2, by its name: parameters without those of routed experts, and
        these. The last norm is in the head's."""
        found: dict[str, tuple[int, int]] = {}
        for name, shape in self.parameters.items():
            unit = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name.removesuffix(".weight")
            unit = "lm_head" if unit == "model.norm" else unit
            dense, experts = found.get(unit, (0, 0))
            count = math.prod(shape)
            found[unit] = (dense, experts + count) if _EXPERTS in name else (dense + count, experts)
        return found

    def held(self, topology: Topology, rank: int) -> int:
        """Parameters on a rank."""
        return sum(len(self.rows(name, topology, rank)) * math.prod(shape[1:]) for name, shape in self.parameters.items())


def memory_of(shapes: Shapes, topology: Topology, load: Load) -> Memory:
    """What a rank needs at most, on the first rank of a replica, which never holds less than another."""
    held = shapes.held(topology, 0)
    every, layer_peak = _activations(shapes.config, load, topology.ep > 1)
    tokens = load.rows * load.length
    residual = shapes.layers * FULL * shapes.config.hidden_size * tokens
    again = tokens * _attention_again(shapes.config, load)
    return Memory(
        weights=FULL * held,
        gradients=FULL * held,
        moments=round(2 * load.moment * held),
        gathered=_gathered(shapes, topology),
        copies=_copies(shapes, topology) if load.half else 0,
        activations=every,
        selective=every - shapes.layers * again + again,
        recomputed=residual + layer_peak,
        logits=_logits(shapes.config.vocab_size, load),
    )


def _copies(shapes: Shapes, topology: Topology) -> int:
    """Autocast's own of linear layers, for the whole pass; of experts, for as long as a layer runs, where FSDP has gathered them."""
    linear = sum(math.prod(shapes.parameters[name]) for name in shapes.linear if name != "lm_head.weight")
    return 2 * (linear + max(experts for _, experts in shapes.units().values()) // topology.ep)


def _logits(vocabulary: int, load: Load) -> int:
    """Of the blocks that the head cuts the vocabulary into: the products and, in half precision, the same in float32 and what goes into the
    next products; where one block is all, the backward pass has the forward pass's as well."""
    block = logits_block(load.supervised, vocabulary)
    each = (2 + FULL + 2 if load.half else FULL) + (FULL if block == vocabulary else 0)
    return each * load.supervised * block


def _gathered(shapes: Shapes, topology: Topology) -> int:
    """A layer's weights and gradients, the next layer's weights on their way in and the last one's gradients on theirs out; or the same
    of the head and a layer, where that is more."""
    if topology.world_size == 1:
        return 0
    units = {name: FULL * (dense + experts // topology.ep) for name, (dense, experts) in shapes.units().items()}
    largest = max(size for unit, size in units.items() if unit.startswith("model.layers."))
    return max(4 * largest, 2 * units["lm_head"] + 2 * largest)


def _activations(config: MostConfig, load: Load, exchanged: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass over full rows: of all of the stack, and of its largest layer alone."""
    attention = _attention(config, load.half, load.half and load.on_gpu)
    n_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    dense = attention + _mlp(config, config.intermediate_size, load.half)
    experts = attention + _experts(config, load.half, exchanged)
    last = _norm(config.hidden_size)
    shared = 4 * 8 + FULL * config.qk_rope_head_dim  # ids, places, records and angles as complex numbers
    tokens = load.rows * load.length
    n_experts = config.num_hidden_layers - n_dense
    return tokens * (n_dense * dense + n_experts * experts + last + shared), tokens * max(dense * (n_dense > 0), experts * (n_experts > 0))


def _attention_again(config: MostConfig, load: Load) -> int:
    """Per token and layer, what selective recomputation does not keep: of attention all but its input and the norm in front of it."""
    kept = _norm(config.hidden_size) + (2 if load.half else FULL) * config.hidden_size
    return _attention(config, load.half, load.half and load.on_gpu) - kept


def _norm(width: int) -> int:
    """An RMS norm keeps its input in float32 and the factor."""
    return FULL * width + FULL


def _inner_norm(width: int, half: bool) -> int:
    """The library's between two linear layers: raised to float32, the values in the type of both, and the next one's input."""
    return (FULL + 2 + 2 if half else 3 * FULL) * width + FULL


def _attention(config: MostConfig, half: bool, lowered: bool) -> int:
    """Per token, with the layer's first norm: queries, keys, values and output as wide as keys, the normaliser; the output of its width."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    width = 2 if half else FULL
    kept = _norm(hidden) + width * hidden
    kept += _inner_norm(config.kv_lora_rank, half) + (0 if half else FULL * config.qk_rope_head_dim)
    if config.q_lora_rank is not None:
        kept += _inner_norm(config.q_lora_rank, half)
    return kept + heads * ((2 if lowered else FULL) * 4 * key + width * config.v_head_dim + FULL)


def _mlp(config: MostConfig, intermediate: int, half: bool) -> int:
    """Per token, with the norm before it: its input, gate, up and what goes into the last product."""
    return _norm(config.hidden_size) + (2 if half else FULL) * (config.hidden_size + 3 * intermediate)


def _experts(config: MostConfig, half: bool, exchanged: bool) -> int:
    """Per token: router, routed experts, shared experts, which all take the norm's output, the first in float32."""
    hidden, intermediate, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    width = 2 if half else FULL
    masks = 2 if config.use_modality_aware_routing else 0
    router = (2 * FULL + masks) * config.n_routed_experts + (8 + FULL) * chosen
    # Of each pair gate and up, and three indices.
    each = 2 * width * intermediate + 3 * 8
    if exchanged:  # a row as it came, and as it went out
        each += 2 * width * hidden + 8
    shared = _mlp(config, intermediate * config.n_shared_experts, half)
    return shared + (FULL * hidden if half else 0) + router + chosen * each


class _Measured(Staging):
    """The writer's layout of a file, without its bytes."""

    def prepare(self, parts: Sequence[TensorShard]) -> None:
        del parts
        self._buffer = torch.empty(1 << 62, dtype=torch.uint8, device="meta")

    @property
    def header_bytes(self) -> int:
        return len(self._header)


def checkpoint_files(shapes: Shapes, topology: Topology, moments: Moments) -> tuple[int, int]:
    """Bytes of the first rank's file, which is the largest, and of all ranks' files together. Headers of other ranks are taken to be as
    long as the first one's. The tokenizer and the descriptions beside them, some megabytes at most, are not counted."""
    random, parts = random_shards(), list(_parts(shapes, topology, moments))
    first, of_replica = _Measured(), _Measured()
    first.plan([*parts, *random])
    of_replica.plan(random)  # a rank of another replica than the first writes its random states alone
    each = first.header_bytes + sum(part.global_bytes for part in random)
    total = sum(part.global_bytes for part in parts) + topology.fsdp * each + (topology.world_size - topology.fsdp) * of_replica.nbytes
    return first.nbytes, total


def _parts(shapes: Shapes, topology: Topology, moments: Moments) -> Iterator[TensorShard]:
    """What the first rank writes, as `checkpoint.state_parts` orders it."""
    config = shapes.config
    cut = {name: _part(shapes, topology, name, shape, torch.float32) for name, shape in shapes.parameters.items()}
    for name, tensor in shapes.state.items():
        label = f"model.{name}"
        yield dataclasses.replace(cut[name], name=label) if name in cut else _alike(label, tensor)
    for name, part in cut.items():
        stored = _moment(shapes, topology, name, part) if moments == "int8" else {"": part}
        for moment in ("exp_avg", "exp_avg_sq"):
            for form, each in stored.items():
                yield dataclasses.replace(each, name=f"optimizer.{name}.{moment}{form}")
        yield _alike(f"optimizer.{name}.step", torch.empty((), device="meta"))
    if not config.seq_aux and config.aux_loss_alpha > 0:
        layers = sum(name.endswith(".mlp.gate.weight") for name in shapes.parameters)
        yield _alike(f"state.{BALANCE_LOAD}", torch.empty(layers, config.n_routed_experts, dtype=torch.int64, device="meta"))


def _alike(name: str, tensor: torch.Tensor) -> TensorShard:
    """A tensor that all ranks have alike."""
    return shard_of(name, tensor, rank=0)


def _moment(shapes: Shapes, topology: Topology, name: str, part: TensorShard) -> dict[str, TensorShard]:
    """The first rank's parts of a moment in 8 bits, by what `optimizer.saved_state` puts behind its name; a small one stays as it is."""
    shape = shapes.parameters[name]
    block = block_size(torch.empty(shape, device="meta"))
    if block is None:
        return {"": part}
    scale = (shape[0], math.prod(shape[1:]) // block)
    return {"_codes": _part(shapes, topology, name, shape, torch.uint8), "_scale": _part(shapes, topology, name, scale, torch.float32)}


def _part(shapes: Shapes, topology: Topology, name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorShard:
    """The first rank's part of a tensor whose rows lie as a parameter's."""
    rows = shapes.rows(name, topology, 0)
    order = [shapes.placement(topology.ep)[row] for row in rows] if _EXPERTS in name else rows
    local = torch.empty((len(rows), *shape[1:]), dtype=dtype, device="meta")
    return dataclasses.replace(shard_of(name, local, order, rank=0), shape=tuple(shape))


def checkpoint_bytes(config: MostConfig, topology: Topology, moments: Moments) -> int:
    """Bytes of a whole checkpoint: weights, moments and random states, as the writer writes them on this layout."""
    return checkpoint_files(Shapes(config), topology, moments)[1]
