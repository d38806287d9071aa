"""uint8 patches to tokens: a product whose first factor becomes half precision on its way to the tensor cores.

As floats, patches are three times as many bytes to write and read again, which takes half as long as the product. What
is divided by is a factor of the sums, so that pixels are not rounded a second time.

Shapes: B clips, K patches of a clip, P values of a patch, D model features, X = B K.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mone.engine.kernels.gemm import num_processors

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

_ROWS, _INNER = 128, 64


@triton.jit
def _embed(
    patches_desc, weight_desc, out_desc, bias_ptr, mean_ptr,
    num_rows, num_inner, num_columns, factor,
    MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(num_columns, COLUMNS)
    num_tiles = tl.cdiv(num_rows, ROWS) * across
    tile, start = tl.program_id(0), -INNER
    row, column = tile // across * ROWS, tile % across * COLUMNS
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    steps = tl.cdiv(num_tiles - tile, tl.num_programs(0)) * tl.cdiv(num_inner, INNER)
    for _ in range(steps):  # of all tiles, as in `gemm`
        start += INNER
        if start >= num_inner:
            tile = tl.minimum(tile + tl.num_programs(0), num_tiles - 1)
            row, column, start = tile // across * ROWS, tile % across * COLUMNS, 0
        pixels = patches_desc.load([row, start]).to(tl.float32)
        weight = weight_desc.load([column, start])
        if MEAN is None:
            rows = row + tl.arange(0, ROWS)
            pixels -= tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        else:  # known to the compiler, which else moves pixels through shared memory once more: 260 us in place of 205
            pixels -= MEAN
        sums = tl.dot(pixels.to(weight.dtype), weight.T, sums)
        if start + INNER >= num_inner:
            columns = column + tl.arange(0, COLUMNS)
            bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
            out_desc.store([row, column], (sums * factor + bias[None, :]).to(out_desc.dtype))
            sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)


def fits(patches: Tensor, dim: int) -> bool:
    """Whether patches and tokens begin where the tensor memory accelerator can read and write them."""
    aligned = patches.shape[-1] % 16 == 0 and patches.data_ptr() % 16 == 0
    return aligned and dim % 8 == 0 and patches.numel() > 0


def embed_patches(
    patches_BKP: Tensor, mean: float | Tensor, scale: float, weight_DP: Tensor, bias_D: Tensor, out_BKD: Tensor
) -> None:
    """(x - mean) / scale, of which the difference is rounded to the weight's dtype, times the weight, and the bias.

    Args:
        patches_BKP: uint8, of sizes that `fits`.
        mean: One for all, or float32 [B, K] with one for each patch.
        scale: Divides.
        weight_DP: Half precision.
        bias_D: Any floating dtype.
        out_BKD: Gets the result.
    """
    patches_XP, out_XD = patches_BKP.contiguous().flatten(0, 1), out_BKD.flatten(0, 1)
    means, one = (mean.contiguous(), None) if isinstance(mean, Tensor) else (patches_XP, mean)
    columns = min(256, max(16, triton.next_power_of_2(len(weight_DP))))
    tiles = triton.cdiv(len(patches_XP), _ROWS) * triton.cdiv(len(weight_DP), columns)
    _embed[(min(tiles, num_processors(patches_BKP.device)),)](
        TensorDescriptor.from_tensor(patches_XP, [_ROWS, _INNER]),
        TensorDescriptor.from_tensor(weight_DP, [columns, _INNER]),
        TensorDescriptor.from_tensor(out_XD, [_ROWS, columns]),
        *(bias_D, means, *patches_XP.shape, len(weight_DP), 1.0 / scale),
        MEAN=one,
        ROWS=_ROWS,
        COLUMNS=columns,
        INNER=_INNER,
        num_warps=8,
        num_stages=4,
    )
