"""The graph of Ray Data: manifest -> annotations."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.data import ActorPoolStrategy, Dataset

from mone.checkpoint import Checkpoint
from mone.engine.choice import Engine
from pipelines.commit import REMAINING_DIR, CommittedFiles, fence, withdraw, write_remaining
from pipelines.ingest import read_manifest, tokenize_stage
from pipelines.limits import DEFAULT_LIMITS, DecoderChoice, Limits
from pipelines.metrics import RunMetrics
from pipelines.placement import ANY_DEVICE, Placement, Wanted, nodes_up, place
from pipelines.planning import MANIFEST_DIR
from pipelines.predict import BATCH_SIZE, Annotator
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.view import WHOLE_CLIPS, TokenOptions
from pipelines.waiting import Notices

# Of a model on a GPU, which is faster than Ray hands them over one by one.
_CLIPS_OF_CALL = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How clips are annotated.

    Attributes:
        capacity: Effective capacity e_c.
        tokens: Views, and whether static patches are dropped.
        top_k: Labels kept per clip.
        batch_size: Clips of a forward pass; 0 picks by device.
        wanted: What the model's processes run on.
        engine: Which code runs the model's blocks.
        limits: What reading a video may take.
        decoder: Whether a GPU decodes, beside CPUs or before them.
        run: The run's name, which its metrics are labelled with; "" records none.
    """

    capacity: float
    tokens: TokenOptions = WHOLE_CLIPS
    top_k: int = 5
    batch_size: int = 0
    wanted: Wanted = ANY_DEVICE
    engine: Engine = "auto"
    limits: Limits = DEFAULT_LIMITS
    decoder: DecoderChoice = "cpu"
    run: str = ""


def write_annotations(
    output: Path,
    checkpoint: Checkpoint,
    settings: Settings,
    signatures: Signatures = UNSIGNED,
    placement: Placement | None = None,
) -> None:
    """Annotate every clip of DIR/manifest that is not committed yet.

    Strictly one row out for one row in. Each file is committed whole, so a run that is killed at any moment continues
    without a loss or a double. Rows of clips that are planned no more, or of another model, are taken back first.

    Args:
        output: DIR.
        checkpoint: The model.
        settings: How.
        signatures: What signed addresses are read with.
        placement: Where the model runs; None: where the settings and the nodes that are up say.

    Raises:
        LedgerError: Files of the folder that cannot be read.
        OutputFailedError: It has failed for too long, here; of a task, as the cause of Ray's error.
    """
    fence(output)
    withdraw(output, output / MANIFEST_DIR, checkpoint.model_id)
    if num_clips := write_remaining(output, output / MANIFEST_DIR):
        placement = placement or place(settings.wanted, nodes_up())
        _annotate_remaining(output, checkpoint, settings, signatures, placement, num_clips)
    fence(output)
    shutil.rmtree(output / REMAINING_DIR, ignore_errors=True)


def _annotate_remaining(
    output: Path,
    checkpoint: Checkpoint,
    settings: Settings,
    signatures: Signatures,
    placement: Placement,
    num_clips: int,
) -> None:
    remaining = read_manifest(output / REMAINING_DIR)
    metrics = RunMetrics(settings.run)
    decoded = tokenize_stage(
        remaining,
        checkpoint.config,
        settings.tokens,
        settings.limits,
        signatures,
        decoder=settings.decoder,
        num_clips=num_clips,
        metrics=metrics,
        notices=Notices(output),
    )
    annotated = model_stage(
        decoded,
        Annotator,
        (checkpoint, settings.capacity, settings.top_k, settings.engine, metrics),
        batch_size=settings.batch_size,
        placement=placement,
    )
    annotated.set_name(settings.run or None)  # the label `dataset` of Ray Data's own metrics
    files = CommittedFiles(output, metrics, num_clips)
    annotated.write_datasink(files, ray_remote_args={"num_cpus": placement.write_cpus})


def model_stage(
    decoded: Dataset,
    model: type,
    arguments: tuple[Any, ...],
    *,
    batch_size: int = 0,
    placement: Placement | None = None,
) -> Dataset:
    """DECODED rows -> what the model says.

    Args:
        decoded: From `tokenize_stage`.
        model: Callable class.
        arguments: Of its constructor, which also takes `device`, "cuda" or "cpu", and `batch_size`.
        batch_size: Clips of a forward pass; 0 picks by device.
        placement: Where it runs; None: on GPUs where any is up, else on CPUs.
    """
    placement = placement or place(ANY_DEVICE, nodes_up())
    batch_size = batch_size or BATCH_SIZE
    at_once = batch_size * max(1, _CLIPS_OF_CALL // batch_size) if placement.gpus else batch_size
    return decoded.map_batches(
        model,
        fn_constructor_args=arguments,
        # A process that asked for no GPU may see those of its node all the same.
        fn_constructor_kwargs={"device": placement.device, "batch_size": batch_size},
        batch_size=at_once,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=placement.least, max_size=placement.most),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
    )
