"""Odd, damaged and hostile files of the world: every one gives its rows, with the right frames or a reason."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mone.config import ModelConfig
from mone.tubelets import to_frames
from pipelines.archive import Video
from pipelines.manifest import plan_video
from pipelines.picture import picture
from pipelines.probe import decode_frames, first_pts, open_video
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan, instants
from pipelines.tokenize import tokenize_table, tokens_of
from pipelines.view import View

WILD = Path(__file__).parents[3] / "shared" / "data" / "wild"
CONFIG = ModelConfig(num_classes=2, num_frames=8, height_px=64, width_px=64, dim=32, num_heads=4)
# Clips that cover the file, and three short ones inside it, whose starts have to be sought.
PLANS = {"covered": ClipPlan(span_s=2.56), "sought": ClipPlan(span_s=0.3, clips_per_video=3)}
_REFERENCE_FRAMES = 600
_REFERENCE_PIXELS = 1920 * 1080

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WILD.is_dir(), reason="borrowed videos are not here: ../shared/data/wild"),
]


def listed(*expected: str) -> list[str]:
    if not WILD.is_dir():
        return []
    with (WILD / "manifest.csv").open() as file:
        return [row["file"] for row in csv.DictReader(file) if row["expected"] in expected]


def rows_of(name: str, plan: ClipPlan) -> pa.Table:
    clips = plan_video(Video(uri=str(WILD / name)), plan)
    assert clips and len({clip.clip_id for clip in clips}) == len(clips)
    manifest = pa.Table.from_pylist([dataclasses.asdict(clip) for clip in clips], schema=MANIFEST)
    decoded = tokenize_table(manifest, CONFIG)
    assert decoded["clip_id"].to_pylist() == manifest["clip_id"].to_pylist()
    return decoded


def good_files():
    return pytest.mark.parametrize("name, plan", [(name, plan) for name in listed("decode") for plan in PLANS])


every_plan = pytest.mark.parametrize("plan", PLANS)


@good_files()
def test_good_files_give_every_clip(name, plan):
    for row in rows_of(name, PLANS[plan]).to_pylist():
        assert (row["status"], row["error"]) == ("ok", ""), row["error"]


@every_plan
@pytest.mark.parametrize("name", listed("reject"))
def test_bad_files_give_a_reason(name, plan):
    for row in rows_of(name, PLANS[plan]).to_pylist():
        assert row["status"] in {"decode_error", "empty", "unsupported", "missing", "timeout"} and row["error"]


@every_plan
@pytest.mark.parametrize("name", listed("partial"))
def test_damaged_files_give_what_is_left_and_say_so(name, plan):
    rows = rows_of(name, PLANS[plan]).to_pylist()
    assert any(row["status"] == "ok" for row in rows)
    assert any("partial" in row["note"] + row["error"] for row in rows)


@good_files()
def test_frames_are_those_of_decoding_from_the_start(name, plan):
    """No seek, no second decoder: the stream from its first packet on. Scaling may differ as in test_decode."""
    decoded = rows_of(name, PLANS[plan])
    view = View(num_frames=CONFIG.num_frames, height_px=CONFIG.height_px, width_px=CONFIG.width_px)
    times_s, frames = [], []
    container, stream = open_video(str(WILD / name))
    with container:
        if stream.codec_context.width * stream.codec_context.height > _REFERENCE_PIXELS:
            pytest.skip("too large for a reference in memory")
        zero = first_pts(stream)
        for frame in decode_frames(container, stream, []):
            times_s.append(float((frame.pts - zero) * stream.time_base))
            frames.append(picture(frame, view))
            if len(frames) == _REFERENCE_FRAMES:
                break
    if (np.diff(times_s) < 0).any():
        pytest.skip("its clock runs backwards: which frame is on display is anyone's guess")
    starts_s, reference = np.array(times_s), np.stack(frames).astype(int)
    shown = to_frames(tokens_of(decoded, CONFIG)[0].patches[:, 0], CONFIG)
    checked = 0
    for row, clip_THWC in zip([row for row in decoded.to_pylist() if row["status"] == "ok"], shown, strict=True):
        for time_s, frame_HWC in zip(instants(row["start_s"], row["end_s"], CONFIG.num_frames), clip_THWC, strict=True):
            if len(frames) == _REFERENCE_FRAMES and time_s > starts_s[-1]:
                continue
            # Either side of a boundary will do: two readers round the same clock.
            near = {
                max(int(np.searchsorted(starts_s, time_s + margin_s, "right")) - 1, 0) for margin_s in (-2e-3, 2e-3)
            }
            assert min(np.abs(reference[index] - frame_HWC).mean() for index in near) < 5, (row["decoder"], time_s)
            checked += 1
    assert checked
