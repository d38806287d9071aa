"""All blocks on the expert-major layout, in plain PyTorch: any device, with gradients.

The same mathematics as `mone.blocks`, without its padding: a token is computed at the width of its expert, and
LayerNorm knows the rest from two numbers. In the last block, only what
is read is computed: where class tokens are, their own queries and MLP.

Shapes: S sequences, N tokens, D model features, R class tokens, n and d tokens and width of a segment, L blocks.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone.blocks import Block, Branch, Neighbours
from mone.engine.attention import Routes, attend, attend_last, routes_of
from mone.engine.layout import Layout, Tail, from_layout, order_of, to_layout
from mone.engine.mlp import nested_mlp
from mone.engine.norm import nested_norm
from mone.engine.projections import project_in, project_out
from mone.nested import Segments


def run_on_layout(
    blocks: nn.ModuleList,
    x_SND: Tensor,
    segments: Segments,
    gain_LSN1: Tensor,
    neighbours: Neighbours | None = None,
    num_class_tokens: int = 0,
) -> Tensor:
    """Run all blocks on sorted tokens.

    Args:
        blocks: Of `mone.blocks.Block`; their weights are read where they are.
        x_SND: Tokens in expert-major order.
        segments: Which rows go through which expert.
        gain_LSN1: alpha r_j + 1 of each token, for each block.
        neighbours: As in `Block`.
        num_class_tokens: R, which end a sequence and are all that is read of it, or 0: everything is.

    Returns:
        The class tokens [S, R, D], or all tokens [S, N, D].
    """
    dtype = compute_dtype(x_SND)
    heads, tails = to_layout(x_SND, segments)
    routes = routes_of(order_of(segments, x_SND.shape[0], x_SND.device), neighbours)
    *others, last = [cast(Block, block) for block in blocks]
    for block, gain_SN1 in zip(others, gain_LSN1, strict=False):
        heads = _block(block, Layout(heads, tails), segments, gain_SN1, routes, dtype)
    if num_class_tokens:
        return _class_tokens(last, Layout(heads, tails), gain_LSN1[-1], routes, num_class_tokens, dtype)
    heads = _block(last, Layout(heads, tails), segments, gain_LSN1[-1], routes, dtype)
    return from_layout(heads, x_SND, segments)


def _block(
    block: Block,
    layout: Layout,
    segments: Segments,
    gain_SN1: Tensor,
    routes: Routes,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`Block.forward` on heads."""
    attention, tails = block.attention, layout.tails
    normal = _norms(layout.heads, tails, block.norm_attention, dtype)
    qkv_RX = project_in(attention.qkv.weight, attention.qkv.bias, normal)
    mixed_RD = attend(qkv_RX, routes, attention.num_heads, attention.dropout if block.training else 0.0)
    outputs = project_out(attention.out.weight, attention.out.bias, mixed_RD, segments)
    heads = _residual(layout.heads, outputs, block.branch)
    outputs = nested_mlp(block.mlp, _norms(heads, tails, block.norm_mlp, dtype))
    gained = [gain_SN1[:, s.start : s.stop] * output for s, output in zip(segments, outputs, strict=True)]
    return _residual(heads, gained, block.branch)


def _class_tokens(
    block: Block,
    layout: Layout,
    gain_SN1: Tensor,
    routes: Routes,
    num_class_tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """`Block.forward` of the class tokens, which have the full width; of the others, keys and values are needed."""
    attention, dim = block.attention, block.norm_mlp.normalized_shape[0]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    normal = _norms(layout.heads, layout.tails, block.norm_attention, dtype)
    kv_RX = project_in(weight[dim:], bias[dim:], normal)
    q_SRD = F.linear(normal[-1][:, -num_class_tokens:], weight[:dim].to(dtype), bias[:dim].to(dtype))
    dropout = attention.dropout if block.training else 0.0
    mixed_SRD = attend_last(q_SRD, kv_RX, routes, attention.num_heads, dropout)
    return finish(block, layout.heads[-1][:, -num_class_tokens:], mixed_SRD, gain_SN1[:, -num_class_tokens:])


def finish(block: Block, x_SRD: Tensor, mixed_SRD: Tensor, gain_SR1: Tensor) -> Tensor:
    """What a block does after attention has mixed values, at full width."""
    out, dtype = block.attention.out, mixed_SRD.dtype
    output_SRD = F.linear(mixed_SRD, out.weight.to(dtype), out.bias.to(dtype))
    (z_SRD,) = _residual([x_SRD], [output_SRD], block.branch)
    (output_SRD,) = nested_mlp(block.mlp, _norms([z_SRD], [None], block.norm_mlp, dtype))
    return _residual([z_SRD], [gain_SR1 * output_SRD], block.branch)[0]


def _norms(heads: list[Tensor], tails: list[Tail | None], norm: nn.LayerNorm, dtype: torch.dtype) -> list[Tensor]:
    return [nested_norm(head, tail, norm, dtype) for head, tail in zip(heads, tails, strict=True)]


def _residual(heads: list[Tensor], outputs: list[Tensor], branch: Branch) -> list[Tensor]:
    """Add a branch; stochastic depth draws once for all tokens of a sequence."""
    kept_S11 = branch.draw_kept(outputs[0])
    return [head + branch.thin(output, kept_S11) for head, output in zip(heads, outputs, strict=True)]


def compute_dtype(x_SND: Tensor) -> torch.dtype:
    """Of matrix products."""
    device = x_SND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SND.dtype
