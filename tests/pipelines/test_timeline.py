"""Spans and instants, against what their names promise and a slow loop."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.timeline import ClipPlan, frames_at, instants

oracle = settings(max_examples=60, deadline=None, derandomize=True)
durations_s = st.floats(0.01, 200)
spans_s = st.floats(0.1, 60)
TICK_S = 2e-6  # starts are rounded to microseconds
TAIL_S = 0.05  # about a frame: the end of a video is not known better


def check_spans(spans: list[tuple[float, float]], plan: ClipPlan, duration_s: float) -> None:
    starts = [start for start, _ in spans]
    assert all(0 <= start < end <= duration_s + TICK_S for start, end in spans)
    assert starts == sorted(set(starts))
    if duration_s > plan.span_s + TAIL_S:
        assert [end - start for start, end in spans] == pytest.approx([plan.span_s] * len(spans))
    else:
        assert spans == [(0.0, duration_s)]


@oracle
@given(durations_s, spans_s, st.floats(0.2, 1))
def test_covering_leaves_no_gap(duration_s, span_s, stride_share):
    plan = ClipPlan(span_s=span_s, stride_s=span_s * stride_share)
    spans = plan.spans(duration_s)
    check_spans(spans, plan, duration_s)
    assert spans[0][0] == 0 and spans[-1][1] >= duration_s - TAIL_S - TICK_S
    assert all(later[0] <= earlier[1] + TICK_S for earlier, later in itertools.pairwise(spans))


@oracle
@given(durations_s, spans_s)
def test_side_by_side_is_the_default(duration_s, span_s):
    spans = ClipPlan(span_s=span_s).spans(duration_s)
    assert spans == ClipPlan(span_s=span_s, stride_s=span_s).spans(duration_s)
    assert len(spans) <= np.ceil(duration_s / span_s) + 1e-9
    for earlier, later in itertools.pairwise(spans[:-1]):
        assert later[0] == pytest.approx(earlier[1], abs=TICK_S)


@oracle
@given(durations_s, spans_s, st.floats(1, 20))
def test_a_long_stride_keeps_its_distance(duration_s, span_s, factor):
    plan = ClipPlan(span_s=span_s, stride_s=span_s * factor)
    spans = plan.spans(duration_s)
    check_spans(spans, plan, duration_s)
    regular = spans[:-1]
    assert [start for start, _ in regular] == pytest.approx([i * plan.stride_s for i in range(len(regular))], abs=1e-5)


@oracle
@given(spans_s, st.integers(1, 20), st.floats(1, 30))
def test_a_number_of_clips_that_fits_is_met(span_s, count, roominess):
    duration_s = span_s * count * roominess + 2 * TAIL_S
    plan = ClipPlan(span_s=span_s, clips_per_video=count)
    spans = plan.spans(duration_s)
    check_spans(spans, plan, duration_s)
    assert len(spans) == count
    centres = [(start + end) / 2 / duration_s for start, end in spans]
    assert centres == pytest.approx([(i + 0.5) / count for i in range(count)], abs=1e-4)


@oracle
@given(durations_s, spans_s, st.integers(1, 30))
def test_a_number_of_clips_that_does_not_fit_still_gives_valid_spans(duration_s, span_s, count):
    plan = ClipPlan(span_s=span_s, clips_per_video=count)
    spans = plan.spans(duration_s)
    check_spans(spans, plan, duration_s)
    assert 1 <= len(spans) <= count


@pytest.mark.parametrize(
    "sizes",
    [
        {"span_s": 0},
        {"span_s": -1},
        {"span_s": float("inf")},
        {"span_s": float("nan")},
        {"span_s": 1, "stride_s": -1},
        {"span_s": 1, "stride_s": float("nan")},
        {"span_s": 1, "clips_per_video": -1},
        {"span_s": 1, "stride_s": 1, "clips_per_video": 1},
    ],
)
def test_impossible_plans_are_refused(sizes):
    with pytest.raises(ValueError):
        ClipPlan(**sizes)


@oracle
@given(st.floats(0, 1e5), st.floats(0.01, 100), st.integers(1, 64))
def test_instants_are_centres_of_equal_parts_of_the_span(start_s, length_s, count):
    times_s = instants(start_s, start_s + length_s, count)
    assert times_s.shape == (count,) and times_s.dtype == np.float64
    assert (start_s < times_s).all() and (times_s < start_s + length_s).all()
    edges = np.linspace(start_s, start_s + length_s, count + 1)
    np.testing.assert_allclose(times_s, (edges[:-1] + edges[1:]) / 2, rtol=0, atol=1e-9)


@oracle
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=40, unique=True).map(sorted),
    st.lists(st.integers(-100, 2500), min_size=1, max_size=20),
)
def test_the_frame_on_display_is_the_last_that_started(starts_cs, times_cs):
    starts_s = np.array(starts_cs) / 100
    times_s = np.array(times_cs) / 100 + 0.005  # between the hundredths: away from the rounding of time bases
    expected = []
    for time_s in times_s:
        index = 0
        for candidate, start_s in enumerate(starts_s):
            if start_s <= time_s:
                index = candidate
        expected.append(index)
    assert frames_at(times_s, starts_s).tolist() == expected


def test_a_frame_time_rounded_up_by_its_container_still_counts():
    assert frames_at(np.array([0.0333333]), np.array([0.0, 0.034])).tolist() == [1]
