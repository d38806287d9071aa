"""plan.json beside a manifest: of what archive it is, and how that was cut."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jobs.cli import UserError
from mone.checkpoint import write_whole
from pipelines.timeline import ClipPlan

PLAN_FILE = "plan.json"


def write_plan(output: Path, archive: str, plan: ClipPlan) -> None:
    """Say what DIR/manifest is going to be; before it is written, so that there is no manifest without it."""
    write_whole(output / PLAN_FILE, (json.dumps(_identity(archive, plan), indent=1) + "\n").encode())


def check_plan(output: Path, archive: str, plan: ClipPlan) -> None:
    """See that DIR/manifest is of this archive and cut in this way.

    Raises:
        UserError: It is of something else; says of what.
    """
    path = output / PLAN_FILE
    try:
        planned = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for name, value in _identity(archive, plan).items():
        if planned.get(name, value) != value:
            raise UserError(f"{output} was planned with {name} {planned[name]}, not {value}; choose another --output")


def _identity(archive: str, plan: ClipPlan) -> dict[str, Any]:
    place = archive if "://" in archive else str(Path(archive).resolve())
    return {"archive": place, **dataclasses.asdict(plan)}
