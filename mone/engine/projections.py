"""The nested projections on the layout: a matrix product for each segment, and one gradient for the whole weight.

Left to autograd, each slice of a weight would get a gradient as large as the whole, padded with zeros, and those of all
experts would be added up. Here the products of all experts are added into one tensor, where they belong.

Shapes: S sequences, R rows (the tokens of segment after segment), n and d tokens and width of a segment, O output and I
input features of a whole weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mone.nested import Segments


def project_in(weight_OI: Tensor, bias_O: Tensor, inputs: list[Tensor]) -> Tensor:
    """Segments [S, n, d] through the first d columns of a weight, as rows [R, O]."""
    return _ProjectIn.apply(weight_OI, bias_O, *inputs)  # pyright: ignore[reportReturnType]


def project_out(weight_OI: Tensor, x_RI: Tensor, segments: Segments) -> list[Tensor]:
    """Rows [R, I] through the first d rows of a weight, without a bias: for each segment [S, n, d]."""
    return list(_ProjectOut.apply(weight_OI, x_RI, segments))  # pyright: ignore[reportArgumentType]


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
        rows = [x_Snd.flatten(0, 1) for x_Snd in inputs]
        out_RO = cast_O.new_empty(sum(map(len, rows)), len(cast_O))
        for x_Rd, out in zip(rows, out_RO.split([len(x_Rd) for x_Rd in rows]), strict=True):
            torch.addmm(cast_O, x_Rd, cast_OI[:, : x_Rd.shape[1]].T, out=out)
        return out_RO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        weight_OI, *inputs = ctx.saved_tensors
        weight_grad_OI = torch.zeros_like(weight_OI, dtype=ctx.dtype)
        input_grads, grad_RO = [], grads[0].contiguous()
        runs = grad_RO.split([x_Snd.shape[0] * x_Snd.shape[1] for x_Snd in inputs])
        for x_Snd, run_RO in zip(inputs, runs, strict=True):
            width = x_Snd.shape[-1]
            input_grads.append((run_RO @ weight_OI[:, :width]).view_as(x_Snd))
            add_product(weight_grad_OI[:, :width], run_RO, x_Snd.flatten(0, 1))
        return weight_grad_OI, grad_RO.sum(0, dtype=ctx.dtype), *input_grads


class _ProjectOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, x_RI: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        cast_OI = weight_OI.to(x_RI.dtype)
        ctx.save_for_backward(cast_OI, x_RI)
        ctx.segments, ctx.dtype = segments, weight_OI.dtype
        num_sequences = x_RI.shape[0] // segments[-1].stop
        runs = x_RI.split([num_sequences * (s.stop - s.start) for s in segments])
        return tuple(
            F.linear(run_RI, cast_OI[: s.width]).view(num_sequences, -1, s.width)
            for s, run_RI in zip(segments, runs, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_OI, x_RI = ctx.saved_tensors
        weight_grad_OI = torch.zeros_like(weight_OI, dtype=ctx.dtype)
        x_grad_RI = torch.empty_like(x_RI)
        rows = [grad_Snd.reshape(-1, grad_Snd.shape[-1]) for grad_Snd in grads]
        lengths = [len(grad_Rd) for grad_Rd in rows]
        for grad_Rd, run_RI, run_grad_RI in zip(rows, x_RI.split(lengths), x_grad_RI.split(lengths), strict=True):
            width = grad_Rd.shape[1]
            torch.mm(grad_Rd, weight_OI[:width], out=run_grad_RI)
            add_product(weight_grad_OI[:width], grad_Rd, run_RI)
        return weight_grad_OI, x_grad_RI, None
