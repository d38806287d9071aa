"""curve.json: what a training run scored at each capacity, and what it took; curves.json: many of them in one file.

    {"version": 2, "data": "motions", "fold": "split", "split": "val", "recipe": "motions", "method": "mone",
     "capacity": null, "seed": 0, "epochs": 40, "train_clips": 36000, "train_flops": 6.1e16,
     "points": [{"method": "mone", "capacity": 0.4, "drop_static": null, "flops_per_clip": 2.9e8,
                 "dense_flops_per_clip": 6.7e8, "top1": 0.91, "nll": 0.3, "num_clips": 1200}, ...]}

curves.json is {"version": 2, "runs": [a record as above, ...], "rows": [what the table shows, ...]}; only its runs are
read again. A key that is missing, unknown or of a wrong kind is refused.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone.baselines import METHODS
from mone.checkpoint import write_whole
from mone.curve import CurvePoint

RECORD_FILE, COLLECTION_FILE, VERSION = "curve.json", "curves.json", 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveRecord:
    """One training run.

    Attributes:
        data: What it learnt from, as `jobs.train --data` names it.
        fold: Which division of the data into splits: the column of `jobs.train --split-column`.
        split: What its points are measured on.
        recipe: Name of the recipe.
        method: As it was trained (`mone.baselines.METHODS`).
        capacity: The only one that it was trained at, beyond a start at all; None: at many.
        seed: Of weights, order and draws.
        epochs: Of all stages, with those of the model that it started from.
        train_clips: Clips of an epoch.
        train_flops: Floating-point operations of all these steps (`mone.compute.training_flops`).
        points: Its scores. Their methods say how the weights were run, which may be another method than the run's.
    """

    data: str
    fold: str
    split: str
    recipe: str
    method: str
    capacity: float | None
    seed: int
    epochs: int
    train_clips: int
    train_flops: float
    points: tuple[CurvePoint, ...]


def to_json(record: CurveRecord) -> dict[str, Any]:
    """A record as JSON holds it."""
    return {"version": VERSION} | dataclasses.asdict(record)


def from_json(values: Any) -> CurveRecord:
    """The record that parsed JSON holds.

    Raises:
        ValueError: Not a record; says which key is wrong, in one line.
    """
    _check(values, _RECORD)
    if values["version"] != VERSION:
        raise ValueError(f"version is {values['version']}, this code reads {VERSION}")
    if not values["points"]:
        raise ValueError("points is empty")
    for place, point in enumerate(values["points"]):
        _check(point, _POINT, f"points[{place}]")
    points = tuple(CurvePoint(**point) for point in values["points"])
    keys = [(point.method, point.capacity, point.drop_static) for point in points]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"points has {key[0]} at capacity {key[1]:g} twice")
    if values["capacity"] not in (None, *(point.capacity for point in points)):
        raise ValueError(f"points has none at capacity {values['capacity']:g}, which it was trained at")
    fields: dict[str, Any] = {name: value for name, value in values.items() if name != "version"}
    fields["points"] = points
    return CurveRecord(**fields)


def write_record(record: CurveRecord, folder: Path) -> Path:
    """Write the record of a run into its folder; it appears whole or not at all.

    Raises:
        ValueError: A record that could not be read again.
    """
    content = json.dumps(to_json(record), indent=1)
    from_json(json.loads(content))
    return write_whole(folder / RECORD_FILE, f"{content}\n".encode())


def write_collection(records: Iterable[CurveRecord], rows: Iterable[dict[str, Any]], path: Path) -> Path:
    """Write curves.json, a line per run and per row of the table."""
    parts = {"runs": [to_json(record) for record in records], "rows": [*rows]}
    lines = [f' "version": {VERSION}']
    for name, values in parts.items():
        inner = ",\n".join(f"  {json.dumps(part, allow_nan=False)}" for part in values)
        lines.append(f' "{name}": [\n{inner}\n ]')
    return write_whole(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_records(path: Path) -> list[CurveRecord]:
    """The records of a run's folder, of its curve.json, or of a curves.json.

    Raises:
        OSError: No such file.
        ValueError: Not a record, with the file's name.
    """
    path = path / RECORD_FILE if path.is_dir() else path
    try:
        values = json.loads(path.read_text())
        if not (isinstance(values, dict) and "runs" in values):
            return [from_json(values)]
        if values.get("version") != VERSION or not isinstance(values["runs"], list):
            raise ValueError(f"not a list of runs of version {VERSION}")
        return [from_json(run) for run in values["runs"]]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _share(value: Any) -> bool:
    return _amount(value) and value <= 1


_METHOD = (lambda value: isinstance(value, str) and value in METHODS, f"one of {', '.join(METHODS)}")
_TEXT = (_text, "text")
_COUNT = (_count, "a whole number above 0")
_AMOUNT = (_amount, "a number of at least 0")
_SHARE = (_share, "a number from 0 to 1")

# The schema: of each key, what its value must be.
_RECORD = {
    "version": _COUNT,
    "data": _TEXT,
    "fold": _TEXT,
    "split": _TEXT,
    "recipe": _TEXT,
    "method": _METHOD,
    "capacity": (lambda value: value is None or _share(value), "null or a number from 0 to 1"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "epochs": _COUNT,
    "train_clips": _COUNT,
    "train_flops": _AMOUNT,
    "points": (lambda value: isinstance(value, list), "a list"),
}
_POINT = {
    "method": _METHOD,
    "capacity": _SHARE,
    "drop_static": (lambda value: value is None or _amount(value), "null or a number of at least 0"),
    "flops_per_clip": _AMOUNT,
    "dense_flops_per_clip": _COUNT,
    "top1": _SHARE,
    "nll": _AMOUNT,
    "num_clips": _COUNT,
}


def _check(values: Any, schema: dict[str, Any], where: str = "") -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'a record'} must be an object, not {type(values).__name__}")
    prefix = f"{where}." if where else ""
    for name in sorted(values.keys() ^ schema.keys()):
        raise ValueError(f"{prefix}{name} is {'unknown' if name in values else 'missing'}")
    for name, (fits, wanted) in schema.items():
        if not fits(values[name]):
            raise ValueError(f"{prefix}{name} must be {wanted}, got {json.dumps(values[name])[:80]}")
