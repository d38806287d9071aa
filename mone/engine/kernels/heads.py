"""From heads, as attention computes them, to rows that lie anywhere: one pass over memory, whatever the strides.

Shapes: G groups, h heads of k features, M slots of a group, R rows, D = h k features.
"""

import triton
import triton.language as tl
from torch import Tensor

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

# Values that a program moves.
_VALUES = 4096


@triton.jit
def _copy_heads(
    heads_ptr, slot_ptr, out_ptr, num_rows, num_slots, dim, stride_g, stride_h, stride_m, out_stride,
    HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < dim)[None, :]
    slot = row.to(tl.int64)
    if MOVED:
        slot = tl.load(slot_ptr + row, mask=row < num_rows, other=0)
    at = (slot // num_slots * stride_g + slot % num_slots * stride_m)[:, None]
    at += (column // HEAD * stride_h + column % HEAD)[None, :]
    values = tl.load(heads_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :], values, mask=inside)


def copy_heads(heads_GhMk: Tensor, slot_R: Tensor | None, out_RD: Tensor) -> None:
    """Copy what each row takes from its slot.

    Args:
        heads_GhMk: Any strides, but features of a head follow each other.
        slot_R: int64. Slot g M + m of each row; None: row after row.
        out_RD: Of the same dtype; rows may be parts of longer ones.
    """
    num_rows, dim = out_RD.shape
    block = triton.next_power_of_2(dim)
    rows = max(1, _VALUES // block)
    if heads_GhMk.stride(3) != 1:
        heads_GhMk = heads_GhMk.contiguous()
    _copy_heads[(triton.cdiv(num_rows, rows),)](
        *(heads_GhMk, heads_GhMk if slot_R is None else slot_R, out_RD, num_rows, heads_GhMk.shape[2], dim),
        *(*heads_GhMk.stride()[:3], out_RD.stride(0)),
        HEAD=heads_GhMk.shape[3],
        ROWS=rows,
        BLOCK=block,
        MOVED=slot_R is not None,
        num_warps=4,
    )
