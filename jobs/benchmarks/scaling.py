"""How training scales with workers, on real clips: Ray Train, decoded clips from the cache, one run a row."""

import functools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device
from jobs.metrics import read_metrics
from jobs.run_log import RunLog
from jobs.training_data import MOTIONS_DATA, TrainingData, worker_sources
from mone.baselines import with_method
from mone.capacity import check_capacity
from mone.config import preset
from mone.engine.choice import ExactEngine
from mone.parallel import Strategy
from mone.stages import Stage, TrainConfig
from pipelines.train_loop import TrainJob

_CACHE_BYTES = 1 << 40
# The first lines of a run are of a device that warms up, and of a cold cache.
_LINES, _LINES_SKIPPED = 12, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Train as many steps with each number of workers, the batch growing with them, and compare clips a second.

    All videos are decoded into a cache first; every run reads the same clips from it, as many epochs as it has workers,
    through Ray Train and NCCL (gloo on CPUs). An interval is a twelfth of a run; the first two are left out.
    "efficiency" is clips a second for each worker, over those of the first row. "wait" is the share of the time in
    which the first worker waited for clips.

    python -m jobs.benchmark scaling --data LABELLED --preset base --workers 1 2 --batch-size 16
    """

    data: str
    """Labelled videos, as for jobs.train; its splits are not told apart."""
    preset: str = "small"
    """tiny, small, base or large."""
    frames: int = 32
    """Frames of a clip."""
    size: int = 224
    """Height and width of a frame."""
    method: Literal["dense", "mone"] = "dense"
    """What is trained."""
    capacity: float = 0.4
    """Effective capacity of mone."""
    engine: ExactEngine = "auto"
    """Code that runs the blocks."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers, each with a GPU where the cluster has any."""
    batch_size: int = 16
    """Clips of a worker's step."""
    clips_per_video: int = 4
    """Clips from each video."""
    strategy: Strategy = "ddp"
    """ddp or fsdp."""
    cache: str = ""
    """Where decoded clips are kept for the next time; default a folder that is deleted."""
    address: str = ""
    """Ray cluster; default RAY_ADDRESS, else Ray starts here."""

    def measure(self) -> Report:
        """Run the benchmark."""
        from jobs.cluster import connected

        data = self._checked()
        with tempfile.TemporaryDirectory() as folder, connected(self.address):
            rows = [self._row(count, data, Path(folder)) for count in self.workers]
        for row in rows:
            row["efficiency"] = row["clips_per_s"] / row["workers"] / (rows[0]["clips_per_s"] / rows[0]["workers"])
        header = ("workers", "clips/s", "min..max", "efficiency", "wait", "MFU")
        sizes = f"{self.preset}, {self.frames} frames of {self.size} x {self.size}, {self.batch_size} clips a worker"
        table = aligned(header, [_cells(row) for row in rows])
        return Report(table=f"{self.method}, {sizes}, {self.strategy}\n{table}", rows=rows, device=choose_device(""))

    def _checked(self) -> TrainingData:
        """All videos as one split."""
        if not self.workers or min(self.workers) < 1 or self.batch_size < 1 or self.clips_per_video < 1:
            raise UserError("--workers, --batch-size and --clips-per-video must be at least 1")
        if self.data == MOTIONS_DATA:
            raise UserError("give labelled videos: generated clips need neither decoder nor cache")
        # Here, so that a machine which does not scale needs no decoder.
        from pipelines.archive import list_labelled

        with checking_input():
            videos = list(list_labelled(self.data))
            data = TrainingData(
                tuple(sorted({video.label for video in videos})), {"train": videos, "val": [], "test": []}
            )
            self._job(1, data, "")
        steps = len(videos) * self.clips_per_video // (max(self.workers) * self.batch_size)
        if steps < _LINES_SKIPPED + 2:
            raise UserError(f"an epoch has {steps} steps: give more videos, or a larger --clips-per-video")
        return data

    def _job(self, workers: int, data: TrainingData, output: str) -> TrainJob:
        sizes = {"num_frames": self.frames, "height_px": self.size, "width_px": self.size}
        model = with_method(preset(self.preset, num_classes=len(data.labels), **sizes), self.method)
        check_capacity(self.capacity, model.num_experts)
        routing = "dense" if self.method == "dense" else "mone"
        stage = Stage(name="benchmark", epochs=workers, routing=routing, capacities=(self.capacity,))
        num_steps = len((data.videos or {}).get("train", ())) * self.clips_per_video // self.batch_size
        return TrainJob(
            model=model,
            train=TrainConfig(stages=(stage,), batch_size=workers * self.batch_size, bf16=True),
            labels=data.labels,
            output=output,
            method=self.method,
            checkpoint_every=10**9,
            log_every=max(1, num_steps // _LINES),
            engine=self.engine,
        )

    def _row(self, workers: int, data: TrainingData, folder: Path) -> dict[str, Any]:
        from pipelines.train_ray import Workers, fit

        output = folder / str(workers)
        output.mkdir()
        job, cache = self._job(workers, data, str(output)), self.cache or str(folder / "cache")
        sources = worker_sources(data, job, self.clips_per_video, cache, _CACHE_BYTES)
        log = functools.partial(RunLog, str(output), {"data": self.data, "fold": "split", "recipe": "benchmark"})
        fit(job, sources, Workers(count=workers, strategy=self.strategy, storage=str(output)), log)
        lines = [record for record in read_metrics(output) if record["kind"] == "step"][_LINES_SKIPPED:]
        rates = [line["clips_per_s"] for line in lines]
        return {
            "workers": workers,
            "clips_per_s": statistics.median(rates),
            "clips_per_s_intervals": rates,
            "data_wait_share": statistics.median(line["data_wait_share"] for line in lines),
            "mfu": statistics.median(line["mfu"] for line in lines) if "mfu" in lines[0] else None,
            "gpu_memory_gib": lines[-1].get("gpu_memory_gib"),
        }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rates = row["clips_per_s_intervals"]
    return (
        str(row["workers"]),
        f"{row['clips_per_s']:.1f}",
        f"{min(rates):.1f}..{max(rates):.1f}",
        f"{row['efficiency']:.3f}",
        f"{row['data_wait_share']:.1%}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}",
    )
