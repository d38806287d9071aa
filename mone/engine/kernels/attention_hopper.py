"""`attend_rows` for groups of 65 to 256 rows on Hopper: one warp group reads, two compute.

A program has a group of rows and takes one head after the other. While two groups of four warps compute a head, 64
queries at a time, the third reads the next one. Scores stay in registers; as keys come in blocks of 64, exponentials of
one block are taken while another is multiplied.

Shapes: R rows, G groups, M slots of a group, D model features.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from mone.engine.kernels.hopper import factor_layout, make_barriers, memory_layout, product_layout, shared_layout
from mone.engine.rows import Places

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false

# Heads that are computed and read at a time; registers of a thread that computes and of one that reads.
_STAGES, _COMPUTING, _READING = 2, 224, 64


@gluon.constexpr_function
def _sizes(slots):
    """Blocks of keys, the last slots first, and among them what is no whole block."""
    return tuple(size for size in (16, 32) if slots & size) + (64,) * (slots // 64)


@gluon.constexpr_function
def _starts(slots):
    sizes = _sizes(slots)
    return tuple(slots - sum(sizes[: index + 1]) for index in range(len(sizes)))


@gluon.jit
def _buffer(ptr, COUNT: gl.constexpr, SIZE: gl.constexpr):
    return gl.allocate_shared_memory(ptr.dtype.element_ty, [COUNT, SIZE, 64], shared_layout(64))


@gluon.jit
def _rows_at(read_ptr, first, num_slots, stride, SIZE: gl.constexpr):
    """Where the features of slots are; past the last slot those of the last."""
    layout: gl.constexpr = memory_layout(64)
    slot = first + gl.arange(0, SIZE, layout=gl.SliceLayout(1, layout))
    row = gl.load(read_ptr + gl.minimum(slot, num_slots - 1)).to(gl.int32)
    return row[:, None] * stride + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _read(
    work, heads_each, buffers, barriers,
    TILES: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Queries, keys and values of one head after the other, as buffers become free."""
    SIZES: gl.constexpr = _sizes(SLOTS)
    STARTS: gl.constexpr = _starts(SLOTS)
    qkv_ptr, read_ptr, num_slots, stride, dim = work
    queries, keys, values = buffers
    full, empty = barriers
    keys_at, queries_at = (), ()
    for block in gl.static_range(len(SIZES)):
        keys_at += (_rows_at(read_ptr, STARTS[block], num_slots, stride, SIZES[block]),)
    for tile in gl.static_range(TILES):
        queries_at += (_rows_at(read_ptr, 64 * tile, num_slots, stride, 64),)
    for head in range(heads_each):
        stage = head % STAGES
        mbarrier.wait(empty.index(stage), (head // STAGES + 1) % 2)
        at = qkv_ptr + 64 * head
        for tile in gl.static_range(TILES):
            async_copy.async_copy_global_to_shared(queries.index(stage * TILES + tile), at + queries_at[tile])
        for block in gl.static_range(len(SIZES)):
            async_copy.async_copy_global_to_shared(keys[block].index(stage), at + dim + keys_at[block])
        for block in gl.static_range(len(SIZES)):
            async_copy.async_copy_global_to_shared(values[block].index(stage), at + 2 * dim + keys_at[block])
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _begin_scores(query, keys, SIZE: gl.constexpr):
    zero = gl.zeros((64, SIZE), gl.float32, layout=product_layout(SIZE))
    own = gl.convert_layout(query, factor_layout(SIZE))
    return warpgroup_mma(own, keys.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _inside(scores, num_slots, START: gl.constexpr, SIZE: gl.constexpr):
    slot = START + gl.arange(0, SIZE, layout=gl.SliceLayout(0, product_layout(SIZE)))
    return gl.where((slot < num_slots)[None, :], scores, -float("inf"))


@gluon.jit
def _targets(write_ptr, first, num_slots):
    """The rows that take what a tile's slots get, negative where none does."""
    slot = first + gl.arange(0, 64, layout=gl.SliceLayout(1, memory_layout(64)))
    return gl.load(write_ptr + slot, mask=slot < num_slots, other=-1)


@gluon.jit
def _store(ptr, target, stride, mixed):
    layout: gl.constexpr = memory_layout(64)
    feature = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    at = ptr + target.to(gl.int64)[:, None] * stride + feature[None, :]
    gl.store(at, gl.convert_layout(mixed.to(ptr.dtype.element_ty), layout), mask=(target >= 0)[:, None])


@gluon.jit
def _compute(
    work, heads_each, buffers, barriers,
    NUMBER: gl.constexpr, TILES: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every second tile of queries, through all heads."""
    SIZES: gl.constexpr = _sizes(SLOTS)
    STARTS: gl.constexpr = _starts(SLOTS)
    BLOCKS: gl.constexpr = len(SIZES)
    row_layout: gl.constexpr = gl.SliceLayout(1, product_layout(64))
    out_ptr, write_ptr, num_slots, stride, scale = work
    queries, keys, values = buffers
    full, empty = barriers
    # One loop: written out for each tile of a head, the code no longer fits into the processor's cache for it.
    for turn in range(NUMBER, heads_each * TILES, 2):
        head, tile = turn // TILES, turn % TILES
        stage = head % STAGES
        target = _targets(write_ptr, 64 * tile, num_slots)
        mbarrier.wait(full.index(stage), head // STAGES % 2)
        fence_async_shared()
        query = queries.index(stage * TILES + tile).load(factor_layout(64))
        coming, scores = (), ()
        for block in gl.static_range(BLOCKS):
            coming += (_begin_scores(query, keys[block].index(stage), SIZES[block]),)
        best = gl.full((64,), -float("inf"), gl.float32, layout=row_layout)
        for block in gl.static_range(BLOCKS):
            here = warpgroup_mma_wait(BLOCKS - 1 - block, deps=(coming[block],))
            if block == 0:
                here = _inside(here, num_slots, STARTS[block], SIZES[block])
            best = gl.maximum(best, gl.convert_layout(gl.max(here, axis=1), row_layout))
            scores += (here,)
        best *= scale
        mixed = warpgroup_mma_init(gl.zeros((64, 64), gl.float32, layout=product_layout(64)))
        total = gl.zeros((64,), gl.float32, layout=row_layout)
        for block in gl.static_range(BLOCKS):
            most = gl.convert_layout(best, gl.SliceLayout(1, product_layout(SIZES[block])))
            weights = gl.exp2(scores[block] * scale - most[:, None])
            factor = gl.convert_layout(weights.to(query.dtype), factor_layout(64))
            mixed = warpgroup_mma(factor, values[block].index(stage), mixed, use_acc=block > 0, is_async=True)
            total += gl.convert_layout(gl.sum(weights, axis=1), row_layout)
        mixed = warpgroup_mma_wait(0, deps=(mixed,))
        mbarrier.arrive(empty.index(stage), count=1)
        mixed *= (1.0 / total)[:, None]
        _store(out_ptr + 64 * head, target, stride, mixed)


@gluon.jit
def _attention(
    qkv_ptr, out_ptr, read_ptr, write_ptr, num_slots, num_heads, heads_each, qkv_stride, out_stride, scale,
    TILES: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    COMPUTING: gl.constexpr, READING: gl.constexpr,
):  # fmt: skip
    SIZES: gl.constexpr = _sizes(SLOTS)
    programs = num_heads // heads_each
    group = (gl.program_id(0) // programs).to(gl.int64)
    first = gl.program_id(0) % programs * heads_each * 64
    read_ptr += group * num_slots
    write_ptr += group * num_slots
    queries, keys, values = _buffer(qkv_ptr, STAGES * TILES, 64), (), ()
    for block in gl.static_range(len(SIZES)):
        keys += (_buffer(qkv_ptr, STAGES, SIZES[block]),)
        values += (_buffer(qkv_ptr, STAGES, SIZES[block]),)
    full, empty = make_barriers(STAGES, 128), make_barriers(STAGES, TILES)
    buffers, barriers = (queries, keys, values), (full, empty)
    from_here = (qkv_ptr + first, read_ptr, num_slots, qkv_stride, num_heads * 64)
    to_here = (out_ptr + first, write_ptr, num_slots, out_stride, scale)
    gl.warp_specialize(
        [
            (_compute, (to_here, heads_each, buffers, barriers, 0, TILES, SLOTS, STAGES)),
            (_compute, (to_here, heads_each, buffers, barriers, 1, TILES, SLOTS, STAGES)),
            (_read, (from_here, heads_each, buffers, barriers, TILES, SLOTS, STAGES)),
        ],
        [4, 4],
        [COMPUTING, READING],
    )


def fits(qkv_RX: Tensor, num_slots: int, features: int) -> bool:
    """Whether the kernel takes groups of so many rows, with so many features of a head."""
    return 64 < num_slots <= 256 and features == 64 and qkv_RX.element_size() == 2 and qkv_RX.numel() < 2**31


def constants_of(num_slots: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "TILES": triton.cdiv(num_slots, 64),
        "SLOTS": 16 * triton.cdiv(num_slots, 16),
        "STAGES": _STAGES,
        "COMPUTING": _COMPUTING,
        "READING": _READING,
    }


def attend_rows_hopper(
    qkv_RX: Tensor, out_RD: Tensor, places: Places, num_heads: int, heads_each: int, scale: float
) -> None:
    """As `attend_rows`, of all slots, where it `fits`.

    Args:
        qkv_RX: Half precision. Rows in any order.
        out_RD: Rows that places names are written.
        places: Which rows attend to each other.
        num_heads: h.
        heads_each: Heads of a program; divides h.
        scale: Of scores, times the binary logarithm of e.
    """
    num_groups, num_slots = places.read_GM.shape
    _attention[(num_groups * num_heads // heads_each,)](
        *(qkv_RX, out_RD, *places, num_slots, num_heads, heads_each, qkv_RX.stride(0), out_RD.stride(0), scale),
        **constants_of(num_slots),
        num_warps=4,
    )
