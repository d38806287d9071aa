"""Attention within short groups of rows that lie anywhere: a program has one group, one head and a block of queries.

Shapes: R rows, G groups, M slots of a group, D model features, k features of a head.
"""

import triton
import triton.language as tl
from torch import Tensor

from mone.engine.rows import Places

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false


@triton.jit
def _scores(keys_at, values_at, row, inside, query, best, total, mixed, stride):
    at = row.to(tl.int64) * stride
    keys = tl.load(keys_at + at[:, None], mask=inside[:, None], other=0.0)
    values = tl.load(values_at + at[:, None], mask=inside[:, None], other=0.0)
    scores = tl.where(inside[None, :], tl.dot(query, keys.T), -float("inf"))
    larger = tl.maximum(best, tl.max(scores, axis=1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(best - larger)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
    return larger, total * shrink + tl.sum(weights, axis=1), mixed


@triton.jit
def _attention(
    qkv_ptr, out_ptr, read_ptr, write_ptr,
    num_slots, num_heads, num_blocks, first_query, qkv_stride, out_stride, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % num_blocks
    head = program // num_blocks % num_heads
    group = program // num_blocks // num_heads
    dim = num_heads * FEATURES
    feature = head * FEATURES + tl.arange(0, FEATURES)
    read_ptr += group.to(tl.int64) * num_slots
    slot = first_query + block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row = tl.load(read_ptr + slot, mask=slot < num_slots, other=0)
    query = tl.load(qkv_ptr + row.to(tl.int64)[:, None] * qkv_stride + feature[None, :])
    query = (query.to(tl.float32) * scale).to(query.dtype)
    best = tl.full((BLOCK_Q,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_Q, FEATURES), dtype=tl.float32)
    keys_at = qkv_ptr + dim + feature[None, :]
    values_at = qkv_ptr + 2 * dim + feature[None, :]
    whole = num_slots // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        other = start + tl.arange(0, BLOCK_K)
        best, total, mixed = _scores(
            keys_at, values_at, tl.load(read_ptr + other), other < num_slots, query, best, total, mixed, qkv_stride
        )
    if TAIL > 0:
        other = whole + tl.arange(0, TAIL)
        rows = tl.load(read_ptr + other, mask=other < num_slots, other=0)
        best, total, mixed = _scores(keys_at, values_at, rows, other < num_slots, query, best, total, mixed, qkv_stride)
    mixed = mixed / total[:, None]
    target = tl.load(write_ptr + group.to(tl.int64) * num_slots + slot, mask=slot < num_slots, other=-1)
    out_at = target.to(tl.int64)[:, None] * out_stride + feature[None, :]
    tl.store(out_ptr + out_at, mixed.to(out_ptr.dtype.element_ty), mask=(target >= 0)[:, None])


def attend_rows(
    qkv_RX: Tensor,
    out_RD: Tensor,
    places: Places,
    num_heads: int,
    *,
    first_query: int = 0,
    block_q: int = 64,
    block_k: int = 64,
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Mix values: queries, keys and values side by side [R, 3 D] into out_RD.

    Args:
        qkv_RX: Rows in any order.
        out_RD: Rows that places names are written.
        places: Which rows attend to each other.
        num_heads: h; D / h is a power of two of at least 16.
        first_query: Slots before this one are keys and values alone.
        block_q: Queries of a program.
        block_k: Keys taken at a time; what is left over is a block as small as it can be.
        warps: Of a program.
        stages: Of loads in flight.
    """
    dim = qkv_RX.shape[1] // 3
    num_groups, num_slots = places.read_GM.shape
    left = num_slots % block_k
    num_blocks = triton.cdiv(num_slots - first_query, block_q)
    _attention[(num_blocks * num_heads * num_groups,)](
        qkv_RX,
        out_RD,
        places.read_GM,
        places.write_GM,
        num_slots,
        num_heads,
        num_blocks,
        first_query,
        qkv_RX.stride(0),
        out_RD.stride(0),
        1.4426950408889634 * (dim // num_heads) ** -0.5,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        TAIL=max(16, triton.next_power_of_2(left)) if left else 0,
        FEATURES=dim // num_heads,
        num_warps=warps,
        num_stages=stages,
    )
