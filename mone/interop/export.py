"""A joint model of ours as a ViViT that Hugging Face transformers loads.

Shapes: D model features, N tokens of the clip.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save as dump_tensors
from torch import Tensor

from mone.config import ModelConfig
from mone.model import ViViT


def export_vivit(model: ViViT, labels: Sequence[str], folder: Path | str) -> Path:
    """Write config.json, model.safetensors and preprocessor_config.json for VivitForVideoClassification.

    It answers as ours does at capacity 1; router and experts stay behind.

    Args:
        model: Joint, read out at its class token, without a gain on its MLPs.
        labels: Name of each class.
        folder: Made where it does not exist.

    Raises:
        ValueError: What ViViT in transformers cannot express, with the value; or another number of labels than classes.
    """
    _check(model)
    if len(labels) != model.config.num_classes:
        raise ValueError(f"{len(labels)} labels for {model.config.num_classes} classes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in _tensors(model).items()}
    (folder / "model.safetensors").write_bytes(dump_tensors(weights, metadata={"format": "pt"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(model.config), indent=1))
    (folder / "config.json").write_text(json.dumps(_config(model.config, labels), indent=1))
    return folder


def _check(model: ViViT) -> None:
    config = model.config
    wanted = {"encoder": "joint", "pooling": "cls", "pixels": "scaled"}
    for name, value in wanted.items():
        if (actual := getattr(config, name)) != value:
            raise ValueError(f"{name} is {actual!r}, the ViViT of transformers can only be {value!r}")
    if config.pool_norm_eps and config.pool_norm_eps != config.norm_eps:
        raise ValueError(f"pool_norm_eps is {config.pool_norm_eps:g}, it must be norm_eps {config.norm_eps:g}")
    for index, alpha in enumerate(model.encoder.bounded_alphas().tolist()):
        if alpha > 0:
            raise ValueError(
                f"alpha of block {index} is {alpha:.3g}: its gain depends on the input; only models with alpha 0 export"
            )


def _tensors(model: ViViT) -> dict[str, Tensor]:
    config, ours = model.config, model.state_dict()
    kernel = rearrange(
        ours["embed.weight"],
        "d (t p q c) -> d c t p q",
        t=config.tubelet_frames,
        p=config.tubelet_px,
        q=config.tubelet_px,
    )
    position_ND, class_token_KD = ours["encoder.position_ND"], ours["encoder.class_token_KD"]
    tensors = {
        "vivit.embeddings.patch_embeddings.projection.weight": kernel,
        "vivit.embeddings.patch_embeddings.projection.bias": ours["embed.bias"],
        "vivit.embeddings.cls_token": class_token_KD.unsqueeze(0),
        # Our class token holds its position.
        "vivit.embeddings.position_embeddings": torch.cat([torch.zeros_like(class_token_KD), position_ND]).unsqueeze(0),
    }
    for part in ("weight", "bias"):
        tensors[f"vivit.layernorm.{part}"] = ours[f"encoder.norm.{part}"]
        tensors[f"classifier.{part}"] = ours[f"head.{part}"]
        for index in range(config.depth):
            block, theirs = f"encoder.blocks.{index}", f"vivit.encoder.layer.{index}"
            query_key_value = ours[f"{block}.attention.qkv.{part}"].chunk(3)
            for name, tensor in zip(("query", "key", "value"), query_key_value, strict=True):
                tensors[f"{theirs}.attention.attention.{name}.{part}"] = tensor
            tensors[f"{theirs}.attention.output.dense.{part}"] = ours[f"{block}.attention.out.{part}"]
            tensors[f"{theirs}.intermediate.dense.{part}"] = ours[f"{block}.mlp.up.{part}"]
            tensors[f"{theirs}.output.dense.{part}"] = ours[f"{block}.mlp.down.{part}"]
            tensors[f"{theirs}.layernorm_before.{part}"] = ours[f"{block}.norm_attention.{part}"]
            tensors[f"{theirs}.layernorm_after.{part}"] = ours[f"{block}.norm_mlp.{part}"]
    return tensors


def _config(config: ModelConfig, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "architectures": ["VivitForVideoClassification"],
        "model_type": "vivit",
        "image_size": _image_size(config),
        "num_frames": config.num_frames,
        "tubelet_size": [config.tubelet_frames, config.tubelet_px, config.tubelet_px],
        "num_channels": 3,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_ratio * config.dim,
        "hidden_act": "gelu_fast" if config.activation == "gelu_tanh" else "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": True,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def _image_size(config: ModelConfig) -> int | list[int]:
    return config.height_px if config.height_px == config.width_px else [config.height_px, config.width_px]


def _preprocessor(config: ModelConfig) -> dict[str, Any]:
    """X / 127.5 - 1; square frames are scaled by their short side and cropped, as here, others are stretched."""
    square = config.height_px == config.width_px
    frame = {"height": config.height_px, "width": config.width_px}
    return {
        "image_processor_type": "VivitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.height_px} if square else frame,
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": frame,
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "offset": True,
        "do_normalize": False,
    }
