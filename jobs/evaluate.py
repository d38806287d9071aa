"""Accuracy and compute of a model on labelled videos, at several capacities.

python -m jobs.evaluate --model MODEL --data LABELLED --split test --capacity 0.2 0.4 1.0
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from jobs.cli import UserError, checking_input, run
from jobs.cluster import connected
from jobs.inputs import BUNDLED_MODEL, TokenArguments, load_model
from jobs.placement import PlacementOptions, placed
from mone.baselines import capacities_of, with_method
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.engine.choice import Engine
from pipelines.archive import Video, list_labelled
from pipelines.evaluate import ScoredClip, score_videos


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(TokenArguments, PlacementOptions):
    """Measure top-1 accuracy per video, averaging the probabilities of its clips, at each capacity.

    A video that cannot be decoded counts as wrong and is named. The last line of output is one JSON object.
    """

    data: str
    """A .csv/.parquet/.jsonl with columns video, label and maybe split, or a folder with one folder per class."""
    model: str = str(BUNDLED_MODEL)
    """Model folder."""
    split: str = ""
    """Only rows of this split; "" takes all."""
    capacity: tuple[float, ...] = (0.2, 0.4, 1.0)
    """Effective capacities to measure; a method with one capacity of its own is measured at that."""
    method: str = "mone"
    """The model as it is, or a baseline on its weights (mone/baselines.py): dense, random_router, uniform,
    proportionate, submodel, token_drop, tome."""
    engine: Engine = "auto"
    """Code that runs the model's blocks, "reference" being the plainest; all compute the same but "fp8", which trades
    some exactness for time on GPUs from L4 and H100 on (docs/performance.md)."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else Ray starts here."""


def evaluate(config: Evaluate) -> None:
    """Run the job."""
    checkpoint = load_model(config.model)
    plan = config.plan(checkpoint.config.span_s)
    wanted = config.wanted(config.address)
    with checking_input():
        if not config.capacity:
            raise UserError("give at least one --capacity")
        for capacity in config.capacity:
            check_capacity(capacity, checkpoint.config.num_experts)
        capacities = capacities_of(config.method, checkpoint.config, config.capacity)
        checkpoint = checkpoint.with_config(with_method(checkpoint.config, config.method))
        options = config.tokens(checkpoint.config)
        videos = _select(config, checkpoint)
    with connected(config.address):
        placement = placed(wanted, config.engine)
        scores = score_videos(videos, plan, checkpoint, capacities, options, config.engine, placement)
        scored = list(tqdm(scores, "evaluate", unit="clip", mininterval=1))
    result = _result(scored, capacities, config, checkpoint)
    print(_table(result))
    print(json.dumps(result))


def _select(config: Evaluate, checkpoint: Checkpoint) -> list[Video]:
    videos = list(list_labelled(config.data))
    if config.split:
        splits = sorted({video.split for video in videos})
        videos = [video for video in videos if video.split == config.split]
        if not videos:
            raise UserError(f"{config.data} has no split {config.split!r}; it has {', '.join(map(repr, splits))}")
    if unknown := sorted({video.label for video in videos} - set(checkpoint.labels)):
        raise UserError(f"the model does not know the label{'s' * (len(unknown) > 1)} {', '.join(unknown[:5])}")
    return videos


def _result(
    scored: list[ScoredClip], capacities: tuple[float, ...], config: Evaluate, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Top-1 per capacity with its 95 % interval, and operations per clip."""
    clips_of: defaultdict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    failures: dict[str, str] = {}
    for clip in scored:
        clips_of[clip.video, clip.label]  # a video whose clips all fail has an entry too
        if clip.error:
            failures[clip.video] = clip.error
        else:
            clips_of[clip.video, clip.label].append(clip.probabilities_KC)
    rows = []
    for index, capacity in enumerate(capacities):
        right = sum(
            checkpoint.labels[int(np.mean([scores[index] for scores in clips], axis=0).argmax())] == label
            for (_, label), clips in clips_of.items()
            if clips
        )
        low, high = wilson_interval(right, len(clips_of))
        rows.append(
            {
                "capacity": capacity,
                "top1": right / len(clips_of),
                "low": low,
                "high": high,
                "flops_per_clip": _mean(clip.flops_K[index] for clip in scored if not clip.error),
                "dense_flops_per_clip": _mean(clip.dense_flops for clip in scored if not clip.error),
            }
        )
    return {
        "model_id": checkpoint.model_id,
        "data": config.data,
        "split": config.split,
        "method": config.method,
        "drop_static": config.drop_static,
        "views": config.views,
        "videos": len(clips_of),
        "clips": len(scored),
        "failures": failures,
        "results": rows,
    }


def _mean(values: Iterable[int]) -> float:
    """The mean, or 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which holds near 0 and 1 and for few videos too."""
    z, share = 1.96, right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    margin = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, centre - margin), min(1.0, centre + margin)  # at 0 and 1 but for rounding


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['method']}: {result['videos']:,} videos, {result['clips']:,} clips, {len(result['failures'])} failed"
    ]
    lines += [f"  {name}: {error}" for name, error in list(result["failures"].items())[:5]]
    lines.append(f"{'capacity':>8}  {'top-1':>6}  {'95 % interval':>15}  {'GFLOP/clip':>10}  {'of dense':>8}")
    for row in result["results"]:
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        share = row["flops_per_clip"] / (row["dense_flops_per_clip"] or 1)
        lines.append(
            f"{row['capacity']:>8.3g}  {100 * row['top1']:>5.1f}%  {interval:>15}  {row['flops_per_clip'] / 1e9:>10.3f}"
            f"  {share:>7.1%}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("evaluate", Evaluate, evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
