"""How tokens reach the experts of other ranks: each token once per rank, however many of its experts live there.

transformers' own exchange sends a row per (token, expert) and weighs the answers where the token came from. Here a token's row goes to
each rank that holds any of its experts, with the slots and routing weights that it has there; that rank adds up its experts' answers and
sends one row back; the sender adds up the ranks'. With K of E_all experts chosen at random, R ranks and C(n, k) the binomial coefficient,
these are R (1 - C(E_all - E_all/R, K) / C(E_all, K)) rows a token instead of K, each way and for both gradients: 3.3 instead of 6 for
DeepSeek-V2-Lite's 64 experts on 4 ranks.

Rows travel in the autocast's type, routing weights and their gradients in float32; sums are reckoned in float32. The host must know the
numbers of rows: it waits once per layer. (torch's all_to_all_vdev keeps them on the device, but only in builds with NVSHMEM.)

Shapes: T tokens, D hidden, K experts per token, E experts on each rank, R ranks; N rows sent, M rows received.
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
except ImportError:  # transformers 5.22, where compat.check_workers allows one worker alone
    EPImplementation, EPImplementationInterface = object, None

from most_ray.model.kernels import compute_dtype

EXCHANGE = "most_ray"
_ALIGNED = 16  # bytes, so that the parts of a message can be read as what they are, and rows with wide loads


class DispatchPlan(NamedTuple):
    """Who gets what. Rows are grouped by rank and, within each, in the order of tokens.

    tokens (N,): each row's token; slots (N, K): the token's experts, numbered as that row's rank does, E where they live elsewhere;
    places (T, R): each token's row for each rank, N where none goes there; owners (T, K): the rank of each chosen expert.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    owners: torch.Tensor


def destination_ranks(slots: torch.Tensor, n_local: int, n_ranks: int) -> torch.Tensor:
    """The ranks that each token of slots (T, K) goes to, (T, R) bool; rank r holds slots r*E to (r+1)*E, with E = `n_local`."""
    goes = torch.zeros(len(slots), n_ranks, dtype=torch.bool, device=slots.device)
    return goes.scatter_(1, slots // n_local, True)


def plan_dispatch(slots: torch.Tensor, goes: torch.Tensor, n_local: int, n_rows: int) -> DispatchPlan:
    """The plan of slots (T, K) whose destination_ranks (T, R) are `goes`, `n_rows` in all (given, since the device would be waited for)."""
    by_rank = goes.t()
    ranks, tokens = torch.nonzero_static(by_rank, size=n_rows).unbind(1)
    local = slots.index_select(0, tokens) - (ranks * n_local).unsqueeze(-1)
    local = torch.where((local < 0) | (local >= n_local), n_local, local)
    order = by_rank.reshape(-1).cumsum(0).view(by_rank.shape) - 1
    return DispatchPlan(tokens, local, torch.where(goes, order.t(), n_rows), slots // n_local)


class TokenExchange(EPImplementation):
    """An experts module's exchange, to be found at its `exchange`.

    `experts(tokens, slots, weights)` is the plain call. To overlap it with other work, call in this order, on every rank of the group,
    whatever the number of its tokens:

        pending = experts.exchange.start_dispatch(tokens, slots, weights)   # then what is quick
        arguments = pending.send_rows()                                     # then what takes long
        output = experts(*arguments)                                        # through the module, whose hooks gather its weights

    overlaps: whether that pays. Ranks on CPUs have nothing idle: there it takes a tenth to a quarter longer.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        assert tp_mesh.size() == 1, "no two ranks hold the same tokens"
        experts.exchange = self
        self.overlaps = ep_mesh.device_type != "cpu"
        self._sent: tuple[torch.Tensor, DispatchPlan, AllToAll] | None = None

    def start_dispatch(self, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> PendingDispatch:
        """Tell the other ranks how many rows will come. tokens (T, D), slots (T, K) of all ranks' experts, weights (T, K)."""
        return PendingDispatch(self, tokens, slots, weights)

    def __call__(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum over each token's experts, (T, D). The arguments: those of `begin`, or what `send` gave."""
        # By the slots, since hooks wrap the tensors that have gradients.
        if self._sent is None or self._sent[0] is not top_k_index:
            hidden_states, top_k_index, _ = self.start_dispatch(hidden_states, top_k_index, top_k_weights).send_rows()
        assert self._sent is not None
        (_, plan, all_to_all), self._sent = self._sent, None
        rows, slots, weights = _Receive.apply(hidden_states, all_to_all)
        if len(rows) > 0:
            answers = self.experts_forward(rows, slots, weights)
        else:
            # One row of zeros: the experts' gradients are then zeros, not missing, and the backward exchange is not cut off.
            slots = torch.full((1, slots.shape[1]), self.num_local_experts, device=slots.device)
            slots[0, 0] = 0
            answers = self.experts_forward(rows.sum(0, keepdim=True), slots, weights.sum(0, keepdim=True))[:0]
        return _Combine.apply(answers, plan.tokens, plan.places, all_to_all)


class PendingDispatch:
    """Tokens whose counts are on their way to the other ranks."""

    def __init__(self, exchange: TokenExchange, tokens: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> None:
        self._exchange, self._tokens, self._slots, self._weights = exchange, tokens, slots, weights
        self._group = exchange.ep_mesh.get_group()
        self._goes = destination_ranks(slots, exchange.num_local_experts, exchange.ep_mesh.size())
        self._counts = _Counts(self._goes.sum(0), self._group)

    def send_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wait for the counts and put the rows on their way. Returns what to call the experts module with, once."""
        sent, received = self._counts.read()
        plan = plan_dispatch(self._slots, self._goes, self._exchange.num_local_experts, sum(sent))
        layout = _Layout(self._tokens.shape[1], self._slots.shape[1], compute_dtype(self._tokens))
        all_to_all = AllToAll(self._group, sent, received, layout)
        ticket = _Send.apply(self._tokens, self._weights, plan, all_to_all)
        self._exchange._sent = self._slots, plan, all_to_all
        return ticket, self._slots, self._weights.detach()


class _Counts:
    """Rows to and from each rank. On a GPU they come to the host behind an event: what was queued since keeps the GPU busy while the host
    waits."""

    def __init__(self, sent: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._both = torch.stack([sent, sent])
        self._work = dist.all_to_all_single(self._both[1], sent, group=group, async_op=True)
        self._event: torch.cuda.Event | None = None
        if sent.is_cuda:
            self._work.wait()  # the stream does, not the host
            on_host = torch.empty(self._both.shape, dtype=self._both.dtype, pin_memory=True)
            self._both = on_host.copy_(self._both, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[list[int], list[int]]:
        if self._event is None:
            self._work.wait()
        else:
            self._event.synchronize()
        sent, received = self._both.tolist()
        return sent, received


@dataclass(frozen=True)
class _Layout:
    """A message of n rows as bytes (n, B), so that one collective takes what belongs together: a token's `dtype` values (`width` of
    them), `k` routing weights or their gradients, and, where tokens are sent, `k` slots."""

    width: int
    k: int
    dtype: torch.dtype

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _ends(self) -> tuple[int, int, int]:
        rows = -(-self.width * self.dtype.itemsize // _ALIGNED) * _ALIGNED
        weights = rows + self.k * self.weight_dtype.itemsize
        return rows, weights, weights + self.k * torch.int32.itemsize

    def empty(self, n: int, device: torch.device, with_slots: bool) -> torch.Tensor:
        size = self._ends()[2 if with_slots else 1]
        return torch.empty(n, -(-size // _ALIGNED) * _ALIGNED, dtype=torch.uint8, device=device)

    def rows(self, message: torch.Tensor) -> torch.Tensor:
        return message[:, : self.width * self.dtype.itemsize].view(self.dtype)

    def weights(self, message: torch.Tensor) -> torch.Tensor:
        start, end, _ = self._ends()
        return message[:, start:end].view(self.weight_dtype)

    def slots(self, message: torch.Tensor) -> torch.Tensor:
        _, start, end = self._ends()
        return message[:, start:end].view(torch.int32)


@dataclass
class AllToAll:
    """Messages between the ranks: of tokens there and of answers back, and of their gradients the other way round. `there`, `back`: rows
    to, and from, each rank."""

    group: dist.ProcessGroup
    there: list[int]
    back: list[int]
    layout: _Layout
    _flight: tuple[dist.Work, torch.Tensor, torch.Tensor] | None = None

    def start(self, message: torch.Tensor, home: bool) -> None:
        """Send rows, grouped by rank; `home`: to the ranks that hold the tokens."""
        to, coming = (self.back, self.there) if home else (self.there, self.back)
        n = sum(coming)
        # Behind rows that come home there is one of zeros, which places name where nothing was sent.
        arriving = message.new_empty(n + 1 if home else n, message.shape[1])
        arriving[n:] = 0
        work = dist.all_to_all_single(arriving[:n], message, coming, to, group=self.group, async_op=True)
        self._flight = work, arriving, message

    def wait(self) -> torch.Tensor:
        """The rows that were sent to this rank."""
        assert self._flight is not None
        (work, arriving, _), self._flight = self._flight, None
        work.wait()
        return arriving


class _Send(torch.autograd.Function):
    """Starts the tokens' way; its backward ends that of their gradients. `_Receive` is the other half: what runs between the two, forwards
    or backwards, runs while rows travel. The ticket (0,) orders them; the rows themselves are in `AllToAll`."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weights: torch.Tensor, plan: DispatchPlan, all_to_all: AllToAll) -> torch.Tensor:
        layout = all_to_all.layout
        message = layout.empty(len(plan.tokens), tokens.device, with_slots=True)
        torch.index_select(tokens.to(layout.dtype), 0, plan.tokens, out=layout.rows(message))
        torch.index_select(weights.to(layout.weight_dtype), 0, plan.tokens, out=layout.weights(message))
        layout.slots(message).copy_(plan.slots)
        all_to_all.start(message, home=False)
        ctx.all_to_all, ctx.dtypes = all_to_all, (tokens.dtype, weights.dtype)
        ctx.save_for_backward(plan.places, plan.owners)
        return tokens.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        places, owners = ctx.saved_tensors
        layout, message = ctx.all_to_all.layout, ctx.all_to_all.wait()
        token_grads = _add_up(layout.rows(message), places)
        weight_grads = layout.weights(message).gather(0, places.gather(1, owners))
        return token_grads.to(ctx.dtypes[0]), weight_grads.to(ctx.dtypes[1]), None, None


class _Receive(torch.autograd.Function):
    """Ends the tokens' way: rows (M, D), their slots here (M, K) and weights (M, K); its backward starts that of their gradients."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, all_to_all: AllToAll) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.all_to_all, ctx.ticket_dtype = all_to_all, ticket.dtype
        layout, message = all_to_all.layout, all_to_all.wait()
        return layout.rows(message), layout.slots(message).long(), layout.weights(message)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, row_grads: torch.Tensor, _slots: torch.Tensor | None, weight_grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        layout = ctx.all_to_all.layout
        message = layout.empty(len(row_grads), row_grads.device, with_slots=False)
        layout.rows(message).copy_(row_grads)
        layout.weights(message).copy_(weight_grads)
        ctx.all_to_all.start(message, home=True)
        return row_grads.new_empty(0, dtype=ctx.ticket_dtype), None


class _Combine(torch.autograd.Function):
    """The experts' answers (M, D) back to the tokens' ranks, and added up per token there: (T, D)."""

    @staticmethod
    def forward(ctx: Any, answers: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, all_to_all: AllToAll) -> torch.Tensor:
        ctx.all_to_all = all_to_all
        # Saved here, on every rank: a recomputation ends at the last tensor that was saved, and all ranks' must end behind this exchange.
        ctx.save_for_backward(tokens)
        all_to_all.start(answers.contiguous(), home=True)
        return _add_up(all_to_all.wait(), places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        ctx.all_to_all.start(grads.index_select(0, tokens), home=False)
        return ctx.all_to_all.wait(), None, None, None


def _add_up(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows (N + 1, D) that belong to each token, places (T, R), summed: (T, D). The bag's sums are float32 whatever the rows' type, are
    rounded once, and are added up in the same order each time, on GPUs too."""
    return F.embedding_bag(places, rows, mode="sum")


if EPImplementationInterface is not None:
    EPImplementationInterface.register(EXCHANGE, TokenExchange)
