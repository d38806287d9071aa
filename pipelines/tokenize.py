"""The decoding stage: manifest rows to uint8 patches, row for row."""

import dataclasses
import time
from itertools import groupby

import numpy as np
import pyarrow as pa

from mone.config import ModelConfig
from mone.tubelets import to_patches
from pipelines.decode import Clip, Outcome, View, decode_clips
from pipelines.manifest import source_of
from pipelines.probe import DecodeFailure, file_identity
from pipelines.schema import DECODED, PlannedClip, Status


def view_of(config: ModelConfig) -> View:
    """What a model wants to see of a span."""
    return View(num_frames=config.num_frames, height_px=config.height_px, width_px=config.width_px)


def tokenize_table(manifest: pa.Table, config: ModelConfig) -> pa.Table:
    """Decode and cut planned clips: MANIFEST rows to DECODED rows, one for one, in order.

    Neighbouring rows of one video share one pass over it. Nothing raises: a clip that cannot be decoded is a row with
    its status and no patches.

    Args:
        manifest: Rows of the manifest.
        config: The model whose patches [F, N, P] are wanted.
    """
    clips = [PlannedClip(**row) for row in manifest.to_pylist()]
    rows = []
    for _, same_video in groupby(clips, key=lambda clip: (clip.video, clip.version, clip.status)):
        rows.extend(_tokenize_video(list(same_video), config))
    return pa.Table.from_pylist(rows, schema=DECODED)


def _tokenize_video(clips: list[PlannedClip], config: ModelConfig) -> list[dict]:
    if clips[0].status != Status.OK:
        return [_row(clip, config, DecodeFailure(Status(clip.status), clip.error), 0.0) for clip in clips]
    started_s = time.perf_counter()
    outcomes = _decode_unchanged(clips, config)
    decode_ms = (time.perf_counter() - started_s) * 1e3 / len(clips)
    return [_row(clip, config, outcome, decode_ms) for clip, outcome in zip(clips, outcomes, strict=True)]


def _decode_unchanged(clips: list[PlannedClip], config: ModelConfig) -> list[Outcome]:
    """Decode, unless the file has changed since it was planned: then these clips are not what the manifest says."""
    first = clips[0]
    try:
        if file_identity(first.video) != (first.size_bytes, first.version):
            raise DecodeFailure(Status.MISSING, "the file has changed since it was planned; plan again")
    except DecodeFailure as failure:
        return [failure] * len(clips)
    return decode_clips(source_of(first), [(clip.start_s, clip.end_s) for clip in clips], view_of(config))


def _row(clip: PlannedClip, config: ModelConfig, outcome: Outcome, decode_ms: float) -> dict:
    row = dataclasses.asdict(clip) | {"decode_ms": decode_ms, "decoder": "", "patches": None}
    if isinstance(outcome, Clip):
        patches_FNP = np.ascontiguousarray(to_patches(outcome.frames_THWC, config))
        note = "; ".join(filter(None, (clip.note, outcome.note)))
        return row | {"decoder": outcome.decoder, "patches": patches_FNP.tobytes(), "note": note}
    return row | {"status": outcome.status.value, "error": str(outcome)}


def patches_of(decoded: pa.Table, config: ModelConfig) -> np.ndarray:
    """Patches of the rows that have them, uint8 [B, F, N, P]."""
    shape = (config.num_indices, config.num_tokens, config.patch_values)
    buffers = [value.as_buffer() for value in decoded["patches"] if value.is_valid]
    if not buffers:
        return np.empty((0, *shape), dtype=np.uint8)
    return np.stack([np.frombuffer(buffer, dtype=np.uint8).reshape(shape) for buffer in buffers])
