"""The nested encoder, which routes tokens once and keeps them sorted by expert; and the dense temporal encoder.

Shapes: B clips, F temporal indices, N tokens per index, K = F N tokens of a clip (fewer where static patches were
dropped), D model features, P values per patch, S sequences, L blocks, G = F vectors of a clip (joint: G = 1).
Batch sizes are read as x.shape[0]: len(x) would fix the batch size of an exported program.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone.blocks import Neighbours, last_kept, make_blocks
from mone.config import ModelConfig
from mone.engine.choice import Engine, route, run_blocks, score, uses_kernels
from mone.engine.tokens import Gain, Positions, Tokens
from mone.nested import Segment, segments_of
from mone.routing import RoutingPlan, make_router, merge_frames

_LARGEST_ALPHA = 1.0 - 1e-6


class NestedEncoder(nn.Module):
    """Routes tokens once, then runs all blocks in expert-major order.

    Attention, MLP and pooling treat tokens as a set: sorted once, nothing is ever sorted back.

    Attributes:
        engine: Which code runs the blocks, see `mone.engine.choice`; not a property of the model, and not saved.
    """

    engine: Engine = "auto"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = make_router(config)
        places = config.num_tokens * (config.num_indices if config.joint else 1)
        self.position_ND = nn.Parameter(torch.zeros(places, config.dim))
        self.class_token_KD = nn.Parameter(torch.zeros(config.num_class_tokens, config.dim))
        self.alpha_L = nn.Parameter(torch.zeros(config.depth))
        self.blocks = make_blocks(config, config.depth)
        self.norm = nn.LayerNorm(config.dim, config.pool_norm_eps or config.norm_eps)

    def forward(
        self, x_BKD: Tensor, patches_BKP: Tensor, counts: tuple[int, ...], kept_BK: Tensor | None = None
    ) -> tuple[Tensor, RoutingPlan]:
        """Encode clips.

        Args:
            x_BKD: Embedded tokens, without positions.
            patches_BKP: Their uint8 patches, for routers that look at them.
            counts: Tokens of each expert under one budget.
            kept_BK: Places f N + n of the tokens, ascending; None: all are there.

        Returns:
            A vector per frame (joint: per clip) [B, G, D], and the plan, [S, ...] with a sequence per budget.
        """
        config, batch = self.config, x_BKD.shape[0]
        kernels = uses_kernels(self.engine, self.blocks, x_BKD)
        positions = Positions(self.position_ND, kept_BK)
        linear_BKE = score(kernels, x_BKD, positions, self.router)
        if not kernels:
            x_BKD, positions = F.dropout(positions.added_to(x_BKD), config.dropout, self.training), None
        per_frame = config.budget_per_frame(None if kept_BK is None else kept_BK.shape[1])
        num_budgets = config.num_indices if per_frame else 1
        x_SND, patches_SNP = (t.unflatten(1, (num_budgets, -1)).flatten(0, 1) for t in (x_BKD, patches_BKP))
        known = () if linear_BKE is None else (linear_BKE.view(*x_SND.shape[:2], -1),)
        probabilities_SNE = self.router(x_SND, patches_SNP, *known)
        plan = route(kernels, probabilities_SNE, counts, cumulative=config.ranking == "cumulative")

        # Sequences are frames where these have a budget and attend alone, else clips.
        order_SN, num_class_tokens, neighbours = plan.order_BN, config.num_class_tokens, None
        if config.joint and per_frame:
            order_SN, counts = merge_frames(plan, (batch, num_budgets), config.num_tokens)
            x_SND = x_BKD
        elif not (config.joint or per_frame):
            num_class_tokens *= config.num_indices
            neighbours = self._frames(order_SN, kept_BK)
        # Class tokens join the full expert at the end; they have no r_j, so their gain is 1.
        classes_KD = self.class_token_KD.expand(num_class_tokens, -1)
        gain = Gain(plan.weight_BN.reshape(x_SND.shape[:2]), self.bounded_alphas())
        tokens = Tokens(x_SND, order_SN, classes_KD, positions, gain)
        segments = segments_of(counts, config.widths, num_class_tokens)
        x_SND = run_blocks(self.engine, self.blocks, tokens, segments, neighbours, num_class_tokens)
        if num_class_tokens:
            pooled = x_SND
        elif neighbours:
            pooled = neighbours.split(x_SND).mean(dim=1)
        else:
            pooled = x_SND.mean(dim=1)
        return self.norm(pooled.reshape(batch, 1 if config.joint else config.num_indices, config.dim)), plan

    def _frames(self, order_BK: Tensor, kept_BK: Tensor | None) -> Neighbours:
        """Frames that attend within themselves though the rows of a clip are sorted by expert."""
        config, batch = self.config, order_BK.shape[0]
        num_indices, num_tokens, num_class_tokens = config.num_indices, config.num_tokens, config.num_class_tokens
        num_rows = order_BK.shape[1]
        if kept_BK is None:
            kept_BK = torch.arange(num_rows, device=order_BK.device).expand(batch, -1)
        rows_BK = torch.arange(num_rows, device=order_BK.device).expand(batch, -1)
        row_of_token_BK = torch.zeros_like(order_BK).scatter(1, order_BK, rows_BK)
        slot_BFM = row_of_token_BK.gather(1, last_kept(kept_BK, num_indices, num_tokens).flatten(1))
        slot_BFM = slot_BFM.unflatten(1, (num_indices, num_tokens))
        place_BK = kept_BK.gather(1, order_BK)
        home_BN = place_BK + place_BK // num_tokens * num_class_tokens
        if num_class_tokens:
            index_F = torch.arange(num_indices, device=order_BK.device)
            slot_BFM = torch.cat([slot_BFM, (num_rows + index_F).expand(batch, -1).unsqueeze(-1)], dim=-1)
            home_BN = torch.cat([home_BN, (index_F * (num_tokens + 1) + num_tokens).expand(batch, -1)], dim=1)
        return Neighbours(slot_BFM, home_BN)

    def bounded_alphas(self) -> Tensor:
        """Alpha of each block, kept in [0, 1), [L].

        The paper gives the start, 0, and the interval, not how it is kept nor whether blocks share one. Here each
        block has its own, under a clamp whose gradient passes straight through: the start lies on the edge, where a
        sigmoid cannot start and a plain clamp could die. Without gradients, the clamp is all there is to compute.
        """
        if not torch.is_grad_enabled():
            return self.alpha_L.clamp(0.0, _LARGEST_ALPHA)
        return self.alpha_L + (self.alpha_L.clamp(0.0, _LARGEST_ALPHA) - self.alpha_L).detach()

    @torch.no_grad()
    def project_alphas(self) -> None:
        """Put every alpha back into [0, 1), after an optimiser's step.

        Without it an alpha that is pushed down wanders far below 0, and has all the way to come back before it does
        anything again.
        """
        self.alpha_L.clamp_(0.0, _LARGEST_ALPHA)


class TemporalEncoder(nn.Module):
    """Dense transformer over the frame vectors, read out at a class token (ViViT section 3.3; MoNE section 4.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_FD = nn.Parameter(torch.zeros(config.num_indices, config.dim))
        self.class_token_KD = nn.Parameter(torch.zeros(1, config.dim))
        self.blocks = make_blocks(config, config.temporal_depth)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, x_BFD: Tensor, engine: Engine) -> Tensor:
        """[B, F, D] -> [B, D]."""
        tokens = Tokens(x_BFD, None, self.class_token_KD, Positions(self.position_FD))
        everything = (Segment(0, x_BFD.shape[1] + 1, x_BFD.shape[2]),)
        if engine == "fp8":  # which saves nothing on so few tokens
            engine = "triton"
        return self.norm(run_blocks(engine, self.blocks, tokens, everything, None, 1)[:, -1])


class FrameAverage(nn.Module):
    """In place of a temporal encoder: the mean of the vectors, [B, G, D] -> [B, D]."""

    def forward(self, x_BGD: Tensor, engine: Engine) -> Tensor:
        """[B, G, D] -> [B, D]."""
        return x_BGD.mean(dim=1)
