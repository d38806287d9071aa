"""The motions are what their labels say, by oracles that look at pixels rather than at trajectories."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipelines.synthetic import MOTIONS, MotionClip, render, split_seeds, write_clip

SEEDS = range(7, 13)
SHAKE_SHARE = 0.04  # the camera's excursions reach 2 % either way
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def centroids(clip: MotionClip) -> np.ndarray:
    """Mask centres as shares of the frame, float64 [T, 2] (x, y)."""
    return np.array([np.argwhere(mask).mean(axis=0)[::-1] for mask in clip.moving]) / clip.frames.shape[1]


def areas_px(clip: MotionClip) -> np.ndarray:
    return clip.moving.sum(axis=(1, 2))


def turned_deg(clip: MotionClip) -> float:
    """Clockwise angle that the centre of the object sweeps around the middle of its path."""
    path = centroids(clip)
    arms = path - (path.min(axis=0) + path.max(axis=0)) / 2
    cross = arms[:-1, 0] * arms[1:, 1] - arms[:-1, 1] * arms[1:, 0]  # y points down: positive is clockwise
    return float(np.degrees(np.arctan2(cross, (arms[:-1] * arms[1:]).sum(axis=1)).sum()))


def test_a_clip_is_a_function_of_its_arguments() -> None:
    first, again, other = render(5), render(5), render(5 + len(MOTIONS))
    assert first.label == again.label == other.label
    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(first.moving, again.moving)
    assert not np.array_equal(first.frames, other.frames)


def test_consecutive_seeds_are_balanced() -> None:
    assert len(MOTIONS) == len(set(MOTIONS)) == 12
    labels = Counter(render(seed, num_frames=2, size_px=32).label for seed in split_seeds("val", 36))
    assert labels == dict.fromkeys(MOTIONS, 3)


def test_splits_are_disjoint_and_aligned() -> None:
    ranges = sorted((split_seeds(split, 2**39) for split in ("train", "val", "test")), key=lambda r: r.start)
    assert all(len(r) == 2**39 and r.start % len(MOTIONS) == 0 for r in ranges)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(ranges))
    with pytest.raises(ValueError, match="'dev'"):
        split_seeds("dev", 1)
    with pytest.raises(ValueError, match="-1"):
        split_seeds("train", -1)


@pytest.mark.parametrize("label", MOTIONS)
@pytest.mark.parametrize(("num_frames", "size_px"), [(16, 96), (5, 64)])
def test_shapes_and_masks(label: str, num_frames: int, size_px: int) -> None:
    for seed in SEEDS:
        clip = render(seed, label=label, num_frames=num_frames, size_px=size_px)
        assert clip.label == label
        assert (clip.frames.shape, clip.frames.dtype) == ((num_frames, size_px, size_px, 3), np.uint8)
        assert (clip.moving.shape, clip.moving.dtype) == (clip.frames.shape[:3], np.bool_)
        assert clip.moving.any()
        edge = np.ones((size_px, size_px), bool)
        edge[1:-1, 1:-1] = False
        assert not clip.moving[:, edge].any(), "the object leaves the frame"
        if label not in ("appearing", "vanishing"):
            assert clip.moving.any(axis=(1, 2)).all()


def test_errors_name_the_culprit() -> None:
    with pytest.raises(ValueError, match="unknown motion 'sideways'"):
        render(0, label="sideways")
    with pytest.raises(ValueError, match="num_frames >= 2"):
        render(0, num_frames=1)


@pytest.mark.parametrize("label", DIRECTIONS)
def test_directions(label: str) -> None:
    direction = np.array(DIRECTIONS[label])
    for seed in SEEDS:
        path = centroids(render(seed, label=label))
        travel = path[-1] - path[0]
        assert 0.25 - SHAKE_SHARE <= travel @ direction <= 0.55 + SHAKE_SHARE
        assert abs(travel @ direction[::-1]) <= 0.04 + SHAKE_SHARE


def test_left_backwards_is_right() -> None:
    for seed in SEEDS:
        backwards = centroids(render(seed, label="left"))[::-1]
        right = centroids(render(seed, label="right"))
        assert np.abs(backwards[[0, -1], 0] - right[[0, -1], 0]).max() <= SHAKE_SHARE + 0.01
        assert np.all(np.diff(backwards[:, 0]) > -0.03)


def test_bouncing_comes_back() -> None:
    for seed in SEEDS:
        path = centroids(render(seed, label="bouncing"))
        away = np.linalg.norm(path - path[0], axis=1)
        assert away.max() > 0.1 - SHAKE_SHARE
        assert away[-1] < away.max()
        assert 0 < np.argmax(away) < len(away) - 1


def test_crossing_objects_swap() -> None:
    """They are closest (least spread) in between, and what is in front of the middle ends up behind it."""
    for seed in SEEDS:
        clip = render(seed, label="crossing")
        spread = np.array([np.argwhere(mask).std(axis=0).sum() for mask in clip.moving])
        assert spread.min() < 0.8 * min(spread[0], spread[-1])
        assert spread[-1] == pytest.approx(spread[0], rel=0.25)
        first, last = contrast_along(clip, 0), contrast_along(clip, -1)
        assert first @ last < -0.5 * np.linalg.norm(first) * np.linalg.norm(last)


def contrast_along(clip: MotionClip, t: int) -> np.ndarray:
    """Mean colour of the mask's front half less that of its rear half, along frame 0's principal axis."""
    start = np.argwhere(clip.moving[0])
    axis = np.linalg.svd(start - start.mean(axis=0), full_matrices=False)[2][0]
    points = np.argwhere(clip.moving[t])
    along = points @ axis
    front = along > (along.min() + along.max()) / 2
    colours = clip.frames[t][clip.moving[t]].astype(float)
    return colours[front].mean(axis=0) - colours[~front].mean(axis=0)


def test_clockwise_turns_clockwise() -> None:
    """220 to 340 degrees, give or take what the middle of the path misses of the centre."""
    for seed in SEEDS:
        clockwise = turned_deg(render(seed, label="clockwise"))
        counterclockwise = turned_deg(render(seed, label="counterclockwise"))
        assert 180 < clockwise < 380, seed
        assert -380 < counterclockwise < -180, seed


def test_sizes_change() -> None:
    for seed in SEEDS:
        growing, shrinking = (areas_px(render(seed, label=label)) for label in ("growing", "shrinking"))
        assert 1.6**2 * 0.8 < growing[-1] / growing[0] < 2.4**2 * 1.25
        assert 1.6**2 * 0.8 < shrinking[0] / shrinking[-1] < 2.4**2 * 1.25


def test_opacity_changes() -> None:
    for seed in SEEDS:
        appearing, vanishing = (areas_px(render(seed, label=label)) for label in ("appearing", "vanishing"))
        assert appearing[0] == vanishing[-1] == 0
        assert appearing[-1] > 0 and vanishing[0] > 0


def test_written_clips_decode(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clip = render(3)
    write_clip(clip, tmp_path / "clip.mp4", fps=8.0)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == pytest.approx(8.0)
        decoded = list(container.decode(stream))
    assert [frame.time for frame in decoded] == pytest.approx([t / 8 for t in range(16)])
    error = np.array([f.to_ndarray(format="rgb24") for f in decoded]).astype(float) - clip.frames
    assert np.abs(error).mean() < 8
    odd = MotionClip(frames=clip.frames[:, 1:], label=clip.label, moving=clip.moving[:, 1:])
    with pytest.raises(ValueError, match="96x95"):
        write_clip(odd, tmp_path / "odd.mp4")


def test_rendering_needs_numpy_alone() -> None:
    code = "import sys, pipelines.synthetic as s; s.render(0); print({'av', 'ray', 'torch'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
