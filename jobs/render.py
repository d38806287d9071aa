"""Write the motions set as video files, with labels.csv beside them.

python -m jobs.render --output DIR --split test --clips 1200
"""

import csv
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from jobs.cli import UserError, checking_input, run
from jobs.inputs import make_output
from pipelines.processes import processes
from pipelines.synthetic import render, split_seeds, write_clip

# Clips that a process renders at a time: some tenths of a second of work.
_CHUNK_CLIPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Render:
    """Render generated clips of twelve motions as H.264 files: labelled videos to try things on."""

    output: str
    """DIR for the videos and labels.csv (video, label, split)."""
    split: str = "test"
    """"train", "val" or "test": which seeds, never shared between splits."""
    clips: int = 1200
    """How many; classes take turns."""
    size: int = 128
    """Height and width in pixels."""
    frames: int = 16
    """Frames of a clip, at 8 per second."""


def render_job(config: Render) -> None:
    """Run the job."""
    if config.size % 2 or config.size < 32 or config.frames < 2 or config.clips < 1:
        raise UserError("--size must be even and at least 32, --frames at least 2, --clips at least 1")
    with checking_input():
        seeds = split_seeds(config.split, config.clips)
    output = make_output(config.output)
    write = functools.partial(_write, output=output, size_px=config.size, num_frames=config.frames)
    with processes(-(-config.clips // _CHUNK_CLIPS)) as pool:
        written = pool.imap(write, seeds, chunksize=_CHUNK_CLIPS)
        rows = list(tqdm(written, "render", len(seeds), unit="clip", mininterval=1))
    with (output / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "label", "split"])
        writer.writerows([*row, config.split] for row in rows)
    print(output / "labels.csv")


def _write(seed: int, output: Path, size_px: int, num_frames: int) -> tuple[str, str]:
    clip = render(seed, num_frames=num_frames, size_px=size_px)
    name = f"{clip.label}_{seed}.mp4"
    write_clip(clip, output / name)
    return name, clip.label


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("render", Render, render_job, argv)


if __name__ == "__main__":
    sys.exit(main())
