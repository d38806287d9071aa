"""From videos to the clip manifest, the list of everything that will be one row each; and its rows decoded."""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from pipelines.archive import Video
from pipelines.child import Call
from pipelines.decode import decode_clips
from pipelines.decoded import Outcome, Source
from pipelines.failure import DecodeFailure
from pipelines.guarded import Decode, Decoded, Request, T, decode_guarded, probe_guarded
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.probe import VideoInfo, file_identity
from pipelines.schema import PlannedClip, Status
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.timeline import ClipPlan
from pipelines.view import View
from pipelines.waiting import patiently


def clip_id(video: str, size_bytes: int, version: str, start_s: float, end_s: float) -> str:
    """20 hex digits, stable as long as the file and the span are the same."""
    identity = f"{video}\0{size_bytes}\0{version}\0{start_s:.6f}\0{end_s:.6f}"
    return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:20]


def plan_video(video: Video, plan: ClipPlan, limits: Limits = DEFAULT_LIMITS) -> list[PlannedClip]:
    """Probe a video and cut it into clips; one that cannot be probed is one clip of an empty span, with the reason."""
    size_bytes, version = video.size_bytes, video.version
    try:
        if not (size_bytes and version):  # an empty file fails here
            size_bytes, version = file_identity(video.uri)
        info = probe_guarded(video.uri, size_bytes, limits)
        spans, status, error = plan.spans(info.duration_s), Status.OK, ""
    except DecodeFailure as failure:
        info = VideoInfo(duration_s=0.0, fps=0.0, width_px=0, height_px=0, container="", codec="", note="")
        spans, status, error = [(0.0, 0.0)], failure.status, str(failure)
    return [
        PlannedClip(
            clip_id=clip_id(video.address, size_bytes, version, start_s, end_s),
            video=video.address,
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
        duration_s=clip.duration_s,
    )


def by_video(clips: Iterable[PlannedClip]) -> Iterator[list[PlannedClip]]:
    """Neighbours that are clips of one video, together."""
    for _, same_video in groupby(clips, key=lambda clip: (clip.video, clip.version, clip.status)):
        yield list(same_video)


def decode_planned(
    clips: Sequence[PlannedClip], view: View, limits: Limits = DEFAULT_LIMITS, signatures: Signatures = UNSIGNED
) -> list[Outcome]:
    """Decode rows of a manifest, one outcome each, in order; neighbours of one video share a pass over it."""
    addresses = signatures.sign([clip.video for clip in clips])
    readable = [dataclasses.replace(clip, video=address) for clip, address in zip(clips, addresses, strict=True)]
    with patiently():
        return [outcome for _, decoded in decode_videos(readable, view, limits) for outcome in decoded.outcomes]


def decode_videos(
    clips: Iterable[PlannedClip],
    view: View,
    limits: Limits = DEFAULT_LIMITS,
    decode: Decode[T] = decode_clips,
    first: Call | None = None,
    at_once: int = sys.maxsize,
) -> Iterator[tuple[list[PlannedClip], Decoded[T]]]:
    """As `decode_planned`, video by video: its clips and their outcomes; the next is decoded while one is used.

    A file that has changed since it was planned is a failure: its clips are not what the manifest says. Of a video with
    more clips than `at_once`, so many come together.
    """
    videos = [
        (same_video[at : at + at_once], failure)
        for same_video in by_video(clips)
        for failure in [_failure(same_video[0])]  # which asks the store, once
        for at in range(0, len(same_video), at_once)
    ]
    requests = [
        Request(source_of(same_video[0]), [(clip.start_s, clip.end_s) for clip in same_video])
        for same_video, failure in videos
        if failure is None
    ]
    decoded = decode_guarded(requests, view, limits, decode, first)
    for same_video, failure in videos:
        yield same_video, next(decoded) if failure is None else Decoded([failure] * len(same_video), 0.0)


def _failure(clip: PlannedClip) -> DecodeFailure | None:
    """Why there is nothing to decode."""
    if clip.status != Status.OK:
        return DecodeFailure(Status(clip.status), clip.error)
    try:
        if file_identity(clip.video) == (clip.size_bytes, clip.version):
            return None
    except DecodeFailure as failure:
        return failure
    return DecodeFailure(Status.MISSING, "the file has changed since it was planned; plan again")
