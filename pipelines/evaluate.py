"""Scores of labelled clips at several capacities: decoded once, run once per capacity."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mone.checkpoint import Checkpoint
from mone.engine.choice import Engine
from pipelines.annotate import model_stage
from pipelines.archive import Video
from pipelines.ingest import plan_stage, tokenize_stage
from pipelines.placement import Device, Placement
from pipelines.predict import BATCH_SIZE, Annotator
from pipelines.schema import Status
from pipelines.storage.signatures import Signatures
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokens_of
from pipelines.view import WHOLE_CLIPS, TokenOptions

_SCORED = pa.schema(
    [
        ("video", pa.string()),
        ("label", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("probabilities", pa.list_(pa.float32())),  # [K, C] flat; empty unless ok
        ("flops", pa.list_(pa.int64())),  # [K]; empty unless ok
        ("dense_flops", pa.int64()),
    ]
)


class ScoredClip(NamedTuple):
    """One labelled clip.

    Attributes:
        video: Its file.
        label: Its class.
        error: Why it has no scores; "" where it has.
        probabilities_KC: float32 [K, C], a row per capacity, where it has.
        flops_K: Floating-point operations at each capacity, where it has.
        dense_flops: At full width, on all patches.
    """

    video: str
    label: str
    error: str
    probabilities_KC: np.ndarray
    flops_K: tuple[int, ...]
    dense_flops: int


class Scorer:
    """A model at K capacities, as a callable for Ray Data: DECODED rows to scored rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        capacities: tuple[float, ...],
        engine: Engine = "auto",
        *,
        device: Device = "auto",
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.config = checkpoint.config
        self.annotator = Annotator(
            checkpoint, capacities[0], top_k=1, engine=engine, device=device, batch_size=batch_size
        )
        self.capacities = capacities

    def __call__(self, decoded: pa.Table) -> pa.Table:
        """Score a batch."""
        annotator, rows = self.annotator, decoded.select(["video", "label", "status", "error"]).to_pylist()
        for row in rows:
            row |= {"probabilities": [], "flops": [], "dense_flops": 0}
        for tokens in tokens_of(decoded, self.config):
            scores_BKC = np.stack([annotator.probabilities(tokens, capacity) for capacity in self.capacities], axis=1)
            costs = [annotator.compute(tokens, capacity) for capacity in self.capacities]
            for row, scores_KC in zip(tokens.rows, scores_BKC, strict=True):
                rows[row]["probabilities"] = scores_KC.ravel()
                rows[row]["flops"] = [cost.flops for cost in costs]
                rows[row]["dense_flops"] = costs[0].dense_flops
        return pa.Table.from_pylist(rows, schema=_SCORED)


def score_videos(
    videos: Iterable[Video],
    plan: ClipPlan,
    checkpoint: Checkpoint,
    capacities: tuple[float, ...],
    options: TokenOptions = WHOLE_CLIPS,
    engine: Engine = "auto",
    placement: Placement | None = None,
) -> Iterator[ScoredClip]:
    """Every clip of labelled videos with its class probabilities at each capacity, in no particular order."""
    videos = list(videos)
    signatures = Signatures.of(video.uri for video in videos)
    decoded = tokenize_stage(plan_stage(videos, plan), checkpoint.config, options, signatures=signatures)
    scored = model_stage(decoded, Scorer, (checkpoint, capacities, engine), placement=placement)
    for batch in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in pa.table(batch).to_pylist():
            probabilities = np.array(row["probabilities"], dtype=np.float32)
            error = "" if row["status"] == Status.OK else f"{row['status']}: {row['error']}"
            yield ScoredClip(
                row["video"],
                row["label"],
                error,
                probabilities.reshape(len(capacities), -1),
                tuple(row["flops"]),
                row["dense_flops"],
            )
