"""Videos to measure decoding with: H.264 as people's files are, made here, the same on every machine."""

import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS = 24
# Frames from one key frame to the next: x264's own choice, and two seconds, as streaming services have it.
GOPS = (250, 48)
# Spread of what a camera adds, in grey levels.
_GRAIN = 3.0


def write_videos(folder: Path, count: int, *, width_px: int, height_px: int, duration_s: float) -> list[Path]:
    """Write videos with a moving picture, their GOPs in turn; those of one GOP are copies.

    Args:
        folder: Where; files that are there already are kept.
        count: How many.
        width_px: Of a frame, a multiple of 4.
        height_px: Likewise.
        duration_s: Of a video, at 24 frames a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number in range(count):
        gop = GOPS[number % len(GOPS)]
        path = folder / f"{height_px}p-{duration_s:g}s-gop{gop}-{number}.mp4"
        if not path.exists():
            # Written beside its place: what was interrupted must not be taken for a video.
            partial = path.with_suffix(".part")
            if number < len(GOPS):
                _write(partial, width_px, height_px, round(duration_s * FPS), gop)
            else:
                shutil.copyfile(paths[number % len(GOPS)], partial)
            partial.rename(path)
        paths.append(path)
    return paths


def _write(path: Path, width_px: int, height_px: int, num_frames: int, gop: int) -> None:
    options = {"preset": "veryfast", "crf": "23", "g": str(gop), "bf": "3", "b-pyramid": "normal"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width_px, height_px, "yuv420p"
        for number, planes in enumerate(_frames(width_px, height_px, num_frames)):
            frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _frames(width_px: int, height_px: int, num_frames: int) -> Iterator[np.ndarray]:
    """Frames as planes of YUV 4:2:0 one below the other: a camera that pans over a ground, things that cross it."""
    rng = np.random.default_rng(0)
    ground_height, ground_width = height_px + height_px // 2, width_px + width_px // 2
    luma = _clouds(rng, ground_height, ground_width)
    chroma = [_clouds(rng, ground_height // 2, ground_width // 2) for _ in range(2)]
    grain = rng.normal(0, _GRAIN, (2 * height_px, 2 * width_px)).astype(np.int8)
    for number in range(num_frames):
        turn = 2 * np.pi * number / (12 * FPS)
        top = 2 * round(height_px / 8 * (1 + np.sin(turn)))
        left = 2 * round(width_px / 8 * (1 + np.cos(1.3 * turn)))
        y, x = rng.integers(height_px), rng.integers(width_px)
        picture = luma[top : top + height_px, left : left + width_px] + grain[y : y + height_px, x : x + width_px]
        side = height_px // 6
        for thing in range(4):
            place = (number * (3 + thing) * width_px) // (40 * FPS) % (width_px - side)
            row = height_px * (2 * thing + 1) // 10
            picture[row : row + side, place : place + side] = 40 + 50 * thing
        colours = [
            plane[top // 2 : (top + height_px) // 2, left // 2 : (left + width_px) // 2].reshape(height_px // 4, -1)
            for plane in chroma
        ]
        yield np.concatenate([np.clip(picture, 16, 235).astype(np.uint8), *(c.astype(np.uint8) for c in colours)])


def _clouds(rng: np.random.Generator, height_px: int, width_px: int) -> np.ndarray:
    """A picture with detail of every size, int16 [H, W] between 30 and 220."""
    picture = np.zeros((height_px, width_px))
    for cell in (4, 16, 64):
        small = rng.random((height_px // cell + 2, width_px // cell + 2))
        picture += np.kron(small, np.ones((cell, cell)))[:height_px, :width_px] * cell**0.5
    picture -= picture.min()
    return (30 + 190 * picture / picture.max()).astype(np.int16)
