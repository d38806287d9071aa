"""What annotating a manifest would cost, measured on a sample of its clips."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mone.checkpoint import Checkpoint
from mone.compute import clip_compute
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.predict import Annotator
from pipelines.row_files import read_columns
from pipelines.schema import MANIFEST, Status
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.tokenize import tokenize_table

_SAMPLE_CLIPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Cost of a manifest.

    Attributes:
        videos, clips, planned_failures, hours: What is planned; a failure is a video that the probe could not read.
        flops, dense_flops: Of all clips, at the capacity and at full width.
        decode_core_s: Low and high end of the 95 % interval for decoding, in seconds of one core.
        model_s: Seconds in the model, on one worker of this machine.
        num_sampled: Clips measured.
    """

    videos: int
    clips: int
    planned_failures: int
    hours: float
    flops: int
    dense_flops: int
    decode_core_s: tuple[float, float]
    model_s: float
    num_sampled: int

    def __str__(self) -> str:
        """A few lines for people."""
        low, high = self.decode_core_s
        cores = os.cpu_count() or 1
        wall_low, wall_high = ((decode + self.model_s) / cores for decode in (low, high))
        return "\n".join(
            [
                f"videos   {self.videos:,} ({self.planned_failures:,} cannot be read)",
                f"clips    {self.clips:,}, {self.hours:.2f} hours",
                f"compute  {self.flops:.3g} floating-point operations, {self.dense_flops:.3g} at full width",
                f"decode   {_duration(low)} to {_duration(high)} of one core (95 %, from {self.num_sampled} clips)",
                f"model    {_duration(self.model_s)} on one worker here",
                f"wall     {_duration(wall_low)} to {_duration(wall_high)} on the {cores} cores of this machine",
            ]
        )


def estimate(
    manifest: Path,
    checkpoint: Checkpoint,
    capacity: float,
    limits: Limits = DEFAULT_LIMITS,
    signatures: Signatures = UNSIGNED,
) -> Estimate:
    """Decode and run a sample of the clips, and scale up.

    Args:
        manifest: Folder of the manifest.
        checkpoint: The model.
        capacity: Effective capacity e_c.
        limits: Of each video.
        signatures: What signed addresses are read with.
    """
    videos, clips, readable, hours = 0, 0, 0, 0.0
    for table in read_columns(manifest, ["video", "status", "start_s", "end_s"], MANIFEST):
        videos += len(table["video"].unique())
        clips += len(table)
        readable += int((np.array(table["status"].to_pylist()) == Status.OK).sum())
        hours += float((table["end_s"].to_numpy() - table["start_s"].to_numpy()).sum()) / 3600
    sample = _sample(manifest, readable)
    decode_s, model_s = (
        _measure(signatures.sign_table(sample), checkpoint, capacity, limits) if readable else (np.zeros(1), 0.0)
    )
    margin_s = 1.96 * decode_s.std(ddof=1) / len(decode_s) ** 0.5 if len(decode_s) > 1 else 0.0
    compute = clip_compute(checkpoint.config, capacity)
    return Estimate(
        videos=videos,
        clips=clips,
        planned_failures=clips - readable,
        hours=hours,
        flops=compute.flops * readable,
        dense_flops=compute.dense_flops * readable,
        decode_core_s=(
            max(0.0, decode_s.mean() - margin_s) * readable,
            (decode_s.mean() + margin_s) * readable,
        ),
        model_s=model_s * readable,
        num_sampled=len(sample),
    )


def _sample(manifest: Path, readable: int) -> pa.Table:
    """Clips spread evenly over those that are readable."""
    places, before, found = np.linspace(0, readable - 1, min(_SAMPLE_CLIPS, readable)).round().astype(int), 0, []
    for table in read_columns(manifest, MANIFEST.names, MANIFEST):
        here = table.filter(pc.field("status") == Status.OK.value)
        found.append(here.take(places[(before <= places) & (places < before + len(here))] - before))
        before += len(here)
    return pa.concat_tables(found)


def _measure(sample: pa.Table, checkpoint: Checkpoint, capacity: float, limits: Limits) -> tuple[np.ndarray, float]:
    """Seconds of decoding for each clip, and of the model per clip."""
    clips = (sample.slice(index, 1) for index in range(len(sample)))
    decoded = [tokenize_table(clip, checkpoint.config, limits=limits) for clip in clips]
    decode_s = np.array([table["decode_ms"][0].as_py() / 1e3 for table in decoded])
    annotator = Annotator(checkpoint, capacity, top_k=1)
    annotator(decoded[0])  # the first call is slower
    model_ms = annotator(pa.concat_tables(decoded)).filter(pc.field("status") == Status.OK.value)["model_ms"].to_numpy()
    return decode_s, float(model_ms.mean()) / 1e3 if len(model_ms) else 0.0


def _duration(seconds: float) -> str:
    for size_s, unit in ((3600, "h"), (60, "min")):
        if seconds >= size_s:
            return f"{seconds / size_s:.1f} {unit}"
    return f"{seconds:.1f} s"
