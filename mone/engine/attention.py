"""Self-attention over tokens that lie as rows in expert-major order; it does not care about the order.

Shapes: S sequences, N tokens, R = S N rows, C class tokens, D model features, h heads of k features, G groups that
attend within themselves (sequences, or the frames of all sequences), M slots of a group, p tensors side by side (3:
queries, keys and values; 2: keys and values).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mone.blocks import Neighbours
from mone.engine.layout import Order
from mone.engine.support import triton_runs


class Routes(NamedTuple):
    """How attention finds its tokens among the rows.

    Attributes:
        read_X: int64 [G M]. Row of each slot; None: rows lie slot after slot.
        write_R: int64. Slot g M + m whose result each row takes; None: as above.
        num_slots: M.
        once: Whether every row fills one slot, so that reading and writing undo each other.
    """

    read_X: Tensor | None
    write_R: Tensor | None
    num_slots: int
    once: bool


def routes_of(order: Order, neighbours: Neighbours | None) -> Routes:
    """Routes of sequences that attend within themselves, or of their frames."""
    row_SN, token_R = order
    if neighbours is None:
        in_order = token_R is None
        return Routes(None if in_order else row_SN.flatten(), token_R, row_SN.shape[1], once=True)
    num_sequences, num_frames, num_slots = neighbours.slot_SFM.shape
    read_SX = row_SN.gather(1, neighbours.slot_SFM.flatten(1))
    first_S1 = torch.arange(num_sequences, device=row_SN.device).unsqueeze(1) * (num_frames * num_slots)
    write_T = (neighbours.home_SN + first_S1).flatten()
    return Routes(read_SX.flatten(), write_T if token_R is None else write_T[token_R], num_slots, once=False)


def attend(qkv_RX: Tensor, routes: Routes, num_heads: int, dropout: float) -> Tensor:
    """Mix values: queries, keys and values [R, 3 D] to [R, D]."""
    q, k, v = _split(qkv_RX, routes, 3, num_heads)
    mixed_GhMk = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if routes.once:
        return _Join.apply(mixed_GhMk, routes)  # pyright: ignore[reportReturnType]
    mixed_XD = rearrange(mixed_GhMk, "g h m k -> (g m) (h k)")
    return mixed_XD if routes.write_R is None else mixed_XD.index_select(0, routes.write_R)


def attend_last(q_SCD: Tensor, kv_RX: Tensor, routes: Routes, num_heads: int, dropout: float) -> Tensor:
    """Mix values for the class tokens alone, the last of each group: keys and values [R, 2 D] to [S, C, D]."""
    k, v = _split(kv_RX, routes, 2, num_heads)
    q = q_SCD.reshape(k.shape[0], num_heads, 1, k.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).reshape(q_SCD.shape)


def _split(rows_RX: Tensor, routes: Routes, parts: int, num_heads: int) -> Sequence[Tensor]:
    if routes.once:
        return _Split.apply(rows_RX, routes, parts, num_heads)  # pyright: ignore[reportReturnType]
    return _heads(rows_RX, routes, parts, num_heads)


def _heads(rows_RX: Tensor, routes: Routes, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Each part [G, h, M, k]."""
    slots_XX = rows_RX if routes.read_X is None else rows_RX.index_select(0, routes.read_X)
    pattern = "(g m) (p h k) -> p g h m k"
    return rearrange(slots_XX, pattern, m=routes.num_slots, p=parts, h=num_heads).unbind(0)


def _rows(parts: Sequence[Tensor], routes: Routes) -> Tensor:
    """The parts [G, h, M, k] side by side, in rows [R, p D]."""
    groups, num_heads, num_slots, features = parts[0].shape
    if parts[0].numel() and triton_runs(parts[0].device):
        from mone.engine.kernels.heads import copy_heads  # here: there may be no Triton

        dim = num_heads * features
        rows_RX = parts[0].new_empty(groups * num_slots, len(parts) * dim)
        for index, part in enumerate(parts):
            copy_heads(part, routes.write_R, rows_RX[:, index * dim : (index + 1) * dim])
        return rows_RX
    slots_XX = rearrange(list(parts), "p g h m k -> (g m) (p h k)")
    return slots_XX if routes.write_R is None else slots_XX.index_select(0, routes.write_R)


class _Split(torch.autograd.Function):
    """Gathers; autograd would scatter the gradients of each part into zeros, and add them up."""

    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, routes: Routes, parts: int, num_heads: int) -> tuple[Tensor, ...]:
        ctx.routes = routes
        return _heads(rows_RX, routes, parts, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _rows(grads, ctx.routes), None, None, None


class _Join(torch.autograd.Function):
    """The way back."""

    @staticmethod
    def forward(ctx: Any, mixed_GhMk: Tensor, routes: Routes) -> Tensor:
        ctx.routes, ctx.num_heads = routes, mixed_GhMk.shape[1]
        return _rows([mixed_GhMk], routes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _heads(grads[0], ctx.routes, 1, ctx.num_heads)[0], None
