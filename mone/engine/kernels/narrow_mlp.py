"""The MLP of a narrow expert in one launch: its hidden layer stays on the chip.

A program keeps its rows and the sums of their results, and goes through the hidden features a block at a time. For an
expert of width D / 8 the hidden layer is 32 times what goes in, so that writing and reading it would take longer than
the products. A width that is no power of two, such as 96 or 192, is taken in two parts that are.

Shapes: R rows, D model features, H hidden features.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mone.engine.casts import Factor
from mone.engine.kernels.gelu import activate, has_tanh
from mone.engine.rows import Run
from mone.engine.tilings import Tiling

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false

# What a product of 8 bits sums over at least.
_SMALLEST_PART = 32


@triton.jit
def _add(
    sums, out_desc, scale_ptr, bias_ptr, gain, row, column, width,
    BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, BLOCK)
    if SCALED:
        sums *= tl.load(scale_ptr + columns, mask=columns < width, other=0.0)[None, :]
    sums += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    sums = sums * gain[:, None] + out_desc.load([row, column]).to(tl.float32)
    out_desc.store([row, column], sums.to(out_desc.dtype))


@triton.jit
def _narrow_mlp(
    rows_desc, up_desc, down_desc, out_desc,
    more_rows_desc, more_up_desc, more_down_desc, more_out_desc,
    up_scale_ptr, down_scale_ptr, up_bias_ptr, down_bias_ptr, gain_ptr,
    first_row, num_hidden, width,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, MORE: tl.constexpr, BLOCK_H: tl.constexpr,
    ACTIVATION: tl.constexpr, TANH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.program_id(0) * BLOCK_R
    x = rows_desc.load([row, 0])
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    if MORE > 0:
        more_x = more_rows_desc.load([row, BLOCK_D])
        more_sums = tl.zeros((BLOCK_R, MORE), dtype=tl.float32)
    for start in range(0, num_hidden, BLOCK_H):
        hidden = tl.dot(x, up_desc.load([start, 0]).T)
        if MORE > 0:
            hidden = tl.dot(more_x, more_up_desc.load([start, BLOCK_D]).T, hidden)
        if SCALED:
            hidden *= tl.load(up_scale_ptr + start + tl.arange(0, BLOCK_H))[None, :]
        bias = tl.load(up_bias_ptr + start + tl.arange(0, BLOCK_H)).to(tl.float32)
        hidden = activate(hidden, bias[None, :], ACTIVATION, TANH).to(rows_desc.dtype)
        sums = tl.dot(hidden, down_desc.load([0, start]).T, sums)
        if MORE > 0:
            more_sums = tl.dot(hidden, more_down_desc.load([BLOCK_D, start]).T, more_sums)
    gain = tl.load(gain_ptr + row + tl.arange(0, BLOCK_R))
    _add(sums, out_desc, down_scale_ptr, down_bias_ptr, gain, row, 0, width, BLOCK_D, SCALED)
    if MORE > 0:
        _add(more_sums, more_out_desc, down_scale_ptr, down_bias_ptr, gain, row, BLOCK_D, width, MORE, SCALED)


def parts_of(width: int) -> tuple[int, int]:
    """Two powers of two that hold a width, the second 0 where one is enough."""
    first = max(_SMALLEST_PART, triton.next_power_of_2(width + 1) // 2)
    left = width - first
    more = max(_SMALLEST_PART, triton.next_power_of_2(left)) if left > 0 else 0
    return (2 * first, 0) if more == first else (first, more)


def narrow_mlp(
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
    """Add gain times FFN of a run's rows to out_RD.

    Args:
        rows_RD: E4M3 or half precision. Zero from the run's width up to the power of two that holds it.
        up: Whole weight [H, D] in the same dtype; H is a multiple of `tiling.columns`.
        up_H: Its bias.
        down: Whole weight [D, H] in the same dtype.
        down_D: Its bias.
        out_RD: Residual stream; columns past the run's width get values that mean nothing.
        run: Rows of an expert.
        gain_R: float32.
        tiling: Rows and hidden features of a block.
        activation: One of `gelu.FORMS`.
    """
    first, more = parts_of(run.width)
    rows, hidden = tiling.rows, tiling.columns
    descriptors = [
        TensorDescriptor.from_tensor(tensor, block)
        for part in (first, more or first)
        for tensor, block in (
            (rows_RD, [rows, part]),
            (up.values, [hidden, part]),
            (down.values, [part, hidden]),
            (out_RD, [rows, part]),
        )
    ]
    _narrow_mlp[(triton.cdiv(run.stop - run.start, rows),)](
        *descriptors,
        *(up_H if scale is None else scale for scale in (up.scale_O, down.scale_O)),
        *(up_H, down_D, gain_R, run.start, len(up_H), run.width),
        BLOCK_R=rows,
        BLOCK_D=first,
        MORE=more,
        BLOCK_H=hidden,
        ACTIVATION=activation,
        TANH=has_tanh(rows_RD.device),
        SCALED=up.scale_O is not None,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
