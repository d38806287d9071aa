"""How long an optimiser step takes, with routing and without."""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device
from mone.baselines import capacities_of, with_method
from mone.capacity import check_capacity
from mone.clips import MemoryClips
from mone.compute import peak_flops_per_s, training_flops
from mone.config import ModelConfig, preset
from mone.engine.choice import ExactEngine
from mone.model import ViViT
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import Trainer

_NUM_CLASSES = 400
_WARM_UP_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpeed:
    """Time optimiser steps of each method: forward, backward, AdamW, weight average; random clips in memory.

    Methods take turns within each repeat, and "times faster" compares within a repeat. "step GiB" is what a step
    allocates beyond weights, optimiser and clips: activations, mostly.

    python -m jobs.benchmark train --preset base --methods dense mone --capacity 0.4 --batch-size 8
    """

    preset: str = "small"
    """tiny, small, base or large."""
    frames: int = 32
    """Frames of a clip."""
    size: int = 224
    """Height and width of a frame."""
    encoder: Literal["factorised", "joint"] = "factorised"
    """Form of the encoder."""
    methods: tuple[str, ...] = ("dense", "mone", "token_drop")
    """Names from mone/baselines.py; dense is always measured, to compare with."""
    capacity: tuple[float, ...] = (0.4,)
    """Effective capacities."""
    engine: tuple[ExactEngine, ...] = ("auto",)
    """Code that runs the blocks; with several, a row for each, all compared with dense on the first."""
    batch_size: int = 8
    """Clips of a step."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one."""
    repeats: int = 5
    """Measurements of each row; odd, so that the median is one of them."""
    steps: int = 3
    """Steps of a measurement."""
    cuda_graphs: bool = True
    """On a GPU, repeat steps from CUDA graphs, as training does."""

    def measure(self) -> Report:
        """Run the benchmark."""
        device = choose_device(self.device)
        cases = self._cases()
        variants = [_Variant(case, self, device) for case in tqdm(cases, "warm up", unit="row")]
        times_s = [[variant.time_s(self.steps) for variant in variants] for _ in tqdm(range(self.repeats), "measure")]
        rows = [
            self._row(variant, [repeat[index] for repeat in times_s], [repeat[0] for repeat in times_s], device)
            for index, variant in enumerate(variants)
        ]
        header = (
            *("method", "capacity", "engine", "ms/step", "min..max", "clips/s", "times faster", "min..max", "MFU"),
            "step GiB",
        )
        table = aligned(header, [_cells(row) for row in rows])
        sizes = f"{self.preset}, {self.frames} frames of {self.size} x {self.size}, batches of {self.batch_size}"
        return Report(table=f"{sizes}\n{table}", rows=rows, device=device)

    def _cases(self) -> list["_Case"]:
        if self.repeats < 1 or self.repeats % 2 == 0:
            raise UserError(f"--repeats must be odd, got {self.repeats}")
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.engine:
            raise UserError("give at least one --engine")
        with checking_input():
            joint = {"encoder": self.encoder} if self.encoder == "joint" else {}
            sizes = {"num_frames": self.frames, "height_px": self.size, "width_px": self.size}
            config = preset(self.preset, num_classes=_NUM_CLASSES, **sizes, **joint)
            for capacity in self.capacity:
                check_capacity(capacity, config.num_experts)
            return [
                _Case(method, capacity, with_method(config, method), engine)
                for engine in dict.fromkeys(self.engine)
                for method in dict.fromkeys(("dense", *self.methods))
                for capacity in dict.fromkeys(capacities_of(method, config, self.capacity))
            ]

    def _row(
        self, variant: "_Variant", times_s: list[float], dense_s: list[float], device: torch.device
    ) -> dict[str, Any]:
        ratios = [dense / own for dense, own in zip(dense_s, times_s, strict=True)]
        median_s = statistics.median(times_s)
        flops = training_flops(variant.case.config, variant.counts) * self.batch_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops_per_s(name, torch.bfloat16)
        return {
            "method": variant.case.method,
            "capacity": variant.case.capacity,
            "engine": variant.case.engine,
            "step_ms": median_s * 1e3,
            "step_ms_repeats": [1e3 * value for value in times_s],
            "clips_per_s": self.batch_size / median_s,
            "times_faster": statistics.median(ratios),
            "times_faster_min": min(ratios),
            "times_faster_max": max(ratios),
            "training_flops_per_step": flops,
            "mfu": flops / median_s / peak if peak else None,
            "step_bytes": variant.step_bytes,
        }


class _Case(NamedTuple):
    method: str
    capacity: float
    config: ModelConfig
    engine: ExactEngine


class _Variant:
    """A trainer of one row."""

    def __init__(self, case: _Case, options: TrainSpeed, device: torch.device) -> None:
        self.case, self.device = case, device
        routing = "dense" if case.method == "dense" else "mone"
        stage = Stage(name="benchmark", epochs=10**9, routing=routing, capacities=(case.capacity,))
        config, size = TrainConfig(stages=(stage,), batch_size=options.batch_size, bf16=True), case.config
        self.counts = stage.draw_counts(size, torch.Generator())
        shape = (options.batch_size, size.num_frames, size.height_px, size.width_px, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        labels = torch.arange(options.batch_size) % size.num_classes
        torch.manual_seed(0)
        self.clips = MemoryClips(torch.from_numpy(pixels), labels).to(device)
        model = ViViT(size)
        model.encoder.engine = case.engine
        self.trainer = Trainer(model, config, options.batch_size, Parallel(device), cuda_graphs=options.cuda_graphs)
        self.step_bytes: int | None = None
        self.step()
        before = 0
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        for _ in range(_WARM_UP_STEPS):  # the first of which is recorded: a replayed step allocates nothing
            self.step()
        if device.type == "cuda":
            self.step_bytes = torch.cuda.max_memory_allocated(device) - before

    def step(self) -> None:
        for _ in self.trainer.run(self.clips):
            pass

    def time_s(self, steps: int) -> float:
        """Seconds of a step."""
        self._wait()
        started_s = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return (time.perf_counter() - started_s) / steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    spread = min(row["step_ms_repeats"]), max(row["step_ms_repeats"])
    return (
        row["method"],
        f"{row['capacity']:.3g}",
        row["engine"],
        f"{row['step_ms']:.1f}",
        f"{spread[0]:.1f}..{spread[1]:.1f}",
        f"{row['clips_per_s']:.1f}",
        f"{row['times_faster']:.2f}",
        f"{row['times_faster_min']:.2f}..{row['times_faster_max']:.2f}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "" if row["step_bytes"] is None else f"{row['step_bytes'] / 2**30:.2f}",
    )
