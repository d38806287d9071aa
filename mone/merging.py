"""ToMe (Bolya et al., 2023), the training-free baseline that merges similar tokens: every block, at full width.

Shapes: S sequences, N tokens (with class tokens, which come last and never merge), D features, R tokens merged away.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mone.blocks import Block
from mone.encoder import NestedEncoder
from mone.engine.tokens import Positions
from mone.routing import RoutingPlan


@torch.compiler.assume_constant_result
def merging_schedule(mean_tokens: int, num_tokens: int, depth: int) -> tuple[int, ...]:
    """Tokens that each block merges away, so that the blocks see at most mean_tokens on average.

    ToMe takes the same number R in every block, at most half of what is left: the smallest R that does, or else the
    largest there is. A block's attention projections (4 D^2 of its 12 D^2 multiply-adds) see the tokens before merging,
    its MLP (8 D^2) those after.

    Args:
        mean_tokens: Target of the average.
        num_tokens: N, without class tokens.
        depth: Blocks.
    """
    low, high = 0, num_tokens // 2
    while low < high:
        middle = (low + high) // 2
        if _thirds_seen(_steps(middle, num_tokens, depth), num_tokens) <= 3 * mean_tokens * depth:
            high = middle
        else:
            low = middle + 1
    return _steps(high, num_tokens, depth)


def _steps(merged: int, num_tokens: int, depth: int) -> tuple[int, ...]:
    steps: list[int] = []
    for _ in range(depth):
        steps.append(min(merged, num_tokens // 2))
        num_tokens -= steps[-1]
    return tuple(steps)


def _thirds_seen(steps: tuple[int, ...], num_tokens: int) -> int:
    """Three times the sum of what the blocks see."""
    thirds = 0
    for step in steps:
        thirds += 3 * num_tokens - 2 * step
        num_tokens -= step
    return thirds


class MergingEncoder(NestedEncoder):
    """The nested encoder's weights at full width, with ToMe in each block in place of routing."""

    def forward(
        self, x_BKD: Tensor, patches_BKP: Tensor, counts: tuple[int, ...], kept_BK: Tensor | None = None
    ) -> tuple[Tensor, RoutingPlan]:
        """Encode clips; counts[-1] is the average number of tokens of a frame that the blocks may see.

        Returns:
            A vector per frame (joint: per clip) [B, G, D], and a plan that gives every token to the full expert.
        """
        assert kept_BK is None
        config, batch = self.config, x_BKD.shape[0]
        x_BKD = F.dropout(Positions(self.position_ND).added_to(x_BKD), config.dropout, self.training)
        frames = config.num_indices
        x_SND = x_BKD if config.joint else x_BKD.unflatten(1, (frames, -1)).flatten(0, 1)
        schedule = merging_schedule(counts[-1] * (frames if config.joint else 1), x_SND.shape[1], config.depth)
        x_SND = torch.cat([x_SND, self.class_token_KD.expand(x_SND.shape[0], -1, -1)], dim=1)
        size_SN1 = x_SND.new_ones(*x_SND.shape[:2], 1)
        for block, merged in zip(self.blocks, schedule, strict=True):
            x_SND, size_SN1 = self._merging_block(cast(Block, block), x_SND, size_SN1, merged)
        pooled = x_SND[:, -1] if config.num_class_tokens else (x_SND * size_SN1).sum(1) / size_SN1.sum(1)
        vectors_BGD = self.norm(pooled.reshape(batch, 1 if config.joint else frames, config.dim))
        return vectors_BGD, self._everything_full(batch, x_BKD.device, counts)

    def _merging_block(self, block: Block, x_SND: Tensor, size_SN1: Tensor, merged: int) -> tuple[Tensor, Tensor]:
        """Attention over tokens that stand for `size` patches each, merging by their keys, then the MLP."""
        attention, mlp = block.attention, block.mlp
        qkv_SNX = F.linear(block.norm_attention(x_SND), attention.qkv.weight, attention.qkv.bias)
        q, k, v = rearrange(qkv_SNX, "s n (three h k) -> three s h n k", three=3, h=attention.num_heads).unbind(0)
        # Proportional attention (ToMe equation 1): a token weighs as many patches as it stands for.
        bias = size_SN1.log().transpose(1, 2).unsqueeze(1).to(q.dtype)
        dropout = attention.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, bias.expand(-1, 1, q.shape[2], -1), dropout)
        mixed_SND = rearrange(mixed, "s h n k -> s n (h k)")
        x_SND = x_SND + block.branch(F.linear(mixed_SND, attention.out.weight, attention.out.bias))
        if merged:
            x_SND, size_SN1 = merge(x_SND, size_SN1, k.mean(dim=1), merged, self.config.num_class_tokens)
        hidden = mlp.activation(F.linear(block.norm_mlp(x_SND), mlp.up.weight, mlp.up.bias))
        return x_SND + block.branch(F.linear(hidden, mlp.down.weight, mlp.down.bias)), size_SN1

    def _everything_full(self, batch: int, device: torch.device, counts: tuple[int, ...]) -> RoutingPlan:
        config = self.config
        order_SN = torch.arange(config.num_tokens, device=device).expand(batch * config.num_indices, -1)
        full = torch.full_like(order_SN, config.num_experts - 1)
        return RoutingPlan(order_SN, full, torch.ones_like(full, dtype=torch.float32), counts)


def merge(
    x_SND: Tensor, size_SN1: Tensor, metric_SNK: Tensor, merged: int, num_class_tokens: int
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching (ToMe section 3): of the even tokens, the `merged` nearest to an odd one join it.

    Args:
        x_SND: Tokens.
        size_SN1: Patches that each stands for.
        metric_SNK: What similarity is measured on: keys, averaged over heads.
        merged: R, at most half of the tokens.
        num_class_tokens: Tokens at the end that neither join nor are joined.

    Returns:
        Tokens [S, N - R, D], averages weighted by size, and their sizes.
    """
    num_tokens = x_SND.shape[1] - num_class_tokens
    metric_SNK = F.normalize(metric_SNK[:, :num_tokens], dim=-1)
    similarity = metric_SNK[:, ::2] @ metric_SNK[:, 1::2].transpose(1, 2)
    nearest, partner = similarity.max(dim=-1)
    ranked = nearest.argsort(dim=-1, descending=True, stable=True)
    joining, staying = ranked[:, :merged], ranked[:, merged:].sort(dim=-1).values
    target = partner.gather(1, joining)

    def join(values: Tensor) -> Tensor:
        even, odd, rest = values[:, :num_tokens:2], values[:, 1:num_tokens:2], values[:, num_tokens:]
        rows = [index.unsqueeze(-1).expand(-1, -1, values.shape[-1]) for index in (joining, staying, target)]
        odd = odd.scatter_add(1, rows[2], even.gather(1, rows[0]))
        return torch.cat([even.gather(1, rows[1]), odd, rest], dim=1)

    merged_size = join(size_SN1)
    return join(x_SND * size_SN1) / merged_size, merged_size
