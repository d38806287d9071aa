"""Windows along the longer side, through both decoders; options out of range are refused."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.decode import DECODERS, decode_clips
from pipelines.decoded import Clip, Source
from pipelines.probe import probe
from pipelines.view import WHOLE_CLIPS, TokenOptions, View
from tests.media import indexed_frames, read_index, write_video

# Size of a video, and (top, left) of three windows of 64 x 64 in it.
PLACES = {
    "wide": ((161, 64), [(0, 0), (0, 48), (0, 97)]),
    "tall": ((64, 161), [(0, 0), (48, 0), (97, 0)]),
    "square": ((64, 64), [(0, 0)] * 3),
}
both_decoders = pytest.mark.parametrize("decoder", list(DECODERS))
every_shape = pytest.mark.parametrize("shape", PLACES)


def view(crops: int = 3) -> View:
    return View(num_frames=10, height_px=64, width_px=64, crops=crops)


def source(path: Path) -> Source:
    info = probe(str(path))
    return Source(
        path=str(path), width_px=info.width_px, height_px=info.height_px, container=info.container, codec=info.codec
    )


def decoded(decoder: str, path: Path, wanted: View) -> np.ndarray:
    (clip,) = DECODERS[decoder](source(path), [(0.0, 1.0)], wanted)
    assert isinstance(clip, Clip) and clip.decoder == decoder
    return clip.frames_THWC


@both_decoders
@every_shape
def test_three_windows_are_both_ends_and_the_centre_of_the_longer_side(tmp_path, decoder, shape):
    (width_px, height_px), places = PLACES[shape]
    frames = indexed_frames(10, width_px, height_px)
    path = write_video(tmp_path / "a.mkv", frames)
    windows = view().windows(decoded(decoder, path, view()))
    assert len(windows) == 3
    for window, (top, left) in zip(windows, places, strict=True):
        np.testing.assert_array_equal(window, frames[:, top : top + 64, left : left + 64])


@both_decoders
@every_shape
def test_the_one_window_is_the_middle_one_of_three(tmp_path, decoder, shape):
    path = write_video(tmp_path / "a.mkv", indexed_frames(10, *PLACES[shape][0]))
    (alone,) = view(1).windows(decoded(decoder, path, view(1)))
    np.testing.assert_array_equal(alone, view().windows(decoded(decoder, path, view()))[1])


@both_decoders
def test_a_video_on_its_side_is_cut_along_the_side_that_is_longer_upright(tmp_path, decoder):
    stored = indexed_frames(10, 161, 64)
    path = write_video(tmp_path / "a.mp4", stored, rotation_deg=90)
    upright = np.rot90(stored, axes=(1, 2))
    windows = view().windows(decoded(decoder, path, view()))
    for window, top in zip(windows, (0, 48, 97), strict=True):
        np.testing.assert_array_equal(window, upright[:, top : top + 64])


@pytest.mark.parametrize("crops", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(64, 64), (65, 64), (64, 91), (300, 64)])
def test_windows_have_the_size_of_the_view_and_reach_both_ends(crops, size):
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    frames = np.stack([columns, rows, rows], axis=-1)[None].repeat(4, axis=0)
    windows = view(crops).windows(view(crops).crop(frames))
    assert [window.shape for window in windows] == [(4, 64, 64, 3)] * crops
    starts = [(int(window[0, 0, 0, 0]), int(window[0, 0, 0, 1])) for window in windows]
    room = (size[0] - 64, size[1] - 64)
    if crops == 1:
        assert starts == [(room[0] // 2, room[1] // 2)]
    else:
        assert starts[0] == (0, 0) and starts[-1] == room
        assert starts == sorted(starts)


def test_a_stream_that_changes_its_size_midway_has_all_its_windows(tmp_path):
    """Broadcasts do; every frame is scaled and cut by its own size."""
    first = write_video(tmp_path / "first.ts", indexed_frames(10, 160, 96), codec="libx264")
    later = [1000 + 100 * index for index in range(10)]
    second = write_video(tmp_path / "second.ts", indexed_frames(10, 96, 96, first=10), codec="libx264", times_ms=later)
    path = tmp_path / "a.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    wanted = View(num_frames=20, height_px=64, width_px=64, crops=3)
    (clip,) = decode_clips(source(path), [(0.0, 2.0)], wanted)
    assert isinstance(clip, Clip), clip
    ends = wanted.windows(clip.frames_THWC)
    assert {window.shape for window in ends} == {(20, 64, 64, 3)}
    assert {read_index(frame) for frame in ends[1]} >= {2, 5, 8, 12, 15, 18}
    assert (ends[0][4] != ends[2][4]).any()  # while it is wide
    np.testing.assert_array_equal(ends[0][16], ends[2][16])  # once it is square


def test_by_default_clips_are_whole_and_seen_once():
    assert TokenOptions(views=1, drop_static=None) == WHOLE_CLIPS


@pytest.mark.parametrize("values", [{"views": 3}, {"drop_static": 0}, {"drop_static": 255.0, "views": 1}])
def test_options_in_range(values):
    for name, value in values.items():
        assert getattr(TokenOptions(**values), name) == value


@pytest.mark.parametrize(
    "values, named",
    [
        ({"views": 0}, "views"),
        ({"views": -1}, "views"),
        ({"drop_static": -1e-9}, "drop_static"),
        ({"drop_static": 255.5}, "drop_static"),
        ({"drop_static": float("nan")}, "drop_static"),
        ({"drop_static": 0.0, "views": 2}, "one of drop_static and views"),
    ],
)
def test_options_out_of_range_or_combined_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        TokenOptions(**values)
