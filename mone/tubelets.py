"""Frames <-> spatio-temporal patches (tubelets, ViViT section 3.2): shape arithmetic, for numpy and torch alike.

Shapes: B clips, T frames, H x W pixels, C = 3 channels, F temporal indices, N tokens per index, P values per token.
"""

from collections.abc import Sequence
from typing import TypeVar

from einops import rearrange

from mone.config import ModelConfig

Array = TypeVar("Array")

_FRAMES = "... (f t) (h p) (w q) c"
_PATCHES = "... f (h w) (t p q c)"


def to_patches(frames_THWC: Array, config: ModelConfig) -> Array:
    """Cut frames [..., T, H, W, 3] into patches [..., F, N, P] of the same dtype, rows first.

    P runs over time, row, column, channel, in this order.

    Raises:
        ValueError: Frames of another size than the config's; both sizes are named.
    """
    check_frames(frames_THWC.shape, config)  # pyright: ignore[reportAttributeAccessIssue]
    return rearrange(
        frames_THWC, f"{_FRAMES} -> {_PATCHES}", t=config.tubelet_frames, p=config.tubelet_px, q=config.tubelet_px
    )


def check_frames(shape: Sequence[int], config: ModelConfig) -> None:
    """Raise ValueError for frames [..., T, H, W, 3] of another size than the config's; both sizes are named."""
    expected = (config.num_frames, config.height_px, config.width_px, 3)
    if (actual := tuple(shape[-4:])) != expected:
        raise ValueError(f"frames are {actual}, the model takes {expected}")


def to_frames(patches_FNP: Array, config: ModelConfig) -> Array:
    """The inverse of `to_patches`: patches [..., F, N, P] to frames [..., T, H, W, 3]."""
    rows, columns = config.grid
    return rearrange(
        patches_FNP,
        f"{_PATCHES} -> {_FRAMES}",
        h=rows,
        w=columns,
        t=config.tubelet_frames,
        p=config.tubelet_px,
        q=config.tubelet_px,
    )
