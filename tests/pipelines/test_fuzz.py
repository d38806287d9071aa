"""Files damaged by a seed: each ends as its rows, and the process that reads them stays as it was."""

import csv
import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from mone.config import ModelConfig
from pipelines.archive import Video
from pipelines.limits import Limits
from pipelines.manifest import plan_video
from pipelines.schema import MANIFEST, Status
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table, tokens_of
from tests.media import indexed_frames, write_video
from tests.pipelines.test_child import children, num_descriptors

WILD = Path(__file__).parents[3] / "shared" / "data" / "wild"
BUNDLED = Path(__file__).parents[2] / "bundled" / "clips"
CONFIG = ModelConfig(num_classes=2, num_frames=8, height_px=32, width_px=32, dim=32, num_heads=4)
PLAN = ClipPlan(span_s=1.0, clips_per_video=3)
LIMITS = Limits(timeout_s=10)
_BATCH = 20
_GROWTH_BYTES = 64 << 20

Mutation = Callable[[bytearray, random.Random, list[bytes]], bytes]


def flip_bits(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    for _ in range(draw.choice((1, 10, 100, 1000))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def flip_header(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    """Bits of the first or the last kilobyte, where containers have their index."""
    first = draw.choice((0, max(0, len(content) - 1024)))
    for _ in range(draw.choice((1, 3, 10, 30))):
        content[min(first + draw.randrange(1024), len(content) - 1)] ^= 1 << draw.randrange(8)
    return bytes(content)


def cut(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    return bytes(content[: draw.randrange(len(content))])


def cut_out(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    return bytes(content[:start] + content[end:])


def overwrite(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    start, size = draw.randrange(len(content)), draw.randrange(1, 10_000)
    content[start : start + size] = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
    return bytes(content)


def splice(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    """The beginning of another file before the rest of this one."""
    other = draw.choice(others)
    size = draw.choice((16, 64, 512, 4096, len(other) // 2))
    return other[:size] + bytes(content[size:])


def rubbish(content: bytearray, draw: random.Random, others: list[bytes]) -> bytes:
    """No video, or a few bytes of one, under the name of a video."""
    size = draw.randrange(20_000)
    return draw.choice((draw.randbytes(size), bytes(content[:12]) + draw.randbytes(size), b"<html>" * (size // 6)))


MUTATIONS: list[Mutation] = [flip_bits, flip_header, cut, cut_out, overwrite, splice, rubbish]


def private_bytes() -> int:
    """Memory of this process without shared pages."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * 4096


def fuzz(originals: list[Path], folder: Path, count: int, seed: int) -> Counter[str]:
    """Damage files and read them, some at a time as a task does; statuses of all rows."""
    draw, contents, statuses = random.Random(seed), [path.read_bytes() for path in originals], Counter()
    before = (0, 0)
    memory = 0
    for batch in range(0, count, _BATCH):
        planned: list[dict] = []
        for number in range(batch, min(batch + _BATCH, count)):
            original = draw.randrange(len(originals))
            mutate = MUTATIONS[number % len(MUTATIONS)]
            path = (
                folder / f"{number}{draw.choice(originals).suffix if mutate is rubbish else originals[original].suffix}"
            )
            path.write_bytes(mutate(bytearray(contents[original]), draw, contents))
            clips = [dataclasses.asdict(clip) for clip in plan_video(Video(uri=str(path)), PLAN, LIMITS)]
            assert clips, path
            planned += clips
        decoded = tokenize_table(pa.Table.from_pylist(planned, schema=MANIFEST), CONFIG, limits=LIMITS)
        assert decoded["clip_id"].to_pylist() == [clip["clip_id"] for clip in planned]
        for status, error, patches in zip(
            *(decoded[name].to_pylist() for name in ("status", "error", "patches")), strict=True
        ):
            assert (status == Status.OK) == (error == "") == (patches is not None)
            statuses[status] += 1
        assert (
            sum(len(tokens.rows) for tokens in tokens_of(decoded, CONFIG))
            == decoded["patches"].length() - decoded["patches"].null_count
        )
        for path in folder.iterdir():
            path.unlink()
        if batch == 0:
            before, memory = (len(children()), num_descriptors()), private_bytes()
        # One child, whatever became of those before it, and nothing that is left of them.
        assert (len(children()), num_descriptors()) == before
        assert private_bytes() < memory + _GROWTH_BYTES
    return statuses


def test_damaged_files_end_as_rows(tmp_path):
    written = [
        write_video(tmp_path / f"a{suffix}", indexed_frames(30), codec=codec)
        for suffix, codec in ((".mp4", None), (".mkv", None), (".ts", "mpeg2video"), (".avi", "mpeg4"))
    ]
    (tmp_path / "damaged").mkdir()
    statuses = fuzz(sorted(BUNDLED.glob("*/*.mp4"))[::4] + written, tmp_path / "damaged", count=140, seed=0)
    assert statuses[Status.OK] > 50 and statuses[Status.DECODE_ERROR] > 20


@pytest.mark.slow
@pytest.mark.skipif(not WILD.is_dir(), reason="borrowed videos are not here: ../shared/data/wild")
def test_damaged_files_of_the_world_end_as_rows(tmp_path):
    with (WILD / "manifest.csv").open() as file:
        originals = [WILD / row["file"] for row in csv.DictReader(file)]
    statuses = fuzz([path for path in originals if path.stat().st_size > 1], tmp_path, count=2000, seed=1)
    print(dict(statuses))
    assert statuses[Status.OK] > 500 and statuses[Status.DECODE_ERROR] > 200
