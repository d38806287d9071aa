"""Archives in a bucket and on the web name the same videos as on a disk."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from pipelines import archive_remote
from pipelines.archive import ArchiveError, list_labelled, list_videos, signatures_of
from pipelines.storage.signatures import Signatures

NAMES = ["a.mp4", "b/1.mkv", "b/10.MP4", "b/c/2.mp4", "b/c/x.txt", "notes.txt"]


@pytest.fixture
def filled(bucket, tmp_path) -> tuple[str, Path]:
    """The same names in a bucket and on a disk."""
    for name in NAMES:
        bucket.put(f"v/{name}", b"x")
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v" / name).write_bytes(b"x")
    bucket.put("very/other.mp4", b"x")
    return f"s3://{bucket.name}/v", tmp_path / "v"


def below(archive: str, root: str) -> set[str]:
    return {video.uri.removeprefix(f"{root}/") for video in list_videos(archive)}


@pytest.mark.parametrize("pattern", ["", "/", "/*.mp4", "/**/*.mp4", "/b/*", "/b/?.mkv", "/b/[!2].*", "/*/c/[12].mp4"])
def test_folders_and_globs_give_what_they_give_on_a_disk(filled, pattern):
    remote, local = filled
    assert below(f"{remote}{pattern}", remote) == below(f"{local}{pattern}", str(local))


def test_a_listing_tells_the_identity_and_a_single_file_need_not_be_listed(filled, bucket):
    remote, _ = filled
    assert all(video.version and video.size_bytes == 1 for video in list_videos(remote))
    bucket.app.requests.clear()
    (video,) = list_videos(f"{remote}/a.mp4")
    assert video.uri == f"{remote}/a.mp4" and not bucket.app.requests


@pytest.mark.parametrize("extension", [".csv", ".parquet", ".jsonl"])
def test_a_table_in_a_bucket_or_on_the_web_names_videos_relative_to_itself(bucket, web, tmp_path, extension):
    rows = [("a.mp4", "x"), ("../b.mp4", "y"), ("/disk/c.mp4", "z"), ("s3://else/d?.mp4", "x"), ("http://h/e.mp4", "x")]
    table = pa.table({"video": [video for video, _ in rows], "label": [label for _, label in rows]})
    path = web.folder / f"list{extension}"
    match extension:
        case ".csv":
            pa.csv.write_csv(table, path)
        case ".parquet":
            pa.parquet.write_table(table, path)
        case ".jsonl":
            path.write_text("".join(f'{{"video": "{video}", "label": "{label}"}}\n' for video, label in rows))
    uri = bucket.put(f"lists/deep/list{extension}", path.read_bytes())
    found = list(list_videos(uri))
    root = f"s3://{bucket.name}/lists"
    elsewhere = ["s3://else/d?.mp4", "http://h/e.mp4"]
    assert [video.uri for video in found] == [f"{root}/deep/a.mp4", f"{root}/b.mp4", "/disk/c.mp4", *elsewhere]
    assert [video.label for video in found] == [label for _, label in rows]
    web.query = "sig=5ecret"
    found = [video.uri for video in list_videos(f"{web.url}/list{extension}?{web.query}")]
    assert found == [f"{web.url}/a.mp4", f"{web.url}/b.mp4", f"{web.url}/disk/c.mp4", *elsewhere]


def test_a_folder_per_class_in_a_bucket(filled, bucket):
    for name in ("walk/a.mp4", "walk/deep/b.mp4", "run/c.mp4"):
        bucket.put(f"classes/{name}", b"x")
    labels = {Path(video.uri).name: video.label for video in list_labelled(f"s3://{bucket.name}/classes/")}
    assert labels == {"a.mp4": "walk", "b.mp4": "walk", "c.mp4": "run"}
    with pytest.raises(ArchiveError, match=r"a\.mp4 has no label"):
        list(list_labelled(filled[0]))


@pytest.mark.parametrize(
    "archive", ["s3://id:5ecret@bucket/v/", "s3://no-such-bucket/v/", "s3://no-such-bucket/*.mp4", "s3://none/list.csv"]
)
def test_what_cannot_be_listed_is_named(s3_server, archive):
    with pytest.raises(ArchiveError) as caught:
        list(list_videos(archive))
    assert "s3://" in str(caught.value) and "5ecret" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_prefix_has_no_videos(filled, bucket):
    with pytest.raises(ArchiveError, match="no videos"):
        list(list_videos(f"s3://{bucket.name}/nothing"))


def test_a_table_may_not_name_one_address_with_two_queries(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("video\nhttps://h/watch?v=1\nhttps://h/watch?v=2\n")
    with pytest.raises(ArchiveError, match="https://h/watch twice") as caught:
        list(list_videos(str(table)))
    assert "v=" not in str(caught.value)
    table.write_text("video\nhttps://h/a?v=1\nhttps://h/a?v=1\n")
    assert len(list(list_videos(str(table)))) == 1


def test_signatures_are_found_by_the_public_address(tmp_path):
    table = tmp_path / "list.csv"
    signed = [f"https://user:pass@h/{number}.mp4?sig={number}" for number in range(50)]
    table.write_text("\n".join(["video", "a.mp4", "s3://b/c?d.mp4", *signed]))
    signatures = signatures_of(str(table))
    assert len(signatures) == 50 and "sig=" not in repr(signatures)
    public = [f"https://h/{number}.mp4" for number in range(50)]
    assert signatures.sign([*public[::-1], "/a.mp4", "https://h/x.mp4"]) == [*signed[::-1], "/a.mp4", "https://h/x.mp4"]
    assert Signatures.of(["/a", "s3://b/c"]).sign(["/a"]) == ["/a"]


def test_a_bucket_is_not_listed_for_signatures(monkeypatch):
    monkeypatch.setattr(archive_remote, "listing", lambda prefix: pytest.fail("it was listed"))
    assert len(signatures_of("s3://bucket/v/")) == 0
