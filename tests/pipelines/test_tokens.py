"""Clips of dropped patches and of several views, from lossless files to answers: each as if it were alone."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.compute import clip_compute
from mone.config import ModelConfig
from mone.model import ViViT
from mone.static import kept_patches
from mone.tubelets import to_patches
from pipelines.archive import Video
from pipelines.evaluate import Scorer
from pipelines.manifest import plan_video
from pipelines.predict import Annotator
from pipelines.schema import DECODED, MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import Tokens, tokenize_table, tokens_of
from pipelines.view import WHOLE_CLIPS, TokenOptions
from tests.media import indexed_frames, write_video

# 5 indices of 16 tokens: of 80 patches, 3 make a level, so the 16 of a first frame are filled up to 18.
CONFIG = ModelConfig(
    num_classes=3, num_frames=10, height_px=64, width_px=64, dim=32, num_heads=4, depth=2, temporal_depth=1
)
LABELS = ("a", "b", "c")
STILL, EXACT, LOOSE = "still", TokenOptions(drop_static=0), TokenOptions(drop_static=40.0)


@pytest.fixture(autouse=True)
def _on_one_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def frames_of(name: str) -> np.ndarray:
    """Ten frames: all the same; a square that moves over a still picture; all different."""
    still = indexed_frames(1, first=90).repeat(10, axis=0)
    if name == "moving":
        for number, frame_HWC in enumerate(still):
            frame_HWC[16:32, 5 * number : 5 * number + 16] = 250
    return indexed_frames(10) if name == "numbers" else still


@pytest.fixture
def manifest(tmp_path) -> pa.Table:
    """Clips of different sizes once static patches are dropped, and two failures between them."""
    (tmp_path / "text.mkv").write_text("hello")
    names = ["moving", "missing", STILL, "numbers", "text", STILL, "moving"]
    for name in {*names} - {"missing", "text"}:
        write_video(tmp_path / f"{name}.mkv", frames_of(name))
    clips = [
        clip for name in names for clip in plan_video(Video(uri=str(tmp_path / f"{name}.mkv")), ClipPlan(span_s=1.0))
    ]
    return pa.Table.from_pylist([dataclasses.asdict(clip) for clip in clips], schema=MANIFEST)


def make_checkpoint(folder, config: ModelConfig) -> Checkpoint:
    """A model whose answers depend on every parameter, alpha among them."""
    model, generator = ViViT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.encoder.alpha_L.fill_(0.5)
    return read_checkpoint(save_checkpoint(model, LABELS, folder))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), CONFIG)


def whole_patches(name: str) -> np.ndarray:
    return to_patches(frames_of(name), CONFIG)


def name_of(row: dict) -> str:
    return row["video"].rsplit("/", 1)[-1].removesuffix(".mkv")


@pytest.mark.parametrize("options", [EXACT, LOOSE, TokenOptions(drop_static=255.0)], ids=["0", "40", "255"])
def test_kept_places_and_patches_are_those_of_the_whole_clip(manifest, options):
    decoded = tokenize_table(manifest, CONFIG, options)
    assert decoded.schema == DECODED
    assert decoded["clip_id"].to_pylist() == manifest["clip_id"].to_pylist()
    for row in decoded.to_pylist():
        if row["status"] != "ok":
            assert row["patches"] is None and row["kept"] is None and row["error"]
            continue
        patches_FNP = whole_patches(name_of(row))
        kept_K = kept_patches(patches_FNP, options.drop_static)
        np.testing.assert_array_equal(np.frombuffer(row["kept"], dtype=np.int32), kept_K)
        assert row["patches"] == patches_FNP.reshape(80, -1)[kept_K].tobytes()
    assert [row["status"] for row in decoded.to_pylist()] == ["ok", "missing", "ok", "ok", "decode_error", "ok", "ok"]


def test_a_video_that_stands_still_ships_its_first_frame_and_what_fills_the_level(manifest):
    decoded = tokenize_table(manifest, CONFIG, EXACT).to_pylist()
    (first, second) = (row for row in decoded if name_of(row) == STILL)
    assert len(first["patches"]) == 18 * CONFIG.patch_values and first["patches"] == second["patches"]
    assert np.frombuffer(first["kept"], dtype=np.int32).tolist() == list(range(18))


def test_whole_clips_have_no_places(manifest):
    decoded = tokenize_table(manifest, CONFIG)
    assert set(decoded["kept"].to_pylist()) == {None}


def test_clips_of_one_size_are_grouped_and_every_clip_is_in_one_group(manifest):
    decoded = tokenize_table(manifest, CONFIG, EXACT)
    groups = tokens_of(decoded, CONFIG)
    assert sorted(row for group in groups for row in group.rows) == [0, 2, 3, 5, 6]
    sizes = [group.patches.shape[2] for group in groups]
    assert len(set(sizes)) == len(groups) == 3
    for group in groups:
        assert group.rows == sorted(group.rows)
        assert group.kept_BK is not None and group.kept_BK.dtype == np.int64
        assert group.patches.shape == (len(group.rows), 1, group.kept_BK.shape[1], CONFIG.patch_values)
        for row, patches_VKP, kept_K in zip(group.rows, group.patches, group.kept_BK, strict=True):
            patches_FNP = whole_patches(name_of(decoded.slice(row, 1).to_pylist()[0]))
            np.testing.assert_array_equal(patches_VKP[0], patches_FNP.reshape(80, -1)[kept_K])


def alone(checkpoint: Checkpoint, name: str, capacity: float, options: TokenOptions) -> tuple[np.ndarray, int]:
    """Probabilities of a clip that is run by hand, and how many patches it keeps."""
    patches_FNP = whole_patches(name)
    kept_K = kept_patches(patches_FNP, options.drop_static or 0)
    patches = torch.from_numpy(patches_FNP.reshape(80, -1)[kept_K])
    with torch.inference_mode():
        logits_BC = checkpoint.build()(patches[None], capacity, kept_BK=torch.from_numpy(kept_K)[None]).logits_BC
    return logits_BC.softmax(-1)[0].numpy(), len(kept_K)


@pytest.mark.parametrize("capacity", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("options", [EXACT, LOOSE], ids=["0", "40"])
def test_clips_of_different_sizes_in_one_batch_are_answered_as_if_alone(manifest, checkpoint, capacity, options):
    annotated = Annotator(checkpoint, capacity, 3)(tokenize_table(manifest, CONFIG, options))
    assert annotated["clip_id"].to_pylist() == manifest["clip_id"].to_pylist()
    costs = set()
    for row in annotated.to_pylist():
        if row["status"] != "ok":
            assert (row["flops"], row["kept_flops"], row["dense_flops"]) == (0, 0, 0)
            continue
        probabilities_C, num_kept = alone(checkpoint, name_of(row), capacity, options)
        scores = dict(zip(row["labels"], row["scores"], strict=True))
        np.testing.assert_allclose([scores[label] for label in LABELS], probabilities_C, rtol=1e-4, atol=1e-6)
        compute = clip_compute(CONFIG, capacity, num_kept)
        assert (row["flops"], row["kept_flops"]) == (compute.flops, compute.kept_flops)
        assert row["dense_flops"] == clip_compute(CONFIG, 1.0).flops
        assert row["tokens_per_expert"] == list(compute.tokens_per_expert)
        assert sum(row["tokens_per_expert"]) == num_kept
        assert row["flops"] <= row["kept_flops"] <= row["dense_flops"]
        costs.add(row["flops"])
    assert len(costs) == 3


@pytest.mark.parametrize("budget", ["frame", "clip"])
def test_a_joint_model_takes_clips_of_different_sizes_too(manifest, tmp_path, budget):
    config = dataclasses.replace(CONFIG, encoder="joint", temporal_depth=0, budget=budget)
    joint = make_checkpoint(tmp_path / "joint", config)
    for row in Annotator(joint, 0.5, 3)(tokenize_table(manifest, config, EXACT)).to_pylist():
        if row["status"] == "ok":
            probabilities_C, num_kept = alone(joint, name_of(row), 0.5, EXACT)
            scores = dict(zip(row["labels"], row["scores"], strict=True))
            np.testing.assert_allclose([scores[label] for label in LABELS], probabilities_C, rtol=1e-4, atol=1e-6)
            compute = clip_compute(config, 0.5, num_kept)
            assert (row["flops"], row["kept_flops"], row["dense_flops"]) == (
                compute.flops,
                compute.kept_flops,
                compute.dense_flops,
            )
            assert row["flops"] < row["kept_flops"] < row["dense_flops"] or num_kept == 80


def test_scores_of_clips_of_different_sizes_are_those_of_each_alone(manifest, checkpoint):
    capacities = (0.3, 1.0)
    decoded = tokenize_table(manifest, CONFIG, EXACT)
    for row in Scorer(checkpoint, capacities)(decoded).to_pylist():
        if row["status"] != "ok":
            assert (row["probabilities"], row["flops"], row["dense_flops"]) == ([], [], 0)
            continue
        by_hand = [alone(checkpoint, name_of(row), capacity, EXACT) for capacity in capacities]
        expected_KC = np.stack([probabilities_C for probabilities_C, _ in by_hand])
        np.testing.assert_allclose(row["probabilities"], expected_KC.ravel(), rtol=1e-4, atol=1e-6)
        costs = [clip_compute(CONFIG, capacity, by_hand[0][1]) for capacity in capacities]
        assert row["flops"] == [cost.flops for cost in costs] and row["dense_flops"] == costs[0].dense_flops


def test_a_clip_that_the_model_cannot_take_leaves_clips_of_its_size_alone(manifest, checkpoint):
    decoded = tokenize_table(manifest, CONFIG, EXACT)
    annotator = Annotator(checkpoint, 0.5, 3)
    healthy, probabilities = annotator(decoded).to_pylist(), annotator.probabilities

    def stumble(tokens: Tokens, capacity: float, batch_size: int = 0) -> np.ndarray:
        if 2 in tokens.rows:  # of one size with row 5
            raise RuntimeError("out of memory")
        return probabilities(tokens, capacity, batch_size)

    annotator.probabilities = stumble
    for number, (row, before) in enumerate(zip(annotator(decoded).to_pylist(), healthy, strict=True)):
        if number == 2:
            assert (row["status"], row["error"], row["flops"]) == ("model_error", "RuntimeError: out of memory", 0)
        else:
            np.testing.assert_allclose(row.pop("scores"), before.pop("scores"), rtol=1e-4)
            ignored = {"score": None, "model_ms": None}
            assert row | ignored == before | ignored


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooling": "mean"},
        {"pixels": "centred", "budget": "clip"},
        {"num_experts": 1, "temporal_depth": 0},
        # A router that compares a token with those beside it sees the same ones where nothing fills a level.
        {"router": "motion", "num_frames": 8},
        {"router": "random", "num_frames": 8},
    ],
    ids=str,
)
def test_dropping_repeats_of_a_still_clip_changes_no_score_at_full_capacity(tmp_path, changes):
    """Frames attend within themselves: equal ones stay equal, and the first can stand for all."""
    config = dataclasses.replace(CONFIG, **changes)
    model = make_checkpoint(tmp_path / "model", config)
    video = Video(uri=str(write_video(tmp_path / "a.mkv", frames_of(STILL)[: config.num_frames])))
    clips = plan_video(video, ClipPlan(span_s=config.num_frames / 10))
    table = pa.Table.from_pylist([dataclasses.asdict(clip) for clip in clips], schema=MANIFEST)
    whole, dropped = (tokens_of(tokenize_table(table, config, options), config)[0] for options in (WHOLE_CLIPS, EXACT))
    assert dropped.patches.size < 0.3 * whole.patches.size
    scorer = Annotator(model, 1.0, 3)
    np.testing.assert_allclose(
        scorer.probabilities(dropped, 1.0), scorer.probabilities(whole, 1.0), rtol=1e-4, atol=1e-6
    )


# Size of a video, and (top, left) of three windows of 64 x 64 in it.
VIEWS = {"wide": ((161, 64), [(0, 0), (0, 48), (0, 97)]), "tall": ((64, 161), [(0, 0), (48, 0), (97, 0)])}


def planned(path) -> pa.Table:
    clips = plan_video(Video(uri=str(path)), ClipPlan(span_s=1.0))
    return pa.Table.from_pylist([dataclasses.asdict(clip) for clip in clips], schema=MANIFEST)


@pytest.mark.parametrize("shape", VIEWS)
def test_several_views_are_one_clip_with_the_mean_of_their_probabilities(tmp_path, checkpoint, shape):
    size, places = VIEWS[shape]
    frames = indexed_frames(10, *size)
    decoded = tokenize_table(planned(write_video(tmp_path / "a.mkv", frames)), CONFIG, TokenOptions(views=3))
    crops = np.stack([frames[:, top : top + 64, left : left + 64] for top, left in places])
    (tokens,) = tokens_of(decoded, CONFIG)
    np.testing.assert_array_equal(tokens.patches, to_patches(crops, CONFIG)[None])
    with torch.inference_mode():
        logits_VC = checkpoint.build()(torch.from_numpy(to_patches(crops, CONFIG)), 0.5).logits_BC
    assert np.ptp(logits_VC.softmax(-1).numpy(), axis=0).max() > 1e-3  # views that differ in their answers
    (row,) = Annotator(checkpoint, 0.5, 3)(decoded).to_pylist()
    scores = dict(zip(row["labels"], row["scores"], strict=True))
    np.testing.assert_allclose([scores[x] for x in LABELS], logits_VC.softmax(-1).mean(0), rtol=1e-4)
    one = clip_compute(CONFIG, 0.5)
    assert (row["flops"], row["kept_flops"], row["dense_flops"]) == (3 * one.flops, *[3 * one.dense_flops] * 2)
    assert row["tokens_per_expert"] == [3 * tokens for tokens in one.tokens_per_expert]
    (scored,) = Scorer(checkpoint, (0.5, 1.0))(decoded).to_pylist()
    np.testing.assert_allclose(scored["probabilities"][:3], logits_VC.softmax(-1).mean(0), rtol=1e-4)
    assert scored["flops"] == [3 * one.flops, 3 * one.dense_flops]


def test_views_of_a_video_of_the_models_shape_are_equal_and_so_is_the_answer(manifest, checkpoint):
    decoded = tokenize_table(manifest, CONFIG, TokenOptions(views=3))
    (tokens,) = tokens_of(decoded, CONFIG)
    assert tokens.kept_BK is None and (tokens.patches == tokens.patches[:, :1]).all()
    annotator = Annotator(checkpoint, 0.5, 3)
    three, one = annotator(decoded).to_pylist(), annotator(tokenize_table(manifest, CONFIG)).to_pylist()
    for row, alone in zip(three, one, strict=True):
        np.testing.assert_allclose(row["scores"], alone["scores"], rtol=1e-4)
        for name in ("flops", "kept_flops", "dense_flops"):
            assert row[name] == 3 * alone[name]
        assert row["labels"] == alone["labels"] and row["status"] == alone["status"]


def test_views_of_several_clips_stay_with_their_clips(tmp_path, checkpoint):
    wide, tall = (planned(write_video(tmp_path / f"{n}.mkv", indexed_frames(10, *s))) for n, (s, _) in VIEWS.items())
    options, annotator = TokenOptions(views=3), Annotator(checkpoint, 0.5, 3)
    together = annotator(tokenize_table(pa.concat_tables([tall, wide, tall]), CONFIG, options)).to_pylist()
    for row, table in zip(together, (tall, wide, tall), strict=True):
        (alone,) = annotator(tokenize_table(table, CONFIG, options)).to_pylist()
        np.testing.assert_allclose(row["scores"], alone["scores"], rtol=1e-4)
        assert (row["video"], row["labels"]) == (alone["video"], alone["labels"])
