"""What a rank's training holds in memory and what its checkpoints weigh, from the model's shapes alone: no weight is made.

Weights, gradients and moments follow from the layout and are exact, and so are checkpoints but for headers of other ranks' files. What
autograd keeps for the backward pass is summed up term by term, and a test holds it against autograd's own account; what FSDP gathers and
the head's logits are peaks. Not counted: a device's context, its libraries' buffers, gradients of activations, fragmentation.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from most_ray.model.configuration import MostConfig
from most_ray.model.modeling import MostForCausalLM
from most_ray.model.placement import plan_placement
from most_ray.train.checkpoint import random_parts
from most_ray.train.shards import Part, Staging, part_of
from most_ray.train.state import BALANCE_LOAD
from most_ray.train.topology import Topology

_FULL = 4  # bytes of a float32: what weights, gradients, moments and the residual stream are in, autocast or not
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, the one that holds most. weights, gradients, moments: its shards in float32, AdamW's moments both. gathered: the
    peak of what FSDP puts together. copies: weights in half precision, which autocast keeps. activations: of all layers, without
    gradient checkpointing; recomputed: the same with it. logits: the head's, with their gradients."""

    weights: int
    gradients: int
    moments: int
    gathered: int
    copies: int
    activations: int
    recomputed: int
    logits: int

    def total(self, checkpointing: bool) -> int:
        """With gradient checkpointing, or without."""
        kept = self.recomputed if checkpointing else self.activations
        return self.weights + self.gradients + self.moments + self.gathered + self.copies + kept + self.logits


@dataclass(frozen=True)
class Load:
    """A forward pass of a rank: rows of length tokens, and how many of its tokens are supervised. half: under autocast in a type of two
    bytes; on_gpu: its kernels keep no scores of attention."""

    rows: int
    length: int
    supervised: int
    half: bool
    on_gpu: bool


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

    def placement(self, ep_size: int) -> tuple[int, ...]:
        """The expert in each row of the expert tensors."""
        config = self.config
        aware = config.use_modality_aware_routing
        groups = (config.text_expert_indices or (), config.audio_expert_indices or ()) if aware else ((), ())
        return plan_placement(*groups, config.n_routed_experts, ep_size)

    def held(self, topology: Topology, rank: int) -> int:
        """Parameters on a rank."""
        return sum(len(self.rows(name, topology, rank)) * math.prod(shape[1:]) for name, shape in self.parameters.items())


def memory_of(shapes: Shapes, topology: Topology, load: Load) -> Memory:
    """What a rank needs at most, on the first rank of a replica, which never holds less than another."""
    held = _FULL * shapes.held(topology, 0)
    every, layer_peak = _activations(shapes.config, load, topology.ep > 1)
    copies = 2 * sum(math.prod(shapes.parameters[name]) for name in shapes.linear) if load.half else 0
    residual = _FULL * shapes.config.hidden_size * load.rows * load.length
    # In half precision the logits, the same in float32 and their logarithms; behind them the last, its gradient and that in half precision.
    each_logit = 2 * _FULL + 2 * load.half
    return Memory(
        weights=held,
        gradients=held,
        moments=2 * held,
        gathered=_gathered(shapes, topology),
        copies=copies,
        activations=every,
        recomputed=shapes.layers * residual + layer_peak,
        logits=each_logit * load.supervised * shapes.config.vocab_size,
    )


def _gathered(shapes: Shapes, topology: Topology) -> int:
    """A layer's weights and gradients, the next layer's weights on their way in and the last one's gradients on theirs out; or the same
    of the head and a layer, where that is more."""
    if topology.world_size == 1:
        return 0
    units: dict[str, int] = defaultdict(int)
    for name, shape in shapes.parameters.items():
        unit = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name
        units[unit] += _FULL * math.prod(shape) // (topology.ep if _EXPERTS in name else 1)
    largest = max(size for unit, size in units.items() if unit.startswith("model.layers."))
    return max(4 * largest, 2 * units["lm_head.weight"] + 2 * largest)


def _activations(config: MostConfig, load: Load, exchanged: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass: of all of the stack, and of its largest layer alone."""
    attention = _attention(config, load)
    n_dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    dense = attention + _mlp(config, config.intermediate_size, load.half)
    experts = attention + _experts(config, load.half, exchanged)
    last = _norm(config.hidden_size) + (0 if load.half else _FULL * config.hidden_size)
    shared = 8 + _FULL * config.qk_rope_head_dim  # ids, and angles as complex numbers
    tokens = load.rows * load.length
    n_experts = config.num_hidden_layers - n_dense
    return tokens * (n_dense * dense + n_experts * experts + last + shared), tokens * max(dense * (n_dense > 0), experts * (n_experts > 0))


def _norm(width: int) -> int:
    """An RMS norm of float32 numbers: its input, the normalised values, and the factor."""
    return 2 * _FULL * width + _FULL


def _inner_norm(width: int, half: bool) -> int:
    """The same between two linear layers: raised to float32, the values in the type of both, and the next one's input."""
    return (_FULL + 2 + 2 if half else 3 * _FULL) * width + _FULL


def _attention(config: MostConfig, load: Load) -> int:
    """Per token, with the layer's first norm."""
    hidden, heads, value = config.hidden_size, config.num_attention_heads, config.v_head_dim
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    width = 2 if load.half else _FULL
    # Autocast makes each linear layer its own copy of the input.
    kept = _norm(hidden) + (2 * 2 * hidden if load.half else _FULL * hidden)
    kept += _inner_norm(config.kv_lora_rank, load.half) + (0 if load.half else _FULL * config.qk_rope_head_dim)
    if config.q_lora_rank is not None:
        kept += _inner_norm(config.q_lora_rank, load.half)
    output = width * heads * value
    if load.on_gpu or key == value:
        # Queries, keys, what keys and values are cut from, the normaliser, the mask of packed rows; the output, which CPUs copy.
        kept += width * heads * (2 * key + config.qk_nope_head_dim + value) + _FULL * heads + width * load.length
        return kept + (output if load.on_gpu else 2 * output)
    # In float32, scores as well: CPUs have no other kernel for values of another width than keys.
    return kept + _FULL * heads * (2 * key + value + load.length) + output


def _mlp(config: MostConfig, intermediate: int, half: bool) -> int:
    """Per token, with the norm before it: gate, its activation, up, their product; the input twice under autocast."""
    hidden = config.hidden_size
    return _norm(hidden) + (2 * 2 * hidden + 4 * 2 * intermediate if half else _FULL * hidden + 4 * _FULL * intermediate)


def _experts(config: MostConfig, half: bool, exchanged: bool) -> int:
    """Per token: router, routed experts (in float32 under autocast as well), shared experts."""
    hidden, intermediate, chosen = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    masks = 2 if config.use_modality_aware_routing else 0
    router = (2 * _FULL + masks) * config.n_routed_experts + 8 * chosen + 8
    each = _FULL * (2 * hidden + 4 * intermediate + 1) + 3 * 8
    if exchanged:  # received, handed back and sorted again
        each += 2 * _FULL * hidden + 8
    shared = _mlp(config, intermediate * config.n_shared_experts, half)
    # The router takes the norm's output in float32, which in float32 the shared experts take too.
    return shared + (_FULL * hidden if half else 0) + router + chosen * each


class _Measured(Staging):
    """The writer's layout of a file, without its bytes."""

    def prepare(self, parts: Sequence[Part]) -> None:
        del parts
        self._buffer = torch.empty(1 << 62, dtype=torch.uint8, device="meta")

    @property
    def header_bytes(self) -> int:
        return len(self._header)


def checkpoint_files(shapes: Shapes, topology: Topology) -> tuple[int, int]:
    """Bytes of the first rank's file, which is the largest, and of all ranks' files together. Headers of other ranks are taken to be as
    long as the first one's. The tokenizer and the descriptions beside them, some megabytes at most, are not counted."""
    random, parts = random_parts(), list(_parts(shapes, topology))
    first, of_replica = _Measured(), _Measured()
    first.plan([*parts, *random])
    of_replica.plan(random)  # a rank of another replica than the first writes its random states alone
    each = first.header_bytes + sum(part.whole_bytes for part in random)
    total = sum(part.whole_bytes for part in parts) + topology.fsdp * each + (topology.world_size - topology.fsdp) * of_replica.nbytes
    return first.nbytes, total


def _parts(shapes: Shapes, topology: Topology) -> Iterator[Part]:
    """What the first rank writes, as `checkpoint.state_parts` orders it."""
    config = shapes.config
    cut = {name: _part(shapes, topology, name) for name in shapes.parameters}
    for name, tensor in shapes.state.items():
        label = f"model.{name}"
        yield dataclasses.replace(cut[name], name=label) if name in cut else _alike(label, tensor)
    for name, part in cut.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            yield dataclasses.replace(part, name=f"optimizer.{name}.{moment}")
        yield _alike(f"optimizer.{name}.step", torch.empty((), device="meta"))
    if not config.seq_aux and config.aux_loss_alpha > 0:
        layers = sum(name.endswith(".mlp.gate.weight") for name in shapes.parameters)
        yield _alike(f"state.{BALANCE_LOAD}", torch.empty(layers, config.n_routed_experts, dtype=torch.int64, device="meta"))


def _alike(name: str, tensor: torch.Tensor) -> Part:
    """A tensor that all ranks have alike."""
    return part_of(name, tensor, rank=0)


def _part(shapes: Shapes, topology: Topology, name: str) -> Part:
    """The first rank's part of a parameter."""
    shape, rows = shapes.parameters[name], shapes.rows(name, topology, 0)
    order = [shapes.placement(topology.ep)[row] for row in rows] if _EXPERTS in name else rows
    local = torch.empty((len(rows), *shape[1:]), device="meta")
    return dataclasses.replace(part_of(name, local, order, rank=0), shape=tuple(shape))


def checkpoint_bytes(config: MostConfig, topology: Topology) -> int:
    """Bytes of a whole checkpoint: weights, moments and random states, as the writer writes them on this layout."""
    return checkpoint_files(Shapes(config), topology)[1]
