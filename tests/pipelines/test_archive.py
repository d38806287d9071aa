"""Every way to name an archive gives the same videos; what cannot be listed is refused in one line that names it."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from pipelines.archive import ArchiveError, list_labelled, list_videos
from pipelines.manifest import plan_video
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan

ODD_NAMES = ["with space.mp4", "a+b.mp4", "ünï-視頻.mp4", "two\nlines.mp4", "50%#?.mp4", "[1].mp4", "quo\"te's,.mp4"]


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def write_table(path: Path, rows: list[dict]) -> Path:
    table = pa.Table.from_pylist(rows)
    match path.suffix:
        case ".csv":
            pa.csv.write_csv(table, path)
        case ".parquet":
            pa.parquet.write_table(table, path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def uris(archive: Path | str) -> list[str]:
    return [video.uri for video in list_videos(str(archive))]


def refusal(archive: Path | str, listing=list_videos) -> str:
    with pytest.raises(ArchiveError) as caught:
        list(listing(str(archive)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_searched_recursively_for_video_extensions_in_order(tmp_path):
    videos = [touch(tmp_path / name) for name in ("b/2.mkv", "b/10.MP4", "a.webm", "c/d/e/x.avi")]
    for name in ("notes.txt", "b/labels.csv", "b/2.mkv.part", "mp4"):
        touch(tmp_path / name)
    assert sorted(uris(tmp_path)) == sorted(map(str, videos))
    assert uris(tmp_path) == uris(tmp_path / "b" / "..")
    assert [Path(uri).name for uri in uris(tmp_path / "b")] == ["10.MP4", "2.mkv"]


def test_the_order_of_a_folder_does_not_depend_on_the_order_of_creation(tmp_path):
    names = ["z/1.mp4", "a/2.mp4", "m.mp4", "a/1.mp4", "b.mp4"]
    for side, order in (("x", names), ("y", reversed(names))):
        for name in order:
            touch(tmp_path / side / name)
    relative = [[os.path.relpath(uri, tmp_path / side) for uri in uris(tmp_path / side)] for side in ("x", "y")]
    assert relative[0] == relative[1]


def test_a_folder_is_searched_through_links_once(tmp_path):
    touch(tmp_path / "elsewhere" / "a.mp4")
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "link").symlink_to(tmp_path / "elsewhere")
    assert [Path(uri).name for uri in uris(tmp_path / "archive")] == ["a.mp4"]


def test_a_loop_of_links_lists_each_video_once(tmp_path):
    video = touch(tmp_path / "archive" / "a.mp4")
    (tmp_path / "archive" / "loop").symlink_to(tmp_path / "archive")
    assert uris(tmp_path / "archive") == [str(video)]


@pytest.mark.parametrize("pattern, expected", [("*.mp4", 2), ("**/*.mp4", 3), ("?.mkv", 1), ("sub/*", 1)])
def test_a_glob(tmp_path, pattern, expected):
    for name in ("b.mp4", "a.mp4", "c.mkv", "sub/d.mp4"):
        touch(tmp_path / name)
    found = uris(tmp_path / pattern)
    assert len(found) == expected and found == sorted(found)


def test_a_glob_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    video = touch(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    assert uris("*.mp4") == uris("a.mp4") == uris(".") == [str(video)]


def test_a_single_file_of_any_extension(tmp_path):
    video = touch(tmp_path / "camera.bin")
    assert uris(video) == uris(f"file://{video}") == [str(video)]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("form", ["folder", "glob", "file", ".csv", ".parquet", ".jsonl"])
def test_names_survive(tmp_path, name, form):
    video = touch(tmp_path / "videos" / name)
    archive = {"folder": video.parent, "glob": video.parent / "*", "file": video}.get(form)
    archive = archive or write_table(tmp_path / f"list{form}", [{"video": f"videos/{name}"}])
    assert uris(archive) == [str(video)]


@pytest.mark.parametrize("extension", [".csv", ".parquet", ".jsonl"])
def test_a_table(tmp_path, extension, monkeypatch):
    rows = [
        {"video": "b.mp4", "label": "run", "split": "train", "frames": 3},
        {"video": "sub/../a.mp4", "label": "walk", "split": "test", "frames": 4},
        {"video": "/else/where.mkv", "label": "run", "split": "val", "frames": 5},
    ]
    (tmp_path / "folder").mkdir()
    table = write_table(tmp_path / "folder" / f"list{extension}", rows)
    monkeypatch.chdir(tmp_path)
    expected = [f"{tmp_path}/folder/b.mp4", f"{tmp_path}/folder/a.mp4", "/else/where.mkv"]
    for archive in (table, table.relative_to(tmp_path)):
        videos = list(list_videos(str(archive)))
        assert [video.uri for video in videos] == expected
        assert [(video.label, video.split) for video in videos] == [(row["label"], row["split"]) for row in rows]


@pytest.mark.parametrize("extension", [".csv", ".parquet", ".jsonl"])
def test_a_table_of_videos_alone_has_no_labels(tmp_path, extension):
    table = write_table(tmp_path / f"list{extension}", [{"video": "a.mp4"}])
    assert [(video.label, video.split) for video in list_videos(str(table))] == [("", "")]


@pytest.mark.parametrize("extension", [".csv", ".parquet", ".jsonl"])
def test_a_video_listed_twice_appears_once(tmp_path, extension):
    rows = [{"video": "a.mp4"}, {"video": "b.mp4"}, {"video": "./a.mp4"}, {"video": str(tmp_path / "b.mp4")}]
    found = uris(write_table(tmp_path / f"list{extension}", rows))
    assert found == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]


def test_numbers_as_labels_are_names(tmp_path):
    table = write_table(tmp_path / "list.jsonl", [{"video": "a.mp4", "label": 3}, {"video": "b.mp4", "label": 12}])
    assert [video.label for video in list_videos(str(table))] == ["3", "12"]


@pytest.mark.parametrize("text", ["007", "True", "1.0", "2020-01-01 00:00", "NA"])
@pytest.mark.parametrize("column", ["video", "label", "split"])
def test_csv_text_is_taken_as_it_stands(tmp_path, column, text):
    row = {"video": "a.mp4", "label": "x", "split": "train"} | {column: text}
    (tmp_path / "list.csv").write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    (video,) = list_videos(str(tmp_path / "list.csv"))
    assert (Path(video.uri).name, video.label, video.split) == tuple(row.values())


@pytest.mark.parametrize("extension", [".csv", ".parquet", ".jsonl"])
def test_a_table_without_videos_names_its_columns(tmp_path, extension):
    message = refusal(write_table(tmp_path / f"list{extension}", [{"path": "a.mp4", "class": "x"}]))
    assert all(word in message for word in ("video", "path", "class", f"list{extension}"))


@pytest.mark.parametrize("extension", [".csv", ".parquet", ".jsonl"])
def test_a_row_without_a_video_is_numbered(tmp_path, extension):
    table = write_table(tmp_path / f"list{extension}", [{"video": "a.mp4"}, {"video": ""}])
    assert "row 2" in refusal(table)


@pytest.mark.parametrize("content", [b"", b"\0\1\2 this is {no table\n\n,,,\n"], ids=["empty", "rubbish"])
@pytest.mark.parametrize("extension", [".parquet", ".jsonl"])
def test_an_unreadable_table_is_named(tmp_path, extension, content):
    table = tmp_path / f"list{extension}"
    table.write_bytes(content)
    assert str(table) in refusal(table)


def test_an_empty_or_ragged_csv_is_named(tmp_path):
    for content in ("", "video,label\na.mp4\n"):
        (tmp_path / "list.csv").write_text(content)
        assert "list.csv" in refusal(tmp_path / "list.csv")


@pytest.mark.parametrize(
    "name, content",
    [
        ("latin1.csv", "video\né.mp4\n".encode("latin1")),
        ("twice.csv", b"video,video\na.mp4,b.mp4\n"),
        ("nested.jsonl", b'{"video": ["a.mp4"]}\n'),
    ],
)
def test_a_table_of_another_kind_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path / name)


def test_a_table_with_only_a_header_has_no_videos(tmp_path):
    (tmp_path / "list.csv").write_text("video,label\n")
    assert "list.csv" in refusal(tmp_path / "list.csv")


def test_missing_and_empty_archives_are_named(tmp_path):
    touch(tmp_path / "empty" / "notes.txt")
    for name in ("nothing", "nothing.csv", "empty", "empty/*.mp4"):
        assert str(tmp_path / name) in refusal(tmp_path / name)


def test_another_scheme_is_refused():
    assert "ftp://" in refusal("ftp://host/videos")


def test_a_name_that_is_no_utf8_becomes_a_row_or_a_refusal(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb") as file:  # noqa: PTH123 - a name in bytes
        file.write(b"x")
    try:
        videos = list(list_videos(str(tmp_path)))
    except ArchiveError:
        return
    clips = plan_video(videos[0], ClipPlan(span_s=1.0))
    rows = {name: [getattr(clip, name) for clip in clips] for name in MANIFEST.names}
    assert len(pa.table(rows, schema=MANIFEST)) == 1


def test_a_folder_per_class(tmp_path):
    for name in ("walk/a.mp4", "walk/deep/b.mp4", "run/c.mp4"):
        touch(tmp_path / name)
    labels = {Path(video.uri).name: video.label for video in list_labelled(str(tmp_path))}
    assert labels == {"a.mp4": "walk", "b.mp4": "walk", "c.mp4": "run"}


def test_a_folder_per_class_through_a_link(tmp_path):
    touch(tmp_path / "real" / "walk" / "a.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [video.label for video in list_labelled(str(tmp_path / "link"))] == ["walk"]


def test_labels_csv_speaks_for_its_folder(tmp_path):
    touch(tmp_path / "walk" / "a.mp4")
    touch(tmp_path / "walk" / "not listed.mp4")
    write_table(tmp_path / "labels.csv", [{"video": "walk/a.mp4", "label": "stroll", "split": "val"}])
    (video,) = list_labelled(str(tmp_path))
    assert (Path(video.uri).name, video.label, video.split) == ("a.mp4", "stroll", "val")


def test_a_video_without_a_label_is_named(tmp_path):
    touch(tmp_path / "walk" / "a.mp4")
    stray = touch(tmp_path / "stray.mp4")
    assert str(stray) in refusal(tmp_path, list_labelled)
    rows = [{"video": "a.mp4", "label": "x"}, {"video": "b.mp4", "label": ""}]
    table = write_table(tmp_path / "list.csv", rows)
    assert str(tmp_path / "b.mp4") in refusal(table, list_labelled)
