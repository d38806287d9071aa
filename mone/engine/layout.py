"""Expert-major layout: a tensor for each expert's tokens, as wide as the expert.

What an expert of width d never writes, the features past d, stays what it was through all blocks. Such a tail is only
read by LayerNorm, which needs two numbers of it. So the residual stream is cut into heads [S, n_e, d_e], and the tail
is put back once, at the end.

Where tokens of all widths lie in one matrix (queries, keys, values, and what attention makes of them), segment follows
segment over the whole batch, so that each is a run of rows.

Shapes: S sequences, N tokens, R = S N rows, D model features, n and d tokens and width of a segment.
"""

from typing import NamedTuple

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
    heads = [x_SND[:, s.start : s.stop, : s.width].contiguous() for s in segments]
    return heads, [_tail(x_SND[:, s.start : s.stop, s.width :]) for s in segments]


def from_layout(heads: list[Tensor], x_SND: Tensor, segments: Segments) -> Tensor:
    """Put heads back before the tails of the tokens that they were cut from, [S, N, D]."""
    rows = [
        torch.cat([head, x_SND[:, s.start : s.stop, s.width :].to(head.dtype)], dim=-1)
        for head, s in zip(heads, segments, strict=True)
    ]
    return torch.cat(rows, dim=1)


def _tail(x_Snt: Tensor) -> Tail | None:
    if not x_Snt.shape[-1]:
        return None
    x_Snt = x_Snt.to(torch.promote_types(x_Snt.dtype, torch.float32))
    mean_Sn1 = x_Snt.mean(dim=-1, keepdim=True)
    return Tail(mean_Sn1, (x_Snt - mean_Sn1).square().sum(dim=-1, keepdim=True), x_Snt.shape[-1])
