"""LayerNorm of a narrow expert's rows and a product with many columns, on Hopper: weights stay, rows stream by.

A narrow expert sums over so little that reading weights again for every tile takes longer than multiplying, and what it
normalises is little beside what it writes. So a program keeps as many columns of the weight as fit, and two groups of
four warps take 64 rows after 64, each on its own: normalise, multiply, write.

Shapes: R rows, D model features, O output features.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mone.engine.casts import Factor, cast
from mone.engine.kernels.gemm import num_processors
from mone.engine.kernels.hopper import (
    GROUP,
    descriptors_of,
    factor_layout,
    make_barriers,
    make_buffers,
    product_layout,
)
from mone.engine.kernels.narrow_mlp import parts_of
from mone.engine.kernels.norm_hopper import WIDEST, load_tails, normal_of
from mone.engine.rows import Run

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false

# Columns of a block, and bytes of the weight that a program keeps: three blocks at the widest. With rows and results of
# two groups these are 229376 of the 232448 bytes that a program may have.
_COLUMNS = 128
_KEPT = 3 * 2 * _COLUMNS * WIDEST
_REGISTERS = 232


@gluon.jit
def _read(rows_desc, more_rows_desc, rows, more_rows, full, row, MORE: gl.constexpr):
    more_bytes: gl.constexpr = more_rows_desc.block_type.nbytes if MORE else 0
    mbarrier.expect(full, rows_desc.block_type.nbytes + more_bytes)
    tma.async_copy_global_to_shared(rows_desc, [row, 0], full, rows)
    if MORE:
        tma.async_copy_global_to_shared(more_rows_desc, [row, rows_desc.block_type.shape[1]], full, more_rows)


@gluon.jit
def _load(rows):
    return rows.load(product_layout(rows.shape[1])).to(gl.float32)


@gluon.jit
def _project(
    work,
    NUMBER: gl.constexpr, GROUPS: gl.constexpr, MORE: gl.constexpr, CHUNKS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Every so many rows, and of them the columns that are kept."""
    descriptors, buffers, barriers, bias_ptr, tail_ptrs, norm, span = work
    rows_desc, more_rows_desc, out_desc = descriptors
    all_rows, all_more_rows, weights, more_weights, all_staging = buffers
    kept, all_full = barriers
    rows, more_rows, staging = all_rows.index(NUMBER), all_more_rows.index(NUMBER), all_staging.index(NUMBER)
    full = all_full.index(NUMBER)
    mean_ptr, spread_ptr = tail_ptrs
    first_row, stop, column, first, programs = span
    HEIGHT: gl.constexpr = rows.shape[0]
    layout: gl.constexpr = product_layout(COLUMNS)
    zero = gl.zeros((HEIGHT, COLUMNS), gl.float32, layout=layout)
    bias_at = bias_ptr + column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    start, pace = first_row + (first + programs * NUMBER) * HEIGHT, programs * GROUPS * HEIGHT
    if start < stop:
        _read(rows_desc, more_rows_desc, rows, more_rows, full, start, MORE)
    coming_tails = load_tails(mean_ptr, spread_ptr, start, stop, HEIGHT)
    phase = 0
    for row in range(start, stop, pace):
        tails = coming_tails
        coming_tails = load_tails(mean_ptr, spread_ptr, row + pace, stop, HEIGHT)
        mbarrier.wait(full, phase)
        phase ^= 1
        head = _load(rows)
        more_head = head
        if MORE:
            more_head = _load(more_rows)
        if row + pace < stop:
            _read(rows_desc, more_rows_desc, rows, more_rows, full, row + pace, MORE)
        head, more_head = normal_of(head, more_head, tails, norm, MORE)
        own = gl.convert_layout(head.to(rows.dtype), factor_layout(COLUMNS))
        more_own = gl.convert_layout(more_head.to(rows.dtype), factor_layout(COLUMNS))
        for chunk in range(CHUNKS):
            bias = gl.load(bias_at + chunk * COLUMNS)
            mbarrier.wait(kept.index(chunk), 0)
            sums = warpgroup_mma(own, weights.index(chunk).permute((1, 0)), zero, use_acc=False, is_async=True)
            if MORE:
                sums = warpgroup_mma(more_own, more_weights.index(chunk).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            tma.store_wait(0)
            staging.store((sums + bias[None, :]).to(staging.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [row, column + chunk * COLUMNS], staging)
    tma.store_wait(0)


@gluon.jit
def _norm_project(
    rows_desc, weight_desc, more_rows_desc, more_weight_desc, out_desc,
    bias_ptr, mean_ptr, spread_ptr, norm_weight_ptr, norm_bias_ptr,
    first_row, stop, column, num_shares, width, dim, eps,
    GROUPS: gl.constexpr, MORE: gl.constexpr, CHUNKS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = weight_desc.block_type.shape[0]
    WIDTH: gl.constexpr = weight_desc.block_type.shape[1]
    rows, weights = make_buffers(rows_desc, GROUPS), make_buffers(weight_desc, CHUNKS)
    more_rows, more_weights = rows, weights
    if MORE:
        more_rows, more_weights = make_buffers(more_rows_desc, GROUPS), make_buffers(more_weight_desc, CHUNKS)
    staging = make_buffers(out_desc, GROUPS)
    kept, full = make_barriers(CHUNKS, 1), make_barriers(GROUPS, 1)
    fence_async_shared()
    column += gl.program_id(0) % num_shares * CHUNKS * COLUMNS
    more_bytes: gl.constexpr = more_weight_desc.block_type.nbytes if MORE else 0
    for chunk in gl.static_range(CHUNKS):
        at, here = column + chunk * COLUMNS, kept.index(chunk)
        mbarrier.expect(here, weight_desc.block_type.nbytes + more_bytes)
        tma.async_copy_global_to_shared(weight_desc, [at, 0], here, weights.index(chunk))
        if MORE:
            tma.async_copy_global_to_shared(more_weight_desc, [at, WIDTH], here, more_weights.index(chunk))
    descriptors, barriers = (rows_desc, more_rows_desc, out_desc), (kept, full)
    buffers = (rows, more_rows, weights, more_weights, staging)
    norm, tail_ptrs = (norm_weight_ptr, norm_bias_ptr, width, dim, eps), (mean_ptr, spread_ptr)
    span = (first_row, stop, column, gl.program_id(0) // num_shares, gl.num_programs(0) // num_shares)
    work = (descriptors, buffers, barriers, bias_ptr, tail_ptrs, norm, span)
    gl.warp_specialize(
        [
            (_project, (work, 0, GROUPS, MORE, CHUNKS, COLUMNS)),
            (_project, (work, 1, GROUPS, MORE, CHUNKS, COLUMNS)),
        ],
        [4],
        [REGISTERS],
    )


def chunks_of(width: int, num_columns: int) -> int:
    """How many blocks of columns a program keeps: as many as fit, so that programs share all columns evenly."""
    total, fitting = num_columns // _COLUMNS, _KEPT // (2 * sum(parts_of(width)) * _COLUMNS)
    return max(chunks for chunks in range(1, fitting + 1) if total % chunks == 0)


def constants_of(width: int, num_columns: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    chunks = chunks_of(width, num_columns)
    return {"GROUPS": 2, "MORE": parts_of(width)[1], "CHUNKS": chunks, "REGISTERS": _REGISTERS}


def blocks_of(width: int) -> list[list[int]]:
    """Blocks of rows and weights for each part of a width, then of results."""
    first, more = parts_of(width)
    blocks = [block for part in (first, more or first) for block in ([GROUP, part], [_COLUMNS, part])]
    return [*blocks, [GROUP, _COLUMNS]]


def fits(width: int, num_columns: int) -> bool:
    """Whether the kernel takes rows of a width, and so many columns: whole blocks."""
    return width <= WIDEST and num_columns % _COLUMNS == 0


def norm_project_hopper(
    head_RD: Tensor,
    tail_mean_R: Tensor,
    tail_spread_R: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    eps: float,
    weight: Factor,
    bias_O: Tensor,
    out_RO: Tensor,
    run: Run,
    columns: range,
) -> None:
    """`norm_rows`, then `grouped_gemm` without activation, of one narrow expert.

    Args:
        head_RD: Half precision. Residual stream.
        tail_mean_R: As for `norm_rows`.
        tail_spread_R: As for `norm_rows`.
        norm_weight_D: Of the LayerNorm.
        norm_bias_D: Of the LayerNorm.
        eps: Of the LayerNorm.
        weight: Whole weight [O, D] in the same dtype.
        bias_O: Its bias.
        out_RO: Result, in the same dtype.
        run: Rows of an expert, of a width that `fits`.
        columns: Of the result; a number that `fits`.
    """
    tensors = (head_RD, weight.values, head_RD, weight.values, out_RO)
    descriptors = descriptors_of(tensors, blocks_of(run.width))
    constants = constants_of(run.width, len(columns))
    num_shares = len(columns) // (constants["CHUNKS"] * _COLUMNS)
    tiles = triton.cdiv(run.stop - run.start, GROUP)
    programs = min(num_processors(head_RD.device) // num_shares, tiles)
    _norm_project[(programs * num_shares,)](
        *descriptors,
        *(cast(bias_O, torch.float32), tail_mean_R, tail_spread_R, norm_weight_D, norm_bias_D),
        *(run.start, run.stop, columns.start, num_shares, run.width, len(norm_weight_D), eps),
        **constants,
        num_warps=4,
    )
