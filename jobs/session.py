"""A session of a run, from one start to its end or its loss: what it took, what the cluster had, what it cost."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from jobs.run_record import timestamp, write_run
from pipelines.ledger import Totals
from pipelines.metrics import RunMetrics
from pipelines.output import is_there

# Nodes come and go in minutes. It is also what a kill can cost of the record.
_LOOK_S = 10.0


def run_name(output: Path) -> str:
    """What tells the run of an output folder apart in metrics, the same in each of its sessions."""
    return f"{output.name}-{hashlib.blake2s(str(output).encode(), digest_size=3).hexdigest()}"


class Session:
    """The current session's entry in the run's record, kept up to date in run.json while the run goes on."""

    def __init__(self, output: Path, record: dict[str, Any], metrics: RunMetrics, price_per_hour: float) -> None:
        """Start the clock.

        Args:
            output: DIR.
            record: The run's; the entry is put at the end of its sessions.
            metrics: Of the run.
            price_per_hour: Of the cluster.
        """
        self.output, self.record, self.metrics, self.price_per_hour = output, record, metrics, price_per_hour
        self.entry: dict[str, Any] = {"started": timestamp(), "wall_s": 0.0, "cpu_s": 0.0, "gpu_s": 0.0}
        if price_per_hour:
            self.entry["cost"] = 0.0
        record["sessions"].append(self.entry)
        self._started_s = self._added_s = time.monotonic()
        self._looked_s, self._held = -_LOOK_S, {"cpu": 0.0, "gpu": 0.0}

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the block, for which Ray is connected, and write the record however it ends."""
        try:
            self.look()
            yield
        finally:
            self._add()
            self._save()

    def _save(self) -> None:
        """Now or never: what the output folder does not take now it is given again, and last by the job itself."""
        with contextlib.suppress(OSError):
            if is_there(self.output):
                write_run(self.output, self.record)

    def tick(self, clips_left: int) -> None:
        """Bring the metrics and, now and then, the record up to date; may be called often, from any one thread."""
        if time.monotonic() - self._looked_s >= _LOOK_S:
            with contextlib.suppress(Exception):  # a head that does not answer: the run itself decides what follows
                self.look()
            self._save()
        cost = sum(session.get("cost", 0.0) for session in self.record["sessions"])
        self.metrics.show(clips_left=clips_left, cpus=self._held["cpu"], gpus=self._held["gpu"], cost=cost)

    def look(self) -> None:
        """Ask what the cluster has; it had that since it was asked before, or since the start."""
        resources = ray.cluster_resources()
        self._looked_s = time.monotonic()
        self._held = {kind: resources.get(kind.upper(), 0.0) for kind in self._held}
        self._add()

    def _add(self) -> None:
        now_s = time.monotonic()
        for kind, count in self._held.items():
            self.entry[f"{kind}_s"] = round(self.entry[f"{kind}_s"] + count * (now_s - self._added_s), 3)
        self._added_s = now_s
        self.entry["wall_s"] = round(now_s - self._started_s, 3)
        if self.price_per_hour:
            self.entry["cost"] = round(self.price_per_hour * self.entry["wall_s"] / 3600, 6)


def efficiency(result: Totals, sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """How well all sessions of a run used what the cluster held ready for them.

    Shares are of the whole time of all CPUs or GPUs that the cluster had, from the start of each session to its end,
    other runs' part of it included. Rows that were done again count once.

    Args:
        result: Of the rows.
        sessions: Of run.json.

    Returns:
        wall_s: Seconds of all sessions.
        video_hours_per_day_per_gpu: Hours of video that are ok, by day and GPU; None without a GPU.
        video_hours_per_day_per_cpu: Likewise by CPU, decoding and model together.
        efficiency: decode_busy_share, the share of the CPUs' time in which they decoded; model_busy_share, the share
            of the GPUs' time in which the model ran (of the CPUs' time where there is no GPU). None where a session
            did not measure it.
        cost: At the price per hour that each session was given, if any was.
    """
    # GPUs count where the model ran on them.
    sessions = [session | ({"gpu_s": 0.0} if session.get("device") == "cpu" else {}) for session in sessions]
    summed = {
        kind: sum(session.get(kind, 0.0) for session in sessions) for kind in ("wall_s", "cpu_s", "gpu_s", "cost")
    }
    cpu_s, gpu_s = summed["cpu_s"], summed["gpu_s"]
    measured = cpu_s > 0 and all("cpu_s" in session for session in sessions)
    per_gpu = result.hours * 86400 / gpu_s if measured and gpu_s else None
    found: dict[str, Any] = {
        "wall_s": round(summed["wall_s"], 3),
        "video_hours_per_day_per_gpu": None if per_gpu is None else round(per_gpu, 3),
        "video_hours_per_day_per_cpu": round(result.hours * 86400 / cpu_s, 3) if measured else None,
        "efficiency": {
            "decode_busy_share": round(result.decode_s / cpu_s, 4) if measured else None,
            "model_busy_share": round(result.model_s / (gpu_s or cpu_s), 4) if measured else None,
        },
    }
    return found | ({"cost": round(summed["cost"], 6)} if any("cost" in session for session in sessions) else {})


def speed(totals: dict[str, Any]) -> str:
    """The totals' speed in a line for people; "" where it was not measured."""
    if totals.get("video_hours_per_day_per_cpu") is None:
        return ""
    shares, kind = totals["efficiency"], "GPU" if totals["video_hours_per_day_per_gpu"] is not None else "CPU"
    return (
        f"{totals[f'video_hours_per_day_per_{kind.lower()}']:,.1f} video hours a day per {kind}; "
        f"CPUs {shares['decode_busy_share']:.0%} busy decoding, {kind}s {shares['model_busy_share']:.0%} with the model"
    )
