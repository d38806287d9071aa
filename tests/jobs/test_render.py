"""Rendering a labelled set: files that decode, a table that names them."""

import av
import pytest

import jobs.render
from pipelines.archive import list_labelled
from pipelines.synthetic import MOTIONS, split_seeds


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered") / "set"
    arguments = ["--output", folder, "--split", "val", "--clips", 14, "--size", 64, "--frames", 8]
    assert jobs.render.main(list(map(str, arguments))) == 0
    return folder


def test_the_table_names_every_clip_with_its_class_and_split(rendered):
    videos = list(list_labelled(str(rendered)))
    assert [video.label for video in videos] == [*MOTIONS, *MOTIONS[:2]]
    assert {video.split for video in videos} == {"val"}
    names = [video.uri.rpartition("/")[2] for video in videos]
    assert names == [f"{video.label}_{seed}.mp4" for video, seed in zip(videos, split_seeds("val", 14), strict=True)]
    assert {path.name for path in rendered.iterdir()} == {*names, "labels.csv"}


def test_the_clips_have_the_size_and_frames_asked_for(rendered):
    for video in list_labelled(str(rendered)):
        with av.open(video.uri) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == 8 and {(frame.width, frame.height) for frame in frames} == {(64, 64)}
