"""Accuracy against compute: every method at every capacity on the same clips; and whether routing looks at what moves.

Shapes: S clips of a set, B clips of a batch, F temporal indices, N tokens per index, K patches kept, P values per
patch, C classes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mone.augment import centre
from mone.baselines import capacities_of, sharing_weights, with_method
from mone.capacity import check_capacity
from mone.checkpoint import Checkpoint
from mone.clips import ClipSource
from mone.compute import Compute, clip_compute
from mone.config import ModelConfig
from mone.model import Prediction, ViViT
from mone.static import kept_patches
from mone.tubelets import to_patches


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A method at a capacity.

    Attributes:
        method: As it was run (`mone.baselines.METHODS`).
        capacity: Effective capacity e_c.
        drop_static: Grey levels up to which a patch was dropped as static; None: none were dropped.
        flops_per_clip: Floating-point operations from formulas, the mean over the clips.
        dense_flops_per_clip: At full width, on all patches.
        top1: Share of the clips whose best class is right.
        nll: Cross-entropy in nats, the mean over the clips.
        num_clips: How many could be read and were measured.
    """

    method: str
    capacity: float
    drop_static: float | None = None
    flops_per_clip: float
    dense_flops_per_clip: int
    top1: float
    nll: float
    num_clips: int


def measure(
    model: ViViT | Checkpoint,
    clips: ClipSource,
    methods: Sequence[str],
    capacities: Sequence[float],
    *,
    batch_size: int = 64,
    drop_static: float | None = None,
) -> list[CurvePoint]:
    """Accuracy and compute of one set of weights, in one pass over the clips.

    Args:
        model: Left as it is, training mode too; a checkpoint is loaded on the GPU where there is one. On a GPU matrix
            products are bfloat16, as in the jobs.
        clips: What to measure on.
        methods: How to run the weights; "mone" is the model as it is configured.
        capacities: Effective capacities; a method with one capacity of its own is measured at that.
        batch_size: Clips of a batch.
        drop_static: Drop patches that changed by at most so many grey levels; clips of one size then run together.

    Returns:
        A point per method and capacity, in the order asked for.

    Raises:
        ValueError: No clips, none that can be read, an unknown method, or a capacity or threshold out of range.
    """
    if not len(clips):
        raise ValueError("there are no clips to measure")
    if isinstance(model, Checkpoint):
        model = model.build("cuda" if torch.cuda.is_available() else "cpu")
    device = model.head.weight.device
    cases = _cases(model, methods, capacities, drop_static)
    sums = [_Sums(device) for _ in cases]
    whole = _whole(clips, batch_size, model.config)
    groups = whole if drop_static is None else _of_one_size(whole, batch_size, drop_static)
    for group in (group.to(device) for group in groups):
        for case, total in zip(cases, sums, strict=True):
            total.add(case, group)
    if any(not total.num_clips for total in sums):
        raise ValueError("no clip could be read")
    return [_point(case, total, drop_static) for case, total in zip(cases, sums, strict=True)]


class _Case(NamedTuple):
    """What a point measures; the models of all cases share their weights."""

    method: str
    capacity: float
    model: ViViT


def _cases(base: ViViT, methods: Sequence[str], capacities: Sequence[float], drop_static: float | None) -> list[_Case]:
    for capacity in capacities:
        check_capacity(capacity, base.config.num_experts)
    cases = []
    for method in dict.fromkeys(methods):
        config = with_method(base.config, method)
        if drop_static is not None and config.reduces_tokens:
            raise ValueError(f"static patches cannot be dropped with allocation {config.allocation!r}")
        model = sharing_weights(base, config)
        own = capacities_of(method, base.config, capacities)
        cases += [_Case(method, capacity, model) for capacity in dict.fromkeys(own)]
    return cases


class _Group(NamedTuple):
    """Clips of one size: uint8 patches [B, F, N, P]; or [B, K, P] and their places, where static ones were dropped."""

    patches: Tensor
    labels_B: Tensor
    kept_BK: Tensor | None = None

    def to(self, device: torch.device) -> "_Group":
        kept_BK = None if self.kept_BK is None else self.kept_BK.to(device)
        return _Group(self.patches.to(device), self.labels_B.to(device), kept_BK)


def _whole(clips: ClipSource, batch_size: int, config: ModelConfig) -> Iterator[_Group]:
    """All clips in their order, in groups of a batch: the middle of what is there, as the model takes it."""
    plan = np.array_split(np.arange(len(clips)), range(batch_size, len(clips), batch_size))
    for frames_BTHWC, labels_B, _ in clips.batches(plan):
        seen = centre(frames_BTHWC, num_frames=config.num_frames, height_px=config.height_px, width_px=config.width_px)
        if len(labels_B):  # else none of them could be read
            yield _Group(to_patches(seen, config), labels_B)


def _of_one_size(groups: Iterator[_Group], batch_size: int, threshold: float) -> Iterator[_Group]:
    """Clips wait for others of their size until these fill a batch; there are at most `static.LEVELS` sizes."""
    waiting: defaultdict[int, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for group in groups:
        for patches_FNP, label in zip(group.patches.cpu(), group.labels_B.cpu(), strict=True):
            kept_K = torch.from_numpy(kept_patches(patches_FNP.numpy(), threshold))
            alike = waiting[len(kept_K)]
            alike.append((patches_FNP.flatten(0, 1)[kept_K], label, kept_K))
            if len(alike) == batch_size:
                yield _Group(*map(torch.stack, zip(*waiting.pop(len(kept_K)), strict=True)))
    for alike in waiting.values():
        yield _Group(*map(torch.stack, zip(*alike, strict=True)))


class _Sums:
    """Over clips, on the device, which is not waited for until the end."""

    def __init__(self, device: torch.device) -> None:
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.flops, self.num_clips = 0, 0

    def add(self, case: _Case, group: _Group) -> None:
        logits_BC = predict(case.model, group.patches, case.capacity, group.kept_BK).logits_BC.float()
        self.right += (logits_BC.argmax(-1) == group.labels_B).sum()
        self.nll += F.cross_entropy(logits_BC, group.labels_B, reduction="sum").double()
        self.num_clips += len(logits_BC)
        self.flops += len(logits_BC) * _compute(case, group).flops


def _compute(case: _Case, group: _Group) -> Compute:
    num_kept = None if group.kept_BK is None else group.kept_BK.shape[1]
    return clip_compute(case.model.config, case.capacity, num_kept)


def _point(case: _Case, sums: _Sums, drop_static: float | None) -> CurvePoint:
    return CurvePoint(
        method=case.method,
        capacity=case.capacity,
        drop_static=drop_static,
        flops_per_clip=sums.flops / sums.num_clips,
        dense_flops_per_clip=clip_compute(case.model.config, case.capacity).dense_flops,
        top1=int(sums.right) / sums.num_clips,
        nll=float(sums.nll) / sums.num_clips,
        num_clips=sums.num_clips,
    )


@torch.inference_mode()
def predict(model: ViViT, patches: Tensor, capacity: float, kept_BK: Tensor | None = None) -> Prediction:
    """A forward pass as the jobs do it: bfloat16 products on a GPU, float32 on a CPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=patches.device.type == "cuda"):
        return model(patches, capacity, kept_BK=kept_BK)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingFocus:
    """Whether the largest expert goes to what moves, beside what routing without looking would give.

    Attributes:
        capacity: Effective capacity e_c.
        expert: The largest expert that has tokens, 0 the smallest.
        moving_share_of_expert: Share of its tokens that lie on a moving object.
        expert_share_of_moving: Share of the moving patches that it gets.
        moving_share: Share of all patches that are moving: what chance makes of the first.
        expert_share: Share of all patches that it gets: what chance makes of the second.
        width_of_moving: Width of the experts of moving patches over the full one, the mean; 0 of one left out.
        width: The same of all patches, which is what chance makes of it.
    """

    capacity: float
    expert: int
    moving_share_of_expert: float
    expert_share_of_moving: float
    moving_share: float
    expert_share: float
    width_of_moving: float
    width: float


def routing_focus(
    model: ViViT, clips: ClipSource, moving_SFN: Tensor, capacity: float, *, batch_size: int = 64
) -> RoutingFocus:
    """Compare the tokens of the largest expert with the patches that are known to move.

    Args:
        model: Left as it is.
        clips: Their order is that of the mask.
        moving_SFN: bool. Which patches lie on a moving object.
        capacity: Effective capacity e_c.
        batch_size: Clips of a batch.

    Raises:
        ValueError: A model that does not route, a capacity out of range, a mask of another shape, or one in which
            nothing moves.
    """
    config, device = model.config, model.head.weight.device
    _check_mask(config, moving_SFN, len(clips))
    expert = max(index for index, count in enumerate(config.token_counts(capacity)) if count)
    model, num_places = sharing_weights(model, config), moving_SFN.numel()
    both = torch.zeros((), dtype=torch.int64, device=device)
    taken, start = torch.zeros_like(both), 0
    widths = torch.zeros(2, dtype=torch.float64, device=device)
    # Left out (expert -1) has no width.
    width_E = torch.tensor([*config.widths, 0], dtype=torch.float64, device=device) / config.dim
    for group in _whole(clips, batch_size, config):
        plan = predict(model, group.patches.to(device), capacity).plan
        moving_BK = moving_SFN[start : start + len(group.labels_B)].to(device).flatten(1)
        start += len(group.labels_B)
        width_BK = width_E[plan.expert_BN.flatten(1)]
        widths += torch.stack([(width_BK * moving_BK).sum(), width_BK.sum()])
        taken_BK = plan.expert_BN.flatten(1) == expert
        taken += taken_BK.sum()
        both += (taken_BK & moving_BK).sum()
    num_moving = int(moving_SFN.sum())
    return RoutingFocus(
        capacity=capacity,
        expert=expert,
        moving_share_of_expert=int(both) / int(taken),
        expert_share_of_moving=int(both) / num_moving,
        moving_share=num_moving / num_places,
        expert_share=int(taken) / num_places,
        width_of_moving=float(widths[0]) / num_moving,
        width=float(widths[1]) / num_places,
    )


def _check_mask(config: ModelConfig, moving_SFN: Tensor, num_clips: int) -> None:
    if config.allocation == "tome":
        raise ValueError("allocation 'tome' merges tokens and routes none")
    expected = [num_clips, config.num_indices, config.num_tokens]
    if list(moving_SFN.shape) != expected or moving_SFN.dtype != torch.bool:
        raise ValueError(f"the mask is {moving_SFN.dtype} {list(moving_SFN.shape)}, it must be torch.bool {expected}")
    if not moving_SFN.any():
        raise ValueError("no patch of the mask moves")
