"""The graph of Ray Data: manifest -> annotations."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from mone.checkpoint import Checkpoint
from mone.engine.choice import Engine
from pipelines.commit import REMAINING_DIR, CommittedFiles, fence, withdraw, write_remaining
from pipelines.ingest import tokenize_stage
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.planning import MANIFEST_DIR
from pipelines.predict import Annotator
from pipelines.schema import MANIFEST
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.view import WHOLE_CLIPS, TokenOptions

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
        limits: What reading a video may take.
    """

    capacity: float
    tokens: TokenOptions = WHOLE_CLIPS
    top_k: int = 5
    batch_size: int = 0
    num_model_workers: int = 0
    engine: Engine = "auto"
    limits: Limits = DEFAULT_LIMITS


def write_annotations(
    output: Path, checkpoint: Checkpoint, settings: Settings, signatures: Signatures = UNSIGNED
) -> None:
    """Annotate every clip of DIR/manifest that is not committed yet.

    Strictly one row out for one row in. Each file is committed whole, so a run that is killed at any moment continues
    without a loss or a double. Rows of clips that are planned no more, or of another model, are taken back first.

    Args:
        output: DIR.
        checkpoint: The model.
        settings: How.
        signatures: What signed addresses are read with.
    """
    fence(output)
    withdraw(output, output / MANIFEST_DIR, checkpoint.model_id)
    if num_clips := write_remaining(output, output / MANIFEST_DIR):
        _annotate_remaining(output, checkpoint, settings, signatures, num_clips)
    fence(output)
    shutil.rmtree(output / REMAINING_DIR, ignore_errors=True)


def _annotate_remaining(
    output: Path, checkpoint: Checkpoint, settings: Settings, signatures: Signatures, num_clips: int
) -> None:
    remaining = ray.data.read_parquet(str(output / REMAINING_DIR), schema=MANIFEST)
    annotated = model_stage(
        tokenize_stage(remaining, checkpoint.config, settings.tokens, settings.limits, signatures, num_clips=num_clips),
        Annotator,
        (checkpoint, settings.capacity, settings.top_k, settings.engine),
        batch_size=settings.batch_size,
        num_workers=settings.num_model_workers,
    )
    annotated.write_datasink(CommittedFiles(output), ray_remote_args={"num_cpus": _WRITE_CPUS})


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
