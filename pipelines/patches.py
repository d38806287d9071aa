"""Spans of a file to patches: what a process for decoding does for a model, so that pixels leave it as they ship."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from einops import rearrange

from mone.config import ModelConfig
from mone.static import kept_patches
from mone.tubelets import check_frames
from pipelines.decode import chain_of, decode_clips
from pipelines.decoded import Clip, Served, Source
from pipelines.failure import DecodeFailure
from pipelines.limits import DecoderChoice
from pipelines.view import TokenOptions, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches(Served):
    """Decoded patches of one span.

    Attributes:
        patches: uint8 [V, F, N, P] for V views, or [K, P] where static patches were dropped.
        kept_K: int32, the places f N + n of those; None: all are there.
    """

    patches: np.ndarray = field(repr=False)
    kept_K: np.ndarray | None = field(repr=False)


def view_of(config: ModelConfig, views: int = 1) -> View:
    """What a model wants to see of a span."""
    return View(num_frames=config.num_frames, height_px=config.height_px, width_px=config.width_px, crops=views)


def decode_patches(
    config: ModelConfig,
    options: TokenOptions,
    decoder: DecoderChoice,
    source: Source,
    spans: Sequence[tuple[float, float]],
    view: View,
    decoders: Sequence[str],
) -> list[Patches | DecodeFailure]:
    """As `decode_clips`, its frames cut into the patches of a model; `decoder` decides where no chain is given."""
    outcomes = decode_clips(source, spans, view, decoders or chain_of(source, decoder))
    done: list[Patches | DecodeFailure] = []
    while outcomes:
        outcome = outcomes.pop()  # frames go as their patches come
        done.append(_patches_of(outcome, config, options) if isinstance(outcome, Clip) else outcome)
    return done[::-1]


def cut(frames_THWC: np.ndarray, config: ModelConfig) -> np.ndarray:
    """As `to_patches`, for uint8 [T, H, W, 3], in new memory; a row of a patch moves as one piece, not byte by byte."""
    check_frames(frames_THWC.shape, config)
    frames, rows, _, channels = frames_THWC.shape
    row_bytes = config.tubelet_px * channels
    pieces = np.ascontiguousarray(frames_THWC).reshape(frames, rows, -1, row_bytes).view(f"V{row_bytes}")[..., 0]
    patches = rearrange(pieces, "(f t) (h p) w -> f h w t p", t=config.tubelet_frames, p=config.tubelet_px)
    return patches.copy().view(np.uint8).reshape(config.num_indices, config.num_tokens, -1)


def _patches_of(clip: Clip, config: ModelConfig, options: TokenOptions) -> Patches:
    views = view_of(config, options.views).windows(clip.frames_THWC)
    patches = [cut(frames_THWC, config) for frames_THWC in views]
    patches_VFNP = np.stack(patches) if len(patches) > 1 else patches[0][None]
    served = {"decoder": clip.decoder, "note": clip.note, "repeated_share": clip.repeated_share}
    if options.drop_static is None:
        return Patches(patches=patches_VFNP, kept_K=None, **served)
    kept_K = kept_patches(patches_VFNP[0], options.drop_static)
    patches_KP = patches_VFNP.reshape(-1, config.patch_values)[kept_K]
    return Patches(patches=patches_KP, kept_K=kept_K.astype(np.int32), **served)
