"""Runs to rows: what differs only in seed and fold is one row, with its mean and spread; and the rows as Markdown."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jobs.curve_record import CurveRecord
from mone.baselines import METHODS
from mone.curve import CurvePoint

Members = list[tuple[CurveRecord, CurvePoint]]

# Models of one table are of one size, but for their routers.
_ROUTER_SHARE = 0.01


class Series(NamedTuple):
    """What a line of the plot has in common.

    Attributes:
        data: What was learnt from.
        split: What was measured on.
        method: As it was run.
        trained: The method that it was trained as.
        own_capacity: Whether each capacity has a model that was trained at it alone; else one model serves all.
        epochs: Of training.
        drop_static: Grey levels up to which patches were dropped as static; None: none were.
    """

    data: str
    split: str
    method: str
    trained: str
    own_capacity: bool
    epochs: int
    drop_static: float | None

    @property
    def name(self) -> str:
        """Without the epochs: "tome on mone's weights"."""
        on = "" if self.method == self.trained else f" on {self.trained}'s weights"
        on += ", a model per capacity" * self.own_capacity
        return self.method + on + ("" if self.drop_static is None else f", static dropped at {self.drop_static:g}")

    @property
    def is_dense(self) -> bool:
        """Whether it is what the others are compared with: trained and run at full width on all patches."""
        return self.method == self.trained == "dense" and self.drop_static is None

    def order(self) -> tuple[Any, ...]:
        """Dense first, then as `METHODS` has them; what was run as it was trained before what was not."""
        known = [*METHODS]
        threshold = -1.0 if self.drop_static is None else self.drop_static
        places = known.index(self.method), known.index(self.trained)
        return (
            self.data,
            self.split,
            self.method != "dense",
            self.method != self.trained,
            *places,
            self.own_capacity,
            -self.epochs,
            threshold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A series at a capacity, over its runs: every seed of every fold.

    Attributes:
        series: Which.
        capacity: Effective capacity e_c.
        flops_per_clip: Mean over the runs; they differ only where static patches are dropped of different clips.
        dense_flops_per_clip: At full width, on all patches.
        top1: Mean over the runs, as are those below.
        top1_min: Of the runs.
        top1_max: Of the runs.
        top1_std: Sample standard deviation over the runs; None of one.
        above_dense: Mean over the runs of the difference to dense training of the same fold, seed and, the longest,
            epochs: what differs between folds cancels. None where there is no such run.
        above_dense_error: Its standard error; None of one run.
        nll: Cross-entropy in nats.
        num_clips: Clips that it was measured on, of all folds together.
        num_runs: How many there are.
        seeds: Ascending.
        folds: In alphabetical order.
        train_flops: Floating-point operations of a training run.
    """

    series: Series
    capacity: float
    flops_per_clip: float
    dense_flops_per_clip: int
    top1: float
    top1_min: float
    top1_max: float
    top1_std: float | None
    above_dense: float | None
    above_dense_error: float | None
    nll: float
    num_clips: int
    num_runs: int
    seeds: tuple[int, ...]
    folds: tuple[str, ...]
    train_flops: float

    def to_json(self) -> dict[str, Any]:
        """All of it, flat."""
        own = {name: getattr(self, name) for name in self.__slots__ if name != "series"}
        return self.series._asdict() | own | {"seeds": list(self.seeds), "folds": list(self.folds)}


def rows_of(records: Iterable[CurveRecord]) -> list[Row]:
    """Group runs; the rows are sorted, whatever the order of the records.

    Raises:
        ValueError: Runs that do not belong into one table: a seed twice, or runs of one row that differ in more.
    """
    groups: defaultdict[tuple[Series, float], Members] = defaultdict(list)
    for record in sorted_records(records):
        for point in record.points:
            if record.capacity not in (None, point.capacity):
                continue
            series = Series(
                data=record.data,
                split=record.split,
                method=point.method,
                trained=record.method,
                own_capacity=record.capacity is not None,
                epochs=record.epochs,
                drop_static=point.drop_static,
            )
            groups[series, point.capacity].append((record, point))
    keys = sorted(groups, key=lambda key: (*key[0].order(), key[1]))
    dense: dict[tuple[str, str], Members] = {}
    for series, capacity in keys:  # the longest training comes first
        if series.is_dense:
            dense.setdefault(series[:2], groups[series, capacity])
    rows = [_row(*key, groups[key], dense.get(key[0][:2], [])) for key in keys]
    for row in rows:
        first = next(other for other in rows if other.series[:2] == row.series[:2])
        where = f"{row.series.data}, {row.series.split}"
        _agree(where, "folds", [", ".join(first.folds), ", ".join(row.folds)])
        _agree(where, "num_clips", [first.num_clips, row.num_clips])
        if abs(row.dense_flops_per_clip / first.dense_flops_per_clip - 1) > _ROUTER_SHARE:
            _agree(where, "dense_flops_per_clip", [first.dense_flops_per_clip, row.dense_flops_per_clip])
    return rows


def sorted_records(records: Iterable[CurveRecord]) -> list[CurveRecord]:
    """The order in which they are kept."""
    known = [*METHODS]
    return sorted(
        records,
        key=lambda record: (
            *(record.data, record.split, known.index(record.method), record.capacity or 0.0, record.epochs),
            *(record.fold, record.seed),
        ),
    )


def _row(series: Series, capacity: float, members: Members, dense: Members) -> Row:
    records, points = zip(*members, strict=True)
    where = f"{series.name} at capacity {capacity:.3g} after {series.epochs} epochs"
    folds = {fold: _fold(where, fold, members) for fold in sorted({record.fold for record in records})}
    _agree(where, "recipe", [record.recipe for record in records])
    _agree(where, "dense_flops_per_clip", [point.dense_flops_per_clip for point in points])
    top1 = [point.top1 for point in points]
    beside = {(record.fold, record.seed): point.top1 for record, point in dense}
    above = [point.top1 - beside[place] for record, point in members if (place := (record.fold, record.seed)) in beside]
    return Row(
        series=series,
        capacity=capacity,
        flops_per_clip=statistics.fmean(point.flops_per_clip for point in points),
        dense_flops_per_clip=points[0].dense_flops_per_clip,
        top1=statistics.fmean(top1),
        top1_min=min(top1),
        top1_max=max(top1),
        top1_std=statistics.stdev(top1) if len(top1) > 1 else None,
        above_dense=statistics.fmean(above) if above else None,
        above_dense_error=statistics.stdev(above) / len(above) ** 0.5 if len(above) > 1 else None,
        nll=statistics.fmean(point.nll for point in points),
        num_clips=sum(folds.values()),
        num_runs=len(records),
        seeds=tuple(sorted({record.seed for record in records})),
        folds=tuple(folds),
        train_flops=statistics.fmean(record.train_flops for record in records),
    )


def _fold(where: str, fold: str, members: Members) -> int:
    """Clips that the runs of a fold were measured on."""
    own = [(record, point) for record, point in members if record.fold == fold]
    seeds = [record.seed for record, _ in own]
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ValueError(f"{where}: seed {seed} is there twice")
    _agree(where, "train_clips", [record.train_clips for record, _ in own])
    _agree(where, "num_clips", [point.num_clips for _, point in own])
    return own[0][1].num_clips


def _agree(where: str, name: str, values: Sequence[Any]) -> None:
    for value in values:
        if value != values[0]:
            raise ValueError(f"{where}: runs differ in {name}, {values[0]} and {value}, and cannot be compared")


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.series.name,
    "capacity": lambda row: f"{row.capacity:.3g}",
    "GFLOP/clip": lambda row: f"{row.flops_per_clip / 1e9:.3f}",
    "share of dense": lambda row: f"{row.flops_per_clip / row.dense_flops_per_clip:.1%}",
    "top-1 %": lambda row: f"{100 * row.top1:.1f}",
    "min..max": lambda row: f"{100 * row.top1_min:.1f}..{100 * row.top1_max:.1f}" if row.top1_std is not None else "",
    "std": lambda row: "" if row.top1_std is None else f"{100 * row.top1_std:.2f}",
    "above dense": lambda row: _difference(row),
    "runs": lambda row: f"{row.num_runs}",
    "epochs": lambda row: f"{row.series.epochs}",
    "training EFLOP": lambda row: f"{row.train_flops / 1e18:.3g}",
}
_NOTES = (
    "top-1: mean over the runs (seeds, of every fold), with its smallest and largest value and the sample standard"
    " deviation. above dense: mean difference in points to dense training of the same fold and seed, and its standard"
    " error. GFLOP/clip: 1e9 floating-point operations of a forward pass, two per multiply-add, from formulas;"
    " training EFLOP: 1e18 of all steps of one run, three forward passes each.\n"
)


def _difference(row: Row) -> str:
    if row.above_dense is None:
        return ""
    error = "" if row.above_dense_error is None else f" ± {100 * row.above_dense_error:.1f}"
    return f"{100 * row.above_dense:+.1f}{error}"


def markdown(rows: Sequence[Row]) -> str:
    """A table for each set of clips, with a line on what its columns mean."""
    parts = []
    for data, split in dict.fromkeys((row.series.data, row.series.split) for row in rows):
        own = [row for row in rows if (row.series.data, row.series.split) == (data, split)]
        lines = [[*_COLUMNS], ["---", *["---:"] * (len(_COLUMNS) - 1)]]
        lines += [[cell(row) for cell in _COLUMNS.values()] for row in own]
        table = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
        parts.append(f"## {data}, split {split}: {own[0].num_clips:,} clips\n\n{table}")
    return "\n".join([*parts, _NOTES])
