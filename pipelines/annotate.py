"""The graphs of Ray Data: manifest -> annotations; and videos -> manifest where that is not kept."""

import dataclasses
import functools
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset

from mone.checkpoint import Checkpoint
from mone.config import ModelConfig
from mone.engine.choice import Engine
from pipelines.commit import REMAINING_DIR, CommittedFiles, fence, withdraw, write_remaining
from pipelines.limits import DEFAULT_LIMITS, Limits
from pipelines.manifest import plan_video
from pipelines.metrics import SILENT, RunMetrics
from pipelines.placement import ANY_DEVICE, Placement, Wanted, nodes_up, place, task_memory
from pipelines.planning import MANIFEST_DIR, manifest_table
from pipelines.predict import Annotator
from pipelines.schema import DECODED, MANIFEST
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_table
from pipelines.video import Video
from pipelines.view import WHOLE_CLIPS, TokenOptions
from pipelines.waiting import Notices, patiently, told

_VIDEOS = pa.schema(
    [
        *((name, pa.string()) for name in ("uri", "label", "split")),
        ("size_bytes", pa.int64()),
        ("version", pa.string()),
    ]
)

# Videos that one task probes: some tenths of a second of work.
_VIDEOS_PER_TASK = 32
# Of a CPU, to read a file of some megabytes.
_READ_CPUS = 0.25
# Clips of one decoding task, and so of one annotations file: seconds of work, which is what a crash can cost, against
# tens of milliseconds for a task, a file and its checkpoint.
CLIPS_PER_TASK = 32
# Tasks for each core, where there are so few clips that all cores would not be at work until the end.
_TASKS_PER_CORE, _FEWEST_CLIPS = 8, 4
# Heap of a decoding task and its child. Ray cannot see heap, so it is asked for.
DECODE_MEMORY_BYTES = DEFAULT_LIMITS.memory_bytes


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
        run: The run's name, which its metrics are labelled with; "" records none.
    """

    capacity: float
    tokens: TokenOptions = WHOLE_CLIPS
    top_k: int = 5
    batch_size: int = 0
    wanted: Wanted = ANY_DEVICE
    engine: Engine = "auto"
    limits: Limits = DEFAULT_LIMITS
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
    remaining = _read_remaining(output / REMAINING_DIR)
    metrics = RunMetrics(settings.run)
    decoded = tokenize_stage(
        remaining,
        checkpoint.config,
        settings.tokens,
        settings.limits,
        signatures,
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
    annotated.write_datasink(CommittedFiles(output, metrics), ray_remote_args={"num_cpus": placement.write_cpus})


def _read_remaining(folder: Path) -> Dataset:
    """MANIFEST rows, a task for each file.

    A task runs again. (Ray's `read_parquet` lets an actor read footers, and a run ended when that died with its node.)
    """
    paths = sorted(map(str, folder.iterdir()))
    return ray.data.from_items(paths, override_num_blocks=len(paths)).map_batches(
        _read_files, batch_size=None, batch_format="pyarrow", num_cpus=_READ_CPUS
    )


def _read_files(paths: pa.Table) -> pa.Table:
    return pa.concat_tables(pq.read_table(path, schema=MANIFEST) for path in paths["item"].to_pylist())


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
    return manifest_table([clip for row in videos.to_pylist() for clip in plan_video(Video(**row), plan)])


def tokenize_stage(
    manifest: Dataset,
    config: ModelConfig,
    options: TokenOptions,
    limits: Limits = DEFAULT_LIMITS,
    signatures: Signatures = UNSIGNED,
    *,
    num_clips: int | None = None,
    metrics: RunMetrics = SILENT,
    notices: Notices | None = None,
) -> Dataset:
    """MANIFEST rows -> DECODED rows, on CPUs; how many rows there are, if it is known, decides how they are shared."""
    return manifest.repartition(target_num_rows_per_block=_clips_per_task(num_clips)).map_batches(
        functools.partial(
            _tokenize,
            config=config,
            options=options,
            limits=limits,
            signatures=signatures,
            metrics=metrics,
            notices=notices,
        ),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,  # both decoders run on one thread
        # What a limit allows beyond that is rarely needed.
        memory=task_memory(min(limits.memory_bytes, DECODE_MEMORY_BYTES), nodes_up()),
    )


def _clips_per_task(num_clips: int | None) -> int:
    num_tasks = _TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
    return CLIPS_PER_TASK if num_clips is None else min(CLIPS_PER_TASK, max(_FEWEST_CLIPS, num_clips // num_tasks))


def _tokenize(
    manifest: pa.Table,
    config: ModelConfig,
    options: TokenOptions,
    limits: Limits,
    signatures: Signatures,
    metrics: RunMetrics,
    notices: Notices | None,
) -> pa.Table:
    """Tokenize with signed addresses in place of the public ones, which stand in what comes out."""
    with told(notices.post) if notices else patiently():
        decoded = tokenize_table(signatures.sign_table(manifest), config, options, limits)
    metrics.decoded(decoded, config.num_frames)
    place = DECODED.get_field_index("video")
    return decoded.set_column(place, DECODED.field(place), manifest["video"])


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
        arguments: Of its constructor.
        batch_size: Clips of a call; 0 picks by device.
        placement: Where it runs; None: on GPUs where any is up, else on CPUs.
    """
    placement = placement or place(ANY_DEVICE, nodes_up())
    return decoded.map_batches(
        model,
        fn_constructor_args=arguments,
        batch_size=batch_size or (64 if placement.gpus else 16),
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=placement.least, max_size=placement.most),
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
    )
