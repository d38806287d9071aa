"""Attention within short groups of rows that lie anywhere.

A program has one group, one head and some blocks of queries. Up to `LARGEST_WHOLE` slots it keeps all keys and values
on the chip, read once for all of its queries, and no maximum is ever revised; beyond it goes through them block by
block.

Shapes: R rows, G groups, M slots of a group, D model features, k features of a head.
"""

import triton
import triton.language as tl
from torch import Tensor

from mone.engine.rows import Places

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

LARGEST_WHOLE = 256


@triton.jit
def _load(at, rows_at, slot, num_slots, stride, MASKED: tl.constexpr):
    """Rows of features, zero past the last slot."""
    if MASKED:
        row = tl.load(rows_at + slot, mask=slot < num_slots, other=0)
        return tl.load(at + row.to(tl.int64)[:, None] * stride, mask=(slot < num_slots)[:, None], other=0.0)
    row = tl.load(rows_at + slot)
    return tl.load(at + row.to(tl.int64)[:, None] * stride)


@triton.jit
def _store(out_ptr, write_ptr, slot, num_slots, feature, stride, mixed, total):
    mixed *= (1.0 / total)[:, None]
    target = tl.load(write_ptr + slot, mask=slot < num_slots, other=-1)
    out_at = target.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(out_ptr + out_at, mixed.to(out_ptr.dtype.element_ty), mask=(target >= 0)[:, None])


@triton.jit
def _mix(query, keys, values, inside, best, total, mixed, scale, MASKED: tl.constexpr):
    """Take some more keys and values into a running softmax."""
    scores = tl.dot(query, keys.T)
    if MASKED:
        scores = tl.where(inside[None, :], scores, -float("inf"))
    larger = tl.maximum(best, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - larger[:, None])
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
    write_ptr += group.to(tl.int64) * num_slots
    slot = first_query + block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query = _load(qkv_ptr + feature[None, :], read_ptr, slot, num_slots, qkv_stride, True)
    best = tl.full((BLOCK_Q,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_Q, FEATURES), dtype=tl.float32)
    keys_at = qkv_ptr + dim + feature[None, :]
    values_at = qkv_ptr + 2 * dim + feature[None, :]
    whole = num_slots // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        other = start + tl.arange(0, BLOCK_K)
        keys = _load(keys_at, read_ptr, other, num_slots, qkv_stride, False)
        values = _load(values_at, read_ptr, other, num_slots, qkv_stride, False)
        best, total, mixed = _mix(query, keys, values, other < num_slots, best, total, mixed, scale, False)
    if TAIL > 0:
        last = whole + tl.arange(0, TAIL)
        last_keys = _load(keys_at, read_ptr, last, num_slots, qkv_stride, True)
        last_values = _load(values_at, read_ptr, last, num_slots, qkv_stride, True)
        best, total, mixed = _mix(query, last_keys, last_values, last < num_slots, best, total, mixed, scale, True)
    _store(out_ptr, write_ptr, slot, num_slots, feature, out_stride, mixed, total)


@triton.jit
def _attention_whole(
    qkv_ptr, out_ptr, read_ptr, write_ptr,
    num_slots, num_heads, num_parts, first_query, qkv_stride, out_stride, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr, FEATURES: tl.constexpr,
    STAGES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    part = program % num_parts
    head = program // num_parts % num_heads
    group = program // num_parts // num_heads
    dim = num_heads * FEATURES
    feature = head * FEATURES + tl.arange(0, FEATURES)
    read_ptr += group.to(tl.int64) * num_slots
    write_ptr += group.to(tl.int64) * num_slots
    query_at = qkv_ptr + feature[None, :]
    keys, values = (), ()
    for tile in tl.static_range(WHOLE):
        other = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        keys += (_load(query_at + dim, read_ptr, other, num_slots, qkv_stride, False),)
        values += (_load(query_at + 2 * dim, read_ptr, other, num_slots, qkv_stride, False),)
    last = WHOLE * BLOCK_K + tl.arange(0, TAIL)
    inside = last < num_slots
    last_keys = _load(query_at + dim, read_ptr, last, num_slots, qkv_stride, True)
    last_values = _load(query_at + 2 * dim, read_ptr, last, num_slots, qkv_stride, True)
    for start in tl.range(first_query + part * BLOCK_Q, num_slots, num_parts * BLOCK_Q, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_Q)
        query = _load(query_at, read_ptr, slot, num_slots, qkv_stride, True)
        if AT_ONCE:
            last_scores = tl.where(inside[None, :], tl.dot(query, last_keys.T), -float("inf"))
            best = tl.max(last_scores, axis=1)
            scores = ()
            for tile in tl.static_range(WHOLE):
                scores += (tl.dot(query, keys[tile].T),)
                best = tl.maximum(best, tl.max(scores[tile], axis=1))
            best *= scale
            last_weights = tl.exp2(last_scores * scale - best[:, None])
            total = tl.sum(last_weights, axis=1)
            mixed = tl.dot(last_weights.to(query.dtype), last_values)
            for tile in tl.static_range(WHOLE):
                weights = tl.exp2(scores[tile] * scale - best[:, None])
                total += tl.sum(weights, axis=1)
                mixed = tl.dot(weights.to(query.dtype), values[tile], mixed)
        else:
            best = tl.full((BLOCK_Q,), -float("inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
            mixed = tl.zeros((BLOCK_Q, FEATURES), dtype=tl.float32)
            for tile in tl.static_range(WHOLE):
                best, total, mixed = _mix(query, keys[tile], values[tile], inside, best, total, mixed, scale, False)
            best, total, mixed = _mix(query, last_keys, last_values, inside, best, total, mixed, scale, True)
        _store(out_ptr, write_ptr, slot, num_slots, feature, out_stride, mixed, total)


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
    parts: int = 0,
    at_once: bool = True,
    registers: int = 0,
) -> None:
    """Mix values: queries, keys and values side by side [R, 3 D] into out_RD.

    Args:
        qkv_RX: Rows in any order.
        out_RD: Rows that places names are written.
        places: Which rows attend to each other.
        num_heads: h; D / h is a power of two of at least 16.
        first_query: Slots before this one are keys and values alone.
        block_q: Queries taken at a time.
        block_k: Keys taken at a time; what is left over is a block as small as it can be.
        warps: Of a program.
        stages: Of loads in flight.
        parts: Programs that share the queries of a head, each with all keys and values at hand; 0: a program for each
            block of queries, which goes through keys and values. Long groups are as with 0.
        at_once: With parts, hold the scores of all keys at a time, which takes more registers and less work.
        registers: Of a thread, at most; 0: as many as are of use.
    """
    dim = qkv_RX.shape[1] // 3
    num_groups, num_slots = places.read_GM.shape
    whole, left = divmod(num_slots, block_k)
    blocks = triton.cdiv(num_slots - first_query, block_q)
    keep = parts > 0 and num_slots <= LARGEST_WHOLE
    if keep and not left:
        whole, left = whole - 1, block_k
    tail = max(16, triton.next_power_of_2(left)) if left else 0
    programs = min(parts, blocks) if keep else blocks
    grid = (programs * num_heads * num_groups,)
    arguments = (
        *(qkv_RX, out_RD, places.read_GM, places.write_GM, num_slots, num_heads, programs, first_query),
        *(qkv_RX.stride(0), out_RD.stride(0), 1.4426950408889634 * (dim // num_heads) ** -0.5),
    )
    sizes = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "TAIL": tail, "FEATURES": dim // num_heads, "num_warps": warps}
    if registers and qkv_RX.is_cuda:
        sizes["maxnreg"] = registers
    if keep:
        _attention_whole[grid](*arguments, **sizes, WHOLE=whole, STAGES=stages, AT_ONCE=at_once)
    else:
        _attention[grid](*arguments, **sizes, num_stages=stages)
