"""Tokens of sequences to rows of runs, with the mean and spread of what is left behind.

Shapes: S sequences, K tokens in their own order, N sorted tokens, C class tokens, D model features, R rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from mone.engine.tokens import Tokens

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false


@triton.jit
def _enter(
    x_ptr, order_ptr, classes_ptr, row_ptr, width_ptr, head_ptr, mean_ptr, spread_ptr,
    num_own, num_sorted, num_slots, x_stride, head_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(0) // num_slots).to(tl.int64)
    slot = tl.program_id(0) % num_slots
    row = tl.load(row_ptr + tl.program_id(0)).to(tl.int64)
    width = tl.load(width_ptr + slot)
    column = tl.arange(0, BLOCK)
    own = slot.to(tl.int64)
    if not ORDERED:
        own = tl.load(order_ptr + sequence * num_sorted + slot, mask=slot < num_sorted, other=0)
    x_at = x_ptr + (sequence * num_own + own) * x_stride
    class_at = classes_ptr + (slot - num_sorted) * DIM
    x = tl.load(x_at + column, mask=(column < DIM) & (slot < num_sorted), other=0.0)
    x += tl.load(class_at + column, mask=(column < DIM) & (slot >= num_sorted), other=0.0).to(x.dtype)
    tl.store(head_ptr + row * head_stride + column, x, mask=column < width)
    in_tail = (column >= width) & (column < DIM)
    mean = tl.sum(tl.where(in_tail, x.to(tl.float32), 0.0), axis=0) / tl.maximum(DIM - width, 1)
    apart = tl.where(in_tail, x.to(tl.float32) - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(spread_ptr + row, tl.sum(apart * apart, axis=0))


def enter_rows(
    tokens: Tokens, row_SN: Tensor, width_N: Tensor, head_RD: Tensor, tail_mean_R: Tensor, tail_spread_R: Tensor
) -> None:
    """Write the first features of each token to its row, and two numbers of the others.

    Args:
        tokens: Sorted on the way.
        row_SN: int64. The row of each sorted token.
        width_N: int32. The width of each token's expert.
        head_RD: Rows of the residual stream.
        tail_mean_R: float32. Gets the mean of the features past the width, 0 where there are none.
        tail_spread_R: float32. Gets the sum of their squared distances from it.
    """
    x_SKD, order_SN, classes_CD = tokens
    x_SKD, (num_own, dim) = x_SKD.contiguous(), x_SKD.shape[1:]
    block = triton.next_power_of_2(dim)
    _enter[(row_SN.numel(),)](
        x_SKD,
        row_SN if order_SN is None else order_SN.contiguous(),
        x_SKD if classes_CD is None else classes_CD.contiguous(),
        *(row_SN, width_N, head_RD, tail_mean_R, tail_spread_R),
        num_own,
        num_own if order_SN is None else order_SN.shape[1],
        row_SN.shape[1],
        *(x_SKD.stride(1), head_RD.stride(0)),
        DIM=dim,
        BLOCK=block,
        ORDERED=order_SN is None,
        num_warps=1 if block <= 1024 else 4,
    )
