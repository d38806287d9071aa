"""Accuracy against compute: one table and one plot from many training runs.

python -m jobs.curves RUN [RUN ...] --output DIR
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.cli import checking_input, run
from jobs.curve_plot import draw_curves
from jobs.curve_record import COLLECTION_FILE, CurveRecord, read_records, write_collection, write_record
from jobs.curve_rows import markdown, rows_of, sorted_records
from jobs.inputs import make_output
from mone.checkpoint import write_whole

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Write DIR/curves.md, curves.svg, curves.png and curves.json: means over seeds and folds, and their spread.

    The same runs give the same files, byte for byte, in whatever order they are named. Runs of one method that differ
    in epochs are rows of their own.
    """

    runs: Runs
    """Folders of jobs.train, their curve.json, or a curves.json that this job wrote."""
    output: str
    """DIR."""


def curves(config: Curves) -> None:
    """Run the job."""
    with checking_input():
        if not config.runs:
            raise ValueError("give at least one RUN")
        records = [record for path in config.runs for record in read_records(Path(path))]
        rows = rows_of(records)
    output = make_output(config.output)
    write_collection(sorted_records(records), [row.to_json() for row in rows], output / COLLECTION_FILE)
    table = markdown(rows)
    write_whole(output / "curves.md", table.encode())
    for suffix in ("svg", "png"):
        draw_curves(rows, output / f"curves.{suffix}")
    print(table, end="")


def write_run_curve(record: CurveRecord, folder: Path) -> None:
    """For the end of a training run: its curve.json, and the same as curve.md and curve.png.

    Raises:
        ValueError: A record that `read_records` would not take.
    """
    rows = rows_of([record])
    write_record(record, folder)
    write_whole(folder / "curve.md", markdown(rows).encode())
    draw_curves(rows, folder / "curve.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("curves", Curves, curves, argv)


if __name__ == "__main__":
    sys.exit(main())
