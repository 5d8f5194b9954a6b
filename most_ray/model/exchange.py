"""The exchange of tokens between expert-parallel ranks: each token is sent once per rank, however many of its experts are there.

A token's row is dispatched to each rank that has any of its experts, with the slots and routing weights that it has there; that rank adds
up the outputs of its experts and returns one row; the token's rank combines the ranks' rows by a sum. Rows are sent in the type of the
autocast, routing weights and their gradients in float32; sums are computed in float32. The host needs the numbers of rows, for which it
waits once per layer. Why, and how many rows and bytes that takes: docs/decisions/token-exchange.md.

Shapes: T tokens of this rank, D hidden size, K experts per token, E experts on each rank (in code `n_local`), R ranks, N rows dispatched
from this rank, M rows received by this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError:  # transformers 5.22, with which compat.check_workers allows a single worker only
    EPImplementation, EPImplementationInterface = object, None

from most_ray.model.kernels import compute_dtype

EXCHANGE = "most_ray"  # name of the exchange in transformers' registry
_ALIGNMENT = 16  # bytes, so that parts of a message can be viewed in their types, and rows read with wide loads


class DispatchPlan(NamedTuple):
    """The rows to dispatch, grouped by rank and, within a rank, in the order of tokens."""

    tokens: torch.Tensor  # (N,), the token of each row
    slots: torch.Tensor  # (N, K), the slots of the token's experts on the row's rank, E for experts on other ranks
    rows: torch.Tensor  # (T, R), the row of each token for each rank, N where none is sent
    ranks: torch.Tensor  # (T, K), the rank of each chosen expert


def destination_ranks(slots: torch.Tensor, n_local: int, n_ranks: int) -> torch.Tensor:
    """The ranks that each token is sent to, bool (T, R), by the slots (T, K) of its experts. Rank r has slots r * E to (r + 1) * E - 1."""
    destinations = torch.zeros(len(slots), n_ranks, dtype=torch.bool, device=slots.device)
    return destinations.scatter_(1, slots // n_local, True)


def plan_dispatch(slots: torch.Tensor, destinations: torch.Tensor, n_local: int, n_rows: int) -> DispatchPlan:
    """The plan for tokens with slots (T, K) and destinations bool (T, R). n_rows: N; computing it here would wait for the device."""
    by_rank = destinations.t()
    ranks, tokens = torch.nonzero_static(by_rank, size=n_rows).unbind(1)
    local = slots.index_select(0, tokens) - (ranks * n_local).unsqueeze(-1)
    local = torch.where((local < 0) | (local >= n_local), n_local, local)
    order = by_rank.reshape(-1).cumsum(0).view(by_rank.shape) - 1
    return DispatchPlan(tokens, local, torch.where(destinations, order.t(), n_rows), slots // n_local)


class TokenExchange(EPImplementation):
    """The exchange of an experts module, which is its attribute `exchange`.

    `experts(tokens, slots, weights)` is the plain call. To overlap it with other work, call in this order, on every rank of the group,
    whatever the number of its tokens:

        pending = experts.exchange.start_dispatch(tokens, slots, weights)   # then what is quick
        arguments = pending.send_rows()                                     # then what takes long
        output = experts(*arguments)                                        # through the module, whose hooks gather its weights

    Attributes:
        overlaps: whether overlapping is faster. On CPUs nothing is idle, and it takes a tenth to a quarter longer.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        assert tp_mesh.size() == 1, "no two ranks have the same tokens"
        experts.exchange = self
        self.overlaps = ep_mesh.device_type != "cpu"
        self._sent: tuple[torch.Tensor, DispatchPlan, AllToAll] | None = None

    def start_dispatch(self, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> PendingDispatch:
        """Start to exchange the numbers of rows: tokens (T, D), slots (T, K) of their experts on all ranks, weights (T, K)."""
        return PendingDispatch(self, tokens, slots, weights)

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts, (T, D). The arguments are those of `start_dispatch`, or the result of `send_rows`."""
        # Sent rows are recognised by their slots, since hooks wrap the tensors that have gradients.
        if self._sent is None or self._sent[0] is not top_k_index:
            hidden_states, top_k_index, _ = self.start_dispatch(hidden_states, top_k_index, top_k_weights).send_rows()
        assert self._sent is not None
        (_, plan, all_to_all), self._sent = self._sent, None
        rows, slots, weights = _Receive.apply(hidden_states, all_to_all)
        if len(rows) > 0:
            outputs = self.experts_forward(rows, slots, weights)
        else:
            # One row of zeros, so that the experts' gradients are zeros instead of missing, and the backward exchange takes place.
            slots = torch.full((1, slots.shape[1]), self.num_local_experts, device=slots.device)
            slots[0, 0] = 0
            outputs = self.experts_forward(rows.sum(0, keepdim=True), slots, weights.sum(0, keepdim=True))[:0]
        return _Combine.apply(outputs, plan.tokens, plan.rows, all_to_all)


class PendingDispatch:
    """Tokens whose numbers of rows are being exchanged with the other ranks."""

    def __init__(self, exchange: TokenExchange, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
        self._exchange, self._tokens, self._slots, self._weights = exchange, tokens, slots, weights
        self._group = exchange.ep_mesh.get_group()
        self._destinations = destination_ranks(slots, exchange.num_local_experts, exchange.ep_mesh.size())
        self._counts = _RowCounts(self._destinations.sum(0), self._group)

    def send_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait for the numbers of rows and start to send the rows. Returns the arguments for one call of the experts module."""
        sent, received = self._counts.read()
        plan = plan_dispatch(self._slots, self._destinations, self._exchange.num_local_experts, sum(sent))
        layout = _MessageLayout(self._tokens.shape[1], self._slots.shape[1], compute_dtype(self._tokens))
        all_to_all = AllToAll(self._group, sent, received, layout)
        ticket = _Dispatch.apply(self._tokens, self._weights, plan, all_to_all)
        self._exchange._sent = self._slots, plan, all_to_all
        return ticket, self._slots, self._weights.detach()


class _RowCounts:
    """The numbers of rows to and from each rank. From a GPU they are copied to the host followed by an event, so that work that is queued
    later keeps the GPU busy while the host waits."""

    def __init__(self, sent: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._both = torch.stack([sent, sent])
        self._work = dist.all_to_all_single(self._both[1], sent, group=group, async_op=True)
        self._event: torch.cuda.Event | None = None
        if sent.is_cuda:
            self._work.wait()  # the stream waits, not the host
            on_host = torch.empty(self._both.shape, dtype=self._both.dtype, pin_memory=True)
            self._both = on_host.copy_(self._both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[int], list[int]]:
        """Rows to each rank and from each rank."""
        if self._event is None:
            self._work.wait()
        else:
            self._event.synchronize()
        sent, received = self._both.tolist()
        return sent, received


@dataclass(frozen=True)
class _MessageLayout:
    """The layout of a message of n rows as uint8 (n, bytes of a row), so that one collective sends what belongs together: a token's row,
    its routing weights or their gradients, and in a dispatch its slots."""

    width: int  # D
    k: int  # K
    dtype: torch.dtype  # of rows

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type of routing weights."""
        return torch.promote_types(self.dtype, torch.float32)

    def _ends(self) -> tuple[int, int, int]:
        """Where the row, the weights and the slots end, in bytes."""
        rows = -(-self.width * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        weights = rows + self.k * self.weight_dtype.itemsize
        return rows, weights, weights + self.k * torch.int32.itemsize

    def empty(self, n: int, device: torch.device, with_slots: bool) -> torch.Tensor:
        """A message of `n` rows that is not initialized."""
        size = self._ends()[2 if with_slots else 1]
        return torch.empty(n, -(-size // _ALIGNMENT) * _ALIGNMENT, dtype=torch.uint8, device=device)

    def rows(self, message: torch.Tensor) -> torch.Tensor:
        """A view (n, D) of the rows in a message."""
        return message[:, : self.width * self.dtype.itemsize].view(self.dtype)

    def weights(self, message: torch.Tensor) -> torch.Tensor:
        """A view (n, K) of the weights in a message."""
        return message[:, slice(*self._ends()[:2])].view(self.weight_dtype)

    def slots(self, message: torch.Tensor) -> torch.Tensor:
        """A view (n, K) of the slots in a message."""
        return message[:, slice(*self._ends()[1:])].view(torch.int32)


@dataclass
class AllToAll:
    """Messages between the ranks, one at a time: dispatches of tokens and of gradients of outputs, and the combination of outputs and of
    gradients of tokens, which goes the opposite way."""

    group: dist.ProcessGroup
    sent: list[int]  # rows dispatched to each rank
    received: list[int]  # rows received from each rank in a dispatch
    layout: _MessageLayout
    _pending: tuple[dist.Work, torch.Tensor, torch.Tensor] | None = None  # the collective, its output and its input

    def start(self, message: torch.Tensor, combine: bool) -> None:
        """Start to send `message`, whose rows are grouped by rank; `combine`: back to the ranks of the tokens."""
        sent, received = (self.received, self.sent) if combine else (self.sent, self.received)
        n = sum(received)
        # After combined rows there is one of zeros, which `DispatchPlan.rows` names where nothing was sent.
        output = message.new_empty(n + 1 if combine else n, message.shape[1])
        output[n:] = 0
        work = dist.all_to_all_single(output[:n], message, received, sent, group=self.group, async_op=True)
        self._pending = work, output, message

    def wait(self) -> torch.Tensor:
        """Wait for the rows that are sent to this rank."""
        assert self._pending is not None
        (work, output, _), self._pending = self._pending, None
        work.wait()
        return output


class _Dispatch(torch.autograd.Function):
    """Starts to dispatch tokens; its backward waits for the gradients of tokens. `_Receive` is the other half: what runs between the two,
    forward or backward, runs while rows are sent. The ticket (0,) only orders the two; the rows are in `AllToAll`."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor, plan: DispatchPlan, all_to_all: AllToAll) -> torch.Tensor:
        layout = all_to_all.layout
        message = layout.empty(len(plan.tokens), tokens.device, with_slots=True)
        torch.index_select(tokens.to(layout.dtype), 0, plan.tokens, out=layout.rows(message))
        torch.index_select(weights.to(layout.weight_dtype), 0, plan.tokens, out=layout.weights(message))
        layout.slots(message).copy_(plan.slots)
        all_to_all.start(message, combine=False)
        ctx.all_to_all, ctx.dtypes = all_to_all, (tokens.dtype, weights.dtype)
        ctx.save_for_backward(plan.rows, plan.ranks)
        return tokens.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, ranks = ctx.saved_tensors
        layout, message = ctx.all_to_all.layout, ctx.all_to_all.wait()
        token_grads = _sum_by_token(layout.rows(message), rows)
        weight_grads = layout.weights(message).gather(0, rows.gather(1, ranks))
        return token_grads.to(ctx.dtypes[0]), weight_grads.to(ctx.dtypes[1]), None, None


class _Receive(torch.autograd.Function):
    """Waits for dispatched tokens: rows (M, D), their slots on this rank (M, K) and weights (M, K). Its backward starts to combine their
    gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, all_to_all: AllToAll) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.all_to_all, ctx.ticket_dtype = all_to_all, ticket.dtype
        layout, message = all_to_all.layout, all_to_all.wait()
        return layout.rows(message), layout.slots(message).long(), layout.weights(message)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grads: torch.Tensor, _slots: None, weight_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout = ctx.all_to_all.layout
        message = layout.empty(len(row_grads), row_grads.device, with_slots=False)
        layout.rows(message).copy_(row_grads)
        layout.weights(message).copy_(weight_grads)
        ctx.all_to_all.start(message, combine=True)
        return row_grads.new_empty(0, dtype=ctx.ticket_dtype), None


class _Combine(torch.autograd.Function):
    """Sends the experts' outputs (M, D) back to the tokens' ranks and adds them up by token: (T, D)."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, all_to_all: AllToAll) -> torch.Tensor:
        ctx.all_to_all = all_to_all
        # Saved here, on every rank: a recomputation stops at the last tensor that was saved, which must come after the exchange everywhere.
        ctx.save_for_backward(tokens)
        all_to_all.start(outputs.contiguous(), combine=True)
        return _sum_by_token(all_to_all.wait(), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        ctx.all_to_all.start(grads.index_select(0, tokens), combine=False)
        return ctx.all_to_all.wait(), None, None, None


def _sum_by_token(combined: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum the combined rows (N + 1, D) of each token, which are `rows` (T, R): (T, D). Whatever their type, sums are computed in float32
    in a fixed order, on GPUs too, and are rounded once."""
    return F.embedding_bag(rows, combined, mode="sum")


if EPImplementationInterface is not None:
    EPImplementationInterface.register(EXCHANGE, TokenExchange)
