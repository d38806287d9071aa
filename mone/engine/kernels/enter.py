"""Tokens of sequences to rows of runs, with the mean and spread of what is left behind, and their gains.

Shapes: S sequences, K tokens in their own order, N sorted tokens, C class tokens, D model features, R rows, P
positions, L blocks.
"""

import triton
import triton.language as tl
from torch import Tensor

from mone.engine.rows import Run, in_eights, width_of_token
from mone.engine.tokens import Tokens

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false


@triton.jit
def _enter(
    x_ptr, order_ptr, classes_ptr, position_ptr, place_ptr, weight_ptr, alpha_ptr, row_ptr, width_ptr,
    head_ptr, mean_ptr, spread_ptr, gain_ptr,
    num_own, num_sorted, num_slots, num_positions, num_layers, x_stride, head_stride, gain_stride,
    DIM: tl.constexpr, BLOCK: tl.constexpr, LAYERS: tl.constexpr, ORDERED: tl.constexpr, POSITIONED: tl.constexpr,
    PLACED: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    sequence = (tl.program_id(0) // num_slots).to(tl.int64)
    slot = tl.program_id(0) % num_slots
    row = tl.load(row_ptr + tl.program_id(0)).to(tl.int64)
    width = tl.load(width_ptr + slot)
    if ALIGNED:
        width = tl.multiple_of(width, 8)
    column, layer = tl.arange(0, BLOCK), tl.arange(0, LAYERS)
    own = slot.to(tl.int64)
    if not ORDERED:
        own = tl.load(order_ptr + sequence * num_sorted + slot, mask=slot < num_sorted, other=0)
    token = sequence * num_own + own
    routed = (column < DIM) & (slot < num_sorted)
    x = tl.load(x_ptr + token * x_stride + column, mask=routed, other=0.0)
    if POSITIONED:
        place = tl.load(place_ptr + token, mask=slot < num_sorted, other=0) if PLACED else token
        x += tl.load(position_ptr + place % num_positions * DIM + column, mask=routed, other=0.0)
    class_at = classes_ptr + (slot - num_sorted) * DIM
    x += tl.load(class_at + column, mask=(column < DIM) & (slot >= num_sorted), other=0.0).to(x.dtype)
    tl.store(head_ptr + row * head_stride + column, x, mask=column < width)
    in_tail = (column >= width) & (column < DIM)
    mean = tl.sum(tl.where(in_tail, x.to(tl.float32), 0.0), axis=0) / tl.maximum(DIM - width, 1)
    apart = tl.where(in_tail, x.to(tl.float32) - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(spread_ptr + row, tl.sum(apart * apart, axis=0))
    gain = tl.full((LAYERS,), 1.0, dtype=tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + token, mask=slot < num_sorted, other=0.0)
        gain += weight * tl.load(alpha_ptr + layer, mask=layer < num_layers, other=0.0).to(tl.float32)
    tl.store(gain_ptr + layer * gain_stride + row, gain, mask=layer < num_layers)


def enter_rows(
    tokens: Tokens,
    runs: tuple[Run, ...],
    row_SN: Tensor,
    head_RD: Tensor,
    tail_mean_R: Tensor,
    tail_spread_R: Tensor,
    gain_LR: Tensor,
) -> None:
    """Write the first features of each token to its row, and two numbers of the others.

    Args:
        tokens: Placed and sorted on the way.
        runs: Rows of each expert.
        row_SN: int64. The row of each sorted token.
        head_RD: Rows of the residual stream.
        tail_mean_R: float32. Gets the mean of the features past the width, 0 where there are none.
        tail_spread_R: float32. Gets the sum of their squared distances from it.
        gain_LR: float32. Gets the gain of each row in each block, as `Tokens.gains`.
    """
    x_SKD, order_SN, classes_CD, positions, gain = tokens
    x_SKD, (num_own, dim) = x_SKD.contiguous(), x_SKD.shape[1:]
    table_PD, place_SK = (x_SKD, None) if positions is None else positions
    weight_SK, alpha_L = (x_SKD, x_SKD) if gain is None else gain
    block = triton.next_power_of_2(dim)
    _enter[(row_SN.numel(),)](
        x_SKD,
        row_SN if order_SN is None else order_SN.contiguous(),
        x_SKD if classes_CD is None else classes_CD.contiguous(),
        table_PD.contiguous(),
        row_SN if place_SK is None else place_SK.contiguous(),
        weight_SK.contiguous(),
        *(alpha_L, row_SN, width_of_token(runs, x_SKD.device), head_RD, tail_mean_R, tail_spread_R, gain_LR),
        num_own,
        num_own if order_SN is None else order_SN.shape[1],
        row_SN.shape[1],
        *(table_PD.numel() // dim, len(gain_LR), x_SKD.stride(1), head_RD.stride(0), gain_LR.stride(0)),
        DIM=dim,
        BLOCK=block,
        LAYERS=triton.next_power_of_2(len(gain_LR)),
        ORDERED=order_SN is None,
        POSITIONED=positions is not None,
        PLACED=place_SK is not None,
        WEIGHTED=gain is not None,
        ALIGNED=in_eights(runs),
        num_warps=1 if block <= 1024 else 4,
    )
