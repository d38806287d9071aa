"""Expert-major layout: a tensor for each expert's tokens, as wide as the expert.

What an expert of width d never writes, the features past d, stays what it was through all blocks. Such a tail is only
read by LayerNorm, which needs two numbers of it. So the residual stream is cut into heads [S, n_e, d_e], and the tail
is put back once, at the end.

Where tokens of all widths lie in one matrix (queries, keys, values, and what attention makes of them), segment follows
segment over the whole batch, so that each is a run of rows.

Shapes: S sequences, N tokens, R = S N rows, D model features, n and d tokens and width of a segment.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mone.nested import Segments


class Tail(NamedTuple):
    """What LayerNorm needs to know of the features past d, float32 or wider.

    Attributes:
        mean_Sn1: Their mean.
        spread_Sn1: The sum of their squared distances from it.
        width: How many they are, D - d.
    """

    mean_Sn1: Tensor
    spread_Sn1: Tensor
    width: int


class Order(NamedTuple):
    """Where tokens lie as rows.

    Attributes:
        row_SN: int64. Row of each token.
        token_R: int64. Token s N + n of each row; None: rows lie as tokens do.
    """

    row_SN: Tensor
    token_R: Tensor | None

    def rows(self, x_XSN: Tensor) -> Tensor:
        """Numbers of tokens [..., S, N] as rows [..., R]."""
        x_XT = x_XSN.flatten(-2)
        return x_XT if self.token_R is None else x_XT.index_select(-1, self.token_R)


def order_of(segments: Segments, num_sequences: int, device: torch.device) -> Order:
    """Rows of segment after segment."""
    num_tokens = segments[-1].stop
    token_SN = torch.arange(num_sequences * num_tokens, device=device).view(num_sequences, num_tokens)
    if len(segments) == 1:
        return Order(token_SN, None)
    row_SN = torch.empty_like(token_SN)
    for s in segments:
        rows = torch.arange(num_sequences * s.start, num_sequences * s.stop, device=device)
        row_SN[:, s.start : s.stop] = rows.view(num_sequences, -1)
    return Order(row_SN, torch.cat([token_SN[:, s.start : s.stop].flatten() for s in segments]))


def to_layout(x_SND: Tensor, segments: Segments) -> tuple[list[Tensor], list[Tail | None]]:
    """Cut tokens that are sorted by expert, [S, N, D], into heads [S, n, d] and what is known of tails."""
    cut: list[Tensor] = list(_Cut.apply(x_SND, segments))  # pyright: ignore[reportArgumentType]
    heads, stats, tails = cut[: len(segments)], iter(cut[len(segments) :]), []
    for s in segments:
        width = x_SND.shape[-1] - s.width
        tails.append(Tail(next(stats), next(stats), width) if width else None)
    return heads, tails


def from_layout(heads: list[Tensor], x_SND: Tensor, segments: Segments) -> Tensor:
    """Put heads back before the tails of the tokens that they were cut from, [S, N, D]."""
    rows = [
        torch.cat([head, x_SND[:, s.start : s.stop, s.width :].to(head.dtype)], dim=-1)
        for head, s in zip(heads, segments, strict=True)
    ]
    return torch.cat(rows, dim=1)


class _Cut(torch.autograd.Function):
    """Heads, then mean and spread of each tail. Left to autograd, each would get a gradient as large as the whole."""

    @staticmethod
    def forward(ctx: Any, x_SND: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        heads = [x_SND[:, s.start : s.stop, : s.width].contiguous() for s in segments]
        stats = []
        for s in segments:
            x_Snt = x_SND[:, s.start : s.stop, s.width :]
            if x_Snt.shape[-1]:
                x_Snt = x_Snt.to(torch.promote_types(x_SND.dtype, torch.float32))
                mean_Sn1 = x_Snt.mean(dim=-1, keepdim=True)
                stats += [mean_Sn1, (x_Snt - mean_Sn1).square().sum(dim=-1, keepdim=True)]
        ctx.segments = segments
        ctx.save_for_backward(x_SND, *stats[::2])
        return (*heads, *stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_SND, *means = ctx.saved_tensors
        head_grads, stat_grads = grads[: len(ctx.segments)], iter(grads[len(ctx.segments) :])
        x_grad_SND, each_mean = torch.empty_like(x_SND), iter(means)
        for s, head_grad in zip(ctx.segments, head_grads, strict=True):
            x_grad_SND[:, s.start : s.stop, : s.width] = head_grad
            x_Snt = x_SND[:, s.start : s.stop, s.width :]
            if num_features := x_Snt.shape[-1]:
                mean_Sn1, mean_grad, spread_grad = next(each_mean), next(stat_grads), next(stat_grads)
                x_grad_Snt = (x_Snt - mean_Sn1).mul_(2 * spread_grad).add_(mean_grad / num_features)
                x_grad_SND[:, s.start : s.stop, s.width :] = x_grad_Snt
        return x_grad_SND, None
