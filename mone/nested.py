"""The two nested projections (MoNE section 3.1 and appendix A.1), as plain slices of one weight.

Tokens lie in expert-major order: a segment of consecutive rows for each expert. An expert of width d reads the first d
input features on the way in and writes the first d output features on the way out; the other side is always full.

Shapes: B sequences, N tokens, D model features, O output features, H hidden features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Segment(NamedTuple):
    """Rows [start, stop) of a sequence, which all go through the expert of this width."""

    start: int
    stop: int
    width: int


Segments = tuple[Segment, ...]


def segments_of(counts: tuple[int, ...], widths: tuple[int, ...], num_full: int = 0) -> Segments:
    """Segments of tokens sorted smallest expert first; empty ones are left out.

    Args:
        counts: Tokens of each expert.
        widths: Width of each expert.
        num_full: Unrouted tokens at the end (a class token), which join the full expert.
    """
    segments, start = [], 0
    for count, width in zip((*counts[:-1], counts[-1] + num_full), widths, strict=True):
        if count:
            segments.append(Segment(start, start + count, width))
        start += count
    return tuple(segments)


class NestedIn(nn.Linear):
    """Projection D -> O of which an expert of width d uses the first d input features: W[:, :d] x[:d] + b."""

    def forward(self, x_BND: Tensor, segments: Segments) -> Tensor:
        """[B, N, D] -> [B, N, O]. Features of x past a token's width are ignored."""
        return torch.cat(
            [F.linear(x_BND[:, s.start : s.stop, : s.width], self.weight[:, : s.width], self.bias) for s in segments],
            dim=1,
        )


class NestedOut(nn.Linear):
    """Projection H -> D of which an expert of width d computes the first d output features: W[:d] x + b[:d].

    The rest is zero, so in a residual branch the features past d keep their value. Biases are sliced like the weight
    (the paper does not speak of them): a full bias would write where the expert does not.
    """

    def forward(self, x_BNH: Tensor, segments: Segments) -> Tensor:
        """[B, N, H] -> [B, N, D], zero past each token's width."""
        outputs = []
        for s in segments:
            output = F.linear(x_BNH[:, s.start : s.stop], self.weight[: s.width], self.bias[: s.width])
            outputs.append(F.pad(output, (0, self.out_features - s.width)))
        return torch.cat(outputs, dim=1)
