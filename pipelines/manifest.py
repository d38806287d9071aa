"""From videos to the clip manifest: the list of everything that will be one row each."""

import hashlib

from pipelines.archive import Video
from pipelines.decode import Source
from pipelines.probe import DecodeFailure, VideoInfo, file_identity, probe
from pipelines.schema import PlannedClip, Status
from pipelines.timeline import ClipPlan


def clip_id(video: str, size_bytes: int, version: str, start_s: float, end_s: float) -> str:
    """20 hex digits, stable as long as the file and the span are the same."""
    identity = f"{video}\0{size_bytes}\0{version}\0{start_s:.6f}\0{end_s:.6f}"
    return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:20]


def plan_video(video: Video, plan: ClipPlan) -> list[PlannedClip]:
    """Probe a video and cut it into clips; one that cannot be probed is one clip of an empty span, with the reason."""
    size_bytes, version = 0, ""
    try:
        size_bytes, version = file_identity(video.uri)
        info = probe(video.uri)
        spans, status, error = plan.spans(info.duration_s), Status.OK, ""
    except DecodeFailure as failure:
        info = VideoInfo(duration_s=0.0, fps=0.0, width_px=0, height_px=0, container="", codec="", note="")
        spans, status, error = [(0.0, 0.0)], failure.status, str(failure)
    return [
        PlannedClip(
            clip_id=clip_id(video.uri, size_bytes, version, start_s, end_s),
            video=video.uri,
            start_s=start_s,
            end_s=end_s,
            label=video.label,
            size_bytes=size_bytes,
            version=version,
            duration_s=info.duration_s,
            fps=info.fps,
            width_px=info.width_px,
            height_px=info.height_px,
            container=info.container,
            codec=info.codec,
            status=status.value,
            error=error,
            note=info.note,
        )
        for start_s, end_s in spans
    ]


def source_of(clip: PlannedClip) -> Source:
    """What decoding needs to know of a clip's file."""
    return Source(
        path=clip.video,
        width_px=clip.width_px,
        height_px=clip.height_px,
        container=clip.container,
        codec=clip.codec,
    )
