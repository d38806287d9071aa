"""`narrow_mlp` for Hopper, whose warps have roles: one reads weights ahead, four each compute 64 rows.

In Triton a program waits for its products before GELU, and what fills the gap is another program, if one fits. Here,
in Gluon, the first product of the next hidden features is under way during GELU of these, and one group of warps
multiplies while another has GELU. Rows and their hidden features stay in registers.

Shapes: R rows, D model features, H hidden features.
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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from mone.engine.casts import Factor, cast
from mone.engine.kernels.gelu import activate
from mone.engine.kernels.hopper import (
    GROUP,
    descriptors_of,
    factor_layout,
    make_barriers,
    make_buffers,
    memory_layout,
    product_layout,
)
from mone.engine.kernels.narrow_mlp import parts_of
from mone.engine.rows import Run
from mone.engine.tilings import Tiling

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false

# Registers of a thread that computes and of one that reads, by the number of groups.
_REGISTERS = {2: (232, 40), 3: (160, 24)}

# Forms of GELU that get their bias in float32: two values of 16 bits are taken apart, and so waited for, as soon as
# they are loaded. The error function leaves no registers for it.
FULL_BIAS = ("gelu_fast", "gelu_tanh_fast")


@gluon.jit
def _read(
    descriptors, buffers, barriers, row, num_steps,
    MORE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The rows once, then the weights of hidden features, block by block, as buffers become free."""
    rows_desc, up_desc, down_desc, more_rows_desc, more_up_desc, more_down_desc = descriptors
    rows, up, down, more_rows, more_up, more_down = buffers
    rows_full, full, empty = barriers
    WIDTH: gl.constexpr = rows_desc.block_type.shape[1]
    HIDDEN: gl.constexpr = up_desc.block_type.shape[0]
    rows_bytes: gl.constexpr = rows_desc.block_type.nbytes + (more_rows_desc.block_type.nbytes if MORE else 0)
    more_bytes: gl.constexpr = more_up_desc.block_type.nbytes + more_down_desc.block_type.nbytes if MORE else 0
    bytes: gl.constexpr = up_desc.block_type.nbytes + down_desc.block_type.nbytes + more_bytes
    mbarrier.expect(rows_full, GROUPS * rows_bytes)
    for group in gl.static_range(GROUPS):
        at = row + rows_desc.block_type.shape[0] * group
        tma.async_copy_global_to_shared(rows_desc, [at, 0], rows_full, rows.index(group))
        if MORE:
            tma.async_copy_global_to_shared(more_rows_desc, [at, WIDTH], rows_full, more_rows.index(group))
    for step in range(num_steps):
        stage, start = step % STAGES, step * HIDDEN
        mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
        here = full.index(stage)
        mbarrier.expect(here, bytes)
        tma.async_copy_global_to_shared(up_desc, [start, 0], here, up.index(stage))
        tma.async_copy_global_to_shared(down_desc, [0, start], here, down.index(stage))
        if MORE:
            tma.async_copy_global_to_shared(more_up_desc, [start, WIDTH], here, more_up.index(stage))
            tma.async_copy_global_to_shared(more_down_desc, [WIDTH, start], here, more_down.index(stage))


@gluon.jit
def _hidden(own, more_own, up, more_up, zero, stage, MORE: gl.constexpr):
    """Begin the first product."""
    hidden = warpgroup_mma(own, up.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if MORE:
        hidden = warpgroup_mma(more_own, more_up.index(stage).permute((1, 0)), hidden, is_async=True)
    return hidden


@gluon.jit
def _add(sums, out_ptr, bias_ptr, gain_ptr, row, stop, column, width, stride):
    """What these rows got, onto the stream."""
    COLUMNS: gl.constexpr = sums.shape[1]
    layout: gl.constexpr = memory_layout(COLUMNS)
    rows = row + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    inside = (rows < stop)[:, None] & (columns < width)[None, :]
    at = out_ptr + rows.to(gl.int64)[:, None] * stride + columns[None, :]
    before = gl.load(at, mask=inside, other=0.0)
    bias = gl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(gl.float32)
    gain = gl.load(gain_ptr + rows, mask=rows < stop, other=0.0)
    added = (gl.convert_layout(sums, layout) + bias[None, :]) * gain[:, None]
    gl.store(at, (added + before.to(gl.float32)).to(before.dtype), mask=inside)


@gluon.jit
def _compute(
    work, buffers, barriers, num_steps,
    NUMBER: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """The MLP of one group's rows."""
    out_ptr, up_bias_ptr, down_bias_ptr, gain_ptr, row, stop, width, stride = work
    rows, up, down, more_rows, more_up, more_down = buffers
    rows_full, full, empty = barriers
    ROWS: gl.constexpr = rows.shape[1]
    HIDDEN: gl.constexpr = up.shape[1]
    WIDTH: gl.constexpr = rows.shape[2]
    hidden_layout: gl.constexpr = product_layout(HIDDEN)
    zero = gl.zeros((ROWS, HIDDEN), gl.float32, layout=hidden_layout)
    sums = warpgroup_mma_init(gl.zeros((ROWS, WIDTH), gl.float32, layout=product_layout(WIDTH)))
    bias_at = up_bias_ptr + gl.arange(0, HIDDEN, layout=gl.SliceLayout(0, hidden_layout))
    # A step ahead.
    coming_bias = gl.load(bias_at)
    mbarrier.wait(rows_full, 0)
    own = rows.index(NUMBER).load(factor_layout(HIDDEN))
    more_own = own
    if MORE:
        more_own = more_rows.index(NUMBER).load(factor_layout(HIDDEN))
        more_sums = warpgroup_mma_init(gl.zeros((ROWS, MORE), gl.float32, layout=product_layout(MORE)))
    mbarrier.wait(full.index(0), 0)
    hidden = warpgroup_mma_wait(0, deps=(_hidden(own, more_own, up, more_up, zero, 0, MORE),))
    # All products end within a step: ptxas lets none run on from one into the next.
    for step in range(num_steps - 1):
        stage, following = step % STAGES, (step + 1) % STAGES
        bias = coming_bias.to(gl.float32)
        coming_bias = gl.load(bias_at + (step + 1) * HIDDEN)
        mbarrier.wait(full.index(following), (step + 1) // STAGES % 2)
        coming = _hidden(own, more_own, up, more_up, zero, following, MORE)
        factor = activate(hidden, bias[None, :], ACTIVATION, True).to(rows.dtype)
        factor = gl.convert_layout(factor, factor_layout(WIDTH))
        sums = warpgroup_mma(factor, down.index(stage).permute((1, 0)), sums, is_async=True)
        if MORE:
            more_sums = warpgroup_mma(factor, more_down.index(stage).permute((1, 0)), more_sums, is_async=True)
            hidden, sums, more_sums = warpgroup_mma_wait(0, deps=(coming, sums, more_sums))
            more_sums = warpgroup_mma_init(more_sums)
        else:
            hidden, sums = warpgroup_mma_wait(0, deps=(coming, sums))
        sums = warpgroup_mma_init(sums)
        mbarrier.arrive(empty.index(stage), count=1)
    stage = (num_steps - 1) % STAGES
    factor = activate(hidden, coming_bias.to(gl.float32)[None, :], ACTIVATION, True).to(rows.dtype)
    factor = gl.convert_layout(factor, factor_layout(WIDTH))
    sums = warpgroup_mma(factor, down.index(stage).permute((1, 0)), sums, is_async=True)
    if MORE:
        more_sums = warpgroup_mma(factor, more_down.index(stage).permute((1, 0)), more_sums, is_async=True)
        sums, more_sums = warpgroup_mma_wait(0, deps=(sums, more_sums))
        _add(more_sums, out_ptr, down_bias_ptr, gain_ptr, row + NUMBER * ROWS, stop, WIDTH, width, stride)
    else:
        sums = warpgroup_mma_wait(0, deps=(sums,))
    _add(sums, out_ptr, down_bias_ptr, gain_ptr, row + NUMBER * ROWS, stop, 0, width, stride)


@gluon.jit
def _buffers(rows_desc, up_desc, down_desc, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    return make_buffers(rows_desc, GROUPS), make_buffers(up_desc, STAGES), make_buffers(down_desc, STAGES)


@gluon.jit
def _narrow_mlp(
    rows_desc, up_desc, down_desc, more_rows_desc, more_up_desc, more_down_desc,
    out_ptr, up_bias_ptr, down_bias_ptr, gain_ptr, first_row, stop, num_steps, width, stride,
    MORE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ACTIVATION: gl.constexpr,
    COMPUTING: gl.constexpr, READING: gl.constexpr,
):  # fmt: skip
    rows, up, down = _buffers(rows_desc, up_desc, down_desc, GROUPS, STAGES)
    more_rows, more_up, more_down = rows, up, down
    if MORE:
        more_rows, more_up, more_down = _buffers(more_rows_desc, more_up_desc, more_down_desc, GROUPS, STAGES)
    rows_full, full, empty = make_barriers(1, 1).index(0), make_barriers(STAGES, 1), make_barriers(STAGES, GROUPS)
    fence_async_shared()
    row = first_row + gl.program_id(0) * GROUPS * rows_desc.block_type.shape[0]
    descriptors = (rows_desc, up_desc, down_desc, more_rows_desc, more_up_desc, more_down_desc)
    buffers = (rows, up, down, more_rows, more_up, more_down)
    barriers = (rows_full, full, empty)
    work = (out_ptr, up_bias_ptr, down_bias_ptr, gain_ptr, row, stop, width, stride)
    # Gluon takes no list that is put together, so each number of groups is written out.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (work, buffers, barriers, num_steps, 0, MORE, STAGES, ACTIVATION)),
                (_compute, (work, buffers, barriers, num_steps, 1, MORE, STAGES, ACTIVATION)),
                (_read, (descriptors, buffers, barriers, row, num_steps, MORE, GROUPS, STAGES)),
            ],
            [4, 1],
            [COMPUTING, READING],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (work, buffers, barriers, num_steps, 0, MORE, STAGES, ACTIVATION)),
                (_compute, (work, buffers, barriers, num_steps, 1, MORE, STAGES, ACTIVATION)),
                (_compute, (work, buffers, barriers, num_steps, 2, MORE, STAGES, ACTIVATION)),
                (_read, (descriptors, buffers, barriers, row, num_steps, MORE, GROUPS, STAGES)),
            ],
            [4, 4, 1],
            [COMPUTING, COMPUTING, READING],
        )


def blocks_of(width: int, hidden: int) -> list[list[int]]:
    """Blocks of rows and of both weights, for each part of a width."""
    first, more = parts_of(width)
    return [block for part in (first, more or first) for block in ([GROUP, part], [hidden, part], [part, hidden])]


def constants_of(width: int, tiling: Tiling, activation: str) -> dict[str, Any]:
    """What a kernel is compiled for."""
    groups = tiling.rows // GROUP
    computing, reading = _REGISTERS[groups]
    return {
        "MORE": parts_of(width)[1],
        "GROUPS": groups,
        "STAGES": tiling.stages,
        "ACTIVATION": activation,
        "COMPUTING": computing,
        "READING": reading,
    }


def narrow_mlp_hopper(
    rows_RD: Tensor,
    up: Factor,
    up_H: Tensor,
    down: Factor,
    down_D: Tensor,
    out_RD: Tensor,
    run: Run,
    gain_R: Tensor,
    *,
    tiling: Tiling,
    activation: str,
) -> None:
    """As `narrow_mlp`, in half precision.

    Args:
        rows_RD: Half precision. Zero from the run's width up to the power of two that holds it.
        up: Whole weight [H, D] in the same dtype; H is a multiple of `tiling.columns`.
        up_H: Its bias.
        down: Whole weight [D, H] in the same dtype.
        down_D: Its bias.
        out_RD: Residual stream; only columns up to the run's width are written.
        run: Rows of an expert.
        gain_R: float32.
        tiling: Rows (128 or 192) and hidden features of a block, and blocks of weights that are on their way.
        activation: One of `gelu.FORMS`.
    """
    if activation in FULL_BIAS:
        up_H = cast(up_H, torch.float32)
    tensors = (rows_RD, up.values, down.values) * 2
    descriptors = descriptors_of(tensors, blocks_of(run.width, tiling.columns))
    _narrow_mlp[(triton.cdiv(run.stop - run.start, tiling.rows),)](
        *descriptors,
        *(out_RD, up_H, down_D, gain_R, run.start, run.stop, len(up_H) // tiling.columns, run.width, out_RD.stride(0)),
        **constants_of(run.width, tiling, activation),
        num_warps=4,
    )
