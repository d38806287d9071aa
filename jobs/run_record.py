"""run.json: what was run, with what, and what came of it."""

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli import UserError
from mone.checkpoint import write_whole

if TYPE_CHECKING:  # benchmarks tell versions where there is no pyarrow
    from pipelines.ledger import Totals

RUN_FILE = "run.json"
_PACKAGES = ("mone-video", "ray", "torch", "pyarrow", "av", "decord2", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def read_run(output: Path) -> dict[str, Any]:
    """The record of a folder, empty where there is none.

    Raises:
        UserError: A record that cannot be read.
    """
    path = output / RUN_FILE
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise UserError(f"{path} is not the record of an annotate run")
    return record


def write_run(output: Path, record: dict[str, Any]) -> None:
    """Write the record; it appears whole or not at all."""
    write_whole(output / RUN_FILE, (json.dumps(record, indent=1) + "\n").encode())


def totals_record(totals: "Totals") -> dict[str, Any]:
    """Totals as JSON: counts, hours, operations, seconds, failures by reason."""
    record: dict[str, Any] = {
        "clips": totals.clips,
        "hours": totals.hours,
        "flops": totals.flops,
        "kept_flops": totals.kept_flops,
        "dense_flops": totals.dense_flops,
        "statuses": totals.statuses,
        "labels": totals.labels,
        "decoders": totals.decoders,
        "failures": {
            status: {error: count for (of, error), count in totals.failures.most_common() if of == status}
            for status in sorted({status for status, _ in totals.failures})
        },
    }
    for name in ("saved_share", "dropped_share", "routed_share"):
        record[name] = round(getattr(totals, name), 6)
    record["device_s"] = {"decode": round(totals.decode_s, 3), "model": round(totals.model_s, 3)}
    if totals.labelled:
        record["accuracy"] = {"labelled": totals.labelled, "right": totals.right}
    return record


def timestamp() -> str:
    """Now, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
