"""How fast planned clips become frames: our pipeline, ray.data.read_videos, and the decoders alone."""

import functools
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from jobs.benchmarks.rates import (
    BASELINE,
    LIMIT,
    Case,
    Planned,
    Round,
    Side,
    facts,
    measured,
    planned,
    row,
    scale_table,
    table,
)
from jobs.benchmarks.report import Report
from jobs.cli import UserError, checking_input
from jobs.inputs import load_model
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.config import ModelConfig, preset
from pipelines.timeline import ClipPlan

Sampling = Literal["sparse", "dense"]
_SPARSE_CLIPS = 4
# Of a made video.
_SCALE_CLIPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpeed:
    """Decode planned clips in several ways, on the same videos, cores and machine, in turns; compare frames a second.

    "pipeline" is the part of `annotate` that decodes and tokenizes, in Ray Data. "read_videos" is ray.data.read_videos
    as Ray documents it, its reader resizing; --full-frames adds the same with a resizing stage after it. "decoders
    alone" are as many processes as cores that decode the same clips and drop them: the limit. Frames go to a consumer
    which drops them; planning is apart. Each way does half of the videos and then all: what the other half has added is
    its rate on a long archive, and the rest is its start. What a round does first warms up and is not counted; ratios
    are of rates, medians over rounds. On a machine that others use, processor seconds say more than the clock: they are
    compared as well.

    python -m jobs.benchmark pipeline
    """

    data: str = ""
    """Videos, as annotate takes them; by default they are made (H.264, moving content, GOP 250 and 48 in turns)."""
    resolution: tuple[int, ...] = (360, 1080)
    """Heights of the videos that are made, 16:9."""
    sampling: tuple[Sampling, ...] = ("sparse", "dense")
    """sparse: 4 clips of each video; dense: all of it."""
    videos: int = 8
    """How many are made, or taken from --data; a minute or so of work for a good rate."""
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
    scale: tuple[int, ...] = ()
    """Instead: so many hundreds of clips of 4 frames of 32 x 32 through the pipeline, its time and its memory, such as
    100 1000 10000. "off the line" is how far its seconds are from a straight line through the first and the last."""
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
        plan_s = sum(case.planned.plan_s for case in cases)
        cores = f"{os.cpu_count()} cores, {self.rounds} rounds, plan {plan_s:.1f} s"
        shown = scale_table(rows) if self.scale else table(rows)
        return Report(table=f"{cores}\n{shown}", rows=rows, device=torch.device("cpu"))

    def _checked(self) -> Checkpoint | None:
        for name, least in (("videos", 2), ("frames", 1), ("size", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} must be at least {least}, got {getattr(self, name)}")
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
        if any(count < _SCALE_CLIPS or count % _SCALE_CLIPS for count in self.scale):
            raise UserError(f"--scale must be hundreds, got {' '.join(map(str, self.scale))}")
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

    def _cases(self, checkpoint: Checkpoint | None, folder: Path) -> list[Case]:
        if self.scale:
            config = self._config(checkpoint)
            return [_scale_case(count, config, folder, self.keep) for count in sorted(set(self.scale))]
        span_s = self.span if checkpoint is None else checkpoint.config.span_s
        return [
            Case(name, sampling, planned(paths, clip_plan(sampling, span_s), folder))
            for name, paths in self._paths(folder)
            for sampling in self.sampling
        ]

    def _paths(self, folder: Path) -> Iterator[tuple[str, list[str]]]:
        from pipelines.archive import list_videos

        if self.data:
            with checking_input():
                paths = [video.uri for video in itertools.islice(list_videos(self.data), self.videos)]
            if len(paths) < 2:
                raise UserError(f"--data must have at least 2 videos, got {self.data}")
            yield self.data, paths
            return
        where = Path(self.keep).resolve() if self.keep else folder / "videos"
        for height_px in tqdm(self.resolution, "make videos", unit="resolution"):
            yield f"{height_px}p", made_videos(where, self.videos, height_px, self.duration)

    def _rows(self, cases: list[Case], checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
        from jobs.benchmarks.sides import Decoders

        decoders = Decoders(os.cpu_count() or 1)
        try:
            return [row for case in cases for row in self._case_rows(case, decoders, checkpoint)]
        finally:
            decoders.close()

    def _case_rows(self, case: Case, decoders: Any, checkpoint: Checkpoint | None) -> list[dict[str, Any]]:
        first = case.planned.half()
        half, whole = (self._sides(part, decoders, checkpoint) for part in (first, case.planned))
        rounds: dict[str, list[Round]] = {name: [] for name in whole}
        for number in tqdm(range(self.rounds + 1), f"{case.archive} {case.sampling}", unit="round"):
            for name, of_way in rounds.items():
                take = measured(half[name])
                if number:
                    more_clips = len(case.planned.clips) - len(first.clips)
                    of_way.append(Round(take, measured(whole[name]), more_clips))
        return [row(case, self._config(checkpoint).num_frames, name, rounds) for name in rounds]

    def _sides(self, part: Planned, decoders: Any, checkpoint: Checkpoint | None) -> dict[str, Side]:
        from jobs.benchmarks import sides
        from pipelines.patches import view_of

        config, clips = self._config(checkpoint), part.clips
        view = view_of(config)
        found: dict[str, Side] = {
            "pipeline": functools.partial(sides.ours, part.manifest, config),
            BASELINE: functools.partial(sides.read_videos, clips, view, resize_in_reader=True),
            LIMIT: functools.partial(decoders.decode, clips, config),
        }
        if self.full_frames:
            found[f"{BASELINE}, full frames"] = functools.partial(
                sides.read_videos, clips, view, resize_in_reader=False
            )
        if checkpoint is not None:
            found["annotate"] = functools.partial(sides.annotated, part.manifest, checkpoint, self.capacity)
        return found

    def _scale_rows(self, cases: list[Case]) -> list[dict[str, Any]]:
        from jobs.benchmarks import sides

        config = self._config(None)
        ways = [functools.partial(sides.ours, case.planned.manifest, config) for case in cases]
        ways[0]()  # warms up
        rounds = [[measured(way) for way in ways] for _ in tqdm(range(self.rounds), "scale", unit="round")]
        rows = [
            facts(case, config.num_frames, "pipeline", list(takes))
            for case, takes in zip(cases, zip(*rounds, strict=True), strict=True)
        ]
        for before, of_case in itertools.pairwise(rows):
            more = of_case["clips"] - before["clips"]
            of_case["ms_per_more_clip"] = (of_case["seconds"] - before["seconds"]) / more * 1e3
        for of_case in rows[1:-1]:
            clips, seconds = ([row[name] for row in (rows[0], rows[-1])] for name in ("clips", "seconds"))
            of_case["off_the_line"] = of_case["seconds"] / np.interp(of_case["clips"], clips, seconds) - 1
        return rows


def clip_plan(sampling: Sampling, span_s: float) -> ClipPlan:
    """Clips of a way to sample a video."""
    return ClipPlan(span_s=span_s, clips_per_video=_SPARSE_CLIPS if sampling == "sparse" else 0)


def made_videos(folder: Path, count: int, height_px: int, duration_s: float) -> list[str]:
    """Videos of 16:9, made where they are not there."""
    from jobs.benchmarks.videos import write_videos

    width_px = height_px * 16 // 9 // 4 * 4
    paths = write_videos(folder, count, width_px=width_px, height_px=height_px, duration_s=duration_s)
    return [str(path) for path in paths]


def _scale_case(count: int, config: ModelConfig, folder: Path, keep: str) -> Case:
    """Clips of 4 frames."""
    from jobs.benchmarks.videos import FPS, write_videos

    span_s = config.num_frames / FPS
    where = Path(keep).resolve() if keep else folder / "videos"
    paths = write_videos(where, count // _SCALE_CLIPS, width_px=112, height_px=64, duration_s=_SCALE_CLIPS * span_s)
    plan = ClipPlan(span_s=span_s, clips_per_video=_SCALE_CLIPS)
    return Case("64p", f"{count:,} clips", planned([str(path) for path in paths], plan, folder))
