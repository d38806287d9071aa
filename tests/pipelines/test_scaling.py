"""Frames scaled as on a GPU are the pictures that FFmpeg's scaler makes of the same frames on a CPU, up to rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.picture import picture
from pipelines.probe import open_video
from pipelines.scaling import Colours, bicubic, scaled_rgb
from pipelines.view import View
from tests.media import indexed_frames, write_video

# Where chroma of H.264 and HEVC lies.
LEFT = 0.25
# Blocks and colours are as sharp as pictures get. swscale rounds down more than once on the way.
MOST_MEAN, MOST = 2.6, 5


def compared(path: Path, wanted: View, shift: float = LEFT) -> np.ndarray:
    """Differences [T, H, W, 3] of all frames."""
    container, stream = open_video(str(path))
    with container:
        frames = list(container.decode(stream))
    found = []
    for frame in frames:
        planes = frame.to_ndarray(format="yuv420p")
        height_px, width_px = frame.height, frame.width
        chroma = planes[height_px:].reshape(2, height_px // 2, width_px // 2).transpose(1, 2, 0)
        luma, chroma = (torch.from_numpy(plane.copy())[None] for plane in (planes[:height_px], chroma))
        colours = Colours(int(frame.colorspace), int(frame.color_range), shift)
        rgb = scaled_rgb(luma, chroma, wanted.scaled_size(width_px, height_px), colours)
        found.append(wanted.crop(rgb[0].numpy()).astype(int) - picture(frame, wanted))
    return np.stack(found)


def written(path: Path, size: tuple[int, int], options: dict[str, str], codec: str = "libx264") -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (4, size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
    blocks = np.kron(noise, np.ones((1, 8, 8, 1), np.uint8))[:, : size[1], : size[0]]
    frames = np.concatenate([indexed_frames(4, *size), blocks])
    return write_video(path, frames, codec=codec, pix_fmt="yuv420p", options=options)


@pytest.mark.parametrize("size", [(320, 180), (90, 160), (640, 360), (64, 64), (854, 480)])
@pytest.mark.parametrize("view_px", [(64, 64), (112, 96), (224, 224)])
def test_pictures_are_those_of_swscale(tmp_path, size, view_px):
    path = written(tmp_path / "a.mp4", size, {"crf": "1", "preset": "ultrafast"})
    differences = compared(path, View(num_frames=1, width_px=view_px[0], height_px=view_px[1]))
    assert np.abs(differences).mean(axis=(1, 2, 3)).max() <= MOST_MEAN
    assert np.abs(differences).max() <= MOST


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt470bg", "smpte240m", "fcc", "bt2020nc"])
@pytest.mark.parametrize("full", ["off", "on"])
def test_matrix_and_range_are_those_that_the_file_names(tmp_path, matrix, full):
    options = {"crf": "1", "preset": "ultrafast", "x264-params": f"colormatrix={matrix}:fullrange={full}"}
    differences = compared(
        written(tmp_path / "a.mp4", (320, 180), options), View(num_frames=1, width_px=80, height_px=80)
    )
    assert np.abs(differences).mean(axis=(1, 2, 3)).max() <= MOST_MEAN
    assert np.abs(differences).max() <= MOST


def test_chroma_is_not_shifted_unnoticed(tmp_path):
    path = written(tmp_path / "a.mp4", (320, 180), {"crf": "1", "preset": "ultrafast"})
    wanted = View(num_frames=1, width_px=120, height_px=120)
    assert np.abs(compared(path, wanted, 0.0)).max() > 2 * MOST


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.0, 0.25]))
def test_weights_keep_a_plain_picture_plain(source, target, shift):
    weights = bicubic(source, target, shift)
    assert weights.shape == (target, source)
    np.testing.assert_allclose(weights.sum(axis=1), 1)


def test_a_frame_of_the_wanted_size_stays_as_it_is():
    np.testing.assert_allclose(bicubic(17, 17), np.eye(17), atol=1e-12)
