"""The nested projections on the layout: a matrix product for each segment, and one gradient for the whole weight.

Left to autograd, each slice of a weight would get a gradient as large as the whole, padded with zeros, and those of all
experts would be added up. Here the products of all experts are added into one tensor, where they belong.

Shapes: S sequences, N tokens, n and d tokens and width of a segment, O output and I input features of a whole weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mone.nested import Segments


def project_in(weight_OI: Tensor, bias_O: Tensor, inputs: list[Tensor]) -> Tensor:
    """Segments [S, n, d] through the first d columns of a weight, joined in order: [S, N, O]."""
    return _ProjectIn.apply(weight_OI, bias_O, *inputs)  # pyright: ignore[reportReturnType]


def project_out(weight_OI: Tensor, bias_O: Tensor, x_SNI: Tensor, segments: Segments) -> list[Tensor]:
    """Tokens [S, N, I] through the first d rows of a weight: for each segment [S, n, d]."""
    return list(_ProjectOut.apply(weight_OI, bias_O, x_SNI, segments))  # pyright: ignore[reportArgumentType]


def add_product(total_OI: Tensor, left_RO: Tensor, right_RI: Tensor) -> None:
    """Add left^T right to a gradient, whose dtype may be wider than that of the factors."""
    if total_OI.dtype == left_RO.dtype:
        total_OI.addmm_(left_RO.T, right_RI)
    else:
        total_OI.add_(left_RO.T @ right_RI)


class _ProjectIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bias_O: Tensor, *inputs: Tensor) -> Tensor:
        cast_OI, cast_O = weight_OI.to(inputs[0].dtype), bias_O.to(inputs[0].dtype)
        ctx.save_for_backward(cast_OI, *inputs)
        ctx.dtype = weight_OI.dtype
        return torch.cat([F.linear(x_Snd, cast_OI[:, : x_Snd.shape[-1]], cast_O) for x_Snd in inputs], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        weight_OI, *inputs = ctx.saved_tensors
        grad_SNO = grads[0]
        weight_grad_OI = torch.zeros_like(weight_OI, dtype=ctx.dtype)
        input_grads = []
        for x_Snd, grad_SnO in zip(inputs, grad_SNO.split([x.shape[1] for x in inputs], dim=1), strict=True):
            grad_RO, width = grad_SnO.reshape(-1, grad_SnO.shape[-1]), x_Snd.shape[-1]
            input_grads.append((grad_RO @ weight_OI[:, :width]).view_as(x_Snd))
            add_product(weight_grad_OI[:, :width], grad_RO, x_Snd.flatten(0, 1))
        return weight_grad_OI, grad_SNO.sum((0, 1), dtype=ctx.dtype), *input_grads


class _ProjectOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, bias_O: Tensor, x_SNI: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        cast_OI, cast_O = weight_OI.to(x_SNI.dtype), bias_O.to(x_SNI.dtype)
        ctx.save_for_backward(cast_OI, x_SNI)
        ctx.segments, ctx.dtype = segments, weight_OI.dtype
        return tuple(F.linear(x_SNI[:, s.start : s.stop], cast_OI[: s.width], cast_O[: s.width]) for s in segments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, x_SNI = ctx.saved_tensors
        weight_grad_OI = torch.zeros_like(weight_OI, dtype=ctx.dtype)
        bias_grad_O = weight_grad_OI.new_zeros(weight_OI.shape[0])
        x_grads = []
        for s, grad_Snd in zip(ctx.segments, grads, strict=True):
            grad_Rd = grad_Snd.reshape(-1, s.width)
            x_grads.append((grad_Rd @ weight_OI[: s.width]).view(*grad_Snd.shape[:2], -1))
            add_product(weight_grad_OI[: s.width], grad_Rd, x_SNI[:, s.start : s.stop].reshape(len(grad_Rd), -1))
            bias_grad_O[: s.width] += grad_Rd.sum(0, dtype=ctx.dtype)
        return weight_grad_OI, bias_grad_O, torch.cat(x_grads, dim=1), None
