"""LayerNorm of rows of different widths in one launch, from the two numbers that are known of each row's tail.

Shapes: R rows, D model features, J tiles.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mone.engine.rows import Run

# Values that a program holds, and its warps: narrow rows are taken more at a time.
_VALUES, _WARPS = 4096, 4
# Zeros are written up to the power of two that holds a row's width, and to this at least: so far a tile of a product
# may read.
SMALLEST_BLOCK = 64

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false


@triton.jit
def _norm_rows(
    head_ptr, branch_ptr, gain_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, out_ptr,
    first, stop, width, dim, out_columns, head_stride, out_stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < stop)[:, None] & (column < width)[None, :]
    head_at = row.to(tl.int64)[:, None] * head_stride + column[None, :]
    head = tl.load(head_ptr + head_at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        gain = tl.load(gain_ptr + row, mask=row < stop, other=0.0)
        head += gain[:, None] * tl.load(branch_ptr + head_at, mask=inside, other=0.0).to(tl.float32)
        head = head.to(head_ptr.dtype.element_ty)
        tl.store(head_ptr + head_at, head, mask=inside)
        head = head.to(tl.float32)
    tail_mean = tl.load(mean_ptr + row, mask=row < stop, other=0.0)
    tail_spread = tl.load(spread_ptr + row, mask=row < stop, other=0.0)
    own_mean = tl.sum(head, axis=1) / width
    centred = tl.where(inside, head - own_mean[:, None], 0.0)
    apart = own_mean - tail_mean
    tail_share = (dim - width).to(tl.float32) / dim
    variance = (tl.sum(centred * centred, axis=1) + tail_spread) / dim + apart * apart * tail_share * (1 - tail_share)
    scale = tl.rsqrt(variance + eps)
    shift = apart * tail_share * scale
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    normal = (centred * scale[:, None] + shift[:, None]) * weight[None, :] + bias[None, :]
    # Past the width weight, bias and what they scale are zero or left out, so that zeros are written.
    padded = (row < stop)[:, None] & (column < out_columns)[None, :]
    out_at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_ptr + out_at, normal.to(out_ptr.dtype.element_ty), mask=padded)


@triton.jit
def _norm(
    head_ptr, branch_ptr, gain_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, out_ptr, tiles_ptr,
    dim, out_columns, head_stride, out_stride, eps,
    VALUES: tl.constexpr, LARGEST: tl.constexpr, KINDS: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    first = tl.load(tiles_ptr + 4 * tile)
    stop = tl.load(tiles_ptr + 4 * tile + 1)
    width = tl.load(tiles_ptr + 4 * tile + 2)
    kind = tl.load(tiles_ptr + 4 * tile + 3)
    for shift in tl.static_range(KINDS):
        if kind == shift:
            _norm_rows(
                head_ptr, branch_ptr, gain_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, out_ptr,
                first, stop, width, dim, out_columns, head_stride, out_stride, eps,
                VALUES // (LARGEST >> shift), LARGEST >> shift, BRANCH,
            )  # fmt: skip


@functools.lru_cache(maxsize=256)
def norm_tiles(runs: tuple[Run, ...], widest: int, device: torch.device) -> Tensor:
    """Work of each program, int32 [J, 4]: first row, end of the run, width, halvings from the largest block."""
    largest, tiles = _block(widest), []
    for run in runs:
        block = _block(run.width)
        kind = largest.bit_length() - block.bit_length()
        rows = range(run.start, run.stop, max(1, max(_VALUES, largest) // block))
        tiles += [(row, run.stop, run.width, kind) for row in rows]
    with torch.inference_mode(False):
        return torch.tensor(tiles, dtype=torch.int32, device=device)


def norm_rows(
    head_RD: Tensor,
    tail_mean_R: Tensor,
    tail_spread_R: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    out_RD: Tensor,
    runs: tuple[Run, ...],
    *,
    branch_RD: Tensor | None = None,
    gain_R: Tensor | None = None,
    dim: int = 0,
) -> None:
    """LayerNorm of whole tokens into the first features of out_RD, zero up to the power of two after them.

    Args:
        head_RD: Residual stream, of which each run has its width; with a branch, it is added here first.
        tail_mean_R: float32. Mean of the other features; anything where there are none.
        tail_spread_R: float32. Sum of their squared distances from it; 0 where there are none.
        weight_D: Of the LayerNorm.
        bias_D: Of the LayerNorm.
        eps: Of the LayerNorm.
        out_RD: Result; rows may be longer than D.
        runs: Rows of each expert.
        branch_RD: Added to the stream, times gain_R; laid out like it.
        gain_R: float32.
        dim: D, where the weight is shorter.
    """
    largest = _block(len(weight_D))
    dim = dim or len(weight_D)
    tiles_J4 = norm_tiles(runs, len(weight_D), head_RD.device)
    _norm[(len(tiles_J4),)](
        head_RD,
        head_RD if branch_RD is None else branch_RD,
        tail_mean_R if gain_R is None else gain_R,
        tail_mean_R,
        tail_spread_R,
        weight_D,
        bias_D,
        out_RD,
        tiles_J4,
        dim,
        out_RD.shape[1],
        head_RD.stride(0),
        out_RD.stride(0),
        eps,
        VALUES=max(_VALUES, largest),
        LARGEST=largest,
        KINDS=1 + max(largest.bit_length() - _block(run.width).bit_length() for run in runs),
        BRANCH=branch_RD is not None,
        num_warps=_WARPS,
    )


def _block(width: int) -> int:
    return max(SMALLEST_BLOCK, triton.next_power_of_2(width))
