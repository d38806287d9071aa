"""How fast each method is at each capacity."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from jobs.benchmarks.compiled import ALL_MODES, CompileMode, fastest_compiled
from jobs.benchmarks.models import ARITHMETICS
from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device, load_model
from mone.baselines import capacities_of, sharing_weights, with_method
from mone.capacity import check_capacity
from mone.compute import clip_compute
from mone.config import ModelConfig, preset
from mone.engine.graphs import Replayed
from mone.engine.support import check_engine
from mone.model import Prediction, ViViT
from mone.static import kept_patches

RowEngine = Literal["auto", "triton", "layout", "reference", "compiled", "replayed", "fp8"]

# Shorter measurements say more about the clock, and about the first launch after a pause, than about the model.
_SHORTEST_S = 0.02
_SHORTEST_GPU_S = 0.2
# Savings below this are rounding; how much of them became time would be noise.
_SMALLEST_SAVING = 0.01
_PRESET_CLASSES = 400  # of Kinetics-400; 0.3 MFLOP


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpeed:
    """Time each method at each capacity: the same weights, clips and device, all methods in turn.

    The clips are random pixels in memory, so this is the model alone, without decoding. Methods take turns within each
    repeat, so that a device that heats up or is shared slows all of them alike; "times faster" compares within a
    repeat. "realised" is the share of the saved operations that became saved time: 100 % would be a speed-up equal to
    the reduction in FLOPs.

    python -m jobs.benchmark model --preset base --methods mone token_drop --capacity 0.2 0.4 --batch-size 16
    """

    model: str = ""
    """Model folder; without one, a --preset with random weights."""
    preset: str = ""
    """tiny, small, base or large; default base."""
    frames: int = 0
    """Frames of a preset's clip; 0 is 32."""
    size: int = 0
    """Height and width of a preset's frames; 0 is 224."""
    encoder: Literal["", "factorised", "joint", "spatial", "blocks"] = ""
    """Of a preset; default factorised. "spatial" is its spatial half alone, "blocks" that half from embedded tokens on,
    without pixels."""
    methods: tuple[str, ...] = (
        *("dense", "mone", "random_router", "token_drop", "tome", "submodel", "uniform", "proportionate"),
    )
    """Names from mone/baselines.py; dense is always measured, to compare with."""
    capacity: tuple[float, ...] = (0.2, 0.4, 1.0)
    """Effective capacities; dense, uniform and proportionate have one of their own."""
    static_share: float = 0.0
    """Above 0, dense and mone run once more on clips of which this share of the patches is dropped as static."""
    batch_size: int = 8
    """Clips of a batch."""
    dtype: Literal["", "float32", "bf16", "bf16_autocast"] = ""
    """bf16 has weights in bfloat16 too, bf16_autocast is how the jobs run; default bf16 on a GPU, else float32."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one."""
    repeats: int = 7
    """Measurements of each row; odd, so that the median is one of them."""
    engine: tuple[RowEngine, ...] = ("auto",)
    """Code that runs the blocks; with several, a row for each, all compared with dense on the first. "compiled" is
    dense under torch.compile, at the fastest of its modes and attention kernels; "replayed" is "triton" from a
    CUDA graph, "fp8" the same with products of 8 bits."""
    compile_modes: tuple[CompileMode, ...] = ALL_MODES
    """Modes of torch.compile that "compiled" tries, a minute or two each."""
    compile: bool = False
    """torch.compile each row, for its fixed shapes."""

    def measure(self) -> Report:
        """Run the benchmark."""
        device = choose_device(self.device)
        load, cases = self._checked(device)
        dtype = self.dtype or ("bf16" if device.type == "cuda" else "float32")
        base = load().to(ARITHMETICS[dtype].weights)
        clips = {drop: _clips(base.config, self, drop).to(device) for drop in {case.drop_static for case in cases}}
        compiling = self.compile or "compiled" in self.engine
        compiling = _room_to_compile(8 * len(cases)) if compiling else nullcontext()
        with compiling, torch.inference_mode(), ARITHMETICS[dtype].context(device):
            variants = [_variant(base, case, clips[case.drop_static], self) for case in cases]
            times = _times(variants, device, self.repeats)
        rows = [
            _row(variant, time, variants[0], times[0], self.batch_size)
            for variant, time in zip(variants, times, strict=True)
        ]
        sizes = f"{base.config.num_frames} frames of {base.config.height_px} x {base.config.width_px}"
        return Report(
            table=f"batches of {self.batch_size}, {sizes}, {dtype}{', compiled' * self.compile}\n{_table(rows)}",
            rows=rows,
            device=device,
            details={"dtype": dtype, "model_config": dataclasses.asdict(base.config)},
        )

    def _checked(self, device: torch.device) -> tuple[Callable[[], ViViT], list["_Case"]]:
        """How to load the model, and what to measure, dense first."""
        if self.repeats < 1 or self.repeats % 2 == 0:
            raise UserError(f"--repeats must be odd, got {self.repeats}")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")
        if not self.engine:
            raise UserError("give at least one --engine")
        if "replayed" in self.engine and device.type != "cuda":
            raise UserError("--engine replayed needs a CUDA device")
        with checking_input():
            for engine in self.engine:
                check_engine(engine, device)
        if not self.capacity:
            raise UserError("give at least one --capacity")
        config, load = self._stored(device) if self.model else self._random(device)
        with checking_input():
            for capacity in self.capacity:
                check_capacity(capacity, config.num_experts)
            cases = [
                _Case(method, capacity, engine=engine)
                for engine in dict.fromkeys(self.engine)
                for method in dict.fromkeys(("dense", *self.methods) if engine != "compiled" else ("dense",))
                for capacity in dict.fromkeys(capacities_of(method, config, self.capacity))
            ]
        most = 1 - 1 / config.num_indices
        if not 0 <= self.static_share <= most:
            raise UserError(
                f"--static-share must be between 0 and {most:g}, as frame 0 is all kept; got {self.static_share:g}"
            )
        if self.static_share:
            cases += [case._replace(drop_static=True) for case in cases if case.method in ("dense", "mone")]
        return load, cases

    def _stored(self, device: torch.device) -> tuple[ModelConfig, Callable[[], ViViT]]:
        for name in ("preset", "frames", "size", "encoder"):
            if getattr(self, name):
                raise UserError(f"--{name} has no effect with --model, whose config.json says it")
        checkpoint = load_model(self.model)
        return checkpoint.config, lambda: checkpoint.build(device)

    def _random(self, device: torch.device) -> tuple[ModelConfig, Callable[[], ViViT]]:
        size_px = self.size or 224
        spatial = {"temporal_depth": 0} if self.encoder in ("spatial", "blocks") else {}
        with checking_input():
            config = preset(
                self.preset or "base",
                num_classes=_PRESET_CLASSES,
                num_frames=self.frames or 32,
                height_px=size_px,
                width_px=size_px,
                encoder="joint" if self.encoder == "joint" else "factorised",
                **spatial,
            )

        def build() -> ViViT:
            torch.manual_seed(0)
            with device:
                return ViViT(config).eval()

        return config, build


class _Case(NamedTuple):
    """What a row measures."""

    method: str
    capacity: float
    drop_static: bool = False
    engine: RowEngine = "auto"


class _Clips(NamedTuple):
    """A batch: uint8 patches [B, F, N, P]; or [B, K, P] and their places, where static ones were dropped."""

    patches: Tensor
    kept_BK: Tensor | None

    def to(self, device: torch.device) -> "_Clips":
        return _Clips(self.patches.to(device), None if self.kept_BK is None else self.kept_BK.to(device))


def _clips(config: ModelConfig, options: ModelSpeed, drop_static: bool) -> _Clips:
    """Random pixels, of which the static share repeats what its place showed before."""
    rng = np.random.default_rng(0)
    num_places = config.num_indices * config.num_tokens
    shape = (options.batch_size, config.num_indices, config.num_tokens, config.patch_values)
    patches_BFNP = rng.integers(0, 256, shape, dtype=np.uint8)
    for patches_FNP in patches_BFNP if options.static_share else ():
        places = config.num_tokens + rng.permutation(num_places - config.num_tokens)
        for place in np.sort(places[: math.floor(options.static_share * num_places)]):
            index, token = divmod(int(place), config.num_tokens)
            patches_FNP[index, token] = patches_FNP[index - 1, token]
    if not drop_static:
        return _Clips(torch.from_numpy(patches_BFNP), None)
    kept_BK = np.stack([kept_patches(patches_FNP, threshold=0) for patches_FNP in patches_BFNP])
    patches_BKP = np.take_along_axis(patches_BFNP.reshape(len(kept_BK), num_places, -1), kept_BK[..., None], axis=1)
    return _Clips(torch.from_numpy(patches_BKP), torch.from_numpy(kept_BK))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """One row to be.

    Attributes:
        case: Its method and capacity.
        static_share: Share of the patches that is dropped, rounded to a level.
        flops: Of a clip.
        forward: Classifies the batch.
    """

    case: _Case
    static_share: float
    flops: int
    forward: Callable[[], Tensor]


def _variant(base: ViViT, case: _Case, clips: _Clips, asked: ModelSpeed) -> _Variant:
    config = with_method(base.config, case.method)
    num_kept = None if clips.kept_BK is None else clips.kept_BK.shape[1]
    counts = config.token_counts(case.capacity, num_kept)  # here, so that there is nothing but tensors to trace
    model = sharing_weights(base, config)
    flops = clip_compute(config, case.capacity, num_kept).flops
    called = model
    if asked.encoder == "blocks":
        called = cast(ViViT, _FromTokens(model, clips))  # as one in what is asked of it
        flops -= 2 * (num_kept or config.num_indices * config.num_tokens) * config.dim * config.patch_values
    arguments = {"patches": clips.patches, "counts": counts, "kept_BK": clips.kept_BK}
    if case.engine == "compiled":
        model.encoder.engine = "reference"
        run = fastest_compiled(called, arguments, asked.compile_modes)
    elif case.engine in ("replayed", "fp8"):
        model.encoder.engine = "triton" if case.engine == "replayed" else "fp8"
        run = Replayed(called)
    else:
        model.encoder.engine = case.engine
        run = torch.compile(called, dynamic=False) if asked.compile else called
    return _Variant(
        case=case,
        static_share=1 - num_kept / (config.num_indices * config.num_tokens) if num_kept else 0.0,
        flops=flops,
        forward=lambda: run(**arguments).logits_BC,
    )


class _FromTokens(nn.Module):
    """A model whose tokens are embedded already, whatever patches it is called with."""

    def __init__(self, model: ViViT, clips: _Clips) -> None:
        super().__init__()
        self.model, self.config, self.encoder = model, model.config, model.encoder
        self.x_BKD = model.embedded(*clips)

    def embedded(self, patches: Tensor, kept_BK: Tensor | None = None, out_BKD: Tensor | None = None) -> Tensor:
        return self.x_BKD

    def classified(self, *arguments: Any) -> Prediction:
        return self.model.classified(*arguments)

    def forward(self, patches: Tensor, counts: tuple[int, ...], kept_BK: Tensor | None = None) -> Prediction:
        return self.model.classified(self.x_BKD, patches, counts, kept_BK)


def _room_to_compile(num_variants: int) -> AbstractContextManager:
    """Dynamo takes the variants for recompilations of one function, of which it would quietly stop making more at 8."""
    import torch._dynamo  # here: it takes seconds

    return torch._dynamo.config.patch(recompile_limit=num_variants + 8, fail_on_recompile_limit_hit=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """How long a batch took.

    Attributes:
        repeats_s: Seconds in each repeat, the mean over its iterations.
        iterations: Batches of a repeat.
        peak_bytes: Most memory allocated on a GPU, with all weights and clips.
    """

    repeats_s: list[float]
    iterations: int
    peak_bytes: int | None


def _times(variants: list[_Variant], device: torch.device, repeats: int) -> list[_Times]:
    """Warm all variants up, then let them take turns."""
    warm = [_warm_up(variant, device) for variant in tqdm(variants, "warm up", unit="row")]
    taken: list[list[float]] = [[] for _ in variants]
    for _ in tqdm(range(repeats), "measure", unit="repeat"):
        for variant, (iterations, _), repeats_s in zip(variants, warm, taken, strict=True):
            repeats_s.append(_seconds(variant.forward, iterations, device) / iterations)
    return [
        _Times(repeats_s=repeats_s, iterations=iterations, peak_bytes=peak_bytes)
        for repeats_s, (iterations, peak_bytes) in zip(taken, warm, strict=True)
    ]


def _warm_up(variant: _Variant, device: torch.device) -> tuple[int, int | None]:
    """Iterations that a measurement needs, and the peak of memory, weights and all."""
    on_gpu, iterations = device.type == "cuda", 1
    try:
        for _ in range(2):  # a CUDA graph is captured at the second
            variant.forward()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        while _seconds(variant.forward, iterations, device) < (_SHORTEST_GPU_S if on_gpu else _SHORTEST_S):
            iterations *= 2
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {variant.case.method} at {variant.case.capacity:g}: lower --batch-size"
        ) from error
    return iterations, torch.cuda.max_memory_allocated(device) if on_gpu else None


def _seconds(forward: Callable[[], Tensor], iterations: int, device: torch.device) -> float:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    started_s = time.perf_counter()
    for _ in range(iterations):
        forward()
    finish()
    return time.perf_counter() - started_s


def _row(variant: _Variant, times: _Times, dense: _Variant, dense_times: _Times, batch_size: int) -> dict[str, Any]:
    """A row in full. The number of repeats is odd, so a median of inverses is the inverse of the median."""
    batch_s = statistics.median(times.repeats_s)
    faster = [dense_s / own_s for dense_s, own_s in zip(dense_times.repeats_s, times.repeats_s, strict=True)]
    times_faster, flops_share = statistics.median(faster), variant.flops / dense.flops
    saves = 1 - flops_share > _SMALLEST_SAVING
    return {
        "method": variant.case.method,
        "capacity": variant.case.capacity,
        "engine": variant.case.engine,
        "static_share": variant.static_share,
        "flops_per_clip": variant.flops,
        "dense_flops_per_clip": dense.flops,
        "flops_share": flops_share,
        "iterations": times.iterations,
        "batch_ms": batch_s * 1e3,
        "batch_ms_repeats": [repeat_s * 1e3 for repeat_s in times.repeats_s],
        "clips_per_s": batch_size / batch_s,
        "times_faster": times_faster,
        "times_faster_min": min(faster),
        "times_faster_max": max(faster),
        "realised_saving": (1 - 1 / times_faster) / (1 - flops_share) if saves else None,
        "tflop_per_s": variant.flops * batch_size / batch_s / 1e12,
        "peak_memory_bytes": times.peak_bytes,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    header = [
        *("method", "capacity", "engine", "static", "of dense FLOPs", "GFLOP/clip", "ms/batch", "min..max", "clips/s"),
        *("times faster", "min..max", "realised", "TFLOP/s", "peak GiB"),
    ]
    return aligned(header, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    realised, peak_bytes, repeats_ms = row["realised_saving"], row["peak_memory_bytes"], row["batch_ms_repeats"]
    return [
        row["method"],
        f"{row['capacity']:.3g}",
        row["engine"],
        f"{row['static_share']:.0%}",
        f"{row['flops_share']:.1%}",
        f"{row['flops_per_clip'] / 1e9:.3f}",
        f"{row['batch_ms']:.2f}",
        f"{min(repeats_ms):.2f}..{max(repeats_ms):.2f}",
        f"{row['clips_per_s']:.1f}",
        f"{row['times_faster']:.2f}",
        f"{row['times_faster_min']:.2f}..{row['times_faster_max']:.2f}",
        "" if realised is None else f"{realised:.0%}",
        f"{row['tflop_per_s']:.3f}",
        "" if peak_bytes is None else f"{peak_bytes / 2**30:.2f}",
    ]
