"""Readers of ViViT, VideoMAE and ViT classifiers in the layout of Hugging Face transformers.

The published layout is read; the names that newer versions use inside the program are understood too. Where a key is
missing from config.json, the default of transformers holds.

Shapes: D model features, C = 3 channels, N tokens of a frame, F temporal indices.
"""

from typing import Any

import torch
from torch import Tensor

from mone.checkpoint import CheckpointError
from mone.interop.parts import Parts, class_and_positions, mlp_ratio
from mone.interop.pixels import IMAGENET_MEAN, IMAGENET_STD, Pixels, central_frame, embedding
from mone.interop.source import Source

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_RENAMES = (
    (r"\.layers\.(\d+)\.", r".encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
_VIDEOMAE_RENAMES = (
    *_RENAMES,
    (r"\.attention\.query\.bias$", ".attention.q_bias"),
    (r"\.attention\.value\.bias$", ".attention.v_bias"),
)
_MOST_PLACES = 2**20
_PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")


def read_vivit(source: Source) -> Parts:
    """VivitForVideoClassification: joint, read out at the class token (google/vivit-b-16x2-kinetics400).

    The default span is that of Kinetics training: every second frame at 25 frames a second.

    Raises:
        CheckpointError: What is damaged or cannot be expressed.
    """
    source.load(_RENAMES)
    tubelet = source.config.get("tubelet_size", [2, 16, 16])
    if not isinstance(tubelet, list) or len(tubelet) != 3 or any(type(n) is not int or n < 1 for n in tubelet):
        raise source.refuse_key("tubelet_size", tubelet, "three positive integers are needed")
    if tubelet[1] != tubelet[2]:
        raise source.refuse_key("tubelet_size", tubelet, "tubelets must be square")
    num_frames = source.integer("num_frames", 32)
    config = _sizes(source, "gelu_fast", 1e-6) | _frames(source, num_frames, tubelet[0], tubelet[1])
    config |= {"encoder": "joint", "pooling": "cls", "span_s": num_frames * 2 / 25}
    tensors, labels = _encoder(source, "vivit", config, "qkv_bias")
    # Without a file it is x / 127.5 - 1, which the published models were trained on. The processor's class would by
    # default normalise what is normalised already.
    pixels = _pixels(source, Pixels.normalised(0.0, 1.0, 1 / 127.5, 1.0), factor=1 / 127.5, offset=True)
    tensors |= embedding(*_kernel(source, "vivit", config, tubelet[0]), pixels)
    tensors |= _class_and_positions(source, "vivit", config, num_frames // tubelet[0])
    tensors |= _norm(source, "vivit.layernorm", "encoder.norm", config["dim"])
    return Parts(config, tensors, labels)


def read_videomae(source: Source) -> Parts:
    """VideoMAEForVideoClassification: joint, the mean of all tokens, fixed sine and cosine positions.

    The default span is that of Kinetics training: every fourth frame at 30 frames a second.

    Raises:
        CheckpointError: What is damaged or cannot be expressed.
    """
    source.load(_VIDEOMAE_RENAMES)
    if (pooled := source.config.get("use_mean_pooling", True)) is not True:
        raise source.refuse_key("use_mean_pooling", pooled, "only models that average their tokens are supported")
    num_frames, tubelet_frames = source.integer("num_frames", 16), source.integer("tubelet_size", 2)
    config = _sizes(source, "gelu", 1e-12) | _frames(source, num_frames, tubelet_frames, _square_patch(source))
    # fc_norm has torch's own epsilon, whatever the config says of the other norms.
    config |= {"encoder": "joint", "pooling": "mean", "pool_norm_eps": 1e-5, "span_s": num_frames * 4 / 30}
    tensors, labels = _encoder(source, "videomae", config, "qv_bias")
    pixels = _pixels(source, Pixels.normalised(IMAGENET_MEAN, IMAGENET_STD))
    tensors |= embedding(*_kernel(source, "videomae", config, tubelet_frames), pixels)
    num_places = num_frames // tubelet_frames * _num_tokens(config)
    if num_places > _MOST_PLACES:  # no tensor would tell
        raise source.refuse_key("num_frames", num_frames, f"{num_places:,} tokens in a clip are too many")
    tensors["encoder.position_ND"] = sinusoids(num_places, config["dim"])
    tensors["encoder.class_token_KD"] = torch.zeros(0, config["dim"])
    tensors |= _norm(source, "fc_norm", "encoder.norm", config["dim"])
    return Parts(config, tensors, labels)


def read_vit(source: Source, num_frames: int, tubelet_frames: int) -> Parts:
    """ViTForImageClassification, applied to the central frame of each tubelet.

    Raises:
        CheckpointError: What is damaged or cannot be expressed.
    """
    source.load(_RENAMES)
    config = _sizes(source, "gelu", 1e-12) | _frames(source, num_frames, tubelet_frames, _square_patch(source))
    config |= {"encoder": "factorised", "pooling": "cls", "span_s": 2.56}
    tensors, labels = _encoder(source, "vit", config, "qkv_bias")
    kernel_DCtpq, bias_D = _kernel(source, "vit", config, None)
    pixels = _pixels(source, Pixels.normalised(0.5, 0.5))
    tensors |= embedding(central_frame(kernel_DCtpq, tubelet_frames), bias_D, pixels)
    tensors |= _class_and_positions(source, "vit", config, 1)
    tensors |= _norm(source, "vit.layernorm", "encoder.norm", config["dim"])
    return Parts(config, tensors, labels)


def sinusoids(num_places: int, dim: int) -> Tensor:
    """VideoMAE's table [num_places, D]: sine on even, cosine on odd features i of place / 10000^(2 (i // 2) / D)."""
    feature_D = torch.arange(dim, dtype=torch.float64)
    angle_ND = torch.arange(num_places, dtype=torch.float64).unsqueeze(1) / 10000 ** (2 * (feature_D // 2) / dim)
    return torch.where(feature_D % 2 == 0, angle_ND.sin(), angle_ND.cos()).float()


def _sizes(source: Source, activation: str, norm_eps: float) -> dict[str, Any]:
    """What all three say of their blocks; activation and norm_eps are the family's defaults."""
    hidden_act = str(source.config.get("hidden_act", activation))
    if hidden_act not in _ACTIVATIONS:
        raise source.refuse_key("hidden_act", hidden_act, f"must be one of {', '.join(_ACTIVATIONS)}")
    dim = source.integer("hidden_size", 768)
    return {
        "dim": dim,
        "num_heads": source.integer("num_attention_heads", 12),
        "depth": source.integer("num_hidden_layers", 12),
        "temporal_depth": 0,
        "mlp_ratio": mlp_ratio(source, "intermediate_size", source.integer("intermediate_size", 3072), dim),
        "activation": _ACTIVATIONS[hidden_act],
        "norm_eps": source.number("layer_norm_eps", norm_eps),
    }


def _frames(source: Source, num_frames: int, tubelet_frames: int, tubelet_px: int) -> dict[str, Any]:
    if (channels := source.integer("num_channels", 3)) != 3:
        raise source.refuse_key("num_channels", channels, "frames have 3")
    height_px, width_px = source.pair("image_size", source.config.get("image_size", 224))
    return {
        "num_frames": num_frames,
        "height_px": height_px,
        "width_px": width_px,
        "tubelet_frames": tubelet_frames,
        "tubelet_px": tubelet_px,
    }


def _square_patch(source: Source) -> int:
    height_px, width_px = source.pair("patch_size", source.config.get("patch_size", 16))
    if height_px != width_px:
        raise source.refuse_key("patch_size", [height_px, width_px], "patches must be square")
    return height_px


def _num_tokens(config: dict[str, Any]) -> int:
    return config["height_px"] // config["tubelet_px"] * (config["width_px"] // config["tubelet_px"])


def _encoder(
    source: Source, prefix: str, config: dict[str, Any], bias_key: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Blocks and classifier, whose classes go into the config."""
    dim, hidden = config["dim"], config["mlp_ratio"] * config["dim"]
    has_bias = source.config.get(bias_key, True)
    biases = ["query.bias", "key.bias", "value.bias"] if bias_key == "qkv_bias" else ["q_bias", "", "v_bias"]
    tensors: dict[str, Tensor] = {}
    for index in range(config["depth"]):
        theirs, ours = f"{prefix}.encoder.layer.{index}", f"encoder.blocks.{index}"
        attention = f"{theirs}.attention.attention"
        tensors[f"{ours}.attention.qkv.weight"] = torch.cat(
            [source.take(f"{attention}.{name}.weight", dim, dim) for name in ("query", "key", "value")]
        )
        tensors[f"{ours}.attention.qkv.bias"] = torch.cat(
            [source.take(f"{attention}.{name}", dim) if has_bias and name else torch.zeros(dim) for name in biases]
        )
        tensors |= _linear(source, f"{theirs}.attention.output.dense", f"{ours}.attention.out", dim, dim)
        tensors |= _linear(source, f"{theirs}.intermediate.dense", f"{ours}.mlp.up", hidden, dim)
        tensors |= _linear(source, f"{theirs}.output.dense", f"{ours}.mlp.down", dim, hidden)
        tensors |= _norm(source, f"{theirs}.layernorm_before", f"{ours}.norm_attention", dim)
        tensors |= _norm(source, f"{theirs}.layernorm_after", f"{ours}.norm_mlp", dim)
    config["num_classes"] = source.outputs("classifier.weight", "the checkpoint is no classifier")
    tensors |= _linear(source, "classifier", "head", config["num_classes"], dim)
    return tensors, _labels(source, config["num_classes"])


def _linear(source: Source, theirs: str, ours: str, outputs: int, inputs: int) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": source.take(f"{theirs}.weight", outputs, inputs),
        f"{ours}.bias": source.take(f"{theirs}.bias", outputs),
    }


def _norm(source: Source, theirs: str, ours: str, dim: int) -> dict[str, Tensor]:
    return {f"{ours}.{part}": source.take(f"{theirs}.{part}", dim) for part in ("weight", "bias")}


def _kernel(source: Source, prefix: str, config: dict[str, Any], tubelet_frames: int | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution; it has no axis of time where tubelet_frames is None."""
    theirs, size = f"{prefix}.embeddings.patch_embeddings.projection", config["tubelet_px"]
    time = () if tubelet_frames is None else (tubelet_frames,)
    kernel = source.take(f"{theirs}.weight", config["dim"], 3, *time, size, size)
    return kernel, source.take(f"{theirs}.bias", config["dim"])


def _class_and_positions(source: Source, prefix: str, config: dict[str, Any], num_frames: int) -> dict[str, Tensor]:
    dim = config["dim"]
    places = num_frames * _num_tokens(config) + 1
    return class_and_positions(
        source.take(f"{prefix}.embeddings.cls_token", 1, 1, dim)[0, 0],
        source.take(f"{prefix}.embeddings.position_embeddings", 1, places, dim)[0],
    )


def _labels(source: Source, num_classes: int) -> tuple[str, ...]:
    names = source.config.get("id2label") or {str(index): f"LABEL_{index}" for index in range(num_classes)}
    wanted = {str(index) for index in range(num_classes)}
    if not isinstance(names, dict) or set(names) != wanted or not all(isinstance(n, str) for n in names.values()):
        raise CheckpointError(
            f"{source.folder}: id2label does not name the {num_classes} classes of tensor classifier.weight"
        )
    return tuple(names[str(index)] for index in range(num_classes))


def _pixels(source: Source, default: Pixels, *, factor: float = 1 / 255, offset: bool = False) -> Pixels:
    """What the preprocessor's file says, or the default where there is none.

    Args:
        source: The folder.
        default: Without a file.
        factor: rescale_factor where the file does not say.
        offset: Whether 1 is taken off after scaling where the file does not say.
    """
    for name in _PREPROCESSORS:
        if (source.folder / name).exists():
            settings = source.json(name)
            break
    else:
        return default
    scaled, normalised = settings.get("do_rescale", True), settings.get("do_normalize", True)
    try:
        return Pixels.normalised(
            settings.get("image_mean", 0.5) if normalised else 0.0,
            settings.get("image_std", 0.5) if normalised else 1.0,
            settings.get("rescale_factor", factor) if scaled else 1.0,
            1.0 if scaled and settings.get("offset", offset) else 0.0,
        )
    except ValueError as error:
        raise CheckpointError(f"{source.folder / name}: {error}") from error
