"""Weights of one model for another: other frame sizes and counts, and a start for fine-tuning.

Shapes: D model features, F temporal indices, N tokens per index, h x w rows and columns of tokens.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mone.checkpoint import Checkpoint
from mone.config import ModelConfig
from mone.model import ViViT

_SPATIAL, _TEMPORAL = "encoder.position_ND", "temporal.position_FD"
# Weights mean something else where one of these differs.
_MUST_AGREE = (
    *("encoder", "dim", "depth", "num_heads", "mlp_ratio", "num_experts", "tubelet_frames", "tubelet_px"),
    *("activation", "pooling", "pixels"),
)


def resize(
    source: ViViT | Checkpoint,
    *,
    num_frames: int | None = None,
    height_px: int | None = None,
    width_px: int | None = None,
) -> ViViT:
    """The same model for clips of another size: position embeddings are interpolated, all else is copied.

    With the size that it has, the weights are bit-identical. span_s stays: more frames look at the same seconds.

    Args:
        source: A model, or one on disk.
        num_frames: Frames T of a clip; None: as they are.
        height_px: Height of a frame; None: as it is.
        width_px: Width of a frame; None: as it is.

    Returns:
        A new model in evaluation mode.

    Raises:
        ValueError: A size that the tubelets do not divide.
    """
    model = source.build() if isinstance(source, Checkpoint) else source
    changes = {"num_frames": num_frames, "height_px": height_px, "width_px": width_px}
    config = dataclasses.replace(model.config, **{name: size for name, size in changes.items() if size is not None})
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    _fit_positions(tensors, model.config, config)
    with torch.device("meta"):
        resized = ViViT(config)
    resized.load_state_dict(tensors, assign=True)
    return resized.eval()


def initialise_from(model: ViViT, source: ViViT | Checkpoint, *, labels: Sequence[str] | None = None) -> list[str]:
    """Start a model with the weights of another, position embeddings interpolated to its size.

    The head is taken where the classes are the same (by name where both are known, else by number), the temporal
    encoder where both have the same depth.

    Args:
        model: Its weights are overwritten.
        source: A model, or one on disk.
        labels: Names of the model's classes.

    Returns:
        One line for each part that stays as it was.

    Raises:
        ValueError: Sizes that differ such that the weights would be wrong; named with both values.
    """
    source_labels = source.labels if isinstance(source, Checkpoint) else None
    source = source.build() if isinstance(source, Checkpoint) else source
    ours, theirs = model.config, source.config
    for name in _MUST_AGREE:
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(f"{name} is {getattr(ours, name)!r}, that of the source {getattr(theirs, name)!r}")
    tensors = dict(source.state_dict())
    stays_new = _leave_out(tensors, ours, theirs, _other_classes(ours, theirs, labels, source_labels))
    _fit_positions(tensors, theirs, ours)
    known = model.state_dict()
    model.load_state_dict(known | {name: tensor for name, tensor in tensors.items() if name in known})
    stays_new += [
        f"{name}: the source has none" for name in known if name.startswith("encoder") and name not in tensors
    ]
    return stays_new


def _other_classes(
    ours: ModelConfig, theirs: ModelConfig, labels: Sequence[str] | None, source_labels: Sequence[str] | None
) -> str:
    """In what the classes differ; "" where they are the same."""
    if ours.num_classes != theirs.num_classes:
        return f"{ours.num_classes} classes, the source has {theirs.num_classes}"
    if labels is None or source_labels is None:
        return ""
    pairs = zip(labels, source_labels, strict=True)
    return next((f"class {i} is {a!r}, that of the source {b!r}" for i, (a, b) in enumerate(pairs) if a != b), "")


def _leave_out(tensors: dict[str, Tensor], ours: ModelConfig, theirs: ModelConfig, other_classes: str) -> list[str]:
    """Take out what does not fit the model; returns why."""
    reasons = {}
    if other_classes:
        reasons["head"] = other_classes
    if ours.temporal_depth != theirs.temporal_depth:
        reasons["temporal"] = f"{ours.temporal_depth} blocks, the source has {theirs.temporal_depth}"
    for name in [name for name in tensors if name.split(".")[0] in reasons]:
        del tensors[name]
    return [f"{part}: {reason}" for part, reason in reasons.items() if part == "head" or ours.temporal_depth]


def _fit_positions(tensors: dict[str, Tensor], old: ModelConfig, new: ModelConfig) -> None:
    """Interpolate what there is of position embeddings, in place of the dictionary's."""
    old_frames, new_frames = (config.num_indices if config.joint else 1 for config in (old, new))
    tensors[_SPATIAL] = interpolate_positions(tensors[_SPATIAL], (old_frames, *old.grid), (new_frames, *new.grid))
    if _TEMPORAL in tensors:
        tensors[_TEMPORAL] = interpolate_positions(tensors[_TEMPORAL], (old.num_indices, 1, 1), (new.num_indices, 1, 1))


def interpolate_positions(position_ND: Tensor, old: tuple[int, int, int], new: tuple[int, int, int]) -> Tensor:
    """Position embeddings of another grid: bicubic over rows and columns, linear over time, one after the other.

    Bicubic with antialiasing, which shrinking needs; enlarging it changes only the kernel (a = -0.5 for -0.75), which
    then keeps linear ramps linear. Borders stay borders: token centres are scaled with the frame.

    Args:
        position_ND: [F h w, D] in this order.
        old: F, h and w of the embeddings.
        new: F, h and w that are wanted.

    Returns:
        [F h w, D] of the new grid; the very tensor where the grids are equal.
    """
    if old == new:
        return position_ND
    position_FhwD = position_ND.float().unflatten(0, old)
    if old[1:] != new[1:]:
        position_FDhw = position_FhwD.permute(0, 3, 1, 2)
        position_FDhw = F.interpolate(position_FDhw, new[1:], mode="bicubic", align_corners=False, antialias=True)
        position_FhwD = position_FDhw.permute(0, 2, 3, 1)
    if old[0] != new[0]:
        position_hwDF = position_FhwD.flatten(1, 2).permute(1, 2, 0)
        position_hwDF = F.interpolate(position_hwDF, new[0], mode="linear", align_corners=False)
        position_FhwD = position_hwDF.permute(2, 0, 1).unflatten(1, new[1:])
    return position_FhwD.flatten(0, 2).to(position_ND.dtype).contiguous()
