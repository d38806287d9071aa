"""plan.json beside a manifest: of what archive it is, and how that was cut."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from jobs.cli import UserError
from mone.checkpoint import write_whole
from pipelines.planning import PARTIAL_DIR
from pipelines.storage.address import public_address
from pipelines.timeline import ClipPlan

PLAN_FILE = "plan.json"


def write_plan(output: Path, archive: str, plan: ClipPlan) -> None:
    """Say what DIR/manifest is going to be; before it is written, so that there is no manifest without it.

    What a killed run has left of another plan goes.
    """
    if _read(output) != _identity(archive, plan):
        shutil.rmtree(output / PARTIAL_DIR, ignore_errors=True)
    write_whole(output / PLAN_FILE, (json.dumps(_identity(archive, plan), indent=1) + "\n").encode())


def check_plan(output: Path, archive: str, plan: ClipPlan) -> None:
    """See that DIR/manifest is of this archive and cut in this way.

    Raises:
        UserError: It is of something else; says of what.
    """
    planned = _read(output)
    for name, value in _identity(archive, plan).items():
        if planned.get(name, value) != value:
            raise UserError(f"{output} was planned with {name} {planned[name]}, not {value}; choose another --output")


def _read(output: Path) -> dict[str, Any]:
    path = output / PLAN_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _identity(archive: str, plan: ClipPlan) -> dict[str, Any]:
    place = public_address(archive) if "://" in archive else str(Path(archive).resolve())
    return {"archive": place, **dataclasses.asdict(plan)}
