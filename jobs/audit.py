"""Prove that every planned clip has exactly one row.

python -m jobs.audit DIR
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import JobFailed, checking_input, run
from jobs.inputs import Folder
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.ledger import audit
from pipelines.planning import MANIFEST_DIR


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditJob:
    """Compare the ids of DIR/manifest and DIR/annotations; exit 1 and name the ids where they differ."""

    folder: Folder
    """DIR of an annotate run."""


def audit_job(config: AuditJob) -> None:
    """Run the job."""
    folder = Path(config.folder)
    with checking_input():
        result = audit(folder / MANIFEST_DIR, folder / ANNOTATIONS_DIR)
    for kind in ("missing", "doubled", "unknown"):
        for id_ in getattr(result, kind):
            print(f"{kind} {id_}")
    if not result.clean:
        raise JobFailed(
            f"{result.planned:,} planned, {result.annotated:,} rows: {len(result.missing):,} missing,"
            f" {len(result.doubled):,} doubled, {len(result.unknown):,} unknown"
        )
    print(f"clean: {result.planned:,} planned clips, each with exactly one row")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("audit", AuditJob, audit_job, argv)


if __name__ == "__main__":
    sys.exit(main())
