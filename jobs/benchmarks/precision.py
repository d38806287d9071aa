"""What lower precision costs in accuracy."""

import dataclasses
import itertools
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from jobs.benchmarks.models import ARITHMETICS
from jobs.benchmarks.report import Report, aligned
from jobs.cli import UserError, checking_input
from jobs.inputs import BUNDLED, BUNDLED_MODEL, choose_device, load_model
from mone.baselines import sharing_weights
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.config import ModelConfig
from mone.engine.support import eight_bits_run
from mone.model import Prediction
from pipelines.timeline import ClipPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Compare the model's answers in lower precision with those in float64, on the same device and clips.

    Rounding acts in two ways: on the numbers, and on the routing, where a token at the edge between two experts goes to
    the other one. The columns "same routing" send every token to the expert that it has in float64, and so show the
    first alone.

    python -m jobs.benchmark precision --model MODEL --data VIDEOS --capacity 0.2 0.4 1.0
    """

    model: str = str(BUNDLED_MODEL)
    """Model folder."""
    data: str = ""
    """Videos, as annotate takes them; one clip of each. Default the bundled ones."""
    random: bool = False
    """Random pixels in place of videos."""
    clips: int = 64
    """Take the first videos only, so many; or make so many random clips."""
    capacity: tuple[float, ...] = (0.2, 0.4, 1.0)
    """Effective capacities."""
    dtypes: tuple[str, ...] = ()
    """Of float64, float32, bf16 (weights too), bf16_autocast, fp16_autocast and fp8 (GPU); default all but float64."""
    batch_size: int = 8
    """Clips of a batch."""
    device: str = ""
    """"cuda", "cpu"; default the GPU where there is one."""

    def measure(self) -> Report:
        """Run the benchmark."""
        device = choose_device(self.device)
        dtypes = self._checked_dtypes(device)
        checkpoint = load_model(self.model)
        with checking_input():
            for capacity in self.capacity:
                check_capacity(capacity, checkpoint.config.num_experts)
        patches, num_failed = self._patches(checkpoint.config)
        rows = _compare(checkpoint, patches.split(self.batch_size), self.capacity, dtypes, device)
        return Report(
            table=f"{len(patches)} clips, {num_failed} could not be read\n{_table(rows)}",
            rows=rows,
            device=device,
            details={"model_id": checkpoint.model_id, "clips": len(patches), "failed": num_failed},
        )

    def _checked_dtypes(self, device: torch.device) -> tuple[str, ...]:
        for name in ("clips", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not self.capacity:
            raise UserError("give at least one --capacity")
        if self.random and self.data:
            raise UserError("--data has no effect with --random")
        possible = [name for name in ARITHMETICS if device.type == "cuda" or name != "fp16_autocast"]
        if not eight_bits_run(device):
            possible.remove("fp8")
        if unknown := sorted(set(self.dtypes) - set(possible)):
            raise UserError(f"unknown dtype {unknown[0]!r} on {device.type}; there are {', '.join(possible)}")
        return self.dtypes or tuple(name for name in possible if name != "float64")

    def _patches(self, config: ModelConfig) -> tuple[Tensor, int]:
        """uint8 patches [B, F, N, P], and how many clips could not be read."""
        if self.random:
            shape = (self.clips, config.num_indices, config.num_tokens, config.patch_values)
            return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), 0
        data = self.data or str(BUNDLED / "clips" / "labels.csv")
        patches, num_failed = _decoded(data, config, self.clips)
        if not len(patches):
            raise UserError(f"no clip of {data} can be read")
        return patches, num_failed


def _decoded(data: str, config: ModelConfig, num_videos: int) -> tuple[Tensor, int]:
    # Here, so that other benchmarks need no decoder.
    import pyarrow as pa

    from pipelines.archive import list_videos
    from pipelines.manifest import plan_video
    from pipelines.schema import MANIFEST
    from pipelines.tokenize import tokenize_table, tokens_of

    plan = ClipPlan(span_s=config.span_s, clips_per_video=1)
    with checking_input():
        videos = list(itertools.islice(list_videos(data), num_videos))
    clips = [
        dataclasses.asdict(clip) for video in tqdm(videos, "probe", unit="video") for clip in plan_video(video, plan)
    ]
    decoded = tokenize_table(pa.Table.from_pylist(clips, schema=MANIFEST), config)
    for clip in decoded.select(["video", "status", "error"]).to_pylist():
        if clip["error"]:
            print(f"left out {clip['video']}: {clip['status']}: {clip['error']}", file=sys.stderr)
    whole = tokens_of(decoded, config)  # all of one size, or none
    return torch.from_numpy(whole[0].patches[:, 0]) if whole else torch.empty(0), decoded["patches"].null_count


class _Recording(nn.Module):
    """A router that keeps what it said last."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.said_BNE = torch.empty(0)

    def forward(self, tokens_BND: Tensor, patches_BNP: Tensor) -> Tensor:
        self.said_BNE = self.router(tokens_BND, patches_BNP)
        return self.said_BNE


class _Repeating(nn.Module):
    """A router that says what another one said; equal probabilities make an equal plan."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def forward(self, tokens_BND: Tensor, patches_BNP: Tensor) -> Tensor:
        return self.recording.said_BNE


class _Answers(NamedTuple):
    """Of a batch, in float64: three times logits [B, C], and the share of tokens that took another expert [B]."""

    exact_BC: Tensor
    own_BC: Tensor
    same_routing_BC: Tensor
    rerouted_share_B: Tensor


@torch.inference_mode()
def _compare(
    checkpoint: Checkpoint,
    batches: tuple[Tensor, ...],
    capacities: tuple[float, ...],
    dtypes: tuple[str, ...],
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row for each dtype and capacity."""
    exact = checkpoint.build(device).double()
    recording = _Recording(exact.encoder.router)
    exact.set_submodule("encoder.router", recording)
    models = {dtype: checkpoint.build(device).to(ARITHMETICS[dtype].weights) for dtype in dtypes}
    routed = {dtype: sharing_weights(model, checkpoint.config) for dtype, model in models.items()}
    for dtype, model in routed.items():
        model.encoder.engine = models[dtype].encoder.engine = ARITHMETICS[dtype].engine
        model.set_submodule("encoder.router", _Repeating(recording))
    answers: defaultdict[tuple[str, float], list[_Answers]] = defaultdict(list)
    for patches in tqdm(batches, "compare", unit="batch"):
        patches = patches.to(device)
        for capacity in capacities:
            truth = exact(patches, capacity)
            for dtype in dtypes:
                with ARITHMETICS[dtype].context(device):
                    pair = models[dtype](patches, capacity), routed[dtype](patches, capacity)
                answers[dtype, capacity].append(_answers(truth, *pair))
    return [{"dtype": dtype, "capacity": capacity, **_errors(of)} for (dtype, capacity), of in answers.items()]


def _answers(truth: Prediction, own: Prediction, same_routing: Prediction) -> _Answers:
    rerouted = own.plan.expert_BN != truth.plan.expert_BN
    return _Answers(
        truth.logits_BC,
        own.logits_BC.double(),
        same_routing.logits_BC.double(),
        rerouted.flatten(1).double().mean(dim=1),
    )


def _errors(answers: list[_Answers]) -> dict[str, float | None]:
    exact, own, same_routing, rerouted_share = (torch.cat(parts) for parts in zip(*answers, strict=True))
    errors = _distance(own, exact) | {"rerouted_share": rerouted_share.mean().item()}
    return errors | {f"{name}_same_routing": value for name, value in _distance(same_routing, exact).items()}


def _distance(own_KC: Tensor, exact_KC: Tensor) -> dict[str, float | None]:
    difference_KC = own_KC - exact_KC
    values = {
        "max_abs_error": difference_KC.abs().max().item(),
        "relative_rms_error": (difference_KC.square().mean() / exact_KC.square().mean()).sqrt().item(),
        "top1_changed_share": (own_KC.argmax(-1) != exact_KC.argmax(-1)).double().mean().item(),
    }
    # Overflow, or a head that is all zero: JSON has no name for what comes out.
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    header = [
        *("dtype", "capacity", "rerouted", "max abs error", "relative RMS", "top-1 changed"),
        *("same routing: max abs", "relative RMS", "top-1 changed"),
    ]
    return aligned(header, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["dtype"], f"{row['capacity']:g}", f"{row['rerouted_share']:.3%}"]
    for suffix in ("", "_same_routing"):
        largest, relative = (row[f"{name}{suffix}"] for name in ("max_abs_error", "relative_rms_error"))
        cells += ["not finite" if error is None else f"{error:.2e}" for error in (largest, relative)]
        cells.append(f"{row[f'top1_changed_share{suffix}']:.1%}")
    return cells
