"""The MLP of a narrow expert in one launch: its hidden layer stays on the chip.

A program keeps its rows and the sums of their results, and goes through the hidden features a block at a time. For an
expert of width D / 8 the hidden layer is 32 times what goes in, so that writing and reading it would take longer than
the products.

Shapes: R rows, D model features, H hidden features.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mone.engine.kernels.gemm import Tiling, gelu_exact, gelu_tanh
from mone.engine.rows import Run

# pyright: reportCallIssue=false


@triton.jit
def _narrow_mlp(
    rows_desc,
    up_desc,
    down_desc,
    out_desc,
    up_bias_ptr,
    down_bias_ptr,
    gain_ptr,
    first_row,
    num_hidden,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    row = first_row + tl.program_id(0) * BLOCK_R
    x = rows_desc.load([row, 0])
    sums = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_hidden, BLOCK_H):
        hidden = tl.dot(x, up_desc.load([start, 0]).T)
        hidden += tl.load(up_bias_ptr + start + tl.arange(0, BLOCK_H)).to(tl.float32)[None, :]
        hidden = gelu_tanh(hidden) if ACTIVATION == "gelu_tanh" else gelu_exact(hidden)
        sums = tl.dot(hidden.to(rows_desc.dtype), down_desc.load([0, start]).T, sums)
    column = tl.arange(0, BLOCK_D)
    sums += tl.load(down_bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    sums *= tl.load(gain_ptr + row + tl.arange(0, BLOCK_R))[:, None]
    sums += out_desc.load([row, 0]).to(tl.float32)
    out_desc.store([row, 0], sums.to(out_desc.dtype))


def narrow_mlp(
    rows_RD: Tensor,
    up_HD: Tensor,
    up_H: Tensor,
    down_DH: Tensor,
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
        rows_RD: Half precision. Zero from the run's width up to the power of two that holds it.
        up_HD: Whole weight; H is a multiple of `tiling.columns`.
        up_H: Its bias.
        down_DH: Whole weight.
        down_D: Its bias.
        out_RD: Residual stream; columns past the run's width get values that mean nothing.
        run: Rows of an expert.
        gain_R: float32.
        tiling: Rows and hidden features of a block.
        activation: "gelu" or "gelu_tanh".
    """
    block = max(16, triton.next_power_of_2(run.width))
    _narrow_mlp[(triton.cdiv(run.stop - run.start, tiling.rows),)](
        TensorDescriptor.from_tensor(rows_RD, [tiling.rows, block]),
        TensorDescriptor.from_tensor(up_HD, [tiling.columns, block]),
        TensorDescriptor.from_tensor(down_DH, [block, tiling.columns]),
        TensorDescriptor.from_tensor(out_RD, [tiling.rows, block]),
        up_H,
        down_D,
        gain_R,
        run.start,
        len(up_H),
        run.width,
        BLOCK_R=tiling.rows,
        BLOCK_D=block,
        BLOCK_H=tiling.columns,
        ACTIVATION=activation,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
