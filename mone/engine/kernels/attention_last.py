"""Attention of each group's last slot to all of its slots, without keys and values.

One query sees a key as q (W x + b) = (W^T q) x + q b, where q b is the same for all keys, and mixes values to
W (sum of w x) + b. So one row of a group for each head is multiplied by weights, in place of all its rows, which are
read as wide as they are. One launch scores, another mixes.

Shapes: R rows, G groups, M slots of a group, D model features, h heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mone.engine.rows import Run, in_eights, table_of

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

_SLOTS, _COLUMNS = 32, 128


@triton.jit
def _locate(
    normal_at, read_ptr, runs_ptr, slot, column, num_slots, stride, RUNS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Where these columns of slots are, and which lie within a row's width: none past the last slot."""
    row = tl.load(read_ptr + slot, mask=slot < num_slots, other=-1)
    width = tl.zeros_like(row)
    for run in tl.static_range(RUNS):
        width = tl.where(row >= tl.load(runs_ptr + 3 * run), tl.load(runs_ptr + 3 * run + 2), width)
    if ALIGNED:
        width = tl.multiple_of(width, [8])
    return normal_at + row.to(tl.int64)[:, None] * stride + column[None, :], width


@triton.jit
def _score(
    normal_ptr, read_ptr, runs_ptr, query_ptr, scores_ptr,
    num_slots, num_heads, dim, normal_stride, num_blocks, query_head_stride, query_group_stride, scale,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, RUNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // num_blocks).to(tl.int64)
    slot = tl.program_id(0) % num_blocks * SLOTS + tl.arange(0, SLOTS)
    head, column = tl.arange(0, HEADS), tl.arange(0, COLUMNS)
    read_ptr += group * num_slots
    normal_at, width = _locate(normal_ptr, read_ptr, runs_ptr, slot, column, num_slots, normal_stride, RUNS, ALIGNED)
    query_at = query_ptr + group * query_group_stride + head[:, None] * query_head_stride + column[None, :]
    scores = tl.zeros((SLOTS, HEADS), dtype=tl.float32)
    for start in range(0, tl.max(width), COLUMNS):
        normal = tl.load(normal_at + start, mask=(start + column)[None, :] < width[:, None], other=0.0)
        inside = (head < num_heads)[:, None] & (start + column < dim)[None, :]
        query = tl.load(query_at + start, mask=inside, other=0.0)
        scores = tl.dot(normal.to(query.dtype), query.T, scores)
    scores_at = scores_ptr + (group * num_heads + head)[None, :] * num_slots + slot[:, None]
    tl.store(scores_at, scores * scale, mask=(head < num_heads)[None, :] & (slot < num_slots)[:, None])


@triton.jit
def _mix(
    normal_ptr, read_ptr, runs_ptr, weights_ptr, mixed_ptr,
    num_slots, num_heads, dim, normal_stride, num_chunks, mixed_head_stride, mixed_group_stride,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, RUNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // num_chunks).to(tl.int64)
    column = tl.program_id(0) % num_chunks * COLUMNS + tl.arange(0, COLUMNS)
    head = tl.arange(0, HEADS)
    read_ptr += group * num_slots
    mixed = tl.zeros((HEADS, COLUMNS), dtype=tl.float32)
    for start in range(0, num_slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        normal_at, width = _locate(
            normal_ptr, read_ptr, runs_ptr, slot, column, num_slots, normal_stride, RUNS, ALIGNED
        )
        normal = tl.load(normal_at, mask=column[None, :] < width[:, None], other=0.0).to(mixed_ptr.dtype.element_ty)
        weights_at = weights_ptr + (group * num_heads + head)[:, None] * num_slots + slot[None, :]
        inside = (head < num_heads)[:, None] & (slot < num_slots)[None, :]
        weights = tl.load(weights_at, mask=inside, other=0.0)
        mixed = tl.dot(weights.to(normal.dtype), normal, mixed)
    mixed_at = mixed_ptr + group * mixed_group_stride + head[:, None] * mixed_head_stride + column[None, :]
    inside = (head < num_heads)[:, None] & (column < dim)[None, :]
    tl.store(mixed_at, mixed.to(mixed_ptr.dtype.element_ty), mask=inside)


def mix_rows(query_hGD: Tensor, normal_RX: Tensor, read_GM: Tensor, runs: tuple[Run, ...], scale: float) -> Tensor:
    """For each head the mean of a group's rows [h, G, D], weighted by the softmax of their products with its query.

    Args:
        query_hGD: Half precision or float32.
        normal_RX: Rows, as wide as their experts; the dtype of queries or one of 8 bits.
        read_GM: int64. The row of each slot.
        runs: Rows of each expert.
        scale: Of the products.
    """
    num_heads, num_groups, dim = query_hGD.shape
    num_slots, mixed_hGD = read_GM.shape[1], torch.empty_like(query_hGD, memory_format=torch.contiguous_format)
    scores_GhM = torch.empty(num_groups, num_heads, num_slots, dtype=torch.float32, device=read_GM.device)
    rows = (normal_RX, read_GM, table_of(runs, read_GM.device))
    blocks, chunks = triton.cdiv(num_slots, _SLOTS), triton.cdiv(dim, _COLUMNS)
    sizes = (num_slots, num_heads, dim, normal_RX.stride(0))
    constants = {
        "SLOTS": _SLOTS,
        "COLUMNS": _COLUMNS,
        "HEADS": max(16, triton.next_power_of_2(num_heads)),
        "RUNS": len(runs),
        "ALIGNED": in_eights(runs),
        "num_warps": 4,
    }
    _score[(num_groups * blocks,)](
        *rows, query_hGD, scores_GhM, *sizes, blocks, *query_hGD.stride()[:2], scale, **constants
    )
    weights_GhM = scores_GhM.softmax(dim=-1)
    _mix[(num_groups * chunks,)](*rows, weights_GhM, mixed_hGD, *sizes, chunks, *mixed_hGD.stride()[:2], **constants)
    return mixed_hGD
