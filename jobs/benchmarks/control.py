"""What a clip costs the parts of a cluster of which there is one: the driver, and Ray's own services."""

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jobs.benchmarks.report import Report, aligned
from jobs.benchmarks.watch import below, cpu_s, is_service
from jobs.cli import UserError

_CLIPS_PER_VIDEO, _VIDEOS_PER_FILE = 100, 256
# What clips that are handed on together take without pixels.
_BLOCK_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPath:
    """Annotate made-up clips on several Ray nodes of this machine, which sleep where they would decode and compute.

    All else is real: the manifest's files, what is left to do, Ray Data with its tasks, model processes and blocks,
    files that are committed, and the audit. So the rate is that at which this machine hands out and takes back work,
    the workers of all nodes included; "driver" and "services" (the cluster's directory and schedulers) are processor
    time for a clip. Numbers of clips follow each other, so that a cost which grows with the archive shows.

    python -m jobs.benchmark control --clips 1000 10000 100000 1000000
    """

    clips: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Clips of each run."""
    nodes: int = 4
    """Ray nodes on this machine."""
    cpus: int = 8
    """Logical CPUs of each."""
    decode_ms: float = 10.0
    """How long a clip sleeps in place of decoding."""
    model_ms: float = 1.0
    """How long a clip sleeps in place of the model."""
    batch_size: int = 64
    """Clips of a call of the model; as on GPUs."""

    def measure(self) -> Report:
        """Run the benchmark."""
        if not self.clips or min(self.clips) < 1:
            raise UserError("give at least one number of --clips, each at least 1")
        for name in ("nodes", "cpus", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.decode_ms < 0 or self.model_ms < 0:
            raise UserError("--decode-ms and --model-ms must not be negative")
        with self._cluster(), tempfile.TemporaryDirectory() as folder:
            self._run(Path(folder) / "warm-up", 64 * self.nodes * self.cpus)  # processes start
            rows = [
                self._run(Path(folder) / f"{number:03d}", count)
                for number, count in enumerate(tqdm(self.clips, "control", unit="run"))
            ]
        header = ("clips", "s", "clips/s", "driver, us a clip", "services, us a clip", "driver MB", "files", "audit")
        sizes = f"{self.nodes} nodes of {self.cpus} CPUs on {os.cpu_count()} cores"
        return Report(
            table=f"{sizes}\n{aligned(header, [_cells(row) for row in rows])}", rows=rows, device=torch.device("cpu")
        )

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        from ray.cluster_utils import Cluster

        from jobs.cluster import connected, set_ray_options

        set_ray_options()
        size: dict[str, Any] = {"num_cpus": self.cpus, "object_store_memory": 256 * 2**20, "memory": 64 * 2**30}
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp:
            cluster = Cluster(
                initialize_head=True, head_node_args={"include_dashboard": False, "temp_dir": temp, **size}
            )
            try:
                for _ in range(self.nodes - 1):
                    cluster.add_node(**size)
                cluster.wait_for_nodes()
                with connected(str(cluster.address)):
                    yield
            finally:
                cluster.shutdown()

    def _run(self, output: Path, count: int) -> dict[str, Any]:
        from pipelines.ledger import audit

        _write_manifest(output / "manifest", count)
        services = [process for process in below(os.getpid()) if is_service(process)]
        before_s, services_before_s, started_s = cpu_s(os.getpid()), sum(map(cpu_s, services)), time.perf_counter()
        self._annotate(output)
        seconds = time.perf_counter() - started_s
        driver_s, services_s = cpu_s(os.getpid()) - before_s, sum(map(cpu_s, services)) - services_before_s
        found = audit(output / "manifest", output / "annotations")
        return {
            "clips": count,
            "seconds": seconds,
            "clips_per_s": count / seconds,
            "driver_us_per_clip": driver_s / count * 1e6,
            "services_us_per_clip": services_s / count * 1e6,
            "driver_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "files": len(list((output / "annotations").iterdir())),
            "clean": found.clean,
        }

    def _annotate(self, output: Path) -> None:
        """As `pipelines.annotate.write_annotations`, asleep."""
        import functools

        from ray.data import DataContext

        from jobs.benchmarks import asleep
        from pipelines.annotate import model_stage
        from pipelines.commit import REMAINING_DIR, CommittedFiles, fence, write_remaining
        from pipelines.ingest import DECODE_CPUS, clips_per_task, read_manifest
        from pipelines.placement import Wanted, nodes_up, place

        # So that blocks are as many as with pixels, which make each of some hundred megabytes.
        DataContext.get_current().target_max_block_size = _BLOCK_BYTES
        fence(output)
        num_clips = write_remaining(output, output / "manifest")
        placement = place(Wanted(device="cpu", workers=(1, 2 * self.nodes)), nodes_up())
        decoded = (
            read_manifest(output / REMAINING_DIR)
            .repartition(target_num_rows_per_block=clips_per_task(num_clips))
            .map_batches(
                functools.partial(asleep.decode, seconds_per_clip=self.decode_ms / 1e3),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=DECODE_CPUS,
            )
        )
        labelled = model_stage(
            decoded, asleep.Label, (self.model_ms / 1e3,), batch_size=self.batch_size, placement=placement
        )
        files = CommittedFiles(output, num_clips=num_clips)
        labelled.write_datasink(files, ray_remote_args={"num_cpus": placement.write_cpus})
        fence(output)


def _write_manifest(folder: Path, count: int) -> None:
    """As the planner leaves it, a file for each of its tasks."""
    import pyarrow.parquet as pq

    from pipelines.manifest import clip_id
    from pipelines.planning import manifest_table
    from pipelines.schema import PlannedClip, Status

    folder.mkdir(parents=True)
    step = _CLIPS_PER_VIDEO * _VIDEOS_PER_FILE
    for first in range(0, count, step):
        clips = []
        for number in range(first, min(count, first + step)):
            video, place = f"s3://bucket/videos/{number // _CLIPS_PER_VIDEO:08d}.mp4", number % _CLIPS_PER_VIDEO
            start_s, end_s = place * 2.0, place * 2.0 + 2.0
            clips.append(
                PlannedClip(
                    clip_id=clip_id(video, 1 << 20, "1", start_s, end_s),
                    video=video,
                    start_s=start_s,
                    end_s=end_s,
                    label="",
                    size_bytes=1 << 20,
                    version="1",
                    duration_s=_CLIPS_PER_VIDEO * 2.0,
                    fps=24.0,
                    width_px=640,
                    height_px=360,
                    container="mov",
                    codec="h264",
                    status=Status.OK,
                    error="",
                    note="",
                )
            )
        pq.write_table(manifest_table(clips), folder / f"{first // step:06d}.parquet")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['clips']:,}",
        f"{row['seconds']:.1f}",
        f"{row['clips_per_s']:,.0f}",
        f"{row['driver_us_per_clip']:.0f}",
        f"{row['services_us_per_clip']:.0f}",
        f"{row['driver_bytes'] / 2**20:.0f}",
        f"{row['files']:,}",
        "clean" if row["clean"] else "NOT CLEAN",
    )
