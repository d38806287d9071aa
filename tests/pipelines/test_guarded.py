"""Files that hang, crash or fill the memory of their decoder end as outcomes, and leave their neighbours alone."""

import dataclasses
import os
import shutil
import time

import numpy as np
import pytest

from pipelines import guarded
from pipelines.decode import decode_clips
from pipelines.decoded import Clip, Source
from pipelines.failure import DecodeFailure
from pipelines.guarded import Request, decode_guarded, probe_guarded
from pipelines.limits import Limits
from pipelines.probe import file_identity, probe
from pipelines.schema import Status
from pipelines.view import View
from tests.media import indexed_frames, read_index, write_video
from tests.pipelines.test_child import crash, hang_with_the_lock, take_memory_and_hang
from tests.web_server import stall

SPANS = [(0.0, 0.8), (0.8, 1.6), (1.6, 2.4), (2.4, 3.2), (3.2, 4.0)]
POISON_S = 2.0
VIEW = View(num_frames=8, height_px=64, width_px=64)
ENOUGH = Limits(memory_bytes=256 << 20)
SHORT = Limits(timeout_s=0.5, memory_bytes=256 << 20)


@pytest.fixture
def source(tmp_path) -> Source:
    path = write_video(tmp_path / "a.mp4", indexed_frames(40))
    info = probe(str(path))
    return Source(path=str(path), width_px=64, height_px=64, container=info.container, codec=info.codec)


def fill_memory() -> None:
    take_memory_and_hang(400 << 20)


def crashing(source, spans, view, decoders):
    return _poisonous(crash, source, spans, view, decoders)


def filling(source, spans, view, decoders):
    return _poisonous(fill_memory, source, spans, view, decoders)


def _poisonous(end, source, spans, view, decoders):
    """A chain of decoders that ends its process wherever a span holds the moment POISON_S."""
    if any(start_s <= POISON_S < end_s for start_s, end_s in spans):
        end()
    return decode_clips(source, spans, view, decoders)


def only_the_first_crashes(source, spans, view, decoders):
    if not decoders:
        crash()
    return decode_clips(source, spans, view, decoders)


def always_hanging(source, spans, view, decoders):
    hang_with_the_lock()


def fine(outcome) -> list[int]:
    assert isinstance(outcome, Clip), outcome
    return [read_index(frame) for frame in outcome.frames_THWC]


def test_outcomes_are_those_of_decoding_here(source):
    requests = [Request(source, SPANS), Request(source, SPANS[2:3]), Request(source, [(9.0, 9.8), SPANS[0]])]
    for request, decoded in zip(requests, decode_guarded(requests, VIEW), strict=True):
        for found, expected in zip(decoded.outcomes, decode_clips(*request, VIEW), strict=True):
            assert type(found) is type(expected) and decoded.decode_s > 0
            if isinstance(found, Clip):
                assert (found.decoder, found.note) == (expected.decoder, expected.note)
                np.testing.assert_array_equal(found.frames_THWC, expected.frames_THWC)
            else:
                assert (str(found), found.status) == (str(expected), expected.status)


@pytest.mark.parametrize(
    "decode, status, reason",
    [(crashing, Status.DECODE_ERROR, "SIGSEGV"), (filling, Status.UNSUPPORTED, "0.25 GiB")],
    ids=["crash", "memory"],
)
def test_a_poisonous_span_does_not_take_its_neighbours_along(source, decode, status, reason):
    requests = [Request(source, SPANS), Request(source, SPANS[:1])]
    ((outcomes, _), after) = decode_guarded(requests, VIEW, ENOUGH, decode)
    poisoned = outcomes[2]
    assert isinstance(poisoned, DecodeFailure) and poisoned.status == status and reason in str(poisoned)
    for place in (0, 1, 3, 4):
        assert fine(outcomes[place]) == list(range(8 * place, 8 * place + 8))
        assert reason in outcomes[place].note
    assert fine(after.outcomes[0]) == list(range(8)) and after.outcomes[0].note == ""


def test_where_decoding_crashed_the_last_decoder_has_its_turn(source):
    ((outcomes, _),) = decode_guarded([Request(source, SPANS)], VIEW, decode=only_the_first_crashes)
    assert [number for outcome in outcomes for number in fine(outcome)] == list(range(40))
    assert {(outcome.decoder, outcome.note) for outcome in outcomes} == {("decord", "decoding ended by SIGSEGV")}


def test_a_file_that_always_hangs_is_given_up_soon(source, monkeypatch):
    monkeypatch.setattr(Limits, "decode_s", lambda self, source, spans: self.timeout_s)
    started_s = time.monotonic()
    hung, alone = decode_guarded([Request(source, SPANS), Request(source, SPANS[:1])], VIEW, SHORT, always_hanging)
    assert all(isinstance(outcome, DecodeFailure) for outcome in hung.outcomes + alone.outcomes)
    assert {outcome.status for outcome in hung.outcomes + alone.outcomes} == {Status.TIMEOUT}
    assert ["not tried" in str(outcome) for outcome in hung.outcomes] == [False, False, True, True, True]
    # Twice all clips, two by themselves, twice the one of the other request.
    limits_s = 6 * SHORT.timeout_s
    assert limits_s <= time.monotonic() - started_s < limits_s + 60


@pytest.mark.parametrize("clips_at_once", [1, 2, 3])
def test_what_does_not_fit_into_the_memory_goes_in_parts(source, clips_at_once, monkeypatch):
    limits = Limits()
    monkeypatch.setattr(Limits, "clips_at_once", lambda self, view: clips_at_once)
    ((outcomes, _),) = decode_guarded([Request(source, SPANS)], VIEW, limits)
    assert [number for outcome in outcomes for number in fine(outcome)] == list(range(40))


def test_the_limits_grow_with_the_work(source):
    limits = Limits(timeout_s=10, memory_bytes=6 << 20)
    assert limits.probe_s(0) == 10 and limits.probe_s(200 << 20) == 20
    assert limits.decode_s(source, SPANS) == limits.decode_s(source, SPANS[::-1]) == 14
    large = Source(path="", width_px=3840, height_px=2160, container="mov", codec="h264")
    assert limits.decode_s(large, SPANS) == 10 + 4 * 4
    assert limits.clips_at_once(VIEW) == (1 << 20) // (8 * 64 * 64 * 3)
    assert limits.clips_at_once(View(num_frames=8, height_px=640, width_px=640)) == 1


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_bytes": 0}])
def test_limits_must_be_positive(options):
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**options)


def crashing_probe(path):
    os.abort()


def hanging_probe(path):
    hang_with_the_lock()


def filling_probe(path):
    fill_memory()


@pytest.mark.parametrize(
    "probe_, status, reason",
    [
        (crashing_probe, Status.DECODE_ERROR, "probing ended by SIGABRT"),
        (hanging_probe, Status.TIMEOUT, "probing ended: no answer after 0.5 s"),
        (filling_probe, Status.UNSUPPORTED, "probing ended: it took more than 0.25 GiB of memory"),
    ],
)
def test_a_probe_that_is_ended_is_a_failure(source, monkeypatch, probe_, status, reason):
    assert probe_guarded(source.path, 1) == probe(source.path)
    with monkeypatch.context() as patched:
        patched.setattr(guarded, "probe_by_any", probe_)
        with pytest.raises(DecodeFailure) as caught:
            probe_guarded(source.path, 1, SHORT if status == Status.TIMEOUT else ENOUGH)
    assert (caught.value.status, str(caught.value)) == (status, reason)
    assert probe_guarded(source.path, 1) == probe(source.path)


def test_remote_files_are_read_there_with_their_signature(web, source):
    shutil.copy(source.path, web.folder / "a.mp4")
    web.query = "sig=5ecret"
    signed = f"{web.url}/a.mp4?{web.query}"
    size_bytes, _ = file_identity(signed)
    assert probe_guarded(signed, size_bytes) == probe(source.path)
    ((outcomes, _),) = decode_guarded([Request(dataclasses.replace(source, path=signed), SPANS)], VIEW)
    assert [number for outcome in outcomes for number in fine(outcome)] == list(range(40))
    with pytest.raises(DecodeFailure, match="403") as refused:
        probe_guarded(f"{web.url}/a.mp4?sig=stolen", size_bytes)
    assert refused.value.status == Status.MISSING
    web.faults = [stall]
    with pytest.raises(DecodeFailure) as late:
        probe_guarded(signed, 1, SHORT)
    assert late.value.status == Status.TIMEOUT and "5ecret" not in str(late.value)


def test_failures_of_the_probe_come_as_they_are(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"rubbish" * 100)
    with pytest.raises(DecodeFailure) as here:
        probe(str(tmp_path / "a.mp4"))
    with pytest.raises(DecodeFailure) as there:
        probe_guarded(str(tmp_path / "a.mp4"), 700)
    assert (here.value.status, str(here.value)) == (there.value.status, str(there.value))


def test_a_frame_too_large_for_its_memory_is_unsupported(tmp_path):
    """A few kilobytes that hold frames of 35 megapixels."""
    frames = np.zeros((4, 4320, 8192, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", frames, codec="libx264", options={"preset": "ultrafast"})
    assert path.stat().st_size < 200_000
    info = probe_guarded(str(path), path.stat().st_size)
    source = Source(path=str(path), width_px=8192, height_px=4320, container=info.container, codec=info.codec)
    ((found, _), (refused, _)) = (
        next(decode_guarded([Request(source, [(0.0, 0.4)])], VIEW, limits))
        for limits in (Limits(), Limits(memory_bytes=80 << 20))
    )
    assert isinstance(found[0], Clip)
    assert isinstance(refused[0], DecodeFailure) and refused[0].status == Status.UNSUPPORTED
