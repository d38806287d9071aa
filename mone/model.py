"""ViViT, factorised or joint (ViViT section 3.3, models 2 and 1), with Mixtures of Nested Experts.

Shapes: B clips, F temporal indices, N tokens per index, K tokens of a clip, P values per patch, D model features,
C classes.
"""

from typing import NamedTuple

from torch import Tensor, nn

from mone.config import ModelConfig
from mone.encoder import FrameAverage, NestedEncoder, TemporalEncoder
from mone.engine.choice import uses_kernels
from mone.merging import MergingEncoder
from mone.pixels import embed
from mone.routing import MotionRouter, RoutingPlan


class Prediction(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits_BC: float. Class scores before the softmax.
        plan: Who went where; its tensors are [B, F, N] with a budget per frame, [B, K] with one per clip.
    """

    logits_BC: Tensor
    plan: RoutingPlan


class ViViT(nn.Module):
    """Video classifier whose compute is chosen at the call.

    >>> model = ViViT(preset("tiny", num_classes=10))
    >>> logits, plan = model(patches, capacity=0.4)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_values, config.dim)
        self.encoder = MergingEncoder(config) if config.allocation == "tome" else NestedEncoder(config)
        self.temporal = TemporalEncoder(config) if config.temporal_depth else FrameAverage()
        self.head = nn.Linear(config.dim, config.num_classes)
        initialise(self)

    def forward(
        self,
        patches: Tensor,
        capacity: float = 1.0,
        *,
        counts: tuple[int, ...] | None = None,
        kept_BK: Tensor | None = None,
    ) -> Prediction:
        """Classify clips at an effective capacity.

        Args:
            patches: uint8 patches [B, F, N, P] as `tubelets.to_patches` makes them; with kept_BK, [B, K, P].
            capacity: Effective capacity e_c in [d_1 / D, 1]; 1 is the dense model.
            counts: Tokens of each expert under one budget, smallest first, in place of a capacity (for a nested
                sub-model: all tokens on one expert).
            kept_BK: Places f N + n of the patches that were not dropped as static, int64, ascending, with all of the
                first frame (`static.kept_patches`). Such clips have one budget for all frames.

        Raises:
            ValueError: A capacity out of range, counts that do not fit, or patches of another shape.
        """
        config = self.config
        self._check_shape(patches, kept_BK)
        num_kept = None if kept_BK is None else kept_BK.shape[1]
        tokens = config.tokens_per_budget(num_kept)
        if counts is None:
            counts = config.token_counts(capacity, num_kept)
        fewest = 1 if config.reduces_tokens else tokens
        if len(counts) != config.num_experts or min(counts) < 0 or not fewest <= sum(counts) <= tokens:
            raise ValueError(f"counts {counts} do not split {tokens} tokens over {config.num_experts} experts")
        return self.classified(self.embedded(patches, kept_BK), patches, counts, kept_BK)

    def embedded(self, patches: Tensor, kept_BK: Tensor | None = None, out_BKD: Tensor | None = None) -> Tensor:
        """The first half of `forward`: patches to tokens without positions [B, K, D], in out_BKD if that is given."""
        kernels = uses_kernels(self.encoder.engine, self.encoder.blocks, self.embed.weight)
        return embed(self.embed, patches.flatten(1, -2), self.config, kept_BK, out_BKD, kernels=kernels)

    def classified(
        self, x_BKD: Tensor, patches: Tensor, counts: tuple[int, ...], kept_BK: Tensor | None = None
    ) -> Prediction:
        """The second half of `forward`: of the patches it reads only what `encoder.router` does."""
        vectors_BGD, plan = self.encoder(x_BKD, patches.flatten(1, -2), counts, kept_BK)
        logits_BC = self.head(self.temporal(vectors_BGD, self.encoder.engine))
        if self.config.budget_per_frame(None if kept_BK is None else kept_BK.shape[1]):
            frames = (x_BKD.shape[0], self.config.num_indices)
            order, expert, weight = (tensor.unflatten(0, frames) for tensor in plan[:3])
            plan = RoutingPlan(order, expert, weight, plan.counts)
        return Prediction(logits_BC, plan)

    def _check_shape(self, patches: Tensor, kept_BK: Tensor | None) -> None:
        config, shape = self.config, list(patches.shape)
        if kept_BK is None:
            if shape[1:] != [config.num_indices, config.num_tokens, config.patch_values]:
                wanted = f"[B, {config.num_indices}, {config.num_tokens}, {config.patch_values}]"
                raise ValueError(f"patches are {shape}, the model takes {wanted}")
            return
        if config.reduces_tokens:
            raise ValueError(f"static patches cannot be dropped with allocation {config.allocation!r}")
        if shape != [*kept_BK.shape, config.patch_values]:
            raise ValueError(f"patches are {shape}, their places {list(kept_BK.shape)}")
        first, every = config.num_tokens, config.num_indices * config.num_tokens
        if not first <= shape[1] <= every:
            raise ValueError(f"{shape[1]} patches are kept, not from {first} (a whole first frame) to {every}")


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
    | linear part of a motion router | 0: the prior ranks without noise until there is something to learn |
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
    if isinstance(model.encoder.router, MotionRouter):
        nn.init.zeros_(model.encoder.router.weight)
