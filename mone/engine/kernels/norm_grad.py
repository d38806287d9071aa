"""LayerNorm of heads with a gradient: two kernels, which keep nothing of a token but what was there before.

The backward pass takes the statistics anew from the head and the two numbers of its tail. Each program adds up the
gradients of weight and bias over its rows; the programs' sums are added after it.

Shapes: R rows (tokens of one expert), d their width, D model features, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mone.engine.kernels.norm import norm_rows
from mone.engine.rows import Run

# pyright: reportCallIssue=false, reportArgumentType=false

# Values that a program holds of one tensor; it holds four.
_VALUES = 2048


@triton.jit
def _norm_grad(
    head_ptr, mean_ptr, spread_ptr, weight_ptr, grad_ptr,
    head_grad_ptr, mean_grad_ptr, spread_grad_ptr, weight_grad_ptr, bias_grad_ptr,
    num_rows, width, dim, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    weight_grad = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_grad = tl.zeros((BLOCK,), dtype=tl.float32)
    tail_share = (dim - width).to(tl.float32) / dim
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        known = row < num_rows
        inside = known[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        head = tl.load(head_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tail_mean = tl.load(mean_ptr + row, mask=known, other=0.0)
        tail_spread = tl.load(spread_ptr + row, mask=known, other=1.0)
        own_mean = tl.sum(head, axis=1) / width
        centred = tl.where(inside, head - own_mean[:, None], 0.0)
        apart = own_mean - tail_mean
        variance = (tl.sum(centred * centred, axis=1) + tail_spread) / dim
        variance += apart * apart * tail_share * (1 - tail_share)
        scale = tl.rsqrt(variance + eps)
        normal = tl.where(inside, (centred + (apart * tail_share)[:, None]) * scale[:, None], 0.0)
        weight_grad += tl.sum(grad * normal, axis=0)
        bias_grad += tl.sum(grad, axis=0)
        grad *= weight[None, :]
        total = tl.sum(grad, axis=1)
        along = tl.sum(grad * normal, axis=1)
        head_grad = (grad - (total / dim)[:, None] - normal * (along / dim)[:, None]) * scale[:, None]
        tl.store(head_grad_ptr + at, head_grad.to(head_grad_ptr.dtype.element_ty), mask=inside)
        spread_grad = along * scale * scale * (-0.5) / dim
        mean_grad = -scale * total * tail_share - 2.0 * spread_grad * apart * width * tail_share
        tl.store(mean_grad_ptr + row, mean_grad, mask=known)
        tl.store(spread_grad_ptr + row, spread_grad, mask=known)
    tl.store(weight_grad_ptr + program * width + column, weight_grad, mask=column < width)
    tl.store(bias_grad_ptr + program * width + column, bias_grad, mask=column < width)


class KernelNorm(torch.autograd.Function):
    """As `mone.engine.norm.nested_norm`, for float32 statistics: head [S, n, d], tail [S, n, 1] to [S, n, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        head_Snd: Tensor,
        tail_mean_Sn1: Tensor,
        tail_spread_Sn1: Tensor,
        weight_d: Tensor,
        bias_d: Tensor,
        dim: int,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Normalise the heads of tokens of D features, into the dtype."""
        width, rows = head_Snd.shape[-1], head_Snd.shape[0] * head_Snd.shape[1]
        head_Snd, mean_R, spread_R = head_Snd.contiguous(), tail_mean_Sn1.reshape(-1), tail_spread_Sn1.reshape(-1)
        out_Snd = torch.empty_like(head_Snd, dtype=dtype)
        run = Run(0, rows, width, rows, 0)
        out_Rd = out_Snd.view(rows, width)
        norm_rows(head_Snd.view(rows, width), mean_R, spread_R, weight_d, bias_d, eps, out_Rd, (run,), dim=dim)
        ctx.save_for_backward(head_Snd, mean_R, spread_R, weight_d)
        ctx.dim, ctx.eps = dim, eps
        return out_Snd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of head, tail, weight and bias."""
        head_Snd, mean_R, spread_R, weight_d = ctx.saved_tensors
        width, rows = head_Snd.shape[-1], len(mean_R)
        block = triton.next_power_of_2(width)
        tile_rows = max(1, _VALUES // block)
        programs = min(triton.cdiv(rows, tile_rows), _num_programs(head_Snd.device))
        head_grad_Snd = torch.empty_like(head_Snd)
        mean_grad_R, spread_grad_R = torch.empty_like(mean_R), torch.empty_like(spread_R)
        sums_2Pd = torch.empty((2, programs, width), dtype=torch.float32, device=head_Snd.device)
        _norm_grad[(programs,)](
            *(head_Snd, mean_R, spread_R, weight_d, grads[0].contiguous()),
            *(head_grad_Snd, mean_grad_R, spread_grad_R, *sums_2Pd.unbind(0), rows, width, ctx.dim, ctx.eps),
            ROWS=tile_rows,
            BLOCK=block,
            num_warps=4 if block <= 512 else 8,
        )
        weight_grad_d, bias_grad_d = sums_2Pd.sum(1).to(weight_d.dtype)
        tail_grads = (grad_R.view(*head_Snd.shape[:2], 1) for grad_R in (mean_grad_R, spread_grad_R))
        return head_grad_Snd, *tail_grads, weight_grad_d, bias_grad_d, None, None, None


def _num_programs(device: torch.device) -> int:
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
