"""Reading what was written: totals of a run, and the proof that nothing is missing or double."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.schema import ANNOTATIONS, MANIFEST, Status


class LedgerError(ValueError):
    """A folder that is not, or not yet, what a job left; one line that names it."""


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder, sorted.

    Raises:
        LedgerError: No such folder, or none in it.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise LedgerError(f"no parquet files in {folder}; run `python -m jobs.annotate` first")
    return files


def read_columns(folder: Path, columns: list[str], schema: pa.Schema) -> Iterator[pa.Table]:
    """Some columns of each file in turn, so that memory does not grow with the archive.

    Raises:
        LedgerError: A file that cannot be read or lacks a column; it is named.
    """
    for path in parquet_files(folder):
        yield read_file(path, columns, schema)


def read_file(path: Path, columns: list[str], schema: pa.Schema) -> pa.Table:
    """Some columns of one file.

    Raises:
        LedgerError: It cannot be read or lacks a column; it is named.
    """
    try:
        lacking = set(columns) - set(pq.read_schema(path).names)
        if lacking:
            raise LedgerError(f"{path} has no column {', '.join(sorted(lacking))}")
        return pq.read_table(path, columns=columns, schema=schema)
    except (pa.ArrowException, OSError) as error:
        raise LedgerError(f"cannot read {path}: {error}") from error


def count_rows(folder: Path) -> int:
    """Rows in the parquet files of a folder.

    Raises:
        LedgerError: A file that cannot be read, or none.
    """
    return sum(len(table) for table in read_columns(folder, ["clip_id"], MANIFEST))


@dataclass(slots=True)
class Audit:
    """Planned ids against annotated ids.

    Attributes:
        planned: Rows of the manifest.
        annotated: Rows of the annotations.
        missing: Planned ids without a row.
        doubled: Ids with more than one row, in the annotations or in the manifest.
        unknown: Annotated ids that were never planned.
    """

    planned: int = 0
    annotated: int = 0
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Each planned clip has exactly one row."""
        return not (self.missing or self.doubled or self.unknown)


def audit(manifest: Path, annotations: Path) -> Audit:
    """Compare the ids of both tables.

    Raises:
        LedgerError: A table that is missing or cannot be read.
    """
    planned = _count_ids(manifest, MANIFEST)
    annotated = _count_ids(annotations, ANNOTATIONS) if annotations.is_dir() else Counter()
    doubled = {id_ for ids in (planned, annotated) for id_, count in ids.items() if count > 1}
    return Audit(
        planned=planned.total(),
        annotated=annotated.total(),
        missing=sorted(planned.keys() - annotated.keys()),
        doubled=sorted(doubled),
        unknown=sorted(annotated.keys() - planned.keys()),
    )


def _count_ids(folder: Path, schema: pa.Schema) -> Counter[str]:
    ids: Counter[str] = Counter()
    if next(folder.glob("*.parquet"), None) is None and schema is ANNOTATIONS:
        return ids
    for table in read_columns(folder, ["clip_id"], schema):
        ids.update(table["clip_id"].to_pylist())
    return ids


@dataclass(slots=True)
class Totals:
    """Sums over annotations.

    Attributes:
        clips: Rows.
        hours: Of the clips that are ok.
        flops, dense_flops: Floating-point operations used, and what full width would have used.
        kept_flops: What full width would have used on the patches that were not dropped as static.
        decode_s, model_s: Time spent by workers.
        statuses, labels, decoders: Rows by each.
        failures: Failed rows by (status, error).
        labelled, right: Rows whose archive names a class that the model knows, and those answered with it.
    """

    clips: int = 0
    hours: float = 0.0
    flops: int = 0
    kept_flops: int = 0
    dense_flops: int = 0
    decode_s: float = 0.0
    model_s: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    decoders: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    labelled: int = 0
    right: int = 0

    @property
    def failed(self) -> int:
        """Rows that are not ok."""
        return self.clips - self.statuses[Status.OK]

    @property
    def saved_share(self) -> float:
        """Share of the full-width operations that was saved, in all."""
        return 1 - self.flops / self.dense_flops if self.dense_flops else 0.0

    @property
    def dropped_share(self) -> float:
        """Share that was saved by dropping static patches."""
        return 1 - self.kept_flops / self.dense_flops if self.dense_flops else 0.0

    @property
    def routed_share(self) -> float:
        """Share that was saved by routing what was kept."""
        return self.saved_share - self.dropped_share


_TOTALLED = [
    *("status", "error", "label", "true_label", "decoder", "start_s", "end_s"),
    *("flops", "kept_flops", "dense_flops", "decode_ms", "model_ms"),
]


def totals(annotations: Path, known_labels: frozenset[str]) -> Totals:
    """Add up a run.

    Args:
        annotations: Folder of the annotation files.
        known_labels: Classes of the model; a row with another true label is not counted as labelled.

    Raises:
        LedgerError: A file that cannot be read.
    """
    result = Totals()
    for table in read_columns(annotations, _TOTALLED, ANNOTATIONS):
        result.clips += len(table)
        ok = table.filter(pc.field("status") == Status.OK.value)
        result.hours += (_sum(ok["end_s"]) - _sum(ok["start_s"])) / 3600
        result.flops += sum(filter(None, table["flops"].to_pylist()))  # beyond what a float64 holds exactly
        result.kept_flops += sum(filter(None, table["kept_flops"].to_pylist()))
        result.dense_flops += sum(filter(None, table["dense_flops"].to_pylist()))
        result.decode_s += _sum(table["decode_ms"]) / 1e3
        result.model_s += _sum(table["model_ms"]) / 1e3
        result.statuses.update(table["status"].to_pylist())
        result.labels.update(ok["label"].to_pylist())
        result.decoders.update(ok["decoder"].to_pylist())
        for status, error in zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True):
            if status != Status.OK:
                result.failures[status, error] += 1
        pairs = [
            (truth, label)
            for truth, label in zip(ok["true_label"].to_pylist(), ok["label"].to_pylist(), strict=True)
            if truth in known_labels
        ]
        result.labelled += len(pairs)
        result.right += sum(truth == label for truth, label in pairs)
    return result


def _sum(column: pa.ChunkedArray) -> float:
    """Sum in float64, nulls left out."""
    return float(np.nansum(column.to_numpy().astype(np.float64)))
