"""The trainer: one optimiser step after another, on one worker or many, resumable after any of them.

All that is random comes from (seed, epoch, sample) or (seed, step), and a step's loss is averaged over the clips of all
workers, so a run is the same however many workers it has, and however often it is stopped and continued. (But for what
one worker draws for its clips together: dropout, stochastic depth, random routers; and for mixup where a clip of a pair
cannot be read.)

Shapes: B clips, T frames, H x W pixels, C = 3 channels or C classes.
"""

import contextlib
import copy
import functools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from mone.augment import augment, centre, mix
from mone.clips import Batch, ClipSource
from mone.compute import training_flops
from mone.config import ModelConfig
from mone.engine.step_graphs import GraphRecorder, ReplayedGradients
from mone.model import ViViT
from mone.optim import make_optimizer, schedule
from mone.order import EpochOrder
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.tubelets import to_patches

# Whole tensors on the CPU of rank 0, whatever the sharding: a checkpoint fits any number of workers.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOADED = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
# ToMe never trains the router and alpha, which have no moments then.
_LOADED_MOMENTS = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False, strict=False)


class Place(NamedTuple):
    """Where a run is: `samples` of the epoch are done, and `step` steps in all."""

    epoch: int
    samples: int
    step: int


class Metrics(NamedTuple):
    """What happened since the last time, over all workers."""

    stage: str
    epoch: int
    step: int
    loss: float
    accuracy: float
    learning_rate: float
    grad_norm: float
    alpha: float
    clips: int
    clips_per_s: float
    data_wait_share: float
    flops: float
    flops_per_s: float
    tokens_per_expert: tuple[float, ...]


class Score(NamedTuple):
    """Of clips that could be read: share of right answers, mean cross-entropy in nats, and how many there were."""

    top1: float
    nll: float
    num_clips: int


class DivergedError(RuntimeError):
    """The loss is no longer a number, or far above where it began."""


class Trainer:
    """A model with its optimiser and its place in the run."""

    def __init__(
        self, model: ViViT, config: TrainConfig, num_samples: int, parallel: Parallel, *, cuda_graphs: bool = True
    ) -> None:
        """Place the model on its device; all workers must hold the same weights.

        With cuda_graphs, a worker that is alone on a GPU repeats its steps from recordings (`mone.engine.step_graphs`).
        """
        self.config, self.parallel = config, parallel
        self.module, self.model = parallel.wrap(model, bf16=config.bf16), model
        self._backward = functools.partial(_backward, self.module, model.config, config)
        if cuda_graphs and parallel.device.type == "cuda" and self.module is model and parallel.strategy == "ddp":
            recorder = GraphRecorder(parallel.device)
            self._backward = ReplayedGradients(self._backward, list(model.parameters()), recorder)
        self.optimizer = make_optimizer(model, config)
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        self.order, self.num_samples = EpochOrder(num_samples, config.seed), num_samples
        self.place = Place(0, 0, 0)
        self.trained_flops = 0
        self._lowest_loss = math.inf
        self._start_interval()

    @property
    def done(self) -> bool:
        """Whether all epochs are over."""
        return self.place.epoch >= self.config.epochs

    @property
    def stage(self) -> Stage:
        """The current stage, or the last one."""
        return self._stage_and_epoch()[0]

    def run(self, source: ClipSource) -> Iterator[Batch]:
        """Train from here to the end of the epoch; yields after each step what this worker saw."""
        assert not self.done and len(source) == self.num_samples
        size, parallel = self.config.batch_size, self.parallel
        plan = self.order.steps(
            self.place.epoch, size, rank=parallel.rank, world=parallel.world, start_sample=self.place.samples
        )
        batches = source.batches(plan)
        for _ in plan:
            asked_s = time.perf_counter()
            batch = next(batches).to(parallel.device)
            self._waited_s += time.perf_counter() - asked_s
            self._step(batch)
            epoch, samples, step = self.place
            samples = min(samples + size, self.num_samples)
            over = samples == self.num_samples
            self.place = Place(epoch + over, 0 if over else samples, step + 1)
            yield batch

    def _step(self, batch: Batch) -> None:
        """One optimiser step, without waiting for the device."""
        config, device, step = self.config, self.parallel.device, self.place.step
        stage, epoch_of_stage = self._stage_and_epoch()
        self._stage_name = stage.name
        done_share = (epoch_of_stage + self.place.samples / self.num_samples) / stage.epochs
        self._rate = stage.learning_rate * schedule(done_share, config.warmup_share)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * group["lr_scale"]
        counts = stage.draw_counts(self.model.config, _generator(config.seed, step))
        torch.manual_seed(hash((config.seed, step, self.parallel.rank)) % 2**63)  # dropout, random routers

        self.module.train()
        frames, targets = self._prepared(batch)
        total = self.parallel.sum(torch.full((), float(len(targets)), device=device)).clamp(min=1.0)
        chunks = self._chunks(frames, targets)
        self.optimizer.zero_grad(set_to_none=True)
        for index, (frames_BTHWC, targets_BC) in enumerate(chunks):
            with self.parallel.accumulating(self.module, more=index + 1 < len(chunks)):
                self._sums += self._backward(counts, frames_BTHWC, targets_BC, self.parallel.world / total)
        self._grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.model.encoder.project_alphas()
        self._update_average(step)
        self._count(counts)

    def _prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Augmented frames, and what is to be answered: float32 [B, C]."""
        config, sizes = self.config, self.model.config
        num_frames, height_px, width_px = sizes.num_frames, sizes.height_px, sizes.width_px
        draws = {"seed": config.seed, "epoch": self.place.epoch}
        view = {"num_frames": num_frames, "height_px": height_px, "width_px": width_px}
        frames = augment(batch.frames_BTHWC, batch.samples_B, config.augment, **view, **draws)
        return mix(frames, batch.labels_B, batch.samples_B, config.augment, num_classes=sizes.num_classes, **draws)

    def _chunks(self, frames: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As many micro-batches on every worker; where there is nothing left, one black clip of no weight."""
        most = math.ceil(self.config.batch_size / self.parallel.world / 2) * 2
        micro = self.config.micro_batch or most
        shape = frames.shape[1:]
        return [
            (frames[start : start + micro], targets[start : start + micro])
            if start < len(frames)
            else (frames.new_zeros(1, *shape), targets.new_zeros(1, targets.shape[1]))
            for start in range(0, most, micro)
        ]

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """Move the average towards the weights; faster at first, so that it forgets where it began."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        torch._foreach_lerp_(self.average, parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[ViViT]:
        """The model with the averaged weights, which are the result, in evaluation mode."""
        kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._put(self.average)
        self.model.eval()
        try:
            yield self.model
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(self.model.parameters(), tensors, strict=True):
            parameter.copy_(tensor)

    def evaluate(self, source: ClipSource, capacity: float, *, batch_size: int = 64) -> Score:
        """Score the averaged model at an effective capacity, on all workers together."""
        parallel = self.parallel
        plan = EpochOrder(len(source), 0, shuffle=False).steps(
            0, batch_size * parallel.world, rank=parallel.rank, world=parallel.world
        )
        sums = torch.zeros(3, device=parallel.device)
        with self.averaged(), torch.no_grad(), autocast(parallel.device, self.config.bf16):
            for batch in source.batches(plan):
                frames, labels, _ = batch.to(parallel.device)
                if not len(frames):  # FSDP's workers compute together
                    frames, labels = frames.new_zeros(1, *frames.shape[1:]), labels.new_full((1,), -1)
                logits_BC = self.module(self._patches(self._centre(frames)), capacity).logits_BC.float()
                sums += torch.stack(
                    [
                        (logits_BC.argmax(-1) == labels).sum(),
                        F.cross_entropy(logits_BC, labels, ignore_index=-1, reduction="sum"),
                        (labels >= 0).sum(),
                    ]
                )
        right, nll, total = parallel.sum(sums).tolist()
        return Score(right / max(total, 1), nll / max(total, 1), round(total))

    def _centre(self, frames: Tensor) -> Tensor:
        sizes = self.model.config
        return centre(frames, num_frames=sizes.num_frames, height_px=sizes.height_px, width_px=sizes.width_px)

    def _patches(self, frames_BTHWC: Tensor) -> Tensor:
        return to_patches(frames_BTHWC, self.model.config)

    def metrics(self) -> Metrics:
        """What happened since the last call; waits for the device. All workers must call it together.

        Raises:
            DivergedError: The loss or a weight is not finite, or the loss is three times its lowest.
        """
        elapsed_s = time.perf_counter() - self._started_s
        loss, right, clips = self.parallel.sum(self._sums.double()).tolist()
        loss, accuracy = loss / max(clips, 1), right / max(clips, 1)
        step = self.place.step
        # A step after a last good loss can still have spoilt the weights.
        weights_norm = _whole(nn.utils.get_total_norm(self.model.parameters()))
        if not math.isfinite(loss) or not math.isfinite(weights_norm):
            raise DivergedError(f"the loss or the weights are not finite at step {step}; lower the learning rate")
        self._lowest_loss = min(self._lowest_loss, loss)
        if loss > 3 * max(self._lowest_loss, math.log(self.model.config.num_classes)):
            raise DivergedError(f"the loss has grown from {self._lowest_loss:.3g} to {loss:.3g} at step {step}")
        routed = max(1, sum(self._tokens))
        report = Metrics(
            stage=self._stage_name,
            epoch=self.place.epoch,
            step=step,
            loss=loss,
            accuracy=accuracy,
            learning_rate=self._rate,
            grad_norm=_whole(self._grad_norm),
            alpha=_whole(self.model.encoder.bounded_alphas().detach().mean()),
            clips=round(clips),
            clips_per_s=clips / elapsed_s,
            data_wait_share=self._waited_s / elapsed_s,
            flops=float(self._flops),
            flops_per_s=self._flops / elapsed_s,
            tokens_per_expert=tuple(tokens / routed for tokens in self._tokens),
        )
        self._start_interval()
        return report

    def _start_interval(self) -> None:
        self._sums = torch.zeros(3, device=self.parallel.device)
        self._started_s, self._waited_s, self._flops = time.perf_counter(), 0.0, 0
        self._tokens = [0] * self.model.config.num_experts
        self._rate, self._grad_norm, self._stage_name = 0.0, torch.zeros(()), ""

    def _count(self, counts: tuple[int, ...]) -> None:
        """Add a step's work, of all workers as planned, to the totals; what could not be read is counted too."""
        num_clips = min(self.config.batch_size, self.num_samples - self.place.samples)
        flops = training_flops(self.model.config, counts) * num_clips
        self._flops += flops
        self.trained_flops += flops
        for expert, count in enumerate(counts):
            self._tokens[expert] += count * num_clips

    def _stage_and_epoch(self) -> tuple[Stage, int]:
        """The current stage and how many of its epochs are done."""
        epoch = self.place.epoch
        for stage in self.config.stages:
            if epoch < stage.epochs:
                return stage, epoch
            epoch -= stage.epochs
        return self.config.stages[-1], self.config.stages[-1].epochs

    def state(self) -> dict[str, Any]:
        """All that `load` needs to continue, as tensors and numbers. All workers must call it together."""
        with self.averaged():
            average = self._kept(get_model_state_dict(self.model, options=_WHOLE))
        moments = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE) if self.optimizer.state else {}
        return {
            "model": self._kept(get_model_state_dict(self.model, options=_WHOLE)),
            "average": average,
            "optimizer": self._kept(moments),  # before the first step torch would take one to have something to show
            "place": list(self.place),
            "trained_flops": self.trained_flops,
            "lowest_loss": self._lowest_loss,
        }

    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of this moment; on the CPU torch gives the very tensors that training goes on to change."""
        return copy.deepcopy(state) if self.parallel.device.type == "cpu" else state

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was called, on any number of workers."""
        set_model_state_dict(self.model, state["average"], options=_LOADED)
        self.average = [parameter.detach().clone() for parameter in self.model.parameters()]
        set_model_state_dict(self.model, state["model"], options=_LOADED)
        self.optimizer.state.clear()
        if state["optimizer"]:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=_LOADED_MOMENTS)
        self.place, self.trained_flops = Place(*state["place"]), state["trained_flops"]
        self._lowest_loss = state["lowest_loss"]


def _backward(
    module: nn.Module,
    sizes: ModelConfig,
    config: TrainConfig,
    counts: tuple[int, ...],
    frames_BTHWC: Tensor,
    targets_BC: Tensor,
    scale: Tensor,
) -> Tensor:
    """Add the gradients of clips, times a factor; returns sums of loss, right answers and clips, float32 [3]."""
    with autocast(frames_BTHWC.device, config.bf16):
        logits_BC = module(to_patches(frames_BTHWC, sizes), counts=counts).logits_BC.float()
    losses_B = F.cross_entropy(logits_BC, targets_BC, label_smoothing=config.label_smoothing, reduction="none")
    weight_B = targets_BC.sum(dim=-1)  # 0 for what only keeps the workers in step
    loss = (losses_B * weight_B).sum()
    (loss * scale).backward()
    right = (logits_BC.argmax(-1) == targets_BC.argmax(-1)) * weight_B
    return torch.stack([loss.detach(), right.sum(), weight_B.sum()])


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Autocast to bfloat16 where it was asked for and the device has it in hardware."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


def _whole(scalar: Tensor) -> float:
    """The value of a number that FSDP may have spread over the workers."""
    return float(scalar.full_tensor() if isinstance(scalar, DTensor) else scalar)


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash((seed, step)) % 2**63)
