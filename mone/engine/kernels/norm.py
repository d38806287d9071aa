"""LayerNorm of rows of different widths in one launch, from the two numbers that are known of each row's tail.

As many programs as a device holds go through the runs of rows, each with a block as wide as its rows; the next rows are
on their way while some are normalised. A run begins with the program after the last of the run before it, so that in a
small batch no program has two.

Shapes: R rows, D model features, E runs.
"""

import triton
import triton.language as tl
from torch import Tensor

from mone.engine.kernels.gemm import num_processors
from mone.engine.rows import Run, table_of

# Values that a program holds, its warps, and programs on a processor.
VALUES, WARPS, PROGRAMS = 2048, 4, 4
# Zeros are written up to the power of two that holds a row's width, and to this at least: so far a tile of a product
# may read.
SMALLEST_BLOCK = 128

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false


@triton.jit
def _load(head_ptr, mean_ptr, spread_ptr, row, column, stop, width, head_stride):
    inside = (row < stop)[:, None] & (column < width)[None, :]
    head = tl.load(head_ptr + row.to(tl.int64)[:, None] * head_stride + column[None, :], mask=inside, other=0.0)
    tail_mean = tl.load(mean_ptr + row, mask=row < stop, other=0.0)
    return head, tail_mean, tl.load(spread_ptr + row, mask=row < stop, other=0.0)


@triton.jit
def _norm_run(
    head_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, out_ptr, run_ptr,
    taken, dim, out_columns, head_stride, out_stride, eps,
    width: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Normalise the rows of this program's turns, the first turn being that of program `taken`; how many turns."""
    first = tl.load(run_ptr)
    stop = tl.load(run_ptr + 1)
    num_programs = tl.num_programs(0)
    start = first + (tl.program_id(0) + num_programs - taken % num_programs) % num_programs * ROWS
    if start < stop:
        column = tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        tail_share = (dim - width) / dim
        step = num_programs * ROWS
        row = start + tl.arange(0, ROWS)
        coming, coming_mean, coming_spread = _load(
            head_ptr, mean_ptr, spread_ptr, row, column, stop, width, head_stride
        )
        for at in tl.range(start, stop, step):
            head, tail_mean, tail_spread = coming.to(tl.float32), coming_mean, coming_spread
            row = at + tl.arange(0, ROWS)
            coming, coming_mean, coming_spread = _load(
                head_ptr, mean_ptr, spread_ptr, row + step, column, stop, width, head_stride
            )
            own_mean = tl.sum(head, axis=1) / width
            centred = tl.where((column < width)[None, :], head - own_mean[:, None], 0.0)
            apart = own_mean - tail_mean
            variance = (tl.sum(centred * centred, axis=1) + tail_spread) / dim
            variance += apart * apart * tail_share * (1 - tail_share)
            scale = tl.rsqrt(variance + eps)
            shift = apart * tail_share * scale
            normal = (centred * scale[:, None] + shift[:, None]) * weight[None, :] + bias[None, :]
            # Past the width weight, bias and what they scale are zero or left out, so that zeros are written.
            padded = (row < stop)[:, None] & (column < out_columns)[None, :]
            out_at = row.to(tl.int64)[:, None] * out_stride + column[None, :]
            tl.store(out_ptr + out_at, normal.to(out_ptr.dtype.element_ty), mask=padded)
    return (stop - first + ROWS - 1) // ROWS


@triton.jit
def _norm(
    head_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, out_ptr, runs_ptr,
    dim, out_columns, head_stride, out_stride, eps,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    taken = 0
    for index in tl.static_range(len(BLOCKS)):
        taken += _norm_run(
            head_ptr, mean_ptr, spread_ptr, weight_ptr, bias_ptr, out_ptr, runs_ptr + 3 * index,
            taken, dim, out_columns, head_stride, out_stride, eps,
            WIDTHS[index], BLOCKS[index], VALUES // BLOCKS[index],
        )  # fmt: skip


def norm_rows(
    head_RD: Tensor,
    tail_mean_R: Tensor,
    tail_spread_R: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    out_RD: Tensor,
    runs: tuple[Run, ...],
) -> None:
    """LayerNorm of whole tokens into the first features of out_RD, zero up to the power of two after them.

    Args:
        head_RD: Residual stream, of which each run has its width.
        tail_mean_R: float32. Mean of the other features; anything where there are none.
        tail_spread_R: float32. Sum of their squared distances from it; 0 where there are none.
        weight_D: Of the LayerNorm.
        bias_D: Of the LayerNorm.
        eps: Of the LayerNorm.
        out_RD: Result; rows may be longer than D.
        runs: Rows of each expert.
    """
    blocks = [max(SMALLEST_BLOCK, triton.next_power_of_2(run.width)) for run in runs]
    values = max(VALUES, *blocks)
    most = sum(-(-(run.stop - run.start) * block // values) for run, block in zip(runs, blocks, strict=True))
    _norm[(min(max(1, most), PROGRAMS * num_processors(head_RD.device)),)](
        *(head_RD, tail_mean_R, tail_spread_R, weight_D, bias_D, out_RD, table_of(runs, head_RD.device)),
        *(len(weight_D), out_RD.shape[1], head_RD.stride(0), out_RD.stride(0), eps),
        WIDTHS=tuple(run.width for run in runs),
        BLOCKS=tuple(blocks),
        VALUES=values,
        num_warps=WARPS,
    )
