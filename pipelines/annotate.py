"""The two graphs of Ray Data: videos -> manifest, and manifest -> annotations."""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset

from mone.checkpoint import Checkpoint
from mone.config import ModelConfig
from mone.engine.choice import Engine
from pipelines.archive import Video
from pipelines.commit import REMAINING_DIR, CommittedFiles, fence, write_remaining
from pipelines.manifest import plan_video
from pipelines.predict import Annotator
from pipelines.schema import MANIFEST
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from pipelines.view import WHOLE_CLIPS, TokenOptions

MANIFEST_DIR = "manifest"

_VIDEOS = pa.schema([("uri", pa.string()), ("label", pa.string()), ("split", pa.string())])

# Videos that one task probes: some tenths of a second of work.
_VIDEOS_PER_TASK = 32
# Clips of one decoding task, and so of one annotations file: seconds of work, which is what a crash can cost, against
# tens of milliseconds for a task, a file and its checkpoint.
CLIPS_PER_TASK = 32
# Heap of a decoding task: two frames of 8192 x 4320 take 0.9 GB. Ray cannot see heap, so it is asked for.
DECODE_MEMORY_BYTES = 1 << 30
# A write waits for the disk. Its share comes from a model process, so that on two cores, one decoding, one running
# the model, there is room to write: without it nothing is committed before everything is decoded.
_WRITE_CPUS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How clips are annotated.

    Attributes:
        capacity: Effective capacity e_c.
        tokens: Views, and whether static patches are dropped.
        top_k: Labels kept per clip.
        batch_size: Clips of a forward pass; 0 picks by device.
        num_model_workers: Model processes; 0 means one per GPU, or one per two CPUs where there is no GPU.
        engine: Which code runs the model's blocks.
    """

    capacity: float
    tokens: TokenOptions = WHOLE_CLIPS
    top_k: int = 5
    batch_size: int = 0
    num_model_workers: int = 0
    engine: Engine = "auto"


def write_manifest(videos: Iterable[Video], plan: ClipPlan, output: Path) -> None:
    """Probe the videos in parallel and write DIR/manifest, which appears whole or not at all."""
    partial = output / f"{MANIFEST_DIR}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    plan_stage(videos, plan).write_parquet(str(partial))
    partial.rename(output / MANIFEST_DIR)


def write_annotations(output: Path, checkpoint: Checkpoint, settings: Settings) -> None:
    """Annotate every clip of DIR/manifest that is not committed yet.

    Strictly one row out for one row in. Each file is committed whole, so a run that is killed at any moment continues
    without a loss or a double.
    """
    fence(output)
    if not write_remaining(output, output / MANIFEST_DIR):
        return
    remaining = ray.data.read_parquet(str(output / REMAINING_DIR), schema=MANIFEST)
    annotated = model_stage(
        tokenize_stage(remaining, checkpoint.config, settings.tokens),
        Annotator,
        (checkpoint, settings.capacity, settings.top_k, settings.engine),
        batch_size=settings.batch_size,
        num_workers=settings.num_model_workers,
    )
    annotated.write_datasink(CommittedFiles(output), ray_remote_args={"num_cpus": _WRITE_CPUS})
    fence(output)
    shutil.rmtree(output / REMAINING_DIR)


def plan_stage(videos: Iterable[Video], plan: ClipPlan) -> Dataset:
    """Videos -> MANIFEST rows: probing is short I/O and one decoded frame per file."""
    rows = [dataclasses.asdict(video) for video in videos]
    table = pa.Table.from_pylist(rows, schema=_VIDEOS)
    return (
        ray.data.from_arrow(table)
        .repartition(-(-len(table) // _VIDEOS_PER_TASK))
        .map_batches(functools.partial(_plan_table, plan=plan), batch_size=None, batch_format="pyarrow")
    )


def _plan_table(videos: pa.Table, plan: ClipPlan) -> pa.Table:
    clips = [clip for row in videos.to_pylist() for clip in plan_video(Video(**row), plan)]
    columns = {name: [getattr(clip, name) for clip in clips] for name in MANIFEST.names}
    return pa.table(columns, schema=MANIFEST)


def tokenize_stage(manifest: Dataset, config: ModelConfig, options: TokenOptions) -> Dataset:
    """MANIFEST rows -> DECODED rows, on CPUs."""
    return manifest.repartition(target_num_rows_per_block=CLIPS_PER_TASK).map_batches(
        functools.partial(tokenize_table, config=config, options=options),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,  # both decoders run on one thread
        memory=DECODE_MEMORY_BYTES,
    )


def model_stage(
    decoded: Dataset, model: type, arguments: tuple[Any, ...], *, batch_size: int = 0, num_workers: int = 0
) -> Dataset:
    """DECODED rows -> what the model says, on GPUs where the cluster has any, else on CPUs.

    Args:
        decoded: From `tokenize_stage`.
        model: Callable class.
        arguments: Of its constructor.
        batch_size: Clips of a call; 0 picks by device.
        num_workers: Processes at most; 0 picks by cluster.
    """
    resources = ray.cluster_resources()
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    # Without a GPU half of the cores decode while the other half run the model.
    workers = num_workers or num_gpus or max(1, num_cpus // 2)
    return decoded.map_batches(
        model,
        fn_constructor_args=arguments,
        batch_size=batch_size or (64 if num_gpus else 16),
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=workers),
        num_cpus=1 - _WRITE_CPUS,
        num_gpus=1 if num_gpus else 0,
    )
