"""What a run tells while it goes on: Prometheus metrics, through Ray's agent on each node.

Prometheus sees each as ray_NAME, counters as ray_NAME_total, with the label `run` and those below, once for each
worker process. A worker reports every ten seconds and when it ends. deploy/grafana/mone.json draws them.
"""

import functools
from collections import Counter as Tally
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from ray.util.metrics import Counter, Gauge

from pipelines.ledger import column_sum
from pipelines.schema import Status

# Counters. Those of rows are of what was committed, so that they agree with the run's totals; a clip that is done again
# counts again.
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mone_clips": ("Rows committed.", ("status",)),
    "mone_video_seconds": ("Seconds of video in the committed rows that are ok.", ()),
    "mone_flops": ("Floating-point operations of the committed rows, 2 per multiply-add.", ()),
    "mone_dense_flops": ("What full width on all patches would have used.", ()),
    "mone_expert_tokens": ("Tokens that each expert was given; 0 is the smallest.", ("expert",)),
    "mone_frames_decoded": ("Frames that were decoded and kept; not those in between that the codec needed.", ()),
    "mone_decode_seconds": ("Time that decoding tasks spent in reading and decoding.", ()),
    "mone_model_seconds": ("Time that model processes spent in the model.", ()),
    "mone_wait_seconds": ("Time that model processes waited for clips.", ()),
}
# Gauges, of the driver.
GAUGES = {
    "mone_clips_left": "Planned clips that are not committed.",
    "mone_cpus": "CPUs of the cluster.",
    "mone_gpus": "GPUs of the cluster.",
    "mone_cost": "Price per hour times the hours of this run, its earlier sessions too; 0 where no price is given.",
}


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """Records the metrics of a run, a few numbers for a batch of clips, in whichever process it is.

    Attributes:
        run: The label that tells runs apart; "" records nothing.
    """

    run: str

    def decoded(self, decoded: pa.Table, num_frames: int) -> None:
        """Record DECODED rows, with so many frames for each that is ok."""
        if self.run:
            self._add("mone_frames_decoded", num_frames * decoded["status"].to_pylist().count(Status.OK))
            self._add("mone_decode_seconds", column_sum(decoded["decode_ms"]) / 1e3)

    def predicted(self, model_s: float, wait_s: float) -> None:
        """Record a batch of the model, and how long the model had waited for it."""
        self._add("mone_model_seconds", model_s)
        self._add("mone_wait_seconds", wait_s)

    def committed(self, rows: pa.Table) -> None:
        """Record ANNOTATIONS rows."""
        if not self.run:
            return
        for status, count in Tally(rows["status"].to_pylist()).items():
            self._add("mone_clips", count, status=status)
        ok = rows.filter(pc.field("status") == Status.OK.value)
        self._add("mone_video_seconds", column_sum(ok["end_s"]) - column_sum(ok["start_s"]))
        self._add("mone_flops", column_sum(rows["flops"]))
        self._add("mone_dense_flops", column_sum(rows["dense_flops"]))
        tokens = Tally[int]()
        for counts in rows["tokens_per_expert"].to_pylist():
            tokens.update(dict(enumerate(counts)))
        for expert, count in tokens.items():
            self._add("mone_expert_tokens", count, expert=str(expert))

    def show(self, **values: float) -> None:
        """Set gauges, named without their prefix."""
        for name, value in values.items():
            _gauge(f"mone_{name}").set(value, {"run": self.run})

    def _add(self, name: str, value: float, **labels: str) -> None:
        if self.run and value > 0:
            _counter(name).inc(value, {"run": self.run} | labels)


SILENT = RunMetrics("")


@functools.cache
def _counter(name: str) -> Counter:
    description, labels = COUNTERS[name]
    return Counter(name, description, ("run", *labels))


@functools.cache
def _gauge(name: str) -> Gauge:
    return Gauge(name, GAUGES[name], ("run",))
