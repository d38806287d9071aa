"""One page about a run, for a person: totals, labels, failures, and where the compute went.

python -m jobs.report DIR
"""

import base64
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader

from jobs.cli import UserError, checking_input, run
from jobs.inputs import Folder
from jobs.run_record import read_run
from mone.capacity import expert_shares
from mone.checkpoint import CheckpointError, read_checkpoint, write_whole
from pipelines.archive import ArchiveError, signatures_of
from pipelines.commit import ANNOTATIONS_DIR
from pipelines.failure import DecodeFailure
from pipelines.ledger import audit, totals
from pipelines.planning import MANIFEST_DIR
from pipelines.preview import expert_colours, preview
from pipelines.row_files import read_columns
from pipelines.schema import ANNOTATIONS, MANIFEST, PlannedClip, Status
from pipelines.storage.signatures import UNSIGNED, Signatures

REPORT_FILE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Write DIR/report.html: one file, no network needed to read it."""

    folder: Folder
    """DIR of an annotate run."""
    clips: int = 6
    """Clips to show with the expert of each patch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """One clip with its pictures as data URIs."""

    row: dict[str, Any]
    pictures: list[tuple[str, str]]


def report(config: Report) -> None:
    """Run the job."""
    folder = Path(config.folder)
    record = read_run(folder)
    if not record:
        raise UserError(f"{folder} has no run.json; run `python -m jobs.annotate` first")
    if config.clips < 0:
        raise UserError(f"--clips must not be negative, got {config.clips}")
    with checking_input():
        result = totals(folder / ANNOTATIONS_DIR, frozenset(record["labels"]))
        checked = audit(folder / MANIFEST_DIR, folder / ANNOTATIONS_DIR)
    shown, missing_pictures = _pictures(folder, record, config.clips)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("report.html.j2").render(
        record=record,
        totals=result,
        audit=checked,
        shown=shown,
        missing_pictures=missing_pictures,
        experts=_legend(record),
    )
    print(write_whole(folder / REPORT_FILE, page.encode()))


def _pictures(folder: Path, record: dict[str, Any], count: int) -> tuple[list[_Shown], str]:
    """Clips with their pictures, or why there are none."""
    try:
        checkpoint = read_checkpoint(record["config"]["model"])
    except CheckpointError as error:
        return [], str(error)
    if checkpoint.model_id != record["identity"]["model_id"]:
        return [], f"{record['config']['model']} holds another model now"
    model, shown = checkpoint.build(), []
    capacity, drop_static = record["identity"]["capacity"], record["config"].get("drop_static")
    signatures = _signatures(record["identity"]["archive"])
    for clip, row in _choose(folder, count):
        (readable,) = signatures.sign([clip.video])
        try:
            pairs = preview(dataclasses.replace(clip, video=readable), checkpoint, model, capacity, drop_static)
        except DecodeFailure:
            continue
        shown.append(_Shown(row=row, pictures=[(_data_uri(plain), _data_uri(drawn)) for plain, drawn in pairs]))
    return shown, "" if shown or not count else "no clip could be decoded"


def _signatures(archive: str) -> Signatures:
    """What the videos are read with, as far as the list that says it is still there."""
    try:
        return signatures_of(archive)
    except ArchiveError:
        return UNSIGNED


def _choose(folder: Path, count: int) -> list[tuple[PlannedClip, dict[str, Any]]]:
    """Clips spread evenly over the rows that are ok, sorted by video."""
    tables = read_columns(folder / ANNOTATIONS_DIR, ["clip_id", "status", "video"], ANNOTATIONS)
    ok = pa.concat_tables(table.filter(pc.field("status") == Status.OK.value) for table in tables)
    if not len(ok) or not count:
        return []
    places = np.unique(np.linspace(0, len(ok) - 1, count).round().astype(int))
    wanted = ok.sort_by([("video", "ascending"), ("clip_id", "ascending")])["clip_id"].take(places).to_pylist()
    planned = _rows_by_id(folder / MANIFEST_DIR, MANIFEST, wanted)
    annotated = _rows_by_id(folder / ANNOTATIONS_DIR, ANNOTATIONS, wanted)
    return [(PlannedClip(**planned[id_]), annotated[id_]) for id_ in wanted]


def _rows_by_id(folder: Path, schema: pa.Schema, ids: list[str]) -> dict[str, dict[str, Any]]:
    tables = read_columns(folder, schema.names, schema)
    found = pa.concat_tables(table.filter(pc.field("clip_id").isin(ids)) for table in tables)
    return {row["clip_id"]: row for row in found.to_pylist()}


def _legend(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Colour and meaning of each expert."""
    num_experts = record["num_experts"]
    colours = expert_colours(num_experts)
    shares = expert_shares(record["identity"]["capacity"], num_experts)
    names = ["full width" if i == num_experts - 1 else f"1/{2 ** (num_experts - 1 - i)}" for i in range(num_experts)]
    dropping = record["config"].get("drop_static") is not None
    kept = " that were kept" if dropping else ""
    legend = [
        (f"rgb({r} {g} {b})", f"{name}: {share:.0%} of the patches{kept}")
        for (r, g, b), name, share in zip(colours, names, shares, strict=True)
    ]
    if dropping:
        legend.append(("rgb(0 0 0)", "dropped: it did not change"))
    return legend


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("report", Report, report, argv)


if __name__ == "__main__":
    sys.exit(main())
