"""Plan an archive: probe its videos, cut them into clips, write the manifest, estimate the cost.

python -m jobs.plan ARCHIVE --output DIR
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.archive_input import open_archive
from jobs.cli import UserError, checking_input, run
from jobs.cluster import connected
from jobs.estimate import estimate
from jobs.inputs import BUNDLED_MODEL, Archive, ClipOptions, LimitOptions, load_model, make_output
from jobs.plan_record import write_plan
from jobs.progress import videos_progress
from jobs.waits import waiting_shown
from mone.capacity import check_capacity
from pipelines.archive import ArchiveError
from pipelines.planning import MANIFEST_DIR, write_manifest
from pipelines.row_files import LedgerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(ClipOptions, LimitOptions):
    """Probe every video of an archive and write the clip manifest to DIR/manifest.

    Prints videos, clips, hours, and what annotating them would cost, measured on a sample of the clips. Stopped or
    killed at any moment, the same command continues.
    """

    archive: Archive
    """A folder, a glob, a video, or a .csv/.parquet/.jsonl with a column `video`; here or at s3://, gs://, https://."""
    output: str
    """DIR; a manifest that is there already is refused."""
    model: str = str(BUNDLED_MODEL)
    """Model folder: gives the default span, and the cost."""
    capacity: float = 0.4
    """Effective capacity for the estimate."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else Ray starts here."""


def plan(config: Plan) -> None:
    """Run the job."""
    checkpoint = load_model(config.model)
    clip_plan, limits = config.plan(checkpoint.config.span_s), config.limits()
    with checking_input():
        check_capacity(config.capacity, checkpoint.config.num_experts)
    videos, signatures = open_archive(config.archive)
    output = make_output(config.output)
    if (output / MANIFEST_DIR).exists():
        raise UserError(f"{output / MANIFEST_DIR} exists; choose another --output, or remove it to plan again")
    write_plan(output, config.archive, clip_plan)
    try:
        with waiting_shown(output), connected(config.address), videos_progress() as on_videos:
            write_manifest(videos, clip_plan, output, limits, on_videos)
    except (ArchiveError, LedgerError) as error:  # a part of the archive, or of what a killed run has left
        raise UserError(str(error)) from error
    print(estimate(output / MANIFEST_DIR, checkpoint, config.capacity, limits, signatures))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("plan", Plan, plan, argv)


if __name__ == "__main__":
    sys.exit(main())
