"""ViViT's factorised encoder (ViViT section 3.3, model 2) with Mixture of Nested Experts in the spatial encoder.

Shapes: B clips, F temporal indices, N tokens per index, P values per patch, S = B F sequences, D model features,
C classes, L blocks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mone.capacity import token_counts
from mone.config import ModelConfig
from mone.nested import NestedIn, NestedOut, Segment, Segments, segments_of
from mone.routing import RoutingPlan, expert_preferred_routing, make_router

_LARGEST_ALPHA = 1.0 - 1e-6


class Prediction(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits_BC: float. Class scores before the softmax.
        plan: Routing of every frame; its tensors are [B, F, N].
    """

    logits_BC: Tensor
    plan: RoutingPlan


class Attention(nn.Module):
    """Multi-head self-attention SA_j whose projections are nested; scores and values use all D features (A.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = NestedIn(config.dim, 3 * config.dim)
        self.out = NestedOut(config.dim, config.dim)

    def forward(self, x_SND: Tensor, segments: Segments) -> Tensor:
        """[S, N, D] -> [S, N, D], zero past each token's width."""
        qkv = rearrange(self.qkv(x_SND, segments), "s n (three h k) -> three s h n k", three=3, h=self.num_heads)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.out(rearrange(mixed, "s h n k -> s n (h k)"), segments)


class MLP(nn.Module):
    """Feed-forward FFN_j: width d in, full hidden width, width d out (A.1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = NestedIn(config.dim, config.mlp_ratio * config.dim)
        self.down = NestedOut(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x_SND: Tensor, segments: Segments) -> Tensor:
        """[S, N, D] -> [S, N, D], zero past each token's width."""
        return self.down(F.gelu(self.up(x_SND, segments)), segments)


class Block(nn.Module):
    """Pre-norm transformer block of nested experts (MoNE equation 1).

    The paper leaves the place of LayerNorm open; here it sees all D features of every token before each branch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.dim)
        self.mlp = MLP(config)

    def forward(self, x_SND: Tensor, segments: Segments, gain_SN1: Tensor | float = 1.0) -> Tensor:
        """Compute z = x + SA_j(x) and x' = z + gain FFN_j(z), where gain is alpha r_j + 1 for routed tokens."""
        z_SND = x_SND + self.attention(self.norm_attention(x_SND), segments)
        return z_SND + gain_SN1 * self.mlp(self.norm_mlp(z_SND), segments)


class SpatialEncoder(nn.Module):
    """Routes the tokens of each frame once, then runs all blocks in expert-major order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.widths = config.widths
        self.num_class_tokens = int(config.pooling == "cls")
        self.router = make_router(config)
        self.position_ND = nn.Parameter(torch.zeros(config.num_tokens, config.dim))
        self.class_token_KD = nn.Parameter(torch.zeros(self.num_class_tokens, config.dim))
        self.alpha_L = nn.Parameter(torch.zeros(config.depth))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_SND: Tensor, patches_SNP: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, RoutingPlan]:
        """Embedded tokens [S, N, D] -> one vector per frame [S, D] and the plan, [S, N]."""
        x_SND = x_SND + self.position_ND
        plan = expert_preferred_routing(self.router(x_SND, patches_SNP), counts)
        # Attention, MLP and pooling treat tokens as a set: sorted once here, nothing is ever sorted back.
        x_SND = x_SND.gather(1, plan.order_BN.unsqueeze(-1).expand_as(x_SND))
        weight_SN1 = plan.weight_BN.gather(1, plan.order_BN).unsqueeze(-1)
        # A class token joins the full expert at the end; it has no r_j, so its gain is 1.
        x_SND = torch.cat([x_SND, self.class_token_KD.expand(len(x_SND), -1, -1)], dim=1)
        weight_SN1 = F.pad(weight_SN1, (0, 0, 0, self.num_class_tokens))
        segments = segments_of(counts, self.widths, self.num_class_tokens)
        for block, alpha in zip(self.blocks, self.bounded_alphas(), strict=True):
            x_SND = block(x_SND, segments, (alpha * weight_SN1 + 1).to(x_SND.dtype))
        x_SND = self.norm(x_SND)
        return (x_SND[:, -1] if self.num_class_tokens else x_SND.mean(dim=1)), plan

    def bounded_alphas(self) -> Tensor:
        """Alpha of each block, kept in [0, 1), [L].

        The paper gives the start, 0, and the interval, not how it is kept nor whether blocks share one. Here each
        block has its own, under a clamp whose gradient passes straight through: the start lies on the edge, where a
        sigmoid cannot start and a plain clamp could die.
        """
        return self.alpha_L + (self.alpha_L.clamp(0.0, _LARGEST_ALPHA) - self.alpha_L).detach()


class TemporalEncoder(nn.Module):
    """Dense transformer over the frame vectors, read out at a class token (ViViT section 3.3; MoNE section 4.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.position_FD = nn.Parameter(torch.zeros(config.num_indices, config.dim))
        self.class_token_KD = nn.Parameter(torch.zeros(1, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.temporal_depth))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] -> [B, D]."""
        x_BFD = torch.cat([x_BFD + self.position_FD, self.class_token_KD.expand(len(x_BFD), -1, -1)], dim=1)
        everything = (Segment(0, x_BFD.shape[1], x_BFD.shape[2]),)
        for block in self.blocks:
            x_BFD = block(x_BFD, everything)
        return self.norm(x_BFD[:, -1])


class ViViT(nn.Module):
    """Video classifier whose compute is chosen at the call.

    >>> model = ViViT(preset("tiny", num_classes=10))
    >>> logits, plan = model(patches, capacity=0.4)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_values, config.dim)
        self.spatial = SpatialEncoder(config)
        self.temporal = TemporalEncoder(config)
        self.head = nn.Linear(config.dim, config.num_classes)
        initialise(self)

    def forward(
        self, patches_BFNP: Tensor, capacity: float = 1.0, *, counts: tuple[int, ...] | None = None
    ) -> Prediction:
        """Classify clips at an effective capacity.

        Args:
            patches_BFNP: uint8 patches [B, F, N, P] as `tubelets.to_patches` makes them.
            capacity: Effective capacity e_c in [d_1 / D, 1]; 1 is the dense model.
            counts: Tokens of each expert per frame, smallest first, in place of a capacity (for a nested sub-model:
                all tokens on one expert).

        Raises:
            ValueError: A capacity out of range, counts that do not sum to N, or patches of another shape.
        """
        config = self.config
        if tuple(patches_BFNP.shape[1:]) != (config.num_indices, config.num_tokens, config.patch_values):
            expected = f"[B, {config.num_indices}, {config.num_tokens}, {config.patch_values}]"
            raise ValueError(f"patches are {list(patches_BFNP.shape)}, the model takes {expected}")
        if counts is None:
            counts = token_counts(capacity, config.num_tokens, config.num_experts)
        if len(counts) != config.num_experts or sum(counts) != config.num_tokens:
            raise ValueError(
                f"counts {counts} do not split {config.num_tokens} tokens over {config.num_experts} experts"
            )

        batch_and_indices = patches_BFNP.shape[:2]
        patches_SNP = patches_BFNP.flatten(0, 1)
        x_SND = self.embed(to_float(patches_SNP, config, self.embed.weight.dtype))
        frames_SD, plan = self.spatial(x_SND, patches_SNP, counts)
        logits_BC = self.head(self.temporal(frames_SD.unflatten(0, batch_and_indices)))
        order, expert, weight = (tensor.unflatten(0, batch_and_indices) for tensor in plan[:3])
        return Prediction(logits_BC, RoutingPlan(order, expert, weight, counts))


def to_float(patches_SNP: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """uint8 patches as the model sees them; pixels stay uint8 until they are on the device."""
    pixels_SNP = patches_SNP.to(dtype)
    if config.pixels == "scaled":
        return pixels_SNP / 127.5 - 1.0
    return (pixels_SNP - pixels_SNP.mean(dim=(-2, -1), keepdim=True)) / 64.0


def initialise(model: ViViT) -> None:
    """Set the initial weights.

    | parameter | value |
    |---|---|
    | linear weights | Xavier uniform, which suits every width (a fixed std of 0.02 leaves small models deaf) |
    | linear and LayerNorm biases | 0 |
    | LayerNorm weights | 1 |
    | position embeddings | normal, std 0.5: at 0.02 small models are blind to place (patches are of order 1) |
    | class tokens | normal, std 0.02 |
    | head | 0: the first loss is log(classes) |
    | alpha | 0 (MoNE section 3.1) |
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if "position" in name:
            nn.init.normal_(parameter, std=0.5)
        if "class_token" in name:
            nn.init.normal_(parameter, std=0.02)
    nn.init.zeros_(model.head.weight)
