"""What was written, summed up: totals of a run, and the proof that nothing is missing or double."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.clip_ids import all_parts, are_in, num_parts
from pipelines.row_files import parquet_files, read_columns
from pipelines.schema import ANNOTATIONS, MANIFEST, Status


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
    """Compare the ids of both tables, in bounded memory.

    Raises:
        LedgerError: A table that is missing or cannot be read.
    """
    parquet_files(manifest)
    found, parts = Audit(), num_parts(manifest, annotations)
    for planned, annotated in zip(
        all_parts(manifest, MANIFEST, parts), all_parts(annotations, ANNOTATIONS, parts), strict=True
    ):
        found.planned += len(planned)
        found.annotated += len(annotated)
        found.missing += _names(planned[~are_in(planned, annotated)])
        found.unknown += _names(annotated[~are_in(annotated, planned)])
        found.doubled += _names(np.concatenate([ids[1:][ids[1:] == ids[:-1]] for ids in (planned, annotated)]))
    for names in (found.missing, found.doubled, found.unknown):
        names.sort()
    return found


def _names(ids: np.ndarray) -> list[str]:
    return [id_.decode() for id_ in np.unique(ids).tolist()]


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
        result.hours += (column_sum(ok["end_s"]) - column_sum(ok["start_s"])) / 3600
        result.flops += sum(filter(None, table["flops"].to_pylist()))  # beyond what a float64 holds exactly
        result.kept_flops += sum(filter(None, table["kept_flops"].to_pylist()))
        result.dense_flops += sum(filter(None, table["dense_flops"].to_pylist()))
        result.decode_s += column_sum(table["decode_ms"]) / 1e3
        result.model_s += column_sum(table["model_ms"]) / 1e3
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


def column_sum(column: pa.ChunkedArray) -> float:
    """Sum in float64, nulls left out."""
    return float(np.nansum(column.to_numpy().astype(np.float64)))
