"""uint8 pixels to what a model sees, in one pass over memory; a step for each operation takes three or four.

Shapes: X values, P of a patch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# pyright: reportCallIssue=false, reportArgumentType=false

_BLOCK = 4096


@triton.jit
def _shift_and_scale(
    pixels_ptr, mean_ptr, out_ptr, num_values, patch_values, mean, factor,
    BLOCK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = value < num_values
    pixels = tl.load(pixels_ptr + value, mask=inside, other=0).to(tl.float32)
    if EACH:
        mean = tl.load(mean_ptr + value // patch_values, mask=inside, other=0.0)
    shifted = (pixels - mean).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + value, (shifted * factor).to(out_ptr.dtype.element_ty), mask=inside)


def shift_and_scale(patches: Tensor, mean: float | Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """(x - mean) / scale, of the shape of patches, rounded to dtype after each of the two steps.

    Args:
        patches: uint8 [..., P].
        mean: One for all, or float32 [...] with one for each patch.
        scale: Divides.
        dtype: Of the answer; float32 or half precision.
    """
    patches = patches.contiguous()
    out = torch.empty_like(patches, dtype=dtype)
    means, one = (mean.contiguous(), 0.0) if isinstance(mean, Tensor) else (patches, mean)
    _shift_and_scale[(triton.cdiv(patches.numel(), _BLOCK),)](
        *(patches, means, out, patches.numel(), patches.shape[-1], one, 1.0 / scale),
        BLOCK=_BLOCK,
        EACH=isinstance(mean, Tensor),
    )
    return out
