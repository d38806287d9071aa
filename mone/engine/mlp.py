"""The MLP of nested experts on the layout. Its hidden layer, always of full width, is what fills memory.

Without a gradient, rows go through in chunks, so that no hidden layer is larger than a chunk's. With one, the backward
pass computes GELU again from what went into it; and where the expert is narrow that as well, since it costs little.

Shapes: R rows (tokens of all sequences), n and d tokens and width of a segment, S sequences, D features, H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mone.blocks import MLP
from mone.engine.projections import add_product
from mone.engine.support import triton_runs

# Of a processor's memory: a larger tensor of float32 is handed back by glibc as it is freed, and to get it again costs
# as much as the product itself.
_CHUNK_BYTES = 2**24
# Widths up to this share of D compute their hidden layer twice: a third more of a small part.
_RECOMPUTED_SHARE = 0.25


def nested_mlp(mlp: MLP, inputs: list[Tensor]) -> list[Tensor]:
    """FFN of each segment, [S, n, d] to [S, n, d], without the last bias."""
    weights = (mlp.up.weight, mlp.up.bias, mlp.down.weight)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *inputs)):
        return list(_NestedMLP.apply(mlp.activation.approximate, *weights, *inputs))  # pyright: ignore[reportArgumentType]
    up_HD, up_H, down_DH = (weight.to(inputs[0].dtype) for weight in weights)
    outputs = []
    for x_Snd in inputs:
        d, x_Rd = x_Snd.shape[-1], x_Snd.flatten(0, 1)
        rows = _CHUNK_BYTES // (len(up_H) * x_Rd.element_size()) if x_Rd.device.type == "cpu" else len(x_Rd)
        chunks = [
            F.linear(_hidden(part_Rd, up_HD, up_H, mlp.activation.approximate), down_DH[:d])
            for part_Rd in x_Rd.split(max(1, rows))
        ]
        outputs.append((chunks[0] if len(chunks) == 1 else torch.cat(chunks)).view_as(x_Snd))
    return outputs


def _hidden(x_Rd: Tensor, up_HD: Tensor, up_H: Tensor, approximate: str) -> Tensor:
    return F.gelu(F.linear(x_Rd, up_HD[:, : x_Rd.shape[-1]], up_H), approximate=approximate)


def _gelu_grad(
    before_RH: Tensor, grad_RH: Tensor, approximate: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """GELU again, the gradient of what went into it (given that of GELU, which is overwritten), and its sum [H]."""
    if before_RH.numel() and dtype == torch.float32 and triton_runs(before_RH.device):
        from mone.engine.kernels.gelu_grad import gelu_grad  # here: there may be no Triton

        hidden_RH, sum_H = gelu_grad(before_RH, grad_RH, approximate)
        return hidden_RH, grad_RH, sum_H
    hidden_RH = F.gelu(before_RH, approximate=approximate)
    grad_RH = torch.ops.aten.gelu_backward(grad_RH, before_RH, approximate=approximate)
    return hidden_RH, grad_RH, grad_RH.sum(0, dtype=dtype)


class _NestedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, approximate: str, up_HD: Tensor, up_H: Tensor, down_DH: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.approximate, ctx.dtype = approximate, up_HD.dtype
        up_HD, up_H, down_DH = (weight.to(inputs[0].dtype) for weight in (up_HD, up_H, down_DH))
        kept, outputs = [], []
        for x_Snd in inputs:
            d = x_Snd.shape[-1]
            before_SnH = F.linear(x_Snd, up_HD[:, :d], up_H)
            kept.append(None if d <= _RECOMPUTED_SHARE * len(down_DH) else before_SnH)
            outputs.append(F.linear(F.gelu(before_SnH, approximate=approximate), down_DH[:d]))
        ctx.save_for_backward(up_HD, up_H, down_DH, *inputs, *kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        up_HD, up_H, down_DH, *saved = ctx.saved_tensors
        up_grad_HD, down_grad_DH, up_grad_H = (
            torch.zeros_like(weight, dtype=ctx.dtype) for weight in (up_HD, down_DH, up_H)
        )
        input_grads = []
        for x_Snd, before_SnH, grad_Snd in zip(saved[: len(grads)], saved[len(grads) :], grads, strict=True):
            d, x_Rd, grad_Rd = x_Snd.shape[-1], x_Snd.flatten(0, 1), grad_Snd.reshape(-1, x_Snd.shape[-1])
            before_RH = F.linear(x_Rd, up_HD[:, :d], up_H) if before_SnH is None else before_SnH.flatten(0, 1)
            hidden_RH, before_grad_RH, sum_H = _gelu_grad(before_RH, grad_Rd @ down_DH[:d], ctx.approximate, ctx.dtype)
            add_product(down_grad_DH[:d], grad_Rd, hidden_RH)
            add_product(up_grad_HD[:, :d], before_grad_RH, x_Rd)
            up_grad_H += sum_H
            input_grads.append((before_grad_RH @ up_HD[:, :d]).view_as(x_Snd))
        return None, up_grad_HD, up_grad_H, down_grad_DH, *input_grads
