"""All blocks on the expert-major layout, in plain PyTorch: any device, with gradients.

The same mathematics as `mone.blocks`, without its padding: a token is computed at the width of its expert, and
LayerNorm knows the rest from two numbers. In the last block, only what
is read is computed: where class tokens are, their own queries and MLP.

Shapes: S sequences, N tokens, D model features, R class tokens, n and d tokens and width of a segment, L blocks.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone.blocks import Block, Neighbours
from mone.blocks import Branch as Thinning
from mone.engine.attention import Routes, attend, attend_last, routes_of
from mone.engine.layout import Order, Tail, from_layout, order_of, to_layout
from mone.engine.mlp import nested_mlp
from mone.engine.norm import Branch, add_and_norm, nested_norm
from mone.engine.projections import project_in, project_out
from mone.engine.support import compute_dtype
from mone.nested import Segments


class _Layout(NamedTuple):
    """What all blocks share."""

    segments: Segments
    tails: list[Tail | None]
    order: Order
    routes: Routes
    dtype: torch.dtype


class _Stream(NamedTuple):
    """The residual stream of each segment [S, n, d], and the branch that is still to be added to it."""

    heads: list[Tensor]
    branch: Branch | None


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
    heads, tails = to_layout(x_SND, segments)
    order = order_of(segments, x_SND.shape[0], x_SND.device)
    layout = _Layout(segments, tails, order, routes_of(order, neighbours), compute_dtype(x_SND))
    stream, gain_LR = _Stream(heads, None), order.rows(gain_LSN1.squeeze(-1))
    *others, last = [cast(Block, block) for block in blocks]
    for block, gain_R in zip(others, gain_LR, strict=False):
        stream = _block(block, stream, layout, gain_R)
    if num_class_tokens:
        return _class_tokens(last, stream, layout, gain_LSN1[-1], num_class_tokens)
    heads, branch = _block(last, stream, layout, gain_LR[-1])
    return from_layout(branch.added_to(heads) if branch else heads, x_SND, segments)


def _block(block: Block, stream: _Stream, layout: _Layout, gain_R: Tensor) -> _Stream:
    """`Block.forward`, of which the last addition is left to do."""
    attention, dropout = block.attention, block.attention.dropout if block.training else 0.0
    heads, normal = add_and_norm(*stream, layout.tails, block.norm_attention, layout.dtype)
    qkv_RX = project_in(attention.qkv.weight, attention.qkv.bias, normal)
    mixed_RD = attend(qkv_RX, layout.routes, attention.num_heads, dropout)
    outputs = project_out(attention.out.weight, mixed_RD, layout.segments)
    branch = _thinned(Branch(outputs, attention.out.bias, None), block.branch, layout.order)
    heads, normal = add_and_norm(heads, branch, layout.tails, block.norm_mlp, layout.dtype)
    branch = Branch(nested_mlp(block.mlp, normal), block.mlp.down.bias, gain_R)
    return _Stream(heads, _thinned(branch, block.branch, layout.order))


def _thinned(branch: Branch, thinning: Thinning, order: Order) -> Branch:
    """A branch after dropout and stochastic depth, which draws once for all tokens of a sequence."""
    outputs, bias_D, factor_R = branch
    kept_S11 = thinning.draw_kept(outputs[0])
    if kept_S11 is not None:
        kept_R = order.rows(kept_S11.squeeze(-1).expand_as(order.row_SN))
        factor_R = kept_R if factor_R is None else kept_R.to(factor_R.dtype) * factor_R
    if thinning.training and thinning.dropout:
        outputs, bias_D = [thinning.thin(output, None) for output in branch.biased()], None
    return Branch(outputs, bias_D, factor_R)


def _class_tokens(block: Block, stream: _Stream, layout: _Layout, gain_SN1: Tensor, num_class_tokens: int) -> Tensor:
    """`Block.forward` of the class tokens, which have the full width; of the others, keys and values are needed."""
    attention, dim = block.attention, block.norm_mlp.normalized_shape[0]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    heads, normal = add_and_norm(*stream, layout.tails, block.norm_attention, layout.dtype)
    kv_RX = project_in(weight[dim:], bias[dim:], normal)
    own_weight, own_bias = weight[:dim].to(layout.dtype), bias[:dim].to(layout.dtype)
    q_SRD = F.linear(normal[-1][:, -num_class_tokens:], own_weight, own_bias)
    dropout = attention.dropout if block.training else 0.0
    mixed_SRD = attend_last(q_SRD, kv_RX, layout.routes, attention.num_heads, dropout)
    return finish(block, heads[-1][:, -num_class_tokens:], mixed_SRD, gain_SN1[:, -num_class_tokens:])


def finish(block: Block, x_SRD: Tensor, mixed_SRD: Tensor, gain_SR1: Tensor | None = None) -> Tensor:
    """What a block does after attention has mixed values, at full width; no gain is 1."""
    out, dtype = block.attention.out, mixed_SRD.dtype
    z_SRD = x_SRD + block.branch(F.linear(mixed_SRD, out.weight.to(dtype), out.bias.to(dtype)))
    (output_SRD,) = nested_mlp(block.mlp, [nested_norm(z_SRD, None, block.norm_mlp, dtype)])
    output_SRD = output_SRD + block.mlp.down.bias.to(dtype)
    return z_SRD + block.branch(output_SRD if gain_SR1 is None else gain_SR1 * output_SRD)
