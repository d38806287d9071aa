"""Public checkpoints with random weights, from the libraries that publish them, each with its own way to an answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    VivitConfig,
    VivitForVideoClassification,
)

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
LABELS = {0: "walk", 1: "größer", 2: "sit", 3: "walk"}
IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Public(NamedTuple):
    """A checkpoint folder, and what its own library answers to uint8 clips [B, T, H, W, 3] (images: [B, H, W, 3])."""

    folder: Path
    logits: Callable[[Tensor], Tensor]


def vivit(folder: Path, *, max_shard_size: str = "1GB", **changes: Any) -> Public:
    sizes = {"image_size": 24, "num_frames": 4, "tubelet_size": [2, 8, 8], "id2label": LABELS}
    model = randomise(VivitForVideoClassification(VivitConfig(**SIZES | sizes | changes)))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return Public(folder, lambda clips: model(clips.movedim(-1, 2) / 127.5 - 1).logits)


def videomae(folder: Path, **changes: Any) -> Public:
    sizes = {"image_size": 24, "num_frames": 4, "patch_size": 8, "id2label": LABELS}
    model = randomise(VideoMAEForVideoClassification(VideoMAEConfig(**SIZES | sizes | changes)))
    model.save_pretrained(folder)
    return Public(folder, lambda clips: model(((clips / 255 - IMAGENET_MEAN) / IMAGENET_STD).movedim(-1, 2)).logits)


def vit(folder: Path, **changes: Any) -> Public:
    sizes = {"image_size": 24, "patch_size": 8, "id2label": LABELS}
    model = randomise(ViTForImageClassification(ViTConfig(**SIZES | sizes | changes)))
    model.save_pretrained(folder)
    return Public(folder, lambda images: model((images / 255 - 0.5).movedim(-1, 1) / 0.5).logits)


def timm_vit(folder: Path, architecture: str = "vit_tiny_patch16_224", **changes: Any) -> Public:
    sizes = {"embed_dim": 48, "num_heads": 3, "depth": 2, "img_size": 32, "num_classes": 4}
    model = randomise(timm.create_model(architecture, **sizes | changes))
    save_for_hf(model, str(folder), safe_serialization=True)
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    return Public(folder, lambda images: model(((images / 255 - mean) / std).movedim(-1, 1)))


def randomise(model: nn.Module) -> Any:
    """No parameter at a special value, all of a size that keeps activations of order 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and "weight" in name else 10
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if "gamma" in name else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + offset)
    return model.eval()
