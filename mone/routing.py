"""Which expert takes which token: the router and Expert Preferred Routing (MoNE section 3.2, algorithm 1).

Shapes: B sequences (one per budget: a frame, or a clip), N tokens, D features, E experts, P values of a patch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone.config import ModelConfig


class RoutingPlan(NamedTuple):
    """Who goes where, decided once before the first block and kept through all of them.

    Attributes:
        order_BN: int64 [B, sum(counts)]. Token indices sorted by expert, smallest expert first; the first counts[0] of
            them go to the smallest expert, the next counts[1] to the second, and so on.
        expert_BN: int64. Expert of each token, in token order; -1 where counts left it out.
        weight_BN: float32. r_j: the router's probability of the expert that the token got, in token order.
        counts: Tokens of each expert, smallest first, the same for every sequence.
    """

    order_BN: Tensor
    expert_BN: Tensor
    weight_BN: Tensor
    counts: tuple[int, ...]


class LearnedRouter(nn.Linear):
    """One linear layer with a softmax over the experts (MoNE section 3.2).

    Attributes:
        sees_patches: Whether it looks at pixels, and not at tokens alone.
    """

    sees_patches = False

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, tokens_BND: Tensor, patches_BNP: Tensor, linear_BNE: Tensor | None = None) -> Tensor:
        """Probabilities [B, N, E].

        Computed in float32 at least, under autocast too: rounding to bfloat16 makes ties, and ties decide by position.

        Args:
            tokens_BND: Tokens with their positions.
            patches_BNP: Their pixels, for routers that look at them.
            linear_BNE: What the linear layer makes of the tokens, where that is known.
        """
        with torch.autocast(tokens_BND.device.type, enabled=False):
            return self.logits(tokens_BND, patches_BNP, linear_BNE).softmax(dim=-1)

    def logits(self, tokens_BND: Tensor, patches_BNP: Tensor, linear_BNE: Tensor | None = None) -> Tensor:
        """Logits [B, N, E]."""
        del patches_BNP
        if linear_BNE is not None:
            return linear_BNE
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(tokens_BND.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class MotionRouter(LearnedRouter):
    """Beyond the paper: the learned router with a prior that what changes within a tubelet deserves a larger expert.

    A linear router cannot see change, which has no sign, and where alpha stays at 0 it learns nothing at all. Here the
    logit of expert j gets s_j m, where m is the mean absolute difference of the token's successive frames, standardised
    over the tokens of its budget, and s is learnt from a start that grows with the expert.
    """

    sees_patches = True

    def __init__(self, dim: int, num_experts: int, tubelet_frames: int) -> None:
        super().__init__(dim, num_experts)
        self.tubelet_frames = tubelet_frames
        self.prior_E = nn.Parameter(torch.linspace(0.0, 1.0, num_experts))

    def logits(self, tokens_BND: Tensor, patches_BNP: Tensor, linear_BNE: Tensor | None = None) -> Tensor:
        """Logits [B, N, E] with the prior."""
        logits_BNE = super().logits(tokens_BND, patches_BNP, linear_BNE)
        frames_BNTP = patches_BNP.unflatten(-1, (self.tubelet_frames, -1)).to(logits_BNE.dtype)
        motion_BN = frames_BNTP.diff(dim=-2).abs().mean(dim=(-2, -1))
        centred_BN = motion_BN - motion_BN.mean(dim=-1, keepdim=True)
        motion_BN = centred_BN / (centred_BN.square().mean(dim=-1, keepdim=True).sqrt() + 1.0)
        return logits_BNE + motion_BN.unsqueeze(-1) * self.prior_E


class RandomRouter(nn.Module):
    """Baseline: preferences that know nothing of the content.

    In training they are drawn anew at each step. In evaluation they are a hash of the token's pixels and its place in
    the sequence, so that a clip gets the same answer whatever else is in its batch.
    """

    sees_patches = True

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, tokens_BND: Tensor, patches_BNP: Tensor) -> Tensor:
        """Probabilities float32 [B, N, E]."""
        num_tokens, num_values = patches_BNP.shape[-2:]
        if self.training:
            noise = torch.rand(*patches_BNP.shape[:-1], self.num_experts, device=tokens_BND.device)
        else:
            weights_P = torch.arange(1, num_values + 1, device=patches_BNP.device).mul(2654435761).remainder(65521)
            hash_BN = (patches_BNP.long() * weights_P).sum(-1)
            hash_BN = hash_BN + torch.arange(num_tokens, device=patches_BNP.device) * 40503
            salt_E = torch.arange(1, self.num_experts + 1, device=patches_BNP.device) * 48271
            noise = (hash_BN.unsqueeze(-1) * salt_E).remainder(65521) / 65521
        return noise.float().softmax(dim=-1)


def expert_preferred_routing(
    probabilities_BNE: Tensor, counts: tuple[int, ...], *, cumulative: bool = False
) -> RoutingPlan:
    """Give each expert its favourite tokens, the largest expert first (MoNE algorithm 1).

    From the largest expert to the second smallest, expert j takes the counts[j] tokens of highest probability among
    those still free; what is left goes to the smallest. Of equal probabilities the earlier token wins (stable sort),
    so the plan is deterministic. A count of zero selects nothing.

    Args:
        probabilities_BNE: Router probabilities [B, N, E], experts from smallest to largest.
        counts: Tokens of each expert; they sum to N, or to less where tokens are to be left out (the baseline of
            random token drop).
        cumulative: Rank by the probability of the expert or a larger one, in place of the expert's own (beyond the
            paper; see `ModelConfig.ranking`).

    Returns:
        The plan. `weight_BN` keeps the gradient to the router; the decisions have none.
    """
    num_tokens, num_experts = probabilities_BNE.shape[-2:]
    assert len(counts) == num_experts and sum(counts) <= num_tokens, (counts, probabilities_BNE.shape)
    free_BN = torch.ones_like(probabilities_BNE[..., 0], dtype=torch.bool)
    chosen: list[Tensor] = []
    for expert in reversed(range(1, num_experts)):
        wanted_BN = probabilities_BNE[..., expert:].sum(dim=-1) if cumulative else probabilities_BNE[..., expert]
        preference_BN = wanted_BN.detach().masked_fill(~free_BN, -torch.inf)
        top_BK = preference_BN.argsort(dim=-1, descending=True, stable=True)[..., : counts[expert]]
        free_BN = free_BN.scatter(-1, top_BK, False)
        chosen.append(top_BK)
    chosen.append(free_BN.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., : counts[0]])
    order_BN = torch.cat(chosen[::-1], dim=-1)

    expert_of_slot_N = torch.cat([order_BN.new_full((count,), index) for index, count in enumerate(counts)])
    left_out_BN = torch.full_like(free_BN, -1, dtype=torch.int64)
    expert_BN = left_out_BN.scatter(-1, order_BN, expert_of_slot_N.expand_as(order_BN))
    weight_BN = probabilities_BNE.gather(-1, expert_BN.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return RoutingPlan(order_BN, expert_BN, weight_BN, counts)


def merge_frames(
    plan: RoutingPlan, clips_and_frames: tuple[int, int], num_tokens: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Expert-major order of whole clips from a plan per frame.

    Args:
        plan: Over B F sequences.
        clips_and_frames: B and F.
        num_tokens: N, tokens of a frame.

    Returns:
        Order int64 [B, F sum(counts)] into the F N tokens of a clip, and the counts of a clip.
    """
    order_BFN, num_frames = plan.order_BN.unflatten(0, clips_and_frames), clips_and_frames[1]
    order_BFN = order_BFN + num_tokens * torch.arange(num_frames, device=order_BFN.device).unsqueeze(-1)
    order_BK = torch.cat([part.flatten(1) for part in order_BFN.split(plan.counts, dim=-1)], dim=1)
    return order_BK, tuple(num_frames * count for count in plan.counts)


def make_router(config: ModelConfig) -> LearnedRouter | RandomRouter:
    """The router that a config names."""
    if config.router == "random":
        return RandomRouter(config.num_experts)
    if config.router == "motion":
        return MotionRouter(config.dim, config.num_experts, config.tubelet_frames)
    return LearnedRouter(config.dim, config.num_experts)
