"""How fast an archive is annotated with a GPU, its videos decoded by CPUs, by NVDEC, or by both."""

import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from jobs.benchmarks.pipeline import Sampling, clip_plan, made_videos
from jobs.benchmarks.rates import Case, Round, measured, planned
from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device, load_model
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from mone.config import preset
from mone.model import ViViT
from pipelines.limits import DecoderChoice

if TYPE_CHECKING:
    from jobs.benchmarks.sides import Done

_NAMES = {"cpu": "CPUs", "nvdec": "NVDEC", "auto": "both"}
_CLASSES = 400
# Of the model by itself.
_MODEL_BATCHES = 4
# At most: for processes to start and kernels to be compiled, and for decoders alone, which have no start.
_WARM_UP_VIDEOS, _LIMIT_VIDEOS = 16, 160


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateSpeed:
    """Annotate videos end to end, decoding on CPUs alone, on NVDEC alone, and on both (`--decoder` of annotate).

    "limit" are processes that decode the same clips in the same way and drop them: as many as cores, as NVDEC's slots,
    or as both. "model" is the model alone, on patches that lie on the GPU. Each way warms up on some of the
    videos, does half of them, then all: clips/s are of the other half, as on a long archive. "model busy" is the share
    of that time in which the model had clips, "GPU busy" and "NVDEC busy" are what nvidia-smi says.

    python -m jobs.benchmark annotate --resolution 360 1080
    """

    resolution: tuple[int, ...] = (360,)
    """Heights of the videos that are made, 16:9."""
    sampling: tuple[Sampling, ...] = ("dense",)
    """sparse: 4 clips of each video; dense: all of it."""
    videos: int = 48
    """How many are made. The model takes up to a quarter of a minute to start, so rates need minutes of work."""
    duration: float = 60.0
    """Seconds of a video."""
    keep: str = ""
    """Folder for the videos; those that are there are taken. By default they are deleted."""
    model: str = ""
    """Model folder; by default the base model with random weights, which are as fast."""
    preset: str = "base"
    """Size of the model with random weights."""
    capacity: float = 0.4
    """Of the model."""
    batch_size: int = 16
    """Clips of a forward pass."""
    decoder: tuple[DecoderChoice, ...] = ("cpu", "nvdec", "auto")
    """Ways to decode."""
    device: str = ""
    """cuda or cpu; default a GPU where there is one."""

    def measure(self) -> Report:
        """Run the benchmark."""
        device = self._checked()
        from jobs.cluster import connected

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = self._checkpoint(Path(folder))
            cases = list(self._cases(checkpoint, Path(folder)))
            rates = _model_rates(checkpoint, self.capacity, self.batch_size, device)
            # Before Ray starts: each takes all cores, and NVDEC's slots.
            limits: dict[tuple[int, DecoderChoice], float] = {
                (number, way): _limit(case, checkpoint, way)
                for number, case in enumerate(cases)
                for way in self.decoder
            }
            rows = []
            for (number, way), limit in limits.items():
                with connected(""):  # each its own: processes that decode are kept for a while, as they are
                    rows.append(self._row(cases[number], checkpoint, way, limit, rates, device))
                tqdm.write(_table(rows[-1:]), file=sys.stderr)
        model_rate, stage_rate = rates
        head = (
            f"{os.cpu_count()} cores; the model alone {model_rate:.0f} clips/s, from the host's memory {stage_rate:.0f}"
        )
        return Report(table=f"{head}\n{_table(rows)}", rows=rows, device=device)

    def _checked(self) -> torch.device:
        for name, least in (("videos", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if not (self.sampling and self.resolution and self.decoder):
            raise UserError("give at least one --sampling, one --resolution and one --decoder")
        for height_px in self.resolution:
            if height_px < 32 or height_px % 4:
                raise UserError(f"--resolution must be a multiple of 4 and at least 32, got {height_px}")
        if not 1 <= self.duration < float("inf"):
            raise UserError(f"--duration must be at least 1 second, got {self.duration:g}")
        device = choose_device(self.device)
        if device.type == "cpu" and "nvdec" in self.decoder:
            raise UserError("--decoder nvdec needs a GPU")
        return device

    def _checkpoint(self, folder: Path) -> Checkpoint:
        if self.model:
            checkpoint = load_model(self.model)
        else:
            with checking_input():
                model = ViViT(preset(self.preset, num_classes=_CLASSES))
            labels = [f"class {number}" for number in range(_CLASSES)]
            checkpoint = read_checkpoint(save_checkpoint(model, labels, folder / "model"))
        with checking_input():
            check_capacity(self.capacity, checkpoint.config.num_experts)
        return checkpoint

    def _cases(self, checkpoint: Checkpoint, folder: Path) -> Iterator[Case]:
        where = Path(self.keep).resolve() if self.keep else folder / "videos"
        for height_px in tqdm(self.resolution, "make videos", unit="resolution"):
            paths = made_videos(where, self.videos, height_px, self.duration)
            for sampling in self.sampling:
                plan = clip_plan(sampling, checkpoint.config.span_s)
                yield Case(f"{height_px}p", sampling, planned(paths, plan, folder))

    def _row(
        self,
        case: Case,
        checkpoint: Checkpoint,
        way: DecoderChoice,
        limit: float,
        rates: tuple[float, float],
        device: torch.device,
    ) -> dict[str, Any]:
        from jobs.benchmarks import sides
        from jobs.benchmarks.watch import gpu_watched
        from pipelines.ingest import FEWEST_CLIPS_FOR_GPU
        from pipelines.placement import Wanted, nodes_up, place

        placement = place(Wanted(device="cuda" if device.type == "cuda" else "cpu"), nodes_up())
        half, clips = case.planned.half(), len(case.planned.clips)
        warm_up, first_half, whole = (
            functools.partial(
                sides.annotated,
                part.manifest,
                checkpoint,
                self.capacity,
                decoder=way,
                num_clips=num_clips,
                batch_size=self.batch_size,
                placement=placement,
            )
            for part, num_clips in (
                (half.first(_WARM_UP_VIDEOS), FEWEST_CLIPS_FOR_GPU),  # in tasks so small that all processes get some
                (half, clips),
                (case.planned, clips),
            )
        )
        with tqdm(total=3, desc=f"{case.archive} {case.sampling} {_NAMES[way]}", unit="run") as progress:
            warm_up()  # processes start, kernels are compiled
            progress.update()
            first = measured(first_half)
            progress.update()
            with gpu_watched() as gpu:
                last = measured(whole)
            progress.update()
        of = Round(first, last, clips - len(half.clips))
        done: Done = last.done
        rate = 1 / of.clip_s
        return {
            "archive": case.archive,
            "sampling": case.sampling,
            "decoder": way,
            "videos": len({clip.video for clip in case.planned.clips}),
            "clips": clips,
            "failed_clips": done.failed,
            "seconds": last.seconds,
            "seconds_half": first.seconds,
            "clips_per_s": rate,
            "limit_clips_per_s": limit,
            "share_of_limit": rate / limit,
            "model_clips_per_s": rates[0],
            "model_stage_clips_per_s": rates[1],
            "share_of_model": rate / rates[0],
            "model_busy_share": done.model_s / last.seconds,
            "gpu_busy_share": gpu.gpu_share,
            "nvdec_busy_share": gpu.nvdec_share,
            "nvdec_clips_share": done.decoders.get("nvdec", 0) / clips,
            "cpu_ms_per_clip": of.clip_cpu_s * 1e3,
            "decoders": dict(done.decoders),
            "spilled_bytes": last.spilled_bytes,
        }


def _limit(case: Case, checkpoint: Checkpoint, way: DecoderChoice) -> float:
    """Clips a second of processes that decode and drop."""
    from jobs.benchmarks.sides import Decoders
    from pipelines.nvdec import SLOTS_PER_GPU, num_gpus

    slots = SLOTS_PER_GPU * num_gpus()
    count = {"cpu": os.cpu_count() or 1, "nvdec": max(1, slots), "auto": (os.cpu_count() or 1) + slots}[way]
    decoders = Decoders(count, way)
    try:
        some = case.planned.half().first(_LIMIT_VIDEOS)
        for part in (some.first(_WARM_UP_VIDEOS), some):
            done = decoders.decode(part.clips, checkpoint.config)
    finally:
        decoders.close()
    return count * len(some.clips) / done.busy_s  # at the end not all have work, as they would on a long archive


def _model_rates(checkpoint: Checkpoint, capacity: float, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Clips a second of the model alone, and of its stage with decoded clips at hand."""
    import time

    import numpy as np

    from pipelines.predict import Annotator
    from pipelines.tokenize import Tokens

    config = checkpoint.config
    name = "cuda" if device.type == "cuda" else "cpu"
    annotator = Annotator(checkpoint, capacity, 5, device=name, batch_size=batch_size)
    shape = (_MODEL_BATCHES * batch_size, 1, config.num_indices, config.num_tokens, config.patch_values)
    patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    tokens = Tokens(list(range(len(patches))), list(patches), None)
    on_device = torch.from_numpy(patches[:batch_size]).flatten(0, 1).to(annotator.device)
    model = annotator.replayed or annotator.model

    @torch.inference_mode()
    def alone() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=annotator.device.type == "cuda"):
            model(on_device, capacity)
        if annotator.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(step: Any, clips: int) -> float:
        for _ in range(3):
            step()
        started_s, count = time.perf_counter(), 0
        while time.perf_counter() < started_s + 2 or count < 2:
            step()
            count += 1
        return count * clips / (time.perf_counter() - started_s)

    return rate(alone, batch_size), rate(lambda: annotator.probabilities(tokens, capacity), len(patches))


def _table(rows: list[dict[str, Any]]) -> str:
    header = ("videos", "clips of", "decoded by", "clips", "failed", "s", "clips/s", "limit", "of the limit")
    header += ("of the model", "model busy", "GPU busy", "NVDEC busy", "by NVDEC", "CPU ms a clip")

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    return aligned(
        header,
        [
            (
                f"{row['videos']} x {row['archive']}",
                row["sampling"],
                _NAMES[row["decoder"]],
                str(row["clips"]),
                str(row["failed_clips"]),
                f"{row['seconds']:.1f}",
                f"{row['clips_per_s']:.1f}",
                f"{row['limit_clips_per_s']:.1f}",
                *(share(row[name]) for name in ("share_of_limit", "share_of_model", "model_busy_share")),
                *(share(row[name]) for name in ("gpu_busy_share", "nvdec_busy_share", "nvdec_clips_share")),
                f"{row['cpu_ms_per_clip']:.1f}",
            )
            for row in rows
        ],
    )
