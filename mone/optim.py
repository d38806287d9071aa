"""Optimisers and their schedule: AdamW and SGD, decay on matrices only, layer-wise learning rates."""

import math
import re
from typing import Any

import torch

from mone.model import ViViT
from mone.stages import TrainConfig


def make_optimizer(model: ViViT, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of a run; each group's "lr_scale" is its share of the step's learning rate."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    # On a GPU a step of all parameters is a few kernels, which read and write each number once.
    fused = all(parameter.is_cuda for parameter in model.parameters()) or None
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused)


def parameter_groups(model: ViViT, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameters by weight decay and learning-rate scale.

    Decay acts on the weights of linear layers; biases, norms, embeddings and alpha are left alone. Layer-wise decay
    (BEiT, Bao et al., 2022) scales a layer's rate by layer_decay once for each layer above it; the temporal encoder
    counts as further layers, embeddings as layer 0.
    """
    depth, temporal_depth = model.config.depth, model.config.temporal_depth
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if name.endswith("weight") and parameter.dim() == 2 else 0.0
        above = depth + temporal_depth + 1 - _layer(name, depth, temporal_depth)
        key = (decay, layer_decay**above)
        groups.setdefault(key, {"params": [], "weight_decay": key[0], "lr_scale": key[1]})["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, depth: int, temporal_depth: int) -> int:
    if match := re.match(r"(encoder|temporal)\.blocks\.(\d+)\.", name):
        return int(match[2]) + 1 + (depth if match[1] == "temporal" else 0)
    if name.startswith("encoder.norm"):
        return depth
    return depth + temporal_depth + 1 if name.startswith(("head", "temporal.norm")) else 0


def schedule(done_share: float, warmup_share: float) -> float:
    """Linear warm-up, then half a cosine down to zero; a factor in [0, 1]."""
    if done_share < warmup_share or warmup_share >= 1:
        return (done_share + 1e-3) / (warmup_share + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done_share - warmup_share) / (1 - warmup_share)))
