"""Decoded frames that lie on a GPU, scaled and turned into RGB there as FFmpeg's scaler does on a CPU.

Scaling is two matrix products, for the rows and for the columns, with the weights that swscale has for "bicubic": of
the width of the target where pixels get fewer. As there, halved chroma stays halved along rows, two pixels sharing
one. What is left is rounding: at most 5 of 255, a mean of 0.6, or of 2.5 at a seventh of the size
(tests/pipelines/test_scaling.py measures it).
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

# Kr and Kb of the matrices in FFmpeg's numbering; what is not named here is as for 601.
_MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_MATRIX_601 = (0.299, 0.114)
_FULL_RANGE = 2
# Of "bicubic" in swscale; other libraries have -0.5 or -0.75.
_SHARPNESS = -0.6


class Colours(NamedTuple):
    """What the numbers of a frame mean.

    Attributes:
        matrix, range: FFmpeg's numbers.
        chroma_shift: By how much of a chroma sample these lie to the left of the middle of their two pixels.
    """

    matrix: int
    range: int
    chroma_shift: float


def scaled_rgb(
    luma_Bhw: torch.Tensor, chroma_Bhw2: torch.Tensor, size: tuple[int, int], colours: Colours
) -> torch.Tensor:
    """Frames of 4:2:0 in another size.

    Args:
        luma_Bhw: uint8 [B, h, w].
        chroma_Bhw2: uint8 [B, h / 2, w / 2, 2], blue before red.
        size: Width and height wanted.
        colours: Of the frames.

    Returns:
        uint8 RGB [B, H, W, 3], on the same device.
    """
    width_px, height_px = size
    if luma_Bhw.shape[1:] == (height_px, width_px):  # nothing is scaled, and swscale takes chroma as it is
        whole = chroma_Bhw2.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).float()
        return _rgb(luma_Bhw.float(), whole[..., 0], whole[..., 1], colours)
    y = _scaled(luma_Bhw, width_px, height_px, 1, 0.0)
    shared = 2 - width_px % 2  # swscale gives each pixel its own where their number is odd
    u, v = (_scaled(chroma_Bhw2[..., place], width_px, height_px, shared, colours.chroma_shift) for place in (0, 1))
    return _rgb(y, u, v, colours)


def _rgb(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, colours: Colours) -> torch.Tensor:
    red, blue = _MATRICES.get(colours.matrix, _MATRIX_601)
    green = 1 - red - blue
    is_full = colours.range == _FULL_RANGE
    gain, colour_gain = (1.0, 1.0) if is_full else (255 / 219, 255 / 224)
    y = (y - (0 if is_full else 16)) * gain
    u, v = (u - 128) * (2 * (1 - blue) * colour_gain), (v - 128) * (2 * (1 - red) * colour_gain)
    rgb = torch.stack((y + v, y - (blue * u + red * v) / green, y + u), dim=-1)
    return rgb.clamp_(0, 255).to(torch.uint8)  # rounds down, as swscale does where it scales


def _scaled(plane_Bhw: torch.Tensor, width_px: int, height_px: int, shared: int, shift: float) -> torch.Tensor:
    """Planes float32 [B, H, W]; `shared` pixels of a row have one value."""
    device = plane_Bhw.device
    # Half precision is exact for the pixels, and off by 1/16 for what becomes of them.
    kind = torch.float16 if device.type == "cuda" else torch.float32
    rows = _weights(plane_Bhw.shape[1], height_px, 1, 0.0, device, kind)
    columns = _weights(plane_Bhw.shape[2], width_px, shared, shift, device, kind)
    return (rows @ (plane_Bhw.to(kind) @ columns.T)).float()


@functools.lru_cache(maxsize=64)
def _weights(
    source: int, target: int, shared: int, shift: float, device: torch.device, kind: torch.dtype
) -> torch.Tensor:
    """Weights [target, source] along one direction."""
    count = -(-target // shared)
    weights = np.repeat(bicubic(source, count, shift), shared, axis=0)[:target]
    return torch.from_numpy(weights).to(device, kind)


def bicubic(source: int, target: int, shift: float = 0.0) -> np.ndarray:
    """Weights float64 [target, source] of swscale's "bicubic"; beyond the border, its pixel goes on.

    Args:
        source: Pixels that are there.
        target: Pixels wanted.
        shift: By how many pixels of the source all lie further.
    """
    ratio = source / target
    width = max(1.0, ratio)
    centres = (np.arange(target) + 0.5) * ratio - 0.5 + shift
    weights = np.zeros((target, source))
    reach = int(np.ceil(2 * width)) + 1
    for offset in range(-reach, reach + 1):
        places = np.floor(centres).astype(int) + offset
        weight = _cubic(np.abs(places - centres) / width)
        np.add.at(weights, (np.arange(target), places.clip(0, source - 1)), weight)
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(distance: np.ndarray) -> np.ndarray:
    a = _SHARPNESS
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
