"""Tokens of sequences to rows of runs, with the mean and spread of what is left behind.

Shapes: S sequences, N tokens, D model features, R rows.
"""

import triton
import triton.language as tl
from torch import Tensor

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false


@triton.jit
def _enter(
    x_ptr, row_ptr, width_ptr, head_ptr, mean_ptr, spread_ptr, num_tokens, x_stride, head_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + token)
    width = tl.load(width_ptr + token % num_tokens)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * x_stride + column, mask=column < DIM, other=0.0)
    tl.store(head_ptr + row.to(tl.int64) * head_stride + column, x, mask=column < width)
    in_tail = (column >= width) & (column < DIM)
    mean = tl.sum(tl.where(in_tail, x.to(tl.float32), 0.0), axis=0) / tl.maximum(DIM - width, 1)
    apart = tl.where(in_tail, x.to(tl.float32) - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(spread_ptr + row, tl.sum(apart * apart, axis=0))


def enter_rows(
    x_SND: Tensor, row_SN: Tensor, width_N: Tensor, head_RD: Tensor, tail_mean_R: Tensor, tail_spread_R: Tensor
) -> None:
    """Write the first features of each token to its row, and two numbers of the others.

    Args:
        x_SND: Contiguous.
        row_SN: int64. The row of each token.
        width_N: int32. The width of each token's expert.
        head_RD: Rows of the residual stream.
        tail_mean_R: float32. Gets the mean of the features past the width, 0 where there are none.
        tail_spread_R: float32. Gets the sum of their squared distances from it.
    """
    num_tokens, dim = x_SND.shape[1:]
    _enter[(row_SN.numel(),)](
        x_SND, row_SN, width_N, head_RD, tail_mean_R, tail_spread_R, num_tokens, x_SND.stride(1), head_RD.stride(0),
        DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
