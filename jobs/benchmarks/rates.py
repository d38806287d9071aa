"""What ways from planned clips to frames took: rates on a long archive, and the start of a run apart from them."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.benchmarks.report import aligned
from jobs.cli import UserError
from pipelines.timeline import ClipPlan

if TYPE_CHECKING:  # the command line of other benchmarks needs no Ray
    from jobs.benchmarks.sides import Done
    from pipelines.schema import PlannedClip

LIMIT, BASELINE = "decoders alone", "read_videos"

Side = Callable[[], "Done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Planned clips, in memory and as a file, and the seconds that took."""

    clips: list["PlannedClip"]
    manifest: str
    plan_s: float = 0.0

    def half(self) -> "Planned":
        """The clips of the first half of the videos, one at least."""
        return self.first(max(1, len({clip.video for clip in self.clips}) // 2))

    def first(self, count: int) -> "Planned":
        """The clips of the first videos."""
        first = set(list(dict.fromkeys(clip.video for clip in self.clips))[:count])
        return _written([clip for clip in self.clips if clip.video in first], Path(self.manifest).parents[1])


class Case(NamedTuple):
    """What is decoded."""

    archive: str
    sampling: str
    planned: Planned


def planned(paths: Sequence[str], plan: ClipPlan, folder: Path) -> Planned:
    """Plan the clips of videos.

    Raises:
        UserError: One that cannot be read.
    """
    from pipelines.archive import Video
    from pipelines.manifest import plan_video

    started_s = time.perf_counter()
    clips = [clip for path in paths for clip in plan_video(Video(uri=path), plan)]
    plan_s = time.perf_counter() - started_s
    if any(clip.error for clip in clips):
        bad = next(clip for clip in clips if clip.error)
        raise UserError(f"{bad.video} cannot be read: {bad.error}")
    return dataclasses.replace(_written(clips, folder), plan_s=plan_s)


def _written(clips: list["PlannedClip"], folder: Path) -> Planned:
    import pyarrow.parquet as pq

    from pipelines.planning import manifest_table

    manifest = Path(tempfile.mkdtemp(dir=folder)) / "clips.parquet"
    pq.write_table(manifest_table(clips), manifest)
    return Planned(clips=clips, manifest=str(manifest))


@dataclass(frozen=True, slots=True)
class Take:
    """One run of a side."""

    done: "Done"
    seconds: float
    cpu_s: float
    largest_bytes: int
    together_bytes: int
    spilled_bytes: int


def measured(side: Side) -> Take:
    """Run a side."""
    from jobs.benchmarks.watch import Memory

    memory = Memory()
    with memory.watched():
        started_s = time.perf_counter()
        done = side()
        seconds = time.perf_counter() - started_s
    return Take(done, seconds, memory.cpu_s, memory.largest, memory.together, memory.spilled)


@dataclass(frozen=True, slots=True)
class Round:
    """A side on half of the videos, then on all, which have so many clips more."""

    half: Take
    whole: Take
    more_clips: int

    @property
    def clip_s(self) -> float:
        """Seconds of a further clip."""
        # At least a tenth of what it would be without a start: of a very short run only noise is left.
        return max(self.whole.seconds - self.half.seconds, 0.05 * self.whole.seconds) / self.more_clips

    @property
    def clip_cpu_s(self) -> float:
        """Processor seconds of a further clip."""
        return max(self.whole.cpu_s - self.half.cpu_s, 0.05 * self.whole.cpu_s, 0.01) / self.more_clips


def facts(case: Case, num_frames: int, name: str, takes: Sequence[Take]) -> dict[str, Any]:
    """What a side did, whatever it is compared with."""
    clips, last = case.planned.clips, takes[-1].done
    return {
        "archive": case.archive,
        "sampling": case.sampling,
        "side": name,
        "videos": len({clip.video for clip in clips}),
        "clips": len(clips),
        # A frame that a clip shows twice counts twice, on all sides.
        "complete_clips": sum(last.frames[clip.clip_id] == num_frames for clip in clips),
        "failed_clips": last.failed,
        "frames": last.frames.total(),
        "seconds": statistics.median(take.seconds for take in takes),
        "seconds_rounds": [take.seconds for take in takes],
        "cpu_s": statistics.median(take.cpu_s for take in takes),
        "largest_process_bytes": max(take.largest_bytes for take in takes),
        "processes_bytes": max(take.together_bytes for take in takes),
        "spilled_bytes": max(take.spilled_bytes for take in takes),
    }


def row(case: Case, num_frames: int, name: str, rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """A side against the others; ratios are of what was measured side by side, and slower is less than 1."""
    own = rounds[name]
    found = facts(case, num_frames, name, [of.whole for of in own])
    found["clips_per_s_rounds"] = [1 / of.clip_s for of in own]
    found["clips_per_s"] = statistics.median(found["clips_per_s_rounds"])
    found["cpu_ms_per_clip"] = statistics.median(of.clip_cpu_s for of in own) * 1e3
    found["start_s"] = statistics.median(of.whole.seconds - len(case.planned.clips) * of.clip_s for of in own)
    for key, other in (("share_of_limit", LIMIT), ("times_read_videos", BASELINE)):
        pairs = list(zip(rounds[other], own, strict=True))
        found[f"{key}_rounds"] = [theirs.clip_s / ours.clip_s for theirs, ours in pairs]
        found[key] = statistics.median(found[f"{key}_rounds"])
        found[f"{key}_cpu"] = statistics.median(theirs.clip_cpu_s / ours.clip_cpu_s for theirs, ours in pairs)
        found[f"{key}_with_start"] = statistics.median(
            theirs.whole.seconds / ours.whole.seconds for theirs, ours in pairs
        )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for people."""
    header = ("videos", "clips of", "way", "clips", "complete", "s", "start, s", "clips/s", "min..max")
    header += ("of the limit", "x read_videos", "CPU ms a clip", "of the limit", "x read_videos")
    header += ("MB a process", "MB all", "spilled")
    return aligned(header, [_cells(of) for of in rows])


def _cells(of: dict[str, Any]) -> tuple[str, ...]:
    rates = of["clips_per_s_rounds"]
    return (
        f"{of['videos']} x {of['archive']}",
        of["sampling"],
        of["side"],
        str(of["clips"]),
        str(of["complete_clips"]),
        f"{of['seconds']:.1f}",
        f"{of['start_s']:.1f}",
        f"{of['clips_per_s']:.1f}",
        f"{min(rates):.1f}..{max(rates):.1f}",
        f"{of['share_of_limit']:.1%}",
        f"{of['times_read_videos']:.2f}",
        f"{of['cpu_ms_per_clip']:.1f}",
        f"{of['share_of_limit_cpu']:.1%}",
        f"{of['times_read_videos_cpu']:.2f}",
        *_memory(of),
    )


def scale_table(rows: list[dict[str, Any]]) -> str:
    """Rows of ever more clips for people."""
    header = (
        "clips",
        "complete",
        "s",
        "min..max",
        "ms a further clip",
        "off the line",
        "MB a process",
        "MB all",
        "spilled",
    )
    return aligned(
        header,
        [
            (
                f"{of['clips']:,}",
                f"{of['complete_clips']:,}",
                f"{of['seconds']:.2f}",
                f"{min(of['seconds_rounds']):.2f}..{max(of['seconds_rounds']):.2f}",
                f"{of['ms_per_more_clip']:.3f}" if "ms_per_more_clip" in of else "",
                f"{of['off_the_line']:+.1%}" if "off_the_line" in of else "",
                *_memory(of),
            )
            for of in rows
        ],
    )


def _memory(of: dict[str, Any]) -> Sequence[str]:
    return [f"{of[name] / 2**20:.0f}" for name in ("largest_process_bytes", "processes_bytes", "spilled_bytes")]
