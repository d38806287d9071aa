"""Attention within groups of rows that lie anywhere.

Short groups: a program takes one head of a group after the other, all of its keys, values and queries at once, read
while the head before is computed; no maximum is ever revised. Where the rows lie is looked up once for all heads.

Long groups: a program has one head and one block of queries, and goes through keys and values block
by block.

Shapes: R rows, G groups, M slots of a group, D model features, k features of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mone.engine.kernels.gemm import num_processors
from mone.engine.rows import Places
from mone.engine.tilings import Attending

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

LARGEST_WHOLE = 256
_LONG = Attending(64, 64, 4, 3, whole=False)


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
    num_slots, num_heads, num_blocks, qkv_stride, out_stride, scale,
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
    slot = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
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
def _rows_at(rows_at, slot, num_slots, stride, feature, WIDE: tl.constexpr):
    """Where the features of slots are; past the last slot those of the last."""
    row = tl.load(rows_at + tl.minimum(slot, num_slots - 1))
    row = row.to(tl.int64) if WIDE else row.to(tl.int32)
    return row[:, None] * stride + feature[None, :]


@triton.jit
def _attention_whole(
    qkv_ptr, out_ptr, read_ptr, write_ptr,
    num_slots, num_heads, heads_each, qkv_stride, out_stride, scale,
    BLOCK_Q: tl.constexpr, QUERIES: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, TAIL: tl.constexpr,
    FEATURES: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    chunks = num_heads // heads_each
    group = tl.program_id(0) // chunks
    first_head = tl.program_id(0) % chunks * heads_each
    dim = num_heads * FEATURES
    read_ptr += group.to(tl.int64) * num_slots
    write_ptr += group.to(tl.int64) * num_slots
    feature = tl.arange(0, FEATURES)
    keys_at, queries_at, targets = (), (), ()
    for tile in tl.static_range(WHOLE):
        slot = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        keys_at += (_rows_at(read_ptr, slot, num_slots, qkv_stride, feature, WIDE),)
    last = WHOLE * BLOCK_K + tl.arange(0, TAIL)
    last_at = _rows_at(read_ptr, last, num_slots, qkv_stride, feature, WIDE)
    inside = last < num_slots
    for tile in tl.static_range(QUERIES):
        slot = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        queries_at += (_rows_at(read_ptr, slot, num_slots, qkv_stride, feature, WIDE),)
        targets += (tl.load(write_ptr + slot, mask=slot < num_slots, other=-1),)
    for head in tl.range(first_head, first_head + heads_each, num_stages=STAGES):
        at = qkv_ptr + head * FEATURES
        keys, values, queries = (), (), ()
        for tile in tl.static_range(WHOLE):
            keys += (tl.load(at + dim + keys_at[tile]),)
        last_keys = tl.load(at + dim + last_at)
        for tile in tl.static_range(QUERIES):
            queries += (tl.load(at + queries_at[tile]),)
        for tile in tl.static_range(WHOLE):
            values += (tl.load(at + 2 * dim + keys_at[tile]),)
        last_values = tl.load(at + 2 * dim + last_at)
        for tile in tl.static_range(QUERIES):
            last_scores = tl.where(inside[None, :], tl.dot(queries[tile], last_keys.T), -float("inf"))
            best = tl.max(last_scores, axis=1)
            scores = ()
            for other in tl.static_range(WHOLE):
                scores += (tl.dot(queries[tile], keys[other].T),)
                best = tl.maximum(best, tl.max(scores[other], axis=1))
            best *= scale
            last_weights = tl.exp2(last_scores * scale - best[:, None])
            total = tl.sum(last_weights, axis=1)
            mixed = tl.dot(last_weights.to(last_values.dtype), last_values)
            for other in tl.static_range(WHOLE):
                weights = tl.exp2(scores[other] * scale - best[:, None])
                total += tl.sum(weights, axis=1)
                mixed = tl.dot(weights.to(last_values.dtype), values[other], mixed)
            mixed *= (1.0 / total)[:, None]
            target = targets[tile].to(tl.int64)
            out_at = target[:, None] * out_stride + head * FEATURES + feature[None, :]
            tl.store(out_ptr + out_at, mixed.to(out_ptr.dtype.element_ty), mask=(target >= 0)[:, None])


def attend_rows(
    qkv_RX: Tensor,
    out_RD: Tensor,
    places: Places,
    num_heads: int,
    *,
    attending: Attending | None = None,
) -> None:
    """Mix values: queries, keys and values side by side [R, 3 D] into out_RD.

    Args:
        qkv_RX: Rows in any order.
        out_RD: Rows that places names are written.
        places: Which rows attend to each other.
        num_heads: h; D / h is a power of two of at least 16.
        attending: How the work is cut; where it is not for such groups, a default is taken.
    """
    features = qkv_RX.shape[1] // 3 // num_heads
    num_groups, num_slots = places.read_GM.shape
    scale = 1.4426950408889634 * features**-0.5
    tensors, strides = (qkv_RX, out_RD, *places), (qkv_RX.stride(0), out_RD.stride(0))
    if attending is None or (attending.whole and num_slots > LARGEST_WHOLE):
        attending = _LONG
    heads_each = _heads_each(num_groups, num_heads, qkv_RX.device)
    if attending.whole and attending.roles:
        from mone.engine.kernels import attention_hopper as hopper  # older Tritons have no Gluon

        if hopper.fits(qkv_RX, num_slots, features):
            hopper.attend_rows_hopper(qkv_RX, out_RD, places, num_heads, heads_each, scale)
            return
    block_k = attending.block_k
    whole, left = divmod(num_slots, block_k)
    if attending.whole and not left:
        whole, left = whole - 1, block_k
    sizes = {
        "BLOCK_K": block_k,
        "TAIL": max(16, triton.next_power_of_2(left)) if left else 0,
        "FEATURES": features,
    }
    if attending.whole:
        block_q = min(attending.block_q, max(16, triton.next_power_of_2(num_slots)))
        _attention_whole[(num_groups * num_heads // heads_each,)](
            *(*tensors, num_slots, num_heads, heads_each, *strides, scale),
            **sizes,
            BLOCK_Q=block_q,
            QUERIES=triton.cdiv(num_slots, block_q),
            WHOLE=whole,
            STAGES=min(attending.stages, heads_each),
            WIDE=qkv_RX.numel() >= 2**31,
            num_warps=max(4, attending.warps * block_q // attending.block_q),
        )
    else:
        blocks = triton.cdiv(num_slots, attending.block_q)
        _attention[(blocks * num_heads * num_groups,)](
            *(*tensors, num_slots, num_heads, blocks, *strides, scale),
            **sizes,
            BLOCK_Q=attending.block_q,
            num_warps=attending.warps,
            num_stages=attending.stages,
        )


def _heads_each(num_groups: int, num_heads: int, device: torch.device) -> int:
    """Heads of a program: as many as leave a program, or nearly two, for each processor."""
    wanted = 1.9 * num_processors(device)
    each = [heads for heads in range(1, num_heads + 1) if num_heads % heads == 0]
    return max([heads for heads in each if num_groups * num_heads // heads >= wanted], default=1)
