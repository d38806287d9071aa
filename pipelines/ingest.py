"""Stages of Ray Data on CPUs: videos -> manifest rows -> decoded rows.

Their workers import this module, and so neither the model nor torch, which would take seconds of each of them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import Dataset, TaskPoolStrategy

from mone.config import ModelConfig
from pipelines.heap import keep_memory
from pipelines.limits import DEFAULT_LIMITS, DecoderChoice, Limits
from pipelines.manifest import plan_video
from pipelines.metrics import SILENT, RunMetrics
from pipelines.nvdec import SLOTS_PER_GPU
from pipelines.output import in_output
from pipelines.placement import nodes_up, task_memory
from pipelines.planning import manifest_table
from pipelines.row_files import parquet_files
from pipelines.schema import DECODED, MANIFEST
from pipelines.storage.signatures import UNSIGNED, Signatures
from pipelines.timeline import ClipPlan
from pipelines.tokenize import tokenize_tables
from pipelines.video import Video
from pipelines.view import TokenOptions
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
# Clips that a decoding task decodes and hands on together: seconds of work, some hundred megabytes.
CLIPS_TOGETHER = 32
# Clips of a task, at most. A task costs the driver, of which there is one, milliseconds.
MOST_CLIPS_PER_TASK = 128
# Tasks for each core, where there are so few clips that all cores would not be at work until the end.
_TASKS_PER_CORE, _FEWEST_CLIPS = 8, 4
# Share of a core that a decoding task asks for, so that there are three for two cores: Ray Data looks for tasks that
# have ended every tenth of a second, and starts others then; meanwhile the third one has the core.
DECODE_CPUS = 0.66
# Heap of a decoding task and its child. Ray cannot see heap, so it is asked for.
DECODE_MEMORY_BYTES = DEFAULT_LIMITS.memory_bytes


# Clips for which "auto" has processes start to use a GPU, for some seconds each, in which cores do some hundred.
FEWEST_CLIPS_FOR_GPU = 500


def read_manifest(folder: Path) -> Dataset:
    """MANIFEST rows, a task for each file.

    A task runs again. (Ray's `read_parquet` lets an actor read footers, and a run ended when that died with its node.)
    """
    paths = list(map(str, parquet_files(folder)))
    return ray.data.from_items(paths, override_num_blocks=len(paths)).map_batches(
        functools.partial(_read_files, output=folder.parent),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=_READ_CPUS,
    )


def _read_files(paths: pa.Table, output: Path) -> pa.Table:
    with told(Notices(output).post):
        return pa.concat_tables(
            in_output(output, functools.partial(pq.read_table, path, schema=MANIFEST))
            for path in paths["item"].to_pylist()
        )


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
    decoder: DecoderChoice = "cpu",
    num_clips: int | None = None,
    metrics: RunMetrics = SILENT,
    notices: Notices | None = None,
) -> Dataset:
    """MANIFEST rows -> DECODED rows; how many rows there are, if it is known, decides how they are shared.

    A GPU that decodes is no resource of Ray's: a task that gets one of the host's few slots for it decodes there, the
    others on their CPUs, so that whoever is faster takes more (`pipelines.nvdec`).
    """
    decoder = worth_starting(decoder, num_clips)
    return manifest.repartition(target_num_rows_per_block=clips_per_task(num_clips)).map_batches(
        functools.partial(
            _tokenize,
            config=config,
            options=options,
            limits=limits,
            signatures=signatures,
            decoder=decoder,
            metrics=metrics,
            notices=notices,
        ),
        batch_size=None,
        batch_format="pyarrow",
        compute=_pool(decoder),
        num_cpus=DECODE_CPUS,
        # What a limit allows beyond that is rarely needed.
        memory=task_memory(min(limits.memory_bytes, DECODE_MEMORY_BYTES), nodes_up()),
    )


def worth_starting(decoder: DecoderChoice, num_clips: int | None) -> DecoderChoice:
    """Who decodes so many clips: of few, CPUs are done before a GPU has started."""
    few = num_clips is not None and num_clips < FEWEST_CLIPS_FOR_GPU
    return "cpu" if decoder == "auto" and few else decoder


def _pool(decoder: DecoderChoice) -> TaskPoolStrategy | None:
    """As many tasks as slots where GPUs alone are to decode."""
    num_gpus = int(sum(node.gpus for node in nodes_up())) if decoder == "nvdec" else 0
    return TaskPoolStrategy(num_gpus * SLOTS_PER_GPU) if num_gpus else None


def clips_per_task(num_clips: int | None) -> int:
    """Clips that a decoding task takes: fewer where there are so few that cores would stand idle at the end.

    The next power of two, so that what tasks give makes up the model's batches without being cut.
    """
    num_tasks = _TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
    wanted = CLIPS_TOGETHER if num_clips is None else max(_FEWEST_CLIPS, num_clips // num_tasks)
    return min(MOST_CLIPS_PER_TASK, 1 << (wanted - 1).bit_length())


def _tokenize(
    manifest: pa.Table,
    config: ModelConfig,
    options: TokenOptions,
    limits: Limits,
    signatures: Signatures,
    decoder: DecoderChoice,
    metrics: RunMetrics,
    notices: Notices | None,
) -> Iterator[pa.Table]:
    """Tokenize with signed addresses in place of the public ones, which stand in what comes out."""
    keep_memory()
    place, clips = DECODED.get_field_index("video"), signatures.sign_table(manifest)
    with told(notices.post) if notices else patiently():
        start = 0
        for decoded in tokenize_tables(clips, config, options, limits, decoder, rows_each=CLIPS_TOGETHER):
            metrics.decoded(decoded, config.num_frames)
            yield decoded.set_column(place, DECODED.field(place), manifest["video"].slice(start, len(decoded)))
            start += len(decoded)
            del decoded  # before the next ones come
