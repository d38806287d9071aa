"""Label a video archive and record what the routing saved, clip by clip.

python -m jobs.annotate ARCHIVE --output DIR --model MODEL --capacity 0.4
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.archive_input import open_archive
from jobs.cli import JobFailed, UserError, checking_input, run
from jobs.cluster import connected
from jobs.inputs import BUNDLED_MODEL, Archive, LimitOptions, TokenArguments, load_model, make_output
from jobs.placement import PlacementOptions, placed
from jobs.plan_record import check_plan, write_plan
from jobs.progress import clips_progress, videos_progress
from jobs.run_record import read_run, totals_record, versions, write_run
from jobs.session import Session, efficiency, run_name, speed
from jobs.waits import waiting_shown
from mone.baselines import capacities_of
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.engine.choice import Engine
from pipelines.annotate import Settings, write_annotations
from pipelines.archive import ArchiveError
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import Totals, totals
from pipelines.limits import DecoderChoice
from pipelines.metrics import RunMetrics
from pipelines.output import in_output
from pipelines.planning import MANIFEST_DIR, write_manifest
from pipelines.retry import undo_failed
from pipelines.row_files import LedgerError, count_rows
from pipelines.storage.address import public_address


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotate(TokenArguments, LimitOptions, PlacementOptions):
    """Label every clip of an archive: one row per clip in DIR/annotations, whatever happened to it.

    Plans first where DIR has no manifest. Stopped or killed at any moment, the same command continues; finished, it
    does what is new: videos that were added, files that changed. Failures are rows with their reason; --retry-failed
    does those again. `python -m jobs.audit DIR` proves that nothing is missing.
    """

    archive: Archive
    """A folder, a glob, a video, or a .csv/.parquet/.jsonl with a column `video`; here or at s3://, gs://, https://."""
    output: str
    """DIR for manifest, annotations and run.json."""
    model: str = str(BUNDLED_MODEL)
    """Model folder (config.json, model.safetensors, labels.json)."""
    capacity: float = 0.4
    """Effective capacity e_c: 1 is full width, 0.4 about 40 % of the spatial encoder's work."""
    top_k: int = 5
    """Labels kept per clip."""
    batch_size: int = 0
    """Clips of a forward pass; 0 picks 16."""
    engine: Engine = "auto"
    """Code that runs the model's blocks, "reference" being the plainest; all compute the same but "fp8", which trades
    some exactness for time on GPUs from L4 and H100 on (docs/performance.md)."""
    decoder: DecoderChoice = "cpu"
    """cpu: CPUs alone, with the same bits in each run. auto: from 500 clips on, NVDEC beside CPUs where a node has an
    NVIDIA GPU, the faster taking more; its pixels differ by rounding. nvdec: NVDEC alone, CPUs only where it cannot.
    The column `decoder` says who decoded a clip, `note` why another could not."""
    retry_failed: bool = False
    """Do the rows of an earlier run again that are not ok, beside what is new."""
    max_failed_share: float = 0.5
    """Exit with status 1 where more clips failed than this share (all rows are written all the same)."""
    update: bool = False
    """Where --model holds another model than DIR was annotated with, do all clips again in place of refusing."""
    price_per_hour: float = 0.0
    """What the cluster (or this run's part of it) costs for an hour; adds the cost to run.json, report and metrics."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else Ray starts here."""


def annotate(config: Annotate) -> None:
    """Run the job."""
    checkpoint, settings = check(config)
    clip_plan = config.plan(checkpoint.config.span_s)
    output = Path(config.output).resolve()
    planned = (output / MANIFEST_DIR).exists()
    if config.retry_failed and not planned:
        raise UserError(f"nothing to retry: {config.output} has no rows of an earlier run")
    if planned:
        check_plan(output, config.archive, clip_plan)
    videos, signatures = open_archive(config.archive)
    record = _open_record(make_output(config.output), config, checkpoint)

    settings = dataclasses.replace(settings, run=run_name(output))
    session = Session(output, record, RunMetrics(settings.run), config.price_per_hour)
    try:
        with waiting_shown(output):
            with connected(config.address), session.measured():
                placement = placed(settings.wanted, config.engine)
                session.entry |= {"device": placement.device, "model_workers": [placement.least, placement.most]}
                if not planned:
                    write_plan(output, config.archive, clip_plan)
                if config.retry_failed:
                    print(f"retry     {undo_failed(output):,} clips", file=sys.stderr)
                with videos_progress() as on_videos:
                    write_manifest(videos, clip_plan, output, settings.limits, on_videos)
                with clips_progress(output / ANNOTATIONS_DIR, count_rows(output / MANIFEST_DIR), session.tick):
                    write_annotations(output, checkpoint, settings, signatures, placement)
            result = totals(output / ANNOTATIONS_DIR, frozenset(checkpoint.labels))
            record["totals"] = totals_record(result) | efficiency(result, record["sessions"])
            in_output(output, lambda: write_run(output, record))
    except (ArchiveError, LedgerError) as error:  # a part of the archive, or files of an earlier run damaged since
        raise UserError(str(error)) from error
    print(summary(result, record["totals"], output))
    if result.failed > config.max_failed_share * result.clips:
        raise JobFailed(f"{result.failed} of {result.clips} clips failed, more than --max-failed-share allows")


def check(config: Annotate) -> tuple[Checkpoint, Settings]:
    """Check what can be checked without looking at a video.

    Raises:
        UserError: An option out of range, or a model that cannot be used.
    """
    checkpoint = load_model(config.model)
    with checking_input():
        check_capacity(config.capacity, checkpoint.config.num_experts)
    # What runs is what the rows say: a fixed allocation has a capacity of its own, whatever is asked.
    (capacity,) = capacities_of("mone", checkpoint.config, [config.capacity])
    if config.batch_size < 0:
        raise UserError(f"--batch-size must not be negative, got {config.batch_size}")
    if config.top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {config.top_k}")
    if not 0 <= config.price_per_hour < math.inf:
        raise UserError(f"--price-per-hour must not be negative, got {config.price_per_hour:g}")
    if not 0 <= config.max_failed_share <= 1:
        raise UserError(f"--max-failed-share must be between 0 and 1, got {config.max_failed_share:g}")
    return checkpoint, Settings(
        capacity=capacity,
        tokens=config.tokens(checkpoint.config),
        top_k=config.top_k,
        batch_size=config.batch_size,
        wanted=config.wanted(config.address),
        engine=config.engine,
        limits=config.limits(),
        decoder=config.decoder,
    )


def _open_record(output: Path, config: Annotate, checkpoint: Checkpoint) -> dict[str, Any]:
    """The run's record so far; written before any work, so that a folder always says what it belongs to.

    Raises:
        UserError: The folder belongs to another model, capacity or way of cutting clips.
    """
    record = read_run(output)
    identity = {
        "archive": public_address(config.archive),
        "model_id": checkpoint.model_id,
        "capacity": config.capacity,
        "top_k": config.top_k,
        "clips": [config.span, config.stride, config.clips_per_video],
        "tokens": [config.views, config.drop_static],
        "products": "fp8" if config.engine == "fp8" else "half",
    }
    for name, value in identity.items():
        if record and record["identity"].get(name, value) != value and not (config.update and name == "model_id"):
            was = record["identity"].get(name)
            advice = "choose another --output" + (", or --update" if name == "model_id" else "")
            raise UserError(f"{output} was annotated with {name} {was}, not {value}; {advice}")
    record = {
        "config": dataclasses.asdict(config) | {"archive": public_address(config.archive)},
        "identity": identity,
        "run": run_name(output),
        "labels": list(checkpoint.labels),
        "num_experts": checkpoint.config.num_experts,
        "versions": versions(),
        "sessions": record.get("sessions", []),
        "totals": record.get("totals", {}),
    }
    write_run(output, record)
    return record


def summary(result: Totals, record: dict[str, Any], output: Path) -> str:
    """The end of a run in a few lines for people."""
    lines = [
        f"clips     {result.clips:,} ({result.hours:.2f} hours), {result.failed:,} failed",
        f"compute   {result.flops:.3g} of {result.dense_flops:.3g} floating-point operations: "
        f"{result.saved_share:.1%} saved",
    ]
    if result.dropped_share:
        lines.append(f"          {result.dropped_share:.1%} by static patches, {result.routed_share:.1%} by routing")
    if result.labelled:
        lines.append(f"accuracy  {result.right / result.labelled:.1%} of {result.labelled:,} clips with a known label")
    lines += [f"failed    {count:,} {status}: {error}" for (status, error), count in result.failures.most_common(8)]
    if len(result.failures) > 8:
        lines.append(f"          and {len(result.failures) - 8} more reasons in run.json")
    if line := speed(record):
        lines.append(f"speed     {line}")
    if "cost" in record:
        lines.append(f"cost      {record['cost']:,.2f}")
    return "\n".join([*lines, f"rows      {output / ANNOTATIONS_DIR}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("annotate", Annotate, annotate, argv)


if __name__ == "__main__":
    sys.exit(main())
