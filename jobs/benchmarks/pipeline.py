"""How fast planned clips become frames: our pipeline, ray.data.read_videos, and the decoders alone."""

import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import load_model
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.config import ModelConfig, preset
from pipelines.timeline import ClipPlan

if TYPE_CHECKING:  # the command line of other benchmarks needs no Ray
    from jobs.benchmarks.sides import Done
    from pipelines.schema import PlannedClip

Sampling = Literal["sparse", "dense"]
_SPARSE_CLIPS = 4
_LIMIT, _BASELINE = "decoders alone", "read_videos"
_SCALES = (100, 1_000, 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpeed:
    """Decode planned clips in several ways, on the same videos, cores and machine, in turns; compare frames a second.

    "pipeline" is the part of `annotate` that decodes and tokenizes, in Ray Data. "read_videos" is ray.data.read_videos
    as Ray documents it, its reader resizing; --full-frames adds the same with a resizing stage after it. "decoders
    alone" are as many processes as cores that decode the same clips and drop them: the limit. Frames go to a consumer
    which drops them; planning is apart. The first round warms up and is not counted; ratios are medians over rounds.
    On a machine that others use, processor seconds say more than the clock: they are compared as well.

    python -m jobs.benchmark pipeline
    """

    data: str = ""
    """Videos, as annotate takes them; by default they are made (H.264, moving content, GOP 250 and 48 in turns)."""
    resolution: tuple[int, ...] = (360, 1080)
    """Heights of the videos that are made, 16:9."""
    sampling: tuple[Sampling, ...] = ("sparse", "dense")
    """sparse: 4 clips of each video; dense: all of it."""
    videos: int = 4
    """How many are made, or taken from --data."""
    duration: float = 60.0
    """Seconds of a video that is made."""
    keep: str = ""
    """Folder for the videos that are made; those that are there are taken. By default they are deleted."""
    frames: int = 32
    """Frames of a clip."""
    size: int = 224
    """Height and width of a frame."""
    span: float = 2.56
    """Seconds of a clip."""
    model: str = ""
    """Model folder: its sizes and span are taken, and "annotate", with the model, is one more row."""
    capacity: float = 0.4
    """Of the model."""
    full_frames: bool = False
    """Add read_videos with a resizing stage."""
    scale: bool = False
    """Instead: 100, 1,000 and 10,000 clips of 4 frames of 32 x 32 through the pipeline, its time and its memory."""
    rounds: int = 3
    """How often each way is measured."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else Ray starts here. The decoders alone run here."""

    def measure(self) -> Report:
        """Run the benchmark."""
        checkpoint = self._checked()
        from jobs.cluster import connected

        with tempfile.TemporaryDirectory() as folder:
            # Before Ray starts: what is made here takes all cores.
            cases = self._cases(checkpoint, Path(folder))
            with connected(self.address):
                rows = self._scale_rows(cases) if self.scale else self._rows(cases, checkpoint)
        table = _scale_table(rows) if self.scale else _table(rows)
        cores = f"{os.cpu_count()} cores, {self.rounds} rounds, plan {sum(case.plan_s for case in cases):.1f} s"
        return Report(table=f"{cores}\n{table}", rows=rows, device=torch.device("cpu"))

    def _checked(self) -> Checkpoint | None:
        for name in ("videos", "frames", "size", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not self.sampling or not (self.data or self.resolution):
            raise UserError("give at least one --sampling and one --resolution")
        if self.data and self.keep:
            raise UserError("--keep has no effect with --data")
        for height_px in () if self.data else self.resolution:
            if height_px < 32 or height_px % 4:
                raise UserError(f"--resolution must be a multiple of 4 and at least 32, got {height_px}")
        if not 1 <= self.duration < float("inf"):
            raise UserError(f"--duration must be at least 1 second, got {self.duration:g}")
        if self.scale and (self.data or self.model or self.full_frames):
            raise UserError("--data, --model and --full-frames have no effect with --scale")
        with checking_input():
            checkpoint = load_model(self.model) if self.model else None
            self._config(checkpoint)
            if checkpoint is not None:
                check_capacity(self.capacity, checkpoint.config.num_experts)
            ClipPlan(span_s=self.span)
        return checkpoint

    def _config(self, checkpoint: Checkpoint | None) -> ModelConfig:
        if checkpoint is not None:
            return checkpoint.config
        frames, size = (4, 32) if self.scale else (self.frames, self.size)
        return preset("tiny", num_classes=2, num_frames=frames, height_px=size, width_px=size)

    def _cases(self, checkpoint: Checkpoint | None, folder: Path) -> list["_Case"]:
        config = self._config(checkpoint)
        if self.scale:
            return [_scale_case(count, config, folder, self.keep) for count in _SCALES]
        span_s = self.span if checkpoint is None else checkpoint.config.span_s
        plans = {
            "sparse": ClipPlan(span_s=span_s, clips_per_video=_SPARSE_CLIPS),
            "dense": ClipPlan(span_s=span_s),
        }
        return [
            _planned(name, sampling, paths, plans[sampling], config, folder)
            for name, paths in self._paths(folder)
            for sampling in self.sampling
        ]

    def _paths(self, folder: Path) -> Iterator[tuple[str, list[str]]]:
        from jobs.benchmarks.videos import write_videos
        from pipelines.archive import list_videos

        if self.data:
            with checking_input():
                yield self.data, [video.uri for video in itertools.islice(list_videos(self.data), self.videos)]
            return
        where = Path(self.keep).resolve() if self.keep else folder / "videos"
        for height_px in tqdm(self.resolution, "make videos", unit="resolution"):
            width_px = height_px * 16 // 9 // 4 * 4
            sizes = {"width_px": width_px, "height_px": height_px, "duration_s": self.duration}
            yield f"{height_px}p", [str(path) for path in write_videos(where, self.videos, **sizes)]

    def _rows(self, cases: list["_Case"], checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
        from jobs.benchmarks.sides import Decoders

        decoders = Decoders(os.cpu_count() or 1)
        try:
            return [row for case in cases for row in self._case_rows(case, self._sides(case, decoders, checkpoint))]
        finally:
            decoders.close()

    def _sides(self, case: "_Case", decoders: Any, checkpoint: Checkpoint | None) -> dict[str, Callable[[], "Done"]]:
        from jobs.benchmarks import sides
        from pipelines.patches import view_of

        view = view_of(case.config)
        found: dict[str, Callable[[], Done]] = {
            "pipeline": functools.partial(sides.ours, case.manifest, case.config),
            _BASELINE: functools.partial(sides.read_videos, case.clips, view, resize_in_reader=True),
            _LIMIT: functools.partial(decoders.decode, case.clips, case.config),
        }
        if self.full_frames:
            found[f"{_BASELINE}, full frames"] = functools.partial(
                sides.read_videos, case.clips, view, resize_in_reader=False
            )
        if checkpoint is not None:
            found["annotate"] = functools.partial(sides.annotated, case.manifest, checkpoint, self.capacity)
        return found

    def _case_rows(self, case: "_Case", sides: dict[str, Callable[[], "Done"]]) -> list[dict[str, Any]]:
        takes: dict[str, list[_Take]] = {name: [] for name in sides}
        for number in tqdm(range(self.rounds + 1), f"{case.archive} {case.sampling}", unit="round"):
            for name, side in sides.items():
                take = _measured(side)
                if number:
                    takes[name].append(take)
        return [_row(case, name, takes) for name in sides]

    def _scale_rows(self, cases: list["_Case"]) -> list[dict[str, Any]]:
        from jobs.benchmarks import sides

        rows = []
        for case in cases:
            side = functools.partial(sides.ours, case.manifest, case.config)
            if case is cases[0]:
                side()
            takes = {"pipeline": [_measured(side) for _ in range(self.rounds)]}
            rows.append(_row(case, "pipeline", takes))
        for row, before in zip(rows[1:], rows, strict=False):
            more = row["clips"] - before["clips"]
            row["ms_per_more_clip"] = (row["seconds"] - before["seconds"]) / more * 1e3
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """Planned clips, in memory and as a file."""

    archive: str
    sampling: str
    clips: list["PlannedClip"]
    manifest: str
    config: ModelConfig
    plan_s: float


def _planned(archive: str, sampling: str, paths: list[str], plan: ClipPlan, config: ModelConfig, folder: Path) -> _Case:
    import pyarrow.parquet as pq

    from pipelines.archive import Video
    from pipelines.manifest import plan_video
    from pipelines.planning import manifest_table

    started_s = time.perf_counter()
    clips = [clip for path in paths for clip in plan_video(Video(uri=path), plan)]
    plan_s = time.perf_counter() - started_s
    if any(clip.error for clip in clips):
        bad = next(clip for clip in clips if clip.error)
        raise UserError(f"{bad.video} cannot be read: {bad.error}")
    manifest = Path(tempfile.mkdtemp(dir=folder)) / "clips.parquet"
    pq.write_table(manifest_table(clips), manifest)
    return _Case(archive=archive, sampling=sampling, clips=clips, manifest=str(manifest), config=config, plan_s=plan_s)


def _scale_case(count: int, config: ModelConfig, folder: Path, keep: str) -> _Case:
    """Clips of 4 frames, a hundred of each video."""
    from jobs.benchmarks.videos import FPS, write_videos

    span_s = config.num_frames / FPS
    where = Path(keep).resolve() if keep else folder / "videos"
    paths = write_videos(where, count // 100, width_px=112, height_px=64, duration_s=100 * span_s)
    plan = ClipPlan(span_s=span_s, clips_per_video=100)
    return _planned("64p", f"{count:,} clips", [str(path) for path in paths], plan, config, folder)


@dataclass(frozen=True, slots=True)
class _Take:
    """One run of a side."""

    done: "Done"
    seconds: float
    largest_bytes: int
    together_bytes: int
    spilled_bytes: int
    cpu_s: float


def _measured(side: Callable[[], "Done"]) -> _Take:
    from jobs.benchmarks.watch import Memory

    memory = Memory()
    with memory.watched():
        started_s = time.perf_counter()
        done = side()
        seconds = time.perf_counter() - started_s
    return _Take(done, seconds, memory.largest, memory.together, memory.spilled, memory.cpu_s)


def _row(case: _Case, name: str, takes: dict[str, list[_Take]]) -> dict[str, Any]:
    own = takes[name]
    frames = case.config.num_frames
    # A frame that a clip shows twice counts twice, on all sides.
    complete = sum(own[-1].done.frames[clip.clip_id] == frames for clip in case.clips)
    seconds = statistics.median(take.seconds for take in own)
    videos = len({clip.video for clip in case.clips})
    row = {
        "archive": case.archive,
        "sampling": case.sampling,
        "side": name,
        "videos": videos,
        "clips": len(case.clips),
        "complete_clips": complete,
        "failed_clips": own[-1].done.failed,
        "frames": own[-1].done.frames.total(),
        "seconds": seconds,
        "seconds_rounds": [take.seconds for take in own],
        "cpu_s": statistics.median(take.cpu_s for take in own),
        "videos_per_s": videos / seconds,
        "clips_per_s": len(case.clips) / seconds,
        "frames_per_s": own[-1].done.frames.total() / seconds,
        "largest_process_bytes": max(take.largest_bytes for take in own),
        "processes_bytes": max(take.together_bytes for take in own),
        "spilled_bytes": max(take.spilled_bytes for take in own),
    }
    for key, other in (("share_of_limit", _LIMIT), ("times_read_videos", _BASELINE)):
        # Of a round: what was measured side by side. Slower is less than 1 in both.
        pairs = list(zip(takes.get(other, ()), own, strict=False))
        row[f"{key}_rounds"] = [theirs.seconds / take.seconds for theirs, take in pairs]
        row[key] = statistics.median(row[f"{key}_rounds"]) if pairs else None
        row[f"cpu_{key}"] = (
            statistics.median(theirs.cpu_s / max(take.cpu_s, 0.01) for theirs, take in pairs) if pairs else None
        )
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("videos", "clips of", "way", "clips", "complete", "videos/s", "clips/s", "min..max", "frames/s")
    header += ("of the limit", "x read_videos", "CPU s", "of the limit", "x read_videos")
    header += ("MB a process", "MB all", "spilled")
    return aligned(header, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rates = [row["clips"] / seconds for seconds in row["seconds_rounds"]]
    return (
        f"{row['videos']} x {row['archive']}",
        row["sampling"],
        row["side"],
        str(row["clips"]),
        str(row["complete_clips"]),
        f"{row['videos_per_s']:.2f}",
        f"{row['clips_per_s']:.1f}",
        f"{min(rates):.1f}..{max(rates):.1f}",
        f"{row['frames_per_s']:.0f}",
        f"{row['share_of_limit']:.1%}",
        f"{row['times_read_videos']:.2f}",
        f"{row['cpu_s']:.1f}",
        f"{row['cpu_share_of_limit']:.1%}",
        f"{row['cpu_times_read_videos']:.2f}",
        f"{row['largest_process_bytes'] / 2**20:.0f}",
        f"{row['processes_bytes'] / 2**20:.0f}",
        f"{row['spilled_bytes'] / 2**20:.0f}",
    )


def _scale_table(rows: list[dict[str, Any]]) -> str:
    header = ("clips", "complete", "s", "min..max", "ms a further clip", "MB a process", "MB all", "spilled")
    return aligned(
        header,
        [
            (
                f"{row['clips']:,}",
                f"{row['complete_clips']:,}",
                f"{row['seconds']:.2f}",
                f"{min(row['seconds_rounds']):.2f}..{max(row['seconds_rounds']):.2f}",
                f"{row['ms_per_more_clip']:.3f}" if "ms_per_more_clip" in row else "",
                f"{row['largest_process_bytes'] / 2**20:.0f}",
                f"{row['processes_bytes'] / 2**20:.0f}",
                f"{row['spilled_bytes'] / 2**20:.0f}",
            )
            for row in rows
        ],
    )
