"""All that the backward pass needs of a hidden layer, in one pass over memory.

Shapes: R rows, H hidden features, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# pyright: reportCallIssue=false

_ROWS, _BLOCK = 4, 512
# Programs for each processor.
_PROGRAMS = 8


@triton.jit
def _gelu_grad(
    before_ptr, grad_ptr, hidden_ptr, sums_ptr, num_rows, num_columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        at = row.to(tl.int64)[:, None] * num_columns + column[None, :]
        x = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if TANH:
            share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
            steepness = 1.5957691216057308 * (1.0 + 0.134145 * x * x) * share * (1.0 - share)
        else:
            share = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))
            steepness = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        tl.store(hidden_ptr + at, (x * share).to(hidden_ptr.dtype.element_ty), mask=inside)
        grad *= share + x * steepness
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)
        sums += grad
    tl.store(sums_ptr + tl.program_id(1) * num_columns + column, tl.sum(sums, axis=0), mask=column < num_columns)


def gelu_grad(before_RH: Tensor, grad_RH: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """GELU and the gradient of its input.

    Args:
        before_RH: What GELU was applied to; contiguous.
        grad_RH: The gradient of GELU, of the same dtype and contiguous; becomes that of its input.
        approximate: "none" or "tanh".

    Returns:
        GELU [R, H], and the sum of the new gradient over all rows, float32 [H].
    """
    (num_rows, num_columns), device = before_RH.shape, before_RH.device
    across = triton.cdiv(num_columns, _BLOCK)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(triton.cdiv(num_rows, _ROWS), triton.cdiv(_PROGRAMS * processors, across))
    hidden_RH, sums_PH = torch.empty_like(before_RH), torch.empty((programs, num_columns), device=device)
    _gelu_grad[(across, programs)](
        *(before_RH, grad_RH, hidden_RH, sums_PH, num_rows, num_columns),
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        TANH=approximate == "tanh",
        num_warps=4,
    )
    return hidden_RH, sums_PH.sum(0)
