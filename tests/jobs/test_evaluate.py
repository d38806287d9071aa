"""Accuracy against a computation by hand on the same decoded clips; what cannot be decoded counts as wrong."""

import contextlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs.evaluate
from jobs.evaluate import Evaluate, wilson_interval
from mone.compute import clip_compute
from mone.tubelets import to_patches
from pipelines.archive import list_labelled
from pipelines.decode import decode_clips
from pipelines.decoded import Clip
from pipelines.evaluate import ScoredClip, score_videos
from pipelines.manifest import plan_video, source_of
from pipelines.patches import view_of
from pipelines.synthetic import MOTIONS
from pipelines.timeline import ClipPlan
from tests.conftest import NUM_VIDEOS, TINY, run_job, write_labels

CAPACITIES = (0.2, 0.4, 1.0)
PLAN = ClipPlan(span_s=1.0)


@pytest.fixture(scope="module")
def by_hand(archive, checkpoint) -> dict[str, np.ndarray]:
    """Mean class probabilities of each readable video, float32 [K, C]."""
    model, means = checkpoint.build(), {}
    for video in list_labelled(str(archive)):
        planned = plan_video(video, PLAN)
        if planned[0].status != "ok":
            continue
        spans = [(clip.start_s, clip.end_s) for clip in planned]
        clips = [clip for clip in decode_clips(source_of(planned[0]), spans, view_of(TINY)) if isinstance(clip, Clip)]
        assert len(clips) == 2
        patches = torch.from_numpy(np.stack([to_patches(clip.frames_THWC, TINY) for clip in clips]))
        with torch.inference_mode():
            scores = [model(patches, capacity).logits_BC.softmax(-1).mean(0).numpy() for capacity in CAPACITIES]
        means[video.uri] = np.stack(scores)
    assert len(means) == NUM_VIDEOS
    return means


@pytest.fixture
def half_right(tmp_path, archive, by_hand) -> Path:
    """A table in which every other video has the label that the model gives it at capacity 0.4."""
    rows = []
    for number, (video, means_KC) in enumerate(by_hand.items()):
        best = int(means_KC[1].argmax())
        rows.append((video, MOTIONS[best if number % 2 else (best + 1) % 12], "test"))
    rows += [(str(archive.parent / "damaged.mp4"), "left", "test"), (str(archive.parent / "text.mp4"), "left", "other")]
    return write_labels(tmp_path / "half-right.csv", rows)


@pytest.mark.ray
def test_scores_are_those_of_a_loop(shared_ray, archive, checkpoint, by_hand):
    scored, errors = defaultdict(list), {}
    for clip in score_videos(list_labelled(str(archive)), PLAN, checkpoint, CAPACITIES):
        if clip.error:
            assert clip.probabilities_KC.size == 0
            errors[Path(clip.video).name] = clip.error
        else:
            scored[clip.video].append(clip.probabilities_KC)
    assert {video: len(clips) for video, clips in scored.items()} == dict.fromkeys(by_hand, 2)
    for video, clips in scored.items():
        np.testing.assert_allclose(np.mean(clips, axis=0), by_hand[video], rtol=1e-3, atol=1e-5)
    assert errors.keys() == {"damaged.mp4", "text.mp4"}
    assert errors["damaged.mp4"].startswith("empty: ") and errors["text.mp4"].startswith("decode_error: ")


@pytest.mark.ray
def test_the_job_says_what_a_computation_by_hand_says(
    shared_ray, monkeypatch, capsys, half_right, model_folder, by_hand
):
    """In the session's Ray."""
    monkeypatch.setattr(jobs.evaluate, "connected", lambda address: contextlib.nullcontext())
    arguments = ["--model", model_folder, "--data", half_right, "--split", "test", "--capacity", *CAPACITIES]
    assert jobs.evaluate.main(list(map(str, arguments))) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert (result["videos"], result["clips"], result["split"]) == (NUM_VIDEOS + 1, 2 * NUM_VIDEOS + 1, "test")
    assert {Path(video).name for video in result["failures"]} == {"damaged.mp4"}
    assert any("damaged.mp4" in line for line in lines[:-1])
    labels = {video.uri: video.label for video in list_labelled(str(half_right))}
    for index, row in enumerate(result["results"]):
        right = sum(MOTIONS[int(means_KC[index].argmax())] == labels[video] for video, means_KC in by_hand.items())
        assert row["capacity"] == CAPACITIES[index]
        assert row["top1"] == right / (NUM_VIDEOS + 1)
        assert (row["low"], row["high"]) == pytest.approx(wilson_interval(right, NUM_VIDEOS + 1))
        assert row["flops_per_clip"] == clip_compute(TINY, CAPACITIES[index]).flops
        assert row["dense_flops_per_clip"] == clip_compute(TINY, 1.0).flops
        assert any(f"{100 * row['top1']:.1f}%" in line for line in lines[:-1])
    assert result["results"][1]["top1"] == NUM_VIDEOS // 2 / (NUM_VIDEOS + 1)


@pytest.mark.ray
@pytest.mark.slow
def test_the_last_line_of_stdout_is_json(half_right, model_folder):
    ended = run_job("evaluate", "--model", model_folder, "--data", half_right, "--capacity", 0.4)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["videos"] == NUM_VIDEOS + 2 and len(result["results"]) == 1


def scored(video: str, label: str, *probabilities: list[float], error: str = "") -> ScoredClip:
    costs = tuple(100 + number for number in range(len(probabilities)))
    return ScoredClip(video, label, error, np.array(probabilities, dtype=np.float32), costs, 1000 if costs else 0)


def padded(**of_label: float) -> list[float]:
    return [of_label.get(label, 0.0) for label in MOTIONS]


def result_of(clips: list[ScoredClip], checkpoint, capacity: tuple[float, ...] = (0.4,)) -> dict:
    return jobs.evaluate._result(clips, capacity, Evaluate(data="d", capacity=capacity), checkpoint)


def test_a_video_is_judged_by_the_mean_of_its_clips(checkpoint):
    clips = [
        scored("a", "left", padded(left=0.4, right=0.6)),
        scored("b", "up", padded(up=1.0)),
        scored("a", "left", padded(left=0.9, right=0.1)),  # outvotes the first, which alone is wrong
        scored("b", "up", padded(down=0.7, up=0.3)),
        scored("c", "left", padded(right=1.0)),
    ]
    result = result_of(clips, checkpoint)
    assert result["results"][0]["top1"] == 2 / 3
    assert (result["videos"], result["clips"], result["failures"]) == (3, 5, {})


def test_each_capacity_has_its_own_answers(checkpoint):
    clips = [scored("a", "left", padded(left=1.0), padded(right=1.0)), scored("b", "up", padded(up=1.0), padded(up=1))]
    assert [row["top1"] for row in result_of(clips, checkpoint, (0.2, 1.0))["results"]] == [1.0, 0.5]


def test_an_undecodable_video_is_wrong_and_named_and_a_clip_of_one_is_left_out(checkpoint):
    clips = [
        scored("/videos/gone.mp4", "left", error="missing: no such file"),
        scored("/videos/half.mp4", "up", padded(up=1.0)),
        scored("/videos/half.mp4", "up", error="decode_error: damaged"),
    ]
    result = result_of(clips, checkpoint)
    assert result["results"][0]["top1"] == 0.5
    assert result["failures"] == {
        "/videos/gone.mp4": "missing: no such file",
        "/videos/half.mp4": "decode_error: damaged",
    }
    row = result["results"][0]  # operations are those of the clips that were run
    assert (row["flops_per_clip"], row["dense_flops_per_clip"]) == (100, 1000)


def test_two_failures_of_one_name_are_both_named(checkpoint):
    clips = [
        scored("/data/left/1.mp4", "left", error="missing: no such file"),
        scored("/data/up/1.mp4", "up", error="empty: the file has 0 bytes"),
    ]
    assert len(result_of(clips, checkpoint)["failures"]) == 2


@pytest.mark.parametrize(
    "right, total, low, high",
    [
        # Newcombe (1998), table I, method 3; the last by R's prop.test(5, 10, correct = FALSE).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_the_interval_is_wilsons(right, total, low, high):
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)
    mirrored_low, mirrored_high = wilson_interval(total - right, total)
    assert (1 - mirrored_high, 1 - mirrored_low) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_is_one_of_shares():
    for total in range(1, 60):
        for right in (0, total // 2, total):
            low, high = wilson_interval(right, total)
            assert 0 <= low < high <= 1
