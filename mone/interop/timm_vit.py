"""Reader of timm's vision transformers, as timm saves them for the hub.

timm's config.json names a function and the arguments that differ from its own; what these leave open is read off the
tensors. Only architectures are accepted of which it is known that the tensors tell the rest: a parallel or post-norm
block can have the same names.

Shapes: D model features, N tokens of a frame.
"""

import re
from typing import Any

import torch
from torch import Tensor

from mone.checkpoint import CheckpointError
from mone.interop.parts import Parts, class_and_positions, mlp_ratio
from mone.interop.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels, central_frame, embedding
from mone.interop.source import Source

# Width and heads by size; tensors do not tell the heads.
_SIZES = {
    "tiny": (192, 3),
    "small": (384, 6),
    "medium": (512, 8),
    "base": (768, 12),
    "base_plus": (896, 14),
    "large": (1024, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
}
_ARCHITECTURE = re.compile(
    r"(?:vit|deit3?)_(tiny|small|medium|base|large|huge|giant|gigantic)_patch\d+(_plus)?_"
    r"(?:\d+|224_miil|36x1_224|(?<!giant_patch14_)dinov2)"
)
_REFUSED_TENSORS = {
    r"^reg_token": "register tokens",
    r"^dist_token|^head_dist\.": "a distillation token",
    r"^norm_pre\.|^patch_embed\.norm\.": "a norm before the blocks",
    r"^patch_embed\.backbone\.": "a convolutional stem",
    r"^attn_pool\.": "attention pooling",
    r"\.[qk]_norm\.": "normalised queries and keys",
    r"\.attn\.norm\.|\.mlp\.norm\.": "a norm inside a branch",
    r"\brope\b|rel_pos": "relative or rotary positions",
    r"\.mlp\.(fc1_g|fc1_x|w12|w1|w2|w3)\.": "a gated MLP",
}
# Arguments that the tensors show or that matter in training only; those that are read stand in the code.
_HARMLESS_ARGUMENTS = {
    *("patch_size", "embed_dim", "depth", "mlp_ratio", "init_values", "num_classes", "in_chans", "reg_tokens"),
    *("class_token", "no_embed_class", "pre_norm", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "fc_norm"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    *("weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad"),
}
_READ_ARGUMENTS = {"img_size", "num_heads", "global_pool", "act_layer", "qkv_bias"}
_ACTIVATIONS = {"None": "gelu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}


def read_timm(source: Source, num_frames: int, tubelet_frames: int) -> Parts:
    """A timm classifier, applied to the central frame of each tubelet.

    LayerScale becomes part of the projections that it scales.

    Raises:
        CheckpointError: What is damaged or cannot be expressed.
    """
    arguments, pretrained = _arguments(source), _object(source, "pretrained_cfg")
    source.load()
    source.refuse_tensors(_REFUSED_TENSORS)
    dim, tubelet_px = _patch_sizes(source)
    num_heads = _num_heads(source, arguments, dim)
    num_classes = source.outputs("head.weight", "the checkpoint is no classifier")
    hidden = source.outputs("blocks.0.mlp.fc1.weight")
    numbers = [int(match[1]) for name in source.names if (match := re.match(r"blocks\.(\d+)\.", name))]
    height_px, width_px = _image_size(source, arguments, pretrained)
    pooling, tensors = _pooling(source, arguments, dim, height_px // tubelet_px * (width_px // tubelet_px))
    config = {
        "num_classes": num_classes,
        "num_frames": num_frames,
        "height_px": height_px,
        "width_px": width_px,
        "tubelet_frames": tubelet_frames,
        "tubelet_px": tubelet_px,
        "dim": dim,
        "num_heads": num_heads,
        "encoder": "factorised",
        "depth": 1 + max(numbers),
        "temporal_depth": 0,
        "mlp_ratio": mlp_ratio(source, "tensor blocks.0.mlp.fc1.weight", hidden, dim),
        "pooling": pooling,
        "activation": _ACTIVATIONS[str(arguments.get("act_layer"))],
        "norm_eps": 1e-6,
        "span_s": 2.56,
    }
    has_bias = arguments.get("qkv_bias", not str(source.config["architecture"]).endswith("_miil"))
    scaled = "blocks.0.ls1.gamma" in source.names
    for index in range(config["depth"]):
        tensors |= _block(source, f"blocks.{index}", f"encoder.blocks.{index}", (dim, hidden), has_bias, scaled)
    kernel_DCpq = source.take("patch_embed.proj.weight", dim, 3, tubelet_px, tubelet_px)
    bias_D = source.take("patch_embed.proj.bias", dim)
    tensors |= embedding(central_frame(kernel_DCpq, tubelet_frames), bias_D, _pixels(source, pretrained))
    tensors |= {
        "head.weight": source.take("head.weight", num_classes, dim),
        "head.bias": source.take("head.bias", num_classes),
    }
    return Parts(config, tensors, _labels(source, pretrained, num_classes))


def _arguments(source: Source) -> dict[str, Any]:
    """What differs from the architecture's own arguments, of which all are known here."""
    arguments = _object(source, "model_args")
    for name in arguments:
        if name not in _HARMLESS_ARGUMENTS | _READ_ARGUMENTS:
            raise source.refuse_key(f"model_args.{name}", arguments[name], "not known how to express it")
    if (activation := arguments.get("act_layer")) is not None and str(activation) not in _ACTIVATIONS:
        raise source.refuse_key("model_args.act_layer", activation, "must be gelu or gelu_tanh")
    return arguments


def _object(source: Source, key: str) -> dict[str, Any]:
    value = source.config.get(key) or {}
    if not isinstance(value, dict):
        raise source.refuse_key(key, value, "an object is needed")
    return value


def _patch_sizes(source: Source) -> tuple[int, int]:
    """Width D and side of a patch in pixels."""
    shape = source.shape("patch_embed.proj.weight")
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise CheckpointError(
            f"{source.folder}: tensor patch_embed.proj.weight has shape {list(shape)}, square patches of 3 channels are"
            " needed"
        )
    return shape[0], shape[2]


def _image_size(source: Source, arguments: dict[str, Any], pretrained: dict[str, Any]) -> tuple[int, int]:
    input_size = pretrained.get("input_size", [3, 224, 224])
    size = arguments.get("img_size") or (input_size[1:] if isinstance(input_size, list) else input_size)
    return source.pair("img_size", size)


def _pixels(source: Source, pretrained: dict[str, Any]) -> Pixels:
    mean_C, std_C = pretrained.get("mean", IMAGENET_MEAN), pretrained.get("std", IMAGENET_STD)
    try:
        return Pixels.normalised(mean_C, std_C)
    except ValueError as error:
        raise source.refuse_key("pretrained_cfg", {"mean": mean_C, "std": std_C}, str(error)) from None


def _num_heads(source: Source, arguments: dict[str, Any], dim: int) -> int:
    num_heads = arguments.get("num_heads")
    if num_heads is not None and (type(num_heads) is not int or num_heads < 1):
        raise source.refuse_key("model_args.num_heads", num_heads, "a positive integer is needed")
    architecture = str(source.config["architecture"])
    match = _ARCHITECTURE.fullmatch(architecture)
    if not match:
        raise source.refuse_key("architecture", architecture, "not known how to express it")
    wanted_dim, heads = _SIZES[match[1] + (match[2] or "")]
    if num_heads is None and dim != wanted_dim and "embed_dim" not in arguments:
        raise source.refuse_key("model_args.num_heads", None, f"needed, since the width is {dim}, not {wanted_dim}")
    return num_heads or heads


def _pooling(source: Source, arguments: dict[str, Any], dim: int, num_tokens: int) -> tuple[str, dict[str, Tensor]]:
    """How the answer is read out; class token, positions, and the norm of what is read.

    A norm of the class token alone is the same before and after it is picked; a mean is not the same.
    """
    pool = arguments.get("global_pool", source.config.get("global_pool", "token"))
    has_class_token = "cls_token" in source.names
    if pool not in ("token", "avg"):
        raise source.refuse_key("global_pool", pool, "must be token or avg")
    if pool == "avg" and has_class_token:
        raise CheckpointError(f"{source.folder}: tensor cls_token cannot be expressed: a class token beside averaging")
    norm = "fc_norm" if "fc_norm.weight" in source.names else "norm"
    if pool == "avg" and norm == "norm":
        raise CheckpointError(
            f"{source.folder}: tensor fc_norm.weight is missing: a norm before averaging cannot be expressed"
        )
    if pool == "token":
        class_token_D = source.take("cls_token", 1, 1, dim)[0, 0]
        if source.shape("pos_embed") == (1, num_tokens, dim):  # no_embed_class
            position_ND = source.take("pos_embed", 1, num_tokens, dim)[0]
            tensors = {"encoder.class_token_KD": class_token_D.unsqueeze(0), "encoder.position_ND": position_ND}
        else:
            tensors = class_and_positions(class_token_D, source.take("pos_embed", 1, num_tokens + 1, dim)[0])
    else:
        tensors = {
            "encoder.class_token_KD": torch.zeros(0, dim),
            "encoder.position_ND": source.take("pos_embed", 1, num_tokens, dim)[0],
        }
    tensors |= {f"encoder.norm.{part}": source.take(f"{norm}.{part}", dim) for part in ("weight", "bias")}
    return "cls" if pool == "token" else "mean", tensors


def _block(
    source: Source, theirs: str, ours: str, sizes: tuple[int, int], has_bias: bool, scaled: bool
) -> dict[str, Tensor]:
    dim, hidden = sizes
    tensors = {
        f"{ours}.attention.qkv.weight": source.take(f"{theirs}.attn.qkv.weight", 3 * dim, dim),
        f"{ours}.attention.qkv.bias": (
            source.take(f"{theirs}.attn.qkv.bias", 3 * dim) if has_bias else torch.zeros(3 * dim)
        ),
        f"{ours}.mlp.up.weight": source.take(f"{theirs}.mlp.fc1.weight", hidden, dim),
        f"{ours}.mlp.up.bias": source.take(f"{theirs}.mlp.fc1.bias", hidden),
    }
    for projection, name, scale, inputs in (
        ("attn.proj", "attention.out", "ls1", dim),
        ("mlp.fc2", "mlp.down", "ls2", hidden),
    ):
        gamma_D = source.take(f"{theirs}.{scale}.gamma", dim) if scaled else torch.ones(dim)
        weight_DX = source.take(f"{theirs}.{projection}.weight", dim, inputs)
        tensors[f"{ours}.{name}.weight"] = weight_DX * gamma_D.unsqueeze(1)
        tensors[f"{ours}.{name}.bias"] = source.take(f"{theirs}.{projection}.bias", dim) * gamma_D
    for norm, name in (("norm1", "norm_attention"), ("norm2", "norm_mlp")):
        for part in ("weight", "bias"):
            tensors[f"{ours}.{name}.{part}"] = source.take(f"{theirs}.{norm}.{part}", dim)
    return tensors


def _labels(source: Source, pretrained: dict[str, Any], num_classes: int) -> tuple[str, ...]:
    """Names that the config gives, with their descriptions; most published ones give none: class 0, class 1, ..."""
    names = source.config.get("label_names") or pretrained.get("label_names")
    names = names or [f"class {index}" for index in range(num_classes)]
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source.folder}: label_names does not name the {num_classes} classes of head.weight")
    described = source.config.get("label_descriptions") or pretrained.get("label_descriptions")
    described = described if isinstance(described, dict) else {}
    return tuple(str(described.get(name, name)) for name in names)
