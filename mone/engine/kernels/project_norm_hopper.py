"""A narrow expert's projection onto the residual stream and the LayerNorm after it, on Hopper.

All features of a narrow stream lie in one tile, so that its rows are normalised where they are finished. One warp reads
rows and weights ahead; two groups of four warps take 64 rows each.

Shapes: R rows, I input features, D model features.
"""

from typing import Any

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

from mone.engine.casts import Factor
from mone.engine.kernels.gemm import num_processors
from mone.engine.kernels.hopper import GROUP, descriptors_of, make_barriers, make_buffers, product_layout
from mone.engine.kernels.narrow_mlp import parts_of
from mone.engine.kernels.norm_hopper import WIDEST, load_tails, normal_of, vector_at
from mone.engine.rows import Run

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false

# Input features of a step, and bytes for steps that are on their way: three at the widest. With the stream and what is
# normalised, of two groups, these are 221184 of the 232448 bytes that a program may have.
_INNER = 64
_AHEAD = 3 * 2 * _INNER * (2 * GROUP + WIDEST)
# Registers of a thread that computes, and of one that reads.
_COMPUTING, _READING = 232, 40


@gluon.jit
def _read(descriptors, buffers, barriers, span, GROUPS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr):
    """Rows and weights of one step after the other, through all tiles, as buffers become free."""
    rows_desc, weight_desc, more_weight_desc = descriptors
    rows, weights, more_weights = buffers
    full, empty = barriers
    first_row, stop, inner = span
    HEIGHT: gl.constexpr = rows_desc.block_type.shape[0]
    INNER: gl.constexpr = rows_desc.block_type.shape[1]
    WIDTH: gl.constexpr = weight_desc.block_type.shape[0]
    more_bytes: gl.constexpr = more_weight_desc.block_type.nbytes if MORE else 0
    bytes: gl.constexpr = GROUPS * rows_desc.block_type.nbytes + weight_desc.block_type.nbytes + more_bytes
    step = 0
    for row in range(first_row + gl.program_id(0) * GROUPS * HEIGHT, stop, gl.num_programs(0) * GROUPS * HEIGHT):
        for start in range(0, inner, INNER):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
            here = full.index(stage)
            mbarrier.expect(here, bytes)
            for group in gl.static_range(GROUPS):
                own = rows.index(stage * GROUPS + group)
                tma.async_copy_global_to_shared(rows_desc, [row + HEIGHT * group, start], here, own)
            tma.async_copy_global_to_shared(weight_desc, [0, start], here, weights.index(stage))
            if MORE:
                tma.async_copy_global_to_shared(more_weight_desc, [WIDTH, start], here, more_weights.index(stage))
            step += 1


@gluon.jit
def _added(sums, stream, bias_ptr, start, width):
    """Onto the stream, where the sum stays; as it is rounded there."""
    total = stream.load(sums.type.layout).to(gl.float32) + (sums + vector_at(bias_ptr, sums, start, width)[None, :])
    rounded = total.to(stream.dtype)
    stream.store(rounded)
    return rounded.to(gl.float32)


@gluon.jit
def _project(
    work,
    NUMBER: gl.constexpr, GROUPS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The rows of one group, tile after tile."""
    descriptors, buffers, all_streams, all_normals, barriers, bias_ptr, tail_ptrs, norm, span = work
    stream_desc, more_stream_desc, normal_desc, more_normal_desc = descriptors
    rows, weights, more_weights = buffers
    stream, more_stream = all_streams[0].index(NUMBER), all_streams[1].index(NUMBER)
    normal, more_normal = all_normals[0].index(NUMBER), all_normals[1].index(NUMBER)
    full, empty, all_there = barriers
    there = all_there.index(NUMBER)
    mean_ptr, spread_ptr = tail_ptrs
    first_row, stop, inner = span
    width = norm[2]
    HEIGHT: gl.constexpr = rows.shape[1]
    INNER: gl.constexpr = rows.shape[2]
    WIDTH: gl.constexpr = weights.shape[1]
    stream_bytes: gl.constexpr = stream_desc.block_type.nbytes + (more_stream_desc.block_type.nbytes if MORE else 0)
    start_row = first_row + (gl.program_id(0) * GROUPS + NUMBER) * HEIGHT
    step, phase = 0, 0
    for row in range(start_row, stop + NUMBER * HEIGHT, gl.num_programs(0) * GROUPS * HEIGHT):
        tma.store_wait(0)
        mbarrier.expect(there, stream_bytes)
        tma.async_copy_global_to_shared(stream_desc, [row, 0], there, stream)
        if MORE:
            tma.async_copy_global_to_shared(more_stream_desc, [row, WIDTH], there, more_stream)
        tails = load_tails(mean_ptr, spread_ptr, row, stop, HEIGHT)
        sums = warpgroup_mma_init(gl.zeros((HEIGHT, WIDTH), gl.float32, layout=product_layout(WIDTH)))
        if MORE:
            more_sums = warpgroup_mma_init(gl.zeros((HEIGHT, MORE), gl.float32, layout=product_layout(MORE)))
        for _ in range(0, inner, INNER):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES % 2)
            own = rows.index(stage * GROUPS + NUMBER)
            sums = warpgroup_mma(own, weights.index(stage).permute((1, 0)), sums, is_async=True)
            if MORE:
                more_sums = warpgroup_mma(own, more_weights.index(stage).permute((1, 0)), more_sums, is_async=True)
                sums, more_sums = warpgroup_mma_wait(0, deps=(sums, more_sums))
                more_sums = warpgroup_mma_init(more_sums)
            else:
                sums = warpgroup_mma_wait(0, deps=(sums,))
            sums = warpgroup_mma_init(sums)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        mbarrier.wait(there, phase)
        phase ^= 1
        head = _added(warpgroup_mma_wait(0, deps=(sums,)), stream, bias_ptr, 0, width)
        more_head = head
        if MORE:
            more_head = _added(warpgroup_mma_wait(0, deps=(more_sums,)), more_stream, bias_ptr, WIDTH, width)
        fence_async_shared()
        tma.async_copy_shared_to_global(stream_desc, [row, 0], stream)
        if MORE:
            tma.async_copy_shared_to_global(more_stream_desc, [row, WIDTH], more_stream)
        head, more_head = normal_of(head, more_head, tails, norm, MORE)
        normal.store(head.to(normal.dtype))
        if MORE:
            more_normal.store(more_head.to(normal.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(normal_desc, [row, 0], normal)
        if MORE:
            tma.async_copy_shared_to_global(more_normal_desc, [row, WIDTH], more_normal)
    tma.store_wait(0)


@gluon.jit
def _project_norm(
    rows_desc, weight_desc, stream_desc, normal_desc, more_weight_desc, more_stream_desc, more_normal_desc,
    bias_ptr, mean_ptr, spread_ptr, norm_weight_ptr, norm_bias_ptr, first_row, stop, inner, width, dim, eps,
    GROUPS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr, COMPUTING: gl.constexpr, READING: gl.constexpr,
):  # fmt: skip
    rows, weights = make_buffers(rows_desc, STAGES * GROUPS), make_buffers(weight_desc, STAGES)
    stream, normal = make_buffers(stream_desc, GROUPS), make_buffers(normal_desc, GROUPS)
    more_weights, more_stream, more_normal = weights, stream, normal
    if MORE:
        more_weights = make_buffers(more_weight_desc, STAGES)
        more_stream, more_normal = make_buffers(more_stream_desc, GROUPS), make_buffers(more_normal_desc, GROUPS)
    full, empty, there = make_barriers(STAGES, 1), make_barriers(STAGES, GROUPS), make_barriers(GROUPS, 1)
    fence_async_shared()
    buffers, span = (rows, weights, more_weights), (first_row, stop, inner)
    results = (stream_desc, more_stream_desc, normal_desc, more_normal_desc)
    norm, tail_ptrs = (norm_weight_ptr, norm_bias_ptr, width, dim, eps), (mean_ptr, spread_ptr)
    streams, normals = (stream, more_stream), (normal, more_normal)
    work = (results, buffers, streams, normals, (full, empty, there), bias_ptr, tail_ptrs, norm, span)
    factors = (rows_desc, weight_desc, more_weight_desc)
    gl.warp_specialize(
        [
            (_project, (work, 0, GROUPS, MORE, STAGES)),
            (_project, (work, 1, GROUPS, MORE, STAGES)),
            (_read, (factors, buffers, (full, empty), span, GROUPS, MORE, STAGES)),
        ],
        [4, 1],
        [COMPUTING, READING],
    )


def constants_of(width: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    stages = _AHEAD // (2 * _INNER * (2 * GROUP + sum(parts_of(width))))
    more = parts_of(width)[1]
    return {"GROUPS": 2, "MORE": more, "STAGES": stages, "COMPUTING": _COMPUTING, "READING": _READING}


def blocks_of(width: int) -> list[list[int]]:
    """Blocks of rows, then of weights, the stream and what is normalised, for each part of a width."""
    first, more = parts_of(width)
    parts = [block for part in (first, more or first) for block in ([part, _INNER], [GROUP, part], [GROUP, part])]
    return [[GROUP, _INNER], *parts]


def fits(width: int, num_inner: int) -> bool:
    """Whether the kernel takes rows of a width, and sums over so many features: whole steps."""
    return width <= WIDEST and num_inner % _INNER == 0


def project_norm_hopper(
    rows_RI: Tensor,
    weight: Factor,
    bias_D: Tensor,
    head_RD: Tensor,
    tail_mean_R: Tensor,
    tail_spread_R: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    eps: float,
    out_RD: Tensor,
    run: Run,
) -> None:
    """`grouped_gemm` onto the residual stream, then `norm_rows`, of one narrow expert.

    Args:
        rows_RI: Half precision; of a number of features that `fits`.
        weight: Whole weight [D, I] in the same dtype.
        bias_D: Its bias.
        head_RD: Residual stream, in the same dtype; columns past the run's width, as far as its parts go, get values
            that mean nothing.
        tail_mean_R: As for `norm_rows`.
        tail_spread_R: As for `norm_rows`.
        norm_weight_D: Of the LayerNorm.
        norm_bias_D: Of the LayerNorm.
        eps: Of the LayerNorm.
        out_RD: What is normalised, in the same dtype; zero past the run's width, as far as its parts go.
        run: Rows of an expert, of a width that `fits`.
    """
    descriptors = descriptors_of((rows_RI, *(weight.values, head_RD, out_RD) * 2), blocks_of(run.width))
    constants = constants_of(run.width)
    tiles = triton.cdiv(run.stop - run.start, GROUP * constants["GROUPS"])
    _project_norm[(min(num_processors(rows_RI.device), tiles),)](
        *descriptors,
        *(bias_D, tail_mean_R, tail_spread_R, norm_weight_D, norm_bias_D),
        *(run.start, run.stop, rows_RI.shape[1], run.width, len(norm_weight_D), eps),
        **constants,
        num_warps=4,
    )
