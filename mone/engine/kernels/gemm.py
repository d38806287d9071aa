"""One launch for the matrix products of all experts: out = epilogue(scale (rows @ weight^T) + bias).

A persistent kernel: as many programs as the device runs at once take tiles from a table, in which each tile has its own
inner size (an expert of width d reads d features) and columns (it writes d features). Rows of an expert begin at
multiples of a tile, so tiles move whole, by the tensor memory accelerator where there is one.

A program is one loop over the steps of all its tiles, so that the loads of the next tile are in flight while one is
finished. As a loop over tiles with one over steps inside, Triton (3.6, `flatten` or not) begins each tile with nothing
loaded, which costs short sums most.

Shapes: R rows, I input and O output features, J tiles, G programs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mone.engine.casts import Factor
from mone.engine.kernels.gelu import activate, has_tanh
from mone.engine.tilings import Tiling

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false


@triton.jit
def _finish(
    sums, out_desc, scale_ptr, bias_ptr, gain_ptr, row, column, num_columns,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    ACTIVATION: tl.constexpr, TANH: tl.constexpr, RESIDUAL: tl.constexpr, GAIN: tl.constexpr,
    ADDS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, BLOCK_O)
    if SCALED:
        sums *= tl.load(scale_ptr + columns, mask=columns < num_columns, other=0.0)[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    sums = activate(sums, bias[None, :], ACTIVATION, TANH)
    if GAIN:
        sums *= tl.load(gain_ptr + row + tl.arange(0, BLOCK_R))[:, None]
    if ADDS:
        out_desc.atomic_add([row, column], sums.to(out_desc.dtype))
    else:
        if RESIDUAL:
            sums += out_desc.load([row, column]).to(tl.float32)
        out_desc.store([row, column], sums.to(out_desc.dtype))


@triton.jit(do_not_specialize=["num_tiles"])
def _grouped_gemm(
    rows_desc,
    weight_desc,
    out_desc,
    scale_ptr,
    bias_ptr,
    gain_ptr,
    tiles_ptr,
    steps_ptr,
    num_tiles,
    num_columns,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TANH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GAIN: tl.constexpr,
    ADDS: tl.constexpr,
    SCALED: tl.constexpr,
    HALVES: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.load(tiles_ptr + 3 * tile)
    column = tl.load(tiles_ptr + 3 * tile + 1)
    inner = tl.load(tiles_ptr + 3 * tile + 2)
    start = -BLOCK_I
    sums = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    for _ in range(tl.load(steps_ptr + tile)):
        start += BLOCK_I
        if start >= inner:
            tile = tl.minimum(tile + tl.num_programs(0), num_tiles - 1)  # loads run ahead, past the last one too
            row = tl.load(tiles_ptr + 3 * tile)
            column = tl.load(tiles_ptr + 3 * tile + 1)
            inner = tl.load(tiles_ptr + 3 * tile + 2)
            start = 0
        left = rows_desc.load([row, start])
        right = weight_desc.load([column, start])
        sums = tl.dot(left, right.T, sums)
        if start + BLOCK_I >= inner:
            if HALVES:
                low, high = tl.split(tl.permute(tl.reshape(sums, (BLOCK_R, 2, BLOCK_O // 2)), (0, 2, 1)))
                _finish(
                    low, out_desc, scale_ptr, bias_ptr, gain_ptr, row, column, num_columns,
                    BLOCK_R, BLOCK_O // 2, ACTIVATION, TANH, RESIDUAL, GAIN, ADDS, SCALED,
                )  # fmt: skip
                _finish(
                    high, out_desc, scale_ptr, bias_ptr, gain_ptr, row, column + BLOCK_O // 2, num_columns,
                    BLOCK_R, BLOCK_O // 2, ACTIVATION, TANH, RESIDUAL, GAIN, ADDS, SCALED,
                )  # fmt: skip
            else:
                _finish(
                    sums, out_desc, scale_ptr, bias_ptr, gain_ptr, row, column, num_columns,
                    BLOCK_R, BLOCK_O, ACTIVATION, TANH, RESIDUAL, GAIN, ADDS, SCALED,
                )  # fmt: skip
            sums = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)


class Schedule(NamedTuple):
    """Which program computes what: program g the tiles g, g + G, and so on.

    Attributes:
        tiles_J3: int32. Row, column and inner size of a tile.
        steps_G: int32. Steps of a program, through all its tiles.
    """

    tiles_J3: Tensor
    steps_G: Tensor


def scheduled(tiles: Sequence[tuple[int, int, int]], tiling: Tiling, device: torch.device) -> Schedule:
    """Share tiles out among as many programs as the device runs at once.

    Args:
        tiles: From `rows.tiles_of`, of the tiling's size.
        tiling: Of the product.
        device: Where it is computed.
    """
    count = min(len(tiles), num_processors(device) * tiling.programs)
    steps = [sum(triton.cdiv(inner, tiling.inner) for *_, inner in tiles[first::count]) for first in range(count)]
    return Schedule(*(torch.tensor(table, dtype=torch.int32, device=device) for table in (tiles, steps)))


def grouped_gemm(
    rows_RI: Tensor,
    weight: Factor,
    bias_O: Tensor,
    out_RO: Tensor,
    schedule: Schedule,
    *,
    tiling: Tiling,
    activation: str = "",
    residual: bool = False,
    gain_R: Tensor | None = None,
) -> None:
    """Compute the tiles of the table into out_RO.

    Columns of a tile past the expert's width get values that mean nothing; the next expert's rows are never touched.

    Args:
        rows_RI: E4M3, half precision or float32. Zero from an expert's width up to the next multiple of `tiling.inner`.
        weight: Of the same dtype, the whole weight [O, I].
        bias_O: The whole bias.
        out_RO: Any floating dtype.
        schedule: From `scheduled`, with the same tiling.
        tiling: Block sizes; a tile has no more rows than runs are aligned to.
        activation: "" or one of `gelu.FORMS`.
        residual: Add to what out_RO holds.
        gain_R: float32. Factor of each row, before the residual.
    """
    _grouped_gemm[(len(schedule.steps_G),)](
        TensorDescriptor.from_tensor(rows_RI, [tiling.rows, tiling.inner]),
        TensorDescriptor.from_tensor(weight.values, [tiling.columns, tiling.inner]),
        TensorDescriptor.from_tensor(out_RO, [tiling.rows, tiling.columns // (1 + tiling.halves)]),
        bias_O if weight.scale_O is None else weight.scale_O,
        bias_O,
        bias_O if gain_R is None else gain_R,
        *schedule,
        len(schedule.tiles_J3),
        len(bias_O),
        BLOCK_R=tiling.rows,
        BLOCK_O=tiling.columns,
        BLOCK_I=tiling.inner,
        ACTIVATION=activation,
        TANH=has_tanh(rows_RI.device),
        RESIDUAL=residual,
        GAIN=gain_R is not None,
        ADDS=residual and _adds_in_memory(out_RO.device),
        SCALED=weight.scale_O is not None,
        HALVES=tiling.halves,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter 2, so that programs take several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _adds_in_memory(device: torch.device) -> bool:
    """Whether a tile is added where it lies, without being read; what is added is rounded first."""
    on_gpu = device.type == "cuda" and not knobs.runtime.interpret
    return on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
