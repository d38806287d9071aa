"""The patch embedding of a public checkpoint, made to read our pixels.

Shapes: D model features, C = 3 channels, t x p x q frames, rows and columns of a tubelet, P = t p q C values.
"""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pixels(NamedTuple):
    """How a checkpoint wants channel c of a uint8 pixel x: scale_C[c] x + shift_C[c]."""

    scale_C: tuple[float, ...]
    shift_C: tuple[float, ...]

    @classmethod
    def normalised(cls, mean_C: Any, std_C: Any, factor: float = 1 / 255, offset: float = 0.0) -> "Pixels":
        """(factor x - offset - mean) / std, each of three channels or one number for all.

        Raises:
            ValueError: Other than three numbers, or a std that is not positive.
        """
        mean_C, std_C = (tuple(value) if isinstance(value, list | tuple) else (value,) * 3 for value in (mean_C, std_C))
        numbers = [factor, offset, *mean_C, *std_C]
        are_numbers = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
        if len(mean_C) != 3 or len(std_C) != 3 or not are_numbers:
            raise ValueError(f"three numbers are needed for mean and std, got {mean_C} and {std_C}")
        if min(std_C) <= 0:
            raise ValueError(f"std must be positive, got {std_C}")
        return cls(
            tuple(factor / std for std in std_C),
            tuple((-offset - mean) / std for mean, std in zip(mean_C, std_C, strict=True)),
        )


def embedding(kernel_DCtpq: Tensor, bias_D: Tensor, pixels: Pixels) -> dict[str, Tensor]:
    """Weight [D, P] and bias [D] of our embedding, from a convolution whose stride is its kernel.

    Ours reads x / 127.5 - 1; what a checkpoint wants beyond that goes into weight and bias, in float64.
    """
    scale_C, shift_C = (torch.tensor(values, dtype=torch.float64) for values in pixels)
    kernel_DCtpq = kernel_DCtpq.double()
    bias_D = bias_D.double() + torch.einsum("dctpq,c->d", kernel_DCtpq, shift_C + 127.5 * scale_C)
    kernel_DCtpq = kernel_DCtpq * (127.5 * scale_C).view(-1, 1, 1, 1)
    return {
        "embed.weight": rearrange(kernel_DCtpq, "d c t p q -> d (t p q c)").float(),
        "embed.bias": bias_D.float(),
    }


def central_frame(kernel_DCpq: Tensor, tubelet_frames: int) -> Tensor:
    """A tubelet's kernel [D, C, t, p, q] from an image's: at the central frame, zero elsewhere (ViViT section 3.4).

    The centre is frame t // 2: of an even number, the later of the two in the middle, as ViViT's own code has it.
    """
    kernel_DCtpq = kernel_DCpq.new_zeros(*kernel_DCpq.shape[:2], tubelet_frames, *kernel_DCpq.shape[2:])
    kernel_DCtpq[:, :, tubelet_frames // 2] = kernel_DCpq
    return kernel_DCtpq
