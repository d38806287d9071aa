"""LayerNorm over all D features of a token of which only the first d are at hand.

Mean and spread of two groups of features combine (Chan, Golub and LeVeque, 1983) without the cancellation that sums of
squares have:

    D mean   = d mean_h + t mean_t
    D var    = spread_h + spread_t + (mean_h - mean_t)^2 d t / D

where h is the head of d features and t the tail of t = D - d. Only the head is normalised: nobody reads the rest.

Shapes: S sequences, n tokens, d features of the head, R rows (tokens of segment after segment).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone.engine.layout import Tail
from mone.engine.support import triton_runs

# In place of an epsilon under the root of the head's own variance, which is only a step on the way.
_TINY = 1e-12


class Branch(NamedTuple):
    """The output of attention or MLP that is still to be added to the residual stream.

    Attributes:
        outputs: For each segment [S, n, d].
        bias_D: Of the projection that made them, to be added to them first; None: it has been.
        factor_R: float32 or wider. Of each token; None: 1.
    """

    outputs: list[Tensor]
    bias_D: Tensor | None
    factor_R: Tensor | None

    def biased(self) -> list[Tensor]:
        """Outputs with the bias, of which each has its first features."""
        if self.bias_D is None:
            return self.outputs
        return [output + self.bias_D[: output.shape[-1]].to(output.dtype) for output in self.outputs]

    def added_to(self, heads: list[Tensor]) -> list[Tensor]:
        """The stream [S, n, d] of each segment after the branch."""
        outputs = self.biased()
        if self.factor_R is not None:
            factors = self.factor_R.split([head.shape[0] * head.shape[1] for head in heads])
            outputs = [
                output * factor.view(*output.shape[:2], 1) for output, factor in zip(outputs, factors, strict=True)
            ]
        return [head + output.to(head.dtype) for head, output in zip(heads, outputs, strict=True)]


def add_and_norm(
    heads: list[Tensor], branch: Branch | None, tails: list[Tail | None], norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Add a branch to the stream, and normalise the sum.

    Args:
        heads: The residual stream of each segment [S, n, d].
        branch: To be added; None: nothing.
        tails: Of each segment.
        norm: Over whole tokens.
        dtype: Of what is normalised; sums are float32 at least.

    Returns:
        The stream after it, and the first d features of `norm` of whole tokens, [S, n, d] of each segment.
    """
    if heads[0].numel() and heads[0].dtype != torch.float64 and triton_runs(heads[0].device):
        from mone.engine.kernels.add_norm import KernelAddNorm, Norm  # here: there may be no Triton

        outputs, bias_D, factor_R = branch or ([None] * len(heads), None, None)
        stats = ((None, None) if tail is None else tail[:2] for tail in tails)
        means, spreads = zip(*stats, strict=True)
        factor_R = None if factor_R is None else factor_R.float().contiguous()
        arguments = (norm.weight, norm.bias, bias_D, factor_R, Norm(norm.eps, dtype))
        found = list(KernelAddNorm.apply(*arguments, *heads, *outputs, *means, *spreads))  # pyright: ignore[reportArgumentType]
        return (found[: len(heads)] if branch else heads), found[-len(heads) :]
    heads = branch.added_to(heads) if branch else heads
    return heads, [nested_norm(head, tail, norm, dtype) for head, tail in zip(heads, tails, strict=True)]


def nested_norm(head_Snd: Tensor, tail: Tail | None, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """The first d features of `norm` of whole tokens, in the given dtype [S, n, d]; sums are float32 at least."""
    width = head_Snd.shape[-1]
    weight_d, bias_d = norm.weight[:width], norm.bias[:width]
    if tail is not None:
        return _NestedNorm.apply(head_Snd, *tail, weight_d, bias_d, norm.eps, dtype)  # pyright: ignore[reportReturnType]
    wide = torch.promote_types(head_Snd.dtype, weight_d.dtype)
    with torch.autocast(head_Snd.device.type, enabled=False):
        return F.layer_norm(head_Snd.to(wide), (width,), weight_d.to(wide), bias_d.to(wide), norm.eps).to(dtype)


class _NestedNorm(torch.autograd.Function):
    """With its backward pass written out, which keeps two numbers of a token where autograd would keep its features."""

    @staticmethod
    def forward(
        ctx: Any,
        head_Snd: Tensor,
        tail_mean_Sn1: Tensor,
        tail_spread_Sn1: Tensor,
        tail_width: int,
        weight_d: Tensor,
        bias_d: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        d, t, wide = head_Snd.shape[-1], tail_width, tail_mean_Sn1.dtype
        weight_d, bias_d = weight_d.to(wide), bias_d.to(wide)
        own_Snd, own_mean_Sn1, own_scale_Sn1 = torch.native_layer_norm(head_Snd.to(wide), [d], weight_d, None, _TINY)
        own_spread_Sn1 = d * (own_scale_Sn1.pow(-2) - _TINY)
        apart_Sn1 = own_mean_Sn1 - tail_mean_Sn1
        variance_Sn1 = (own_spread_Sn1 + tail_spread_Sn1 + apart_Sn1.square() * (d * t / (d + t))) / (d + t)
        scale_Sn1 = (variance_Sn1 + eps).rsqrt()
        shift_Sn1 = apart_Sn1 * (t / (d + t))  # from the mean of all to that of the head
        ctx.save_for_backward(head_Snd, own_mean_Sn1 - shift_Sn1, scale_Sn1, apart_Sn1, weight_d)
        ctx.tail_width = t
        normal_Snd = own_Snd.mul_(scale_Sn1 / own_scale_Sn1).addcmul_(shift_Sn1 * scale_Sn1, weight_d)
        return normal_Snd.add_(bias_d).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        head_Snd, mean_Sn1, scale_Sn1, apart_Sn1, weight_d = ctx.saved_tensors
        grad_Snd, d, t = grads[0].to(weight_d.dtype), head_Snd.shape[-1], ctx.tail_width
        normal_Snd = (head_Snd - mean_Sn1).mul_(scale_Sn1)
        weight_grad_d = (grad_Snd * normal_Snd).flatten(0, 1).sum(0)
        bias_grad_d = grad_Snd.flatten(0, 1).sum(0)
        grad_Snd = grad_Snd * weight_d
        sum_Sn1 = grad_Snd.sum(dim=-1, keepdim=True)
        along_Sn1 = (grad_Snd * normal_Snd).sum(dim=-1, keepdim=True)
        # As in any LayerNorm, but the sums over all D features end at d, past which nothing is read.
        head_grad_Snd = grad_Snd.sub_(sum_Sn1 / (d + t)).sub_(normal_Snd.mul_(along_Sn1 / (d + t))).mul_(scale_Sn1)
        spread_grad_Sn1 = along_Sn1 * scale_Sn1.square() * (-0.5 / (d + t))
        mean_grad_Sn1 = -scale_Sn1 * sum_Sn1 * (t / (d + t)) - spread_grad_Sn1 * apart_Sn1 * (2 * d * t / (d + t))
        head_grad_Snd = head_grad_Snd.to(head_Snd.dtype)
        return head_grad_Snd, mean_grad_Sn1, spread_grad_Sn1, None, weight_grad_d, bias_grad_d, None, None
