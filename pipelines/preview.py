"""Pictures of where the compute went: a clip's frames with the expert of each patch drawn over them."""

import dataclasses
import io

import numpy as np
import torch
from einops import repeat
from PIL import Image

from mone.checkpoint import Checkpoint
from mone.model import ViViT
from mone.static import kept_patches
from mone.tubelets import to_patches
from pipelines.decoded import Clip
from pipelines.guarded import Request, decode_guarded
from pipelines.manifest import source_of
from pipelines.patches import view_of
from pipelines.schema import PlannedClip
from pipelines.view import View

# From the smallest expert (dark) to the full one (bright), as in viridis: safe for the colour-blind.
_RAMP = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [253, 231, 37]], dtype=np.float32)
_OPACITY = 0.45
_PICTURE_PX = 192
_PICTURES = 4


def expert_colours(num_experts: int) -> np.ndarray:
    """One colour per expert, smallest first, uint8 [E, 3]."""
    place = np.linspace(0, len(_RAMP) - 1, num_experts) if num_experts > 1 else np.array([len(_RAMP) - 1.0])
    return np.stack([np.interp(place, range(len(_RAMP)), _RAMP[:, c]) for c in range(3)], axis=1).astype(np.uint8)


def expert_maps(model: ViViT, frames_THWC: np.ndarray, capacity: float, drop_static: float | None = None) -> np.ndarray:
    """The expert of each patch, int64 [F, rows, columns], 0 the smallest; -1 where it was dropped.

    Args:
        model: In evaluation mode.
        frames_THWC: uint8 frames of the model's size.
        capacity: Effective capacity e_c.
        drop_static: As in `tokenize.TokenOptions`.
    """
    patches = torch.from_numpy(np.ascontiguousarray(to_patches(frames_THWC, model.config)))
    with torch.inference_mode():
        if drop_static is None:
            expert_K = model(patches.unsqueeze(0), capacity).plan.expert_BN.flatten()
        else:
            kept_K = torch.from_numpy(kept_patches(patches.numpy(), drop_static))
            kept_expert = model(patches.flatten(0, 1)[kept_K][None], capacity, kept_BK=kept_K[None]).plan.expert_BN[0]
            expert_K = kept_expert.new_full((patches.shape[0] * patches.shape[1],), -1).scatter(0, kept_K, kept_expert)
    return expert_K.reshape(-1, *model.config.grid).numpy()


def draw(frame_HWC: np.ndarray, expert_RC: np.ndarray, num_experts: int) -> np.ndarray:
    """A frame with its experts as colours over it, uint8 [H, W, 3]; H and W are multiples of the grid.

    Patches that were dropped or left out (-1) are dimmed.
    """
    height, width = frame_HWC.shape[0] // expert_RC.shape[0], frame_HWC.shape[1] // expert_RC.shape[1]
    colours = np.concatenate([expert_colours(num_experts), np.zeros((1, 3), dtype=np.uint8)])  # -1 takes the last
    colour_HWC = repeat(colours[expert_RC], "r c k -> (r h) (c w) k", h=height, w=width)
    return (frame_HWC * (1 - _OPACITY) + colour_HWC * _OPACITY).astype(np.uint8)


def preview(
    clip: PlannedClip, checkpoint: Checkpoint, model: ViViT, capacity: float, drop_static: float | None = None
) -> list[tuple[bytes, bytes]]:
    """A few moments of a clip, as pairs of JPEG files: the frame, and the frame with its experts.

    Raises:
        DecodeFailure: The clip cannot be decoded (any more).
    """
    config = checkpoint.config
    seen, scale = view_of(config), -(-_PICTURE_PX // config.height_px)
    shown = dataclasses.replace(seen, height_px=seen.height_px * scale, width_px=seen.width_px * scale)
    small, large = (_decoded(clip, view) for view in (seen, shown))
    maps = expert_maps(model, small, capacity, drop_static)
    moments = np.linspace(0, config.num_indices - 1, min(_PICTURES, config.num_indices)).round().astype(int)
    frames = [large[moment * config.tubelet_frames] for moment in moments]
    return [
        (jpeg(frame), jpeg(draw(frame, maps[moment], config.num_experts)))
        for moment, frame in zip(moments, frames, strict=True)
    ]


def _decoded(clip: PlannedClip, view: View) -> np.ndarray:
    (decoded,) = decode_guarded([Request(source_of(clip), [(clip.start_s, clip.end_s)])], view)
    (outcome,) = decoded.outcomes
    if not isinstance(outcome, Clip):
        raise outcome
    return outcome.frames_THWC


def jpeg(frame_HWC: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame_HWC)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
