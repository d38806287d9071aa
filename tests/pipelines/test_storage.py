"""Remote files against the same files on disk: what is read, how much is asked for, and what becomes of failures."""

import io
import json
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from pipelines import patience
from pipelines.decode import decode_clips
from pipelines.decoded import Clip, Source
from pipelines.failure import DecodeFailure
from pipelines.probe import file_identity, probe
from pipelines.schema import Status
from pipelines.storage import ranged, store
from pipelines.storage import s3 as s3_store
from pipelines.storage import web as web_store
from pipelines.storage.address import extension, is_remote, public_address
from pipelines.storage.ranged import RangedFile, listing
from pipelines.view import View
from pipelines.waiting import told
from tests.media import indexed_frames, read_index, write_video
from tests.web_server import answer, reset, stall, trickle

VIEW = View(num_frames=4, height_px=64, width_px=64)
SECRET = "X-Amz-Signature=5ec7e7"


@pytest.fixture
def _no_waiting(monkeypatch):
    monkeypatch.setattr(patience, "_FIRST_WAIT_S", 0.001)


@pytest.fixture
def _short_limits(monkeypatch):
    monkeypatch.setattr(web_store, "STALL_S", 0.3)
    monkeypatch.setattr(store, "FETCH_S", 0.3)


pytestmark = pytest.mark.usefixtures("_no_waiting")


def noise(num_bytes: int) -> bytes:
    return np.random.default_rng(0).bytes(num_bytes)


def failure_of(uri: str) -> DecodeFailure:
    with pytest.raises(DecodeFailure) as caught:
        RangedFile(uri).read()
    assert str(caught.value) and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "uri, public",
    [
        ("https://host/a/b.mp4?X-Amz-Signature=1&b=2#c", "https://host/a/b.mp4"),
        ("https://user:pass@host:8080/a.mp4", "https://host:8080/a.mp4"),
        ("http://host", "http://host"),
        ("s3://id:secret@bucket/a?b#c.mp4", "s3://bucket/a?b#c.mp4"),
        ("gs://bucket/a@b.mp4", "gs://bucket/a@b.mp4"),
        ("/folder/a?b.mp4", "/folder/a?b.mp4"),
        ("file:///a?b", "file:///a?b"),
    ],
)
def test_what_of_an_address_is_shown(uri, public):
    assert public_address(uri) == public == public_address(public)


@pytest.mark.parametrize(
    "uri, expected",
    [
        ("https://h/a.MP4?x=.csv", ".mp4"),
        ("s3://b/c.d/e", ""),
        ("/a/.mp4", ""),
        ("https://h.org", ""),
        ("b.csv", ".csv"),
    ],
)
def test_the_extension_is_of_the_name(uri, expected):
    assert extension(uri) == expected


def test_paths_and_drives_are_not_remote():
    assert not any(map(is_remote, ["/a/b.mp4", "a.mp4", "file:///a.mp4", "C:\\a.mp4", "ftp://host/a.mp4"]))
    assert all(map(is_remote, ["s3://b/a", "GS://b/a", "https://h/a", "http://h/a"]))


def test_a_ranged_file_reads_as_the_file_itself(web, monkeypatch):
    monkeypatch.setattr(ranged, "FIRST_BYTES", 100)
    monkeypatch.setattr(ranged, "MAX_BYTES", 1000)
    content = noise(20_000)
    (web.folder / "a.bin").write_bytes(content)
    remote, local = RangedFile(f"{web.url}/a.bin"), io.BytesIO(content)
    rng = np.random.default_rng(1)
    for _ in range(500):
        if rng.random() < 0.3:
            whence = int(rng.integers(3))
            place = [int(rng.integers(25_000)), int(rng.integers(5000)), -int(rng.integers(20_000))][whence]
            assert remote.seek(place, whence) == local.seek(place, whence)
        wanted = local.read(int(rng.integers(300)))
        assert read_exactly(remote, len(wanted)) == wanted
        assert remote.tell() == local.tell()
    assert remote.size_bytes == len(content)
    assert sum(len(data) for _, data in remote._stretches) <= 4 * 1000


def read_exactly(file: RangedFile, num_bytes: int) -> bytes:
    parts = []
    while num_bytes and (part := file.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def test_reading_straight_on_takes_few_requests(web):
    (web.folder / "a.bin").write_bytes(noise(20 << 20))
    assert RangedFile(f"{web.url}/a.bin").readall() == noise(20 << 20)
    assert len(web.requests) == 9 and web.sent_bytes == 20 << 20


@pytest.fixture(scope="module")
def long_video(tmp_path_factory) -> bytes:
    """Ten minutes of noise that does not compress, index at the end, with a key frame every two seconds."""
    frames = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    frames = np.concatenate([frames] * 12)
    path = tmp_path_factory.mktemp("long") / "a.mp4"
    return write_video(path, frames, fps=1, options={"g": "2"}).read_bytes()


def test_a_clip_of_a_long_file_costs_a_small_share_of_it(web, long_video, tmp_path):
    (web.folder / "a.mp4").write_bytes(long_video)
    assert len(long_video) > 5 << 20
    for uri in (f"{web.url}/a.mp4", str(web.folder / "a.mp4")):
        info = probe(uri)
        assert info.duration_s == pytest.approx(600)
    source = Source(path=f"{web.url}/a.mp4", width_px=64, height_px=64, container="mov", codec="h264")
    web.requests.clear()
    web.sent_bytes = 0
    (clip,) = decode_clips(source, [(300.0, 302.0)], VIEW)
    assert isinstance(clip, Clip) and (clip.decoder, clip.note) == ("pyav", "")
    assert web.sent_bytes < 0.25 * len(long_video) and len(web.requests) <= 6
    local = Source(path=str(web.folder / "a.mp4"), width_px=64, height_px=64, container="", codec="h264")
    (expected,) = decode_clips(local, [(300.0, 302.0)], VIEW)
    assert isinstance(expected, Clip)
    np.testing.assert_array_equal(clip.frames_THWC, expected.frames_THWC)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.h264"])
def test_a_remote_video_is_probed_as_a_local_one(web, bucket, tmp_path, name):
    codec = "libx264" if name == "a.h264" else None
    path = write_video(web.folder / name, indexed_frames(20), codec=codec, fps=25 if codec else 10)
    for uri in (f"{web.url}/{name}", bucket.put(f"folder/{name}", path.read_bytes())):
        assert probe(uri) == probe(str(path))


@pytest.mark.usefixtures("_short_limits")
@pytest.mark.parametrize("fault", [answer(500), answer(503), answer(429), reset, stall, trickle], ids=str)
@pytest.mark.parametrize("at", [0, 1])
def test_a_fault_that_passes_is_not_noticed(web, fault, at):
    path = write_video(web.folder / "a.mp4", indexed_frames(20))
    source = Source(path=f"{web.url}/a.mp4", width_px=64, height_px=64, container="mov", codec="h264")
    identity = file_identity(source.path)
    web.faults = [fault, fault] if at == 0 else []
    assert file_identity(source.path) == identity
    web.faults = [fault]
    (clip,) = decode_clips(source, [(1.0, 1.4)], VIEW)
    assert isinstance(clip, Clip) and not web.faults
    assert [read_index(frame) for frame in clip.frames_THWC] == [10, 11, 12, 13]
    assert path.exists()


@pytest.mark.usefixtures("_short_limits")
@pytest.mark.parametrize(
    "fault, status, tries, word",
    [
        (answer(500), Status.MISSING, 5, "500"),
        (answer(503), Status.MISSING, 5, "503"),
        (reset, Status.MISSING, 5, "connection"),
        (stall, Status.TIMEOUT, 5, "time"),
        (trickle, Status.TIMEOUT, 5, "not there after"),
        (answer(403), Status.MISSING, 1, "403"),
        (answer(404), Status.MISSING, 1, "404"),
        (answer(410), Status.MISSING, 1, "410"),
    ],
)
def test_a_fault_that_stays_is_a_failure_with_its_reason_and_without_the_signature(web, fault, status, tries, word):
    web.faults = [fault] * 20
    found = failure_of(f"{web.url}/a.mp4?{SECRET}")
    assert found.status == status and word in str(found) and SECRET not in str(found)
    assert 20 - len(web.faults) == tries


def test_a_store_that_is_away_is_waited_for_where_somebody_is_told(web, monkeypatch):
    monkeypatch.setattr(patience, "_LONGEST_WAIT_S", 0.01)
    (web.folder / "a.bin").write_bytes(b"content")
    web.faults = [answer(503)] * 20
    said: list[str] = []
    with told(said.append):
        assert RangedFile(f"{web.url}/a.bin?{web.query}").readall() == b"content"
    assert not web.faults and said[-1] == ""
    assert {*said[:20]} == {f"{web.url}: the store answers 503 Service Unavailable"}


def test_a_store_that_does_not_come_back_is_waited_for_once(web, monkeypatch):
    monkeypatch.setattr(patience, "_LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    web.faults = [answer(503)] * 10_000
    with told(lambda text: None):
        assert "attempts" in str(failure_of(f"{web.url}/a.mp4"))
        web.requests.clear()
        assert failure_of(f"{web.url}/b.mp4").status == Status.MISSING
    assert len(web.requests) == patience.ATTEMPTS


def test_a_server_that_is_not_there_is_a_failure():
    found = failure_of(f"http://127.0.0.1:9/a.mp4?{SECRET}")
    assert found.status == Status.MISSING and SECRET not in str(found)


@pytest.mark.parametrize("address", ["http://", "http://[bad/a.mp4", "https://a b/c.mp4"])
def test_an_address_that_is_none_is_a_failure(address):
    assert failure_of(address).status == Status.MISSING


def test_an_empty_remote_file_is_empty(web, bucket):
    (web.folder / "a.mp4").touch()
    for uri in (f"{web.url}/a.mp4", bucket.put("a.mp4", b"")):
        with pytest.raises(DecodeFailure, match="0 bytes") as caught:
            file_identity(uri)
        assert caught.value.status == Status.EMPTY


def test_a_server_without_ranges_serves_small_files_once_and_large_ones_never(web, monkeypatch):
    web.ranges = False
    path = write_video(web.folder / "a.mp4", indexed_frames(20))
    assert probe(f"{web.url}/a.mp4") == probe(str(path))
    assert len(web.requests) == 1
    monkeypatch.setattr(web_store, "MAX_WHOLE_BYTES", path.stat().st_size - 1)
    found = failure_of(f"{web.url}/a.mp4")
    assert found.status == Status.UNSUPPORTED and "range" in str(found)


def test_a_file_that_changes_while_it_is_read_is_a_failure(web, monkeypatch):
    monkeypatch.setattr(ranged, "FIRST_BYTES", 100)
    (web.folder / "a.bin").write_bytes(noise(1000))
    file = RangedFile(f"{web.url}/a.bin")
    assert len(file.read(100)) == 100
    (web.folder / "a.bin").write_bytes(noise(1000)[::-1])
    with pytest.raises(DecodeFailure, match="changed"):
        file.read(100)


def test_the_version_is_the_tag_and_the_query_is_sent(web, bucket):
    (web.folder / "a.bin").write_bytes(b"one")
    web.query = SECRET
    with pytest.raises(DecodeFailure, match="403"):
        file_identity(f"{web.url}/a.bin")
    first = file_identity(f"{web.url}/a.bin?{SECRET}")
    (web.folder / "a.bin").write_bytes(b"two")
    assert first[0] == 3 and file_identity(f"{web.url}/a.bin?{SECRET}")[1] != first[1]

    uri = bucket.put("a.bin", b"one")
    first = file_identity(uri)
    assert file_identity(bucket.put("a.bin", b"one")) == first  # the same content, written again
    assert file_identity(bucket.put("a.bin", b"two")) != first


def test_objects_are_listed_page_by_page_with_their_identity(bucket, monkeypatch):
    monkeypatch.setattr(s3_store, "_PAGE_OBJECTS", 3)
    names = [f"v/{number}?#%+ ü.mp4" for number in range(8)]
    for name in names:
        bucket.put(name, b"x")
    bucket.put("w/elsewhere.mp4", b"x")
    bucket.app.requests.clear()
    found = listing(f"s3://{bucket.name}/v/")
    first = next(found)
    assert len(bucket.app.requests) == 1  # a page is there before the others are asked for
    assert (first.size_bytes, first.version) == file_identity(first.uri)
    assert [first.uri, *(item.uri for item in found)] == [f"s3://{bucket.name}/{name}" for name in names]


@pytest.mark.parametrize("fault, tries", [(500, 5), (503, 5), (403, 1)])
def test_faults_of_s3(bucket, fault, tries):
    uri = bucket.put("a.bin", noise(1000))
    bucket.app.requests.clear()
    bucket.app.faults = [500, 503]
    assert RangedFile(uri).readall() == noise(1000)
    bucket.app.faults = [503, 500]
    assert [item.uri for item in listing(f"s3://{bucket.name}/")] == [uri]
    bucket.app.requests.clear()
    bucket.app.faults = [fault] * 20
    assert failure_of(uri).status == Status.MISSING and len(bucket.app.requests) == tries
    bucket.app.faults.clear()


def test_what_is_not_in_a_bucket_is_missing(bucket):
    for uri in (f"s3://{bucket.name}/a.mp4", "s3://no-such-bucket/a.mp4"):
        assert failure_of(uri).status == Status.MISSING
    with pytest.raises(DecodeFailure, match="NoSuchBucket"):
        next(listing("s3://no-such-bucket/"))


OBJECTS = {"v/a b.mp4": noise(300_000), "v/c.mp4": b"x", "w/d.mp4": b"y"}


class _Gcs(BaseHTTPRequestHandler):
    """The two answers of GCS's JSON interface that are needed, a listing in pages of one."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query, names = parse_qs(address.query), sorted(OBJECTS)
        key = unquote(address.path.partition("/o/")[2])
        if not address.path.startswith("/storage/v1/b/bucket/o") or (key and key not in OBJECTS):
            self.send_error(404)
        elif key:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            body = OBJECTS[key][start : end + 1]
            self._send(206, body, {"Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(OBJECTS[key])}"}, key)
        else:
            (prefix,), token = query["prefix"], int(query.get("pageToken", ["0"])[0])
            names = [name for name in names if name.startswith(prefix)]
            items = [{"name": n, "size": str(len(OBJECTS[n])), "generation": tag(n)} for n in names[token : token + 1]]
            more = {"nextPageToken": str(token + 1)} if token + 1 < len(names) else {}
            self._send(200, json_bytes({"items": items} | more), {}, "")

    def _send(self, code: int, body: bytes, headers: dict[str, str], key: str) -> None:
        self.send_response(code)
        for name, value in (
            headers | {"Content-Length": str(len(body)), "X-Goog-Generation": tag(key), "ETag": "x"}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


def tag(name: str) -> str:
    return str(len(name))


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def _gcs(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gcs)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("_gcs")
def test_google_cloud_storage():
    assert [item.uri for item in listing("gs://bucket/v/")] == ["gs://bucket/v/a b.mp4", "gs://bucket/v/c.mp4"]
    for item in listing("gs://bucket/v/"):
        assert (item.size_bytes, item.version) == file_identity(item.uri)
        assert RangedFile(item.uri).readall() == OBJECTS[item.uri.removeprefix("gs://bucket/")]
    assert failure_of("gs://bucket/none.mp4").status == Status.MISSING


def test_a_listing_over_http_is_refused(web):
    with pytest.raises(DecodeFailure, match="table"):
        next(listing(f"{web.url}/"))


def test_nothing_of_the_stores_is_imported_before_it_is_needed():
    code = "import sys, pipelines.tokenize; print(*{name.split('.')[0] for name in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"boto3", "botocore", "google", "requests"} & set(found)
