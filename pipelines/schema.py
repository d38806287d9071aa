"""What is written on disk: columns, units and Arrow types of the two tables."""

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class Status(StrEnum):
    """How a clip ended."""

    OK = "ok"
    DECODE_ERROR = "decode_error"  # the file is damaged, is no video, or crashed its decoder
    TIMEOUT = "timeout"  # a limit on time was reached
    EMPTY = "empty"  # zero bytes, or a stream without frames
    UNSUPPORTED = "unsupported"  # no video stream, a still picture, too many pixels, more memory than it may take
    MISSING = "missing"  # nothing at this path
    MODEL_ERROR = "model_error"  # decoded, but the model failed


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedClip:
    """One row of the manifest, and so one row of the annotations.

    Attributes:
        clip_id: Stable: a hash of the video's identity (uri, size, version) and the span.
        video: Where the file is.
        start_s, end_s: Half-open span in seconds of presentation time; 0 is the video's first frame.
        label: Class, where the archive names one; else "".
        size_bytes, version: With the uri, the identity of the file; version is the modification time in ns.
        duration_s, fps, width_px, height_px, container, codec: From the probe; the size is as
            displayed, after rotation.
        status: "ok", or why the probe failed; such a video is planned as one clip of an empty span.
        error: What the probe says of a failure.
        note: What is unusual about the file ("" mostly), such as a header longer than the video.
    """

    clip_id: str
    video: str
    start_s: float
    end_s: float
    label: str
    size_bytes: int
    version: str
    duration_s: float
    fps: float
    width_px: int
    height_px: int
    container: str
    codec: str
    status: str
    error: str
    note: str


_ARROW = {str: pa.string(), float: pa.float64(), int: pa.int64()}
MANIFEST = pa.schema([(name, _ARROW[kind]) for name, kind in PlannedClip.__annotations__.items()])

# Between decoding and the model: the manifest row, its outcome so far, and pixels as bytes (null after a failure).
DECODED = pa.schema(
    [
        *MANIFEST,
        ("decoder", pa.string()),
        ("decode_ms", pa.float32()),
        ("repeated_share", pa.float32()),
        ("patches", pa.large_binary()),  # uint8 [V, F, N, P] for V views, or [K, P] where static ones were dropped
        ("kept", pa.large_binary()),  # int32 [K], the places f N + n of those; null: all are there
    ]
)

# flops and dense_flops are floating-point operations, 2 per multiply-add (papers print multiply-adds).
ANNOTATIONS = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("label", pa.string()),  # null unless ok
        ("score", pa.float32()),
        ("labels", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("capacity", pa.float32()),
        ("tokens_per_expert", pa.list_(pa.int64())),  # smallest expert first; empty unless ok
        ("flops", pa.int64()),  # 0 unless ok: nothing was computed
        ("kept_flops", pa.int64()),  # full width on the patches kept: between the two, what dropping static ones leaves
        ("dense_flops", pa.int64()),
        ("decoder", pa.string()),
        ("decode_ms", pa.float32()),
        ("repeated_share", pa.float32()),  # of steps between frames, those without a change; null unless decoded
        ("model_ms", pa.float32()),
        ("model_id", pa.string()),
        ("true_label", pa.string()),  # the archive's own label, "" where there is none
        ("note", pa.string()),  # what was unusual: fallbacks, missing frames
    ]
)
