"""A training run as a value: its stages, optimiser and augmentation."""

from dataclasses import dataclass
from typing import Literal

import torch

from mone.augment import AugmentConfig
from mone.config import ModelConfig

# What adaptive training draws from (MoNE section 4.3, "one model for many budgets").
ADAPTIVE_CAPACITIES = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Epochs with one way of choosing each step's experts, under one warm-up and cosine.

    Attributes:
        name: For the log.
        epochs: Passes over the clips.
        routing: "dense": full width. "nested": all tokens through one expert, drawn per step ("MatViT" pre-training,
            MoNE section 4.2). "mone": Expert Preferred Routing at a capacity drawn per step.
        capacities: What "mone" draws from; one value trains at a fixed capacity.
        learning_rate: Peak.
    """

    name: str
    epochs: int
    routing: Literal["dense", "nested", "mone"]
    capacities: tuple[float, ...] = ADAPTIVE_CAPACITIES
    learning_rate: float = 1e-3

    def draw_counts(self, model: ModelConfig, generator: torch.Generator) -> tuple[int, ...]:
        """Tokens of each expert for one step."""
        choices = self.all_counts(model)
        return choices[int(torch.randint(len(choices), (), generator=generator)) if len(choices) > 1 else 0]

    def all_counts(self, model: ModelConfig) -> list[tuple[int, ...]]:
        """What `draw_counts` draws from, each equally likely."""
        if self.routing == "mone":
            return [model.token_counts(capacity) for capacity in self.capacities]
        # ToMe has no narrow experts: merging nothing is all that it can do here.
        dense = self.routing == "dense" or model.allocation == "tome"
        experts = range(model.num_experts - 1 if dense else 0, model.num_experts)
        num_tokens = model.tokens_per_budget()
        return [tuple(num_tokens * (index == expert) for index in range(model.num_experts)) for expert in experts]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train; the model's sizes are a `ModelConfig`.

    Attributes:
        stages: In order; each begins with the weights of the one before.
        batch_size: Clips of a step, over all workers together.
        micro_batch: Clips of a forward pass on one worker at most; 0: all at once. More are accumulated.
        optimizer: "adamw", or "sgd" as in the ViViT paper.
        betas: AdamW's.
        momentum: SGD's.
        weight_decay: On matrices only.
        layer_decay: Factor of the learning rate from one layer to the one below it.
        warmup_share: Share of a stage's steps in which the learning rate rises.
        label_smoothing: Of the cross-entropy.
        max_grad_norm: Gradients are scaled down to it.
        ema_decay: Decay per step of the weight average that is evaluated and saved.
        augment: On the device, drawn per sample and epoch.
        frame_margin: Frames are decoded larger than the model's by this factor, for crops to move in.
        num_spare_frames: And longer by so many frames, for the start to move in.
        bf16: Autocast to bfloat16 on a GPU (weights stay float32).
        seed: Of initial weights, order, draws.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 64
    micro_batch: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.9
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup_share: float = 0.05
    label_smoothing: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    augment: AugmentConfig = AugmentConfig()  # noqa: RUF009 - frozen
    frame_margin: float = 1.0
    num_spare_frames: int = 0
    bf16: bool = False
    seed: int = 0

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def only_capacity(self) -> float | None:
        """The one that "mone" stages train at; None where they draw from many, or there is no such stage."""
        drawn = {capacity for stage in self.stages if stage.routing == "mone" for capacity in stage.capacities}
        return drawn.pop() if len(drawn) == 1 else None
