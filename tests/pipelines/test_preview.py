"""The pictures show the routing that the model used, over the frames that it saw."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mone.capacity import token_counts
from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.config import ModelConfig
from mone.model import ViViT
from mone.static import kept_patches
from mone.tubelets import to_patches
from pipelines.archive import Video
from pipelines.failure import DecodeFailure
from pipelines.manifest import plan_video
from pipelines.preview import draw, expert_colours, expert_maps, jpeg, preview
from pipelines.timeline import ClipPlan
from tests.media import indexed_frames, read_index, write_video

CONFIG = ModelConfig(
    num_classes=2, num_frames=12, height_px=64, width_px=64, dim=32, num_heads=4, depth=1, temporal_depth=1
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    torch.manual_seed(0)
    return read_checkpoint(save_checkpoint(ViViT(CONFIG), ["a", "b"], tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("capacity", [0.125, 0.3, 0.5, 1.0])
def test_the_maps_have_the_counts_of_the_capacity_in_every_frame(checkpoint, capacity):
    maps_FRC = expert_maps(checkpoint.build(), indexed_frames(12), capacity)
    assert maps_FRC.shape == (6, 4, 4) and maps_FRC.dtype == np.int64
    for map_RC in maps_FRC:
        counts = np.bincount(map_RC.ravel(), minlength=CONFIG.num_experts)
        assert tuple(counts) == token_counts(capacity, CONFIG.num_tokens, CONFIG.num_experts)


@pytest.mark.parametrize("seed", range(3))
def test_the_map_is_laid_out_as_the_picture(checkpoint, seed):
    """With a router that gives the full expert the brightest patches, these are where the map says 3."""
    model = checkpoint.build()
    with torch.no_grad():
        for parameter in (
            model.embed.weight,
            model.embed.bias,
            model.encoder.position_ND,
            *model.encoder.router.parameters(),
        ):
            parameter.zero_()
        model.embed.weight[0] = 1 / CONFIG.patch_values
        model.encoder.router.weight[-1, 0] = 10
    num_bright = token_counts(0.5, CONFIG.num_tokens, CONFIG.num_experts)[-1]
    bright = np.random.default_rng(seed).permuted(np.arange(6 * 16).reshape(6, 16) % 16 < num_bright, axis=1)
    bright_FRC = bright.reshape(6, 4, 4)
    frames = np.kron(bright_FRC.repeat(2, axis=0), np.ones((1, 16, 16))).astype(np.uint8)[..., None] * np.full(3, 255)
    maps_FRC = expert_maps(model, frames.astype(np.uint8), 0.5)
    np.testing.assert_array_equal(maps_FRC == 3, bright_FRC)


@pytest.mark.parametrize("capacity", [0.125, 0.5, 1.0])
def test_the_map_has_an_expert_where_a_patch_was_kept_and_none_where_it_was_dropped(checkpoint, capacity):
    frames = indexed_frames(1, first=90).repeat(12, axis=0)
    frames[:, 16:32, 32:48] = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    kept_K = kept_patches(to_patches(frames, CONFIG), 0)
    kept = np.isin(np.arange(96), kept_K).reshape(6, 4, 4)
    assert 16 < kept.sum() < 96 and kept[:, 1, 2].all()
    maps_FRC = expert_maps(checkpoint.build(), frames, capacity, 0)
    np.testing.assert_array_equal(maps_FRC >= 0, kept)
    assert tuple(np.bincount(maps_FRC[kept], minlength=4)) == CONFIG.token_counts(capacity, len(kept_K))


def test_patches_that_were_dropped_are_dimmed():
    frame = indexed_frames(1, first=90)[0]
    drawn = draw(frame, np.full((4, 4), -1), 4)
    np.testing.assert_allclose(drawn, 0.55 * frame, atol=1)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 6])
def test_every_expert_has_its_own_colour(num_experts):
    colours = expert_colours(num_experts)
    assert colours.shape == (num_experts, 3) and colours.dtype == np.uint8
    assert len({tuple(colour) for colour in colours}) == num_experts
    assert (np.diff(colours.astype(int).sum(axis=1)) > 0).all()  # the larger the brighter


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (1, 1)])
def test_drawing_keeps_the_size_and_tints_each_patch_alike(grid):
    frame = np.full((64, 64, 3), 100, dtype=np.uint8)
    expert_RC = np.arange(grid[0] * grid[1]).reshape(grid) % 4
    before = frame.copy()
    drawn = draw(frame, expert_RC, 4)
    assert drawn.shape == frame.shape and drawn.dtype == np.uint8
    np.testing.assert_array_equal(frame, before)
    tints = {}
    height, width = 64 // grid[0], 64 // grid[1]
    for (row, column), expert in np.ndenumerate(expert_RC):
        patch = drawn[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert (patch == patch[0, 0]).all()
        assert tints.setdefault(expert, tuple(patch[0, 0])) == tuple(patch[0, 0])
        towards = np.sign(expert_colours(4)[expert].astype(int) - 100)
        assert (np.sign(patch[0, 0].astype(int) - 100) == towards).all()
    assert len(set(tints.values())) == len(tints)


def test_drawing_leaves_the_picture_visible():
    frame = indexed_frames(1, first=90)[0]
    drawn = draw(frame, np.zeros((4, 4), dtype=np.int64), 4)
    for channel in range(3):
        assert np.corrcoef(frame[..., channel].ravel(), drawn[..., channel].ravel())[0, 1] > 0.99


def test_a_jpeg_decodes_to_the_frame():
    frame = indexed_frames(1, 192, 128, first=170)[0]
    with Image.open(io.BytesIO(jpeg(frame))) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (192, 128), "RGB")
        assert read_index(np.asarray(image)) == 170


def test_a_preview_is_pairs_of_pictures_of_the_clip(tmp_path, checkpoint):
    path = write_video(tmp_path / "a.mp4", indexed_frames(30, 96, 64, first=30))
    _, clip = plan_video(Video(uri=str(path)), ClipPlan(span_s=1.2, clips_per_video=2))
    pairs = preview(clip, checkpoint, checkpoint.build(), 0.5)
    pictures = [[np.asarray(Image.open(io.BytesIO(content))) for content in pair] for pair in pairs]
    assert {picture.shape for pair in pictures for picture in pair} == {(192, 192, 3)}
    shown = [read_index(plain) for plain, _ in pictures]
    first = 30 + round(clip.start_s * 10)
    assert len(shown) == 4 and shown == sorted(set(shown))
    assert all(first <= index < first + 12 for index in shown)
    assert all(np.abs(plain.astype(int) - tinted).mean() > 10 for plain, tinted in pictures)


def test_a_clip_that_is_gone_raises(tmp_path, checkpoint):
    path = write_video(tmp_path / "a.mp4", indexed_frames(12))
    (clip,) = plan_video(Video(uri=str(path)), ClipPlan(span_s=1.2))
    path.unlink()
    with pytest.raises(DecodeFailure):
        preview(clip, checkpoint, checkpoint.build(), 0.5)
