"""What a training run says of itself: lines for people, metrics.jsonl, TensorBoard, and its curve at the end."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.background import looking
from jobs.curve_record import CurveRecord
from jobs.curves import write_run_curve
from jobs.metrics import METRICS_FILE, MetricsWriter, read_metrics
from mone.curve import CurvePoint
from pipelines.output import in_output

_LOOK_EVERY_S = 0.5


class RunLog:
    """Takes the records of `pipelines.train_loop`, on the first worker."""

    def __init__(self, output: str, run: dict[str, Any]) -> None:
        """Continue the log in a folder; `run` is what a `CurveRecord` says of the run beyond the workers' records."""
        self.folder, self.run = Path(output), run
        self.metrics = in_output(self.folder, lambda: MetricsWriter(self.folder))
        records = in_output(self.folder, lambda: read_metrics(self.folder))
        told = [record["clips"] for record in records if record["kind"] == "left_out"]
        self._left_out = {name for clips in told for name in clips}

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        record = dict(record)
        kind = record.pop("kind")
        if kind == "curve":
            self._curve(record)
            return
        if kind == "left_out":  # each clip once in a run, however often it is started
            record["clips"] = {name: why for name, why in record["clips"].items() if name not in self._left_out}
            self._left_out |= record["clips"].keys()
            if not record["clips"]:
                return
        self.metrics.write(kind, record.pop("step"), record)

    def _curve(self, record: dict[str, Any]) -> None:
        """DIR/curve.json, .md and .png from the test split, or from val where there is none."""
        points = record.pop("points")
        splits = sorted({point["split"] for point in points})
        if not splits:
            return
        measured = [
            CurvePoint(**{"method": record["method"]} | {name: point[name] for name in point if name != "split"})
            for point in points
            if point["split"] == splits[0]
        ]
        run = CurveRecord(split=splits[0], points=tuple(measured), **self.run, **record)
        in_output(self.folder, lambda: write_run_curve(run, self.folder))


@contextlib.contextmanager
def showing(folder: Path) -> Iterator[None]:
    """Print what is new in metrics.jsonl, whichever process and machine writes it."""
    seen = {(record["kind"], record["step"]) for record in read_metrics(folder)}
    written = None

    def follow() -> None:
        nonlocal written
        with contextlib.suppress(OSError):  # not there yet, or away
            stat = (folder / METRICS_FILE).stat()
            if (stat.st_ino, stat.st_size) != written:
                written = (stat.st_ino, stat.st_size)
                _show_new(folder, seen)

    try:
        with looking(follow, _LOOK_EVERY_S):
            yield
    finally:
        follow()


def _show_new(folder: Path, seen: set[tuple[str, int]]) -> None:
    for record in read_metrics(folder):
        key = (record["kind"], record["step"])
        if key not in seen:
            seen.add(key)
            print(_line(record["kind"], record), file=sys.stderr, flush=True)


def _line(kind: str, record: dict[str, Any]) -> str:
    if kind == "left_out":
        return "\n".join(f"left out {name}: {reason}" for name, reason in record["clips"].items())
    shown = "  ".join(f"val@{capacity} {score:.1%}" for capacity, score in record.get("val_top1", {}).items())
    memory = f"  {record['gpu_memory_gib']:.1f} GiB" if "gpu_memory_gib" in record else ""
    use = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
    experts = "/".join(f"{share:.0%}" for share in record["tokens_per_expert"])
    return (
        f"{kind:<5} {record['stage']:<9} epoch {record['epoch']:>3}  loss {record['loss']:.4f}"
        f"  train {record['accuracy']:.1%}  {shown}  experts {experts}  alpha {record['alpha']:.3f}"
        f"  {record['clips_per_s']:,.0f} clips/s  wait {record['data_wait_share']:.0%}{use}{memory}"
    )
