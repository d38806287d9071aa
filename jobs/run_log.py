"""What a training run says of itself: lines for people, metrics.jsonl, TensorBoard, and its curve at the end."""

import sys
from pathlib import Path
from typing import Any

from jobs.curve_record import CurveRecord
from jobs.curves import write_run_curve
from jobs.metrics import MetricsWriter
from mone.curve import CurvePoint


class RunLog:
    """Takes the records of `pipelines.train_loop`, on the first worker."""

    def __init__(self, output: str, data: str, recipe: str) -> None:
        self.folder, self.data, self.recipe = Path(output), data, recipe
        self.metrics = MetricsWriter(self.folder)

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep and show a record."""
        record = dict(record)
        kind = record.pop("kind")
        if kind == "curve":
            self._curve(record)
            return
        self.metrics.write(kind, record.pop("step"), record)
        print(_line(kind, record), file=sys.stderr, flush=True)

    def _curve(self, record: dict[str, Any]) -> None:
        """DIR/curve.json, .md and .png from the test split, or from val where there is none."""
        points = record.pop("points")
        splits = sorted({point["split"] for point in points})
        if not splits:
            return
        measured = [
            CurvePoint(method=record["method"], **{name: value for name, value in point.items() if name != "split"})
            for point in points
            if point["split"] == splits[0]
        ]
        run = CurveRecord(data=self.data, split=splits[0], recipe=self.recipe, points=tuple(measured), **record)
        write_run_curve(run, self.folder)


def _line(kind: str, record: dict[str, Any]) -> str:
    shown = "  ".join(f"val@{capacity} {score:.1%}" for capacity, score in record.get("val_top1", {}).items())
    memory = f"  {record['gpu_memory_gib']:.1f} GiB" if "gpu_memory_gib" in record else ""
    return (
        f"{kind:<5} {record['stage']:<9} epoch {record['epoch']:>3}  loss {record['loss']:.4f}"
        f"  train {record['accuracy']:.1%}  {shown}  alpha {record['alpha']:.3f}  {record['clips_per_s']:,.0f} clips/s"
        f"  wait {record['data_wait_share']:.0%}{memory}"
    )
