"""RandAugment (Cubuk et al., 2020) on clips: operations drawn by the caller, the same for all frames of a clip.

The list and the ranges are torchvision's, which are the paper's. Two things differ, for video: what depends on an
image's statistics (contrast, autocontrast, equalize) takes the clip's instead of each frame's, so that nothing flickers
that did not; and shear is about the middle of the frame, bilinear, with grey coming in.

Shapes: T frames, C = 3 channels, H x W pixels, O operations.
"""

import math
from collections.abc import Callable

import numpy as np
from einops import rearrange
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

MAX_MAGNITUDE = 30


def rand_augment(frames_THWC: Tensor, choices_O: np.ndarray, signs_O: np.ndarray, magnitude: float) -> Tensor:
    """One clip through operations, one after the other.

    Args:
        frames_THWC: uint8 [T, H, W, 3].
        choices_O: Numbers in [0, 1) that choose from `OPERATIONS`, with replacement.
        signs_O: Numbers in [0, 1); below a half turns an operation that has a direction around.
        magnitude: 0 to MAX_MAGNITUDE.
    """
    video_TCHW = rearrange(frames_THWC, "t h w c -> t c h w").contiguous()
    for choice, sign in zip(choices_O, signs_O, strict=True):
        operation = list(OPERATIONS.values())[int(choice * len(OPERATIONS))]
        video_TCHW = operation(video_TCHW, math.copysign(magnitude / MAX_MAGNITUDE, sign - 0.5))
    return rearrange(video_TCHW, "t c h w -> t h w c")


def _warp(
    video_TCHW: Tensor,
    *,
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """Rotation in degrees, shift in shares of width and height, shear as tangents, about the middle of the frame."""
    height, width = video_TCHW.shape[-2:]
    return TF.affine(
        video_TCHW,
        angle=angle,
        translate=[int(shift[0] * width), int(shift[1] * height)],
        scale=1.0,
        shear=[math.degrees(math.atan(tangent)) for tangent in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=[128.0, 128.0, 128.0],
    )


def _as_one_picture(operation: Callable[[Tensor], Tensor], video_TCHW: Tensor) -> Tensor:
    """An operation on pixels by the statistics of the clip: its frames lie below each other."""
    tall_CHW = operation(rearrange(video_TCHW, "t c h w -> c (t h) w"))
    return rearrange(tall_CHW, "c (t h) w -> t c h w", t=len(video_TCHW))


# On uint8 [T, 3, H, W] at a signed strength in [-1, 1]; those without a direction take its size.
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda video, strength: video,
    "shear_x": lambda video, strength: _warp(video, shear=(0.3 * strength, 0.0)),
    "shear_y": lambda video, strength: _warp(video, shear=(0.0, 0.3 * strength)),
    "translate_x": lambda video, strength: _warp(video, shift=(150 / 331 * strength, 0.0)),
    "translate_y": lambda video, strength: _warp(video, shift=(0.0, 150 / 331 * strength)),
    "rotate": lambda video, strength: _warp(video, angle=30 * strength),
    "brightness": lambda video, strength: TF.adjust_brightness(video, 1 + 0.9 * strength),
    "saturation": lambda video, strength: TF.adjust_saturation(video, 1 + 0.9 * strength),
    "contrast": lambda video, strength: _as_one_picture(
        lambda tall: TF.adjust_contrast(tall, 1 + 0.9 * strength), video
    ),
    "sharpness": lambda video, strength: TF.adjust_sharpness(video, 1 + 0.9 * strength),
    "posterize": lambda video, strength: TF.posterize(video, 8 - round(4 * abs(strength))),
    "solarize": lambda video, strength: TF.solarize(video, 255 * (1 - abs(strength))),
    "autocontrast": lambda video, strength: _as_one_picture(TF.autocontrast, video),
    "equalize": lambda video, strength: _as_one_picture(TF.equalize, video),
}
