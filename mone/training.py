"""The training loop: stages of epochs over clips that lie in memory. Plain PyTorch, one device.

A run is reproducible and resumable: all randomness of an epoch comes from (seed, epoch), so a run that is stopped and
continued takes the same steps as one that is not.

Shapes: B clips, F temporal indices, N tokens per index, P values per patch.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mone.config import ModelConfig
from mone.model import ViViT


class Batch(NamedTuple):
    """uint8 patches [B, F, N, P] and int64 labels [B], on the training device."""

    patches_BFNP: Tensor
    labels_B: Tensor


class ClipSource(Protocol):
    """Where batches come from."""

    def __len__(self) -> int:
        """Clips of an epoch."""
        ...

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch, in an order drawn from the generator (None: as stored); the last batch may be smaller."""
        ...


class MemoryClips:
    """Clips that fit in memory, kept on the training device.

    Attributes:
        patches_SFNP: uint8 patches of all clips.
        labels_S: int64 classes.
    """

    def __init__(self, patches_SFNP: Tensor, labels_S: Tensor) -> None:
        assert len(patches_SFNP) == len(labels_S)
        self.patches_SFNP, self.labels_S = patches_SFNP, labels_S

    def __len__(self) -> int:
        return len(self.labels_S)

    def batches(self, batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """One epoch; every clip once."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for chosen in order.to(self.labels_S.device).split(batch_size):
            yield Batch(self.patches_SFNP[chosen], self.labels_S[chosen])

    def to(self, device: torch.device | str) -> "MemoryClips":
        """The same clips on a device."""
        return MemoryClips(self.patches_SFNP.to(device), self.labels_S.to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Epochs with one way of choosing each step's experts, under one warm-up and cosine.

    Attributes:
        name: For the log.
        epochs: Passes over the clips.
        routing: "dense": full width. "nested": all tokens through one expert, drawn per step ("MatViT" pre-training,
            MoNE section 4.2). "mone": Expert Preferred Routing at a capacity drawn per step.
        capacities: What "mone" draws from; one value trains at a fixed capacity.
        learning_rate: Peak.
    """

    name: str
    epochs: int
    routing: Literal["dense", "nested", "mone"]
    capacities: tuple[float, ...] = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
    learning_rate: float = 1e-3

    def draw_counts(self, model: ModelConfig, generator: torch.Generator) -> tuple[int, ...]:
        """Tokens of each expert for one step."""
        if self.routing == "mone":
            return model.token_counts(self.capacities[_draw(len(self.capacities), generator)])
        # ToMe has no narrow experts: merging nothing is all that it can do here.
        dense = self.routing == "dense" or model.allocation == "tome"
        expert = model.num_experts - 1 if dense else _draw(model.num_experts, generator)
        return tuple(model.tokens_per_budget() * (index == expert) for index in range(model.num_experts))


def _draw(choices: int, generator: torch.Generator) -> int:
    return int(torch.randint(choices, (), generator=generator))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train; the model's sizes are a `ModelConfig`.

    Attributes:
        stages: In order; each begins with the weights of the one before.
        batch_size: Clips of a step.
        weight_decay: AdamW's, on matrices only.
        warmup_share: Share of a stage's steps in which the learning rate rises.
        label_smoothing: Of the cross-entropy.
        max_grad_norm: Gradients are scaled down to it.
        ema_decay: Decay per step of the weight average that is evaluated and saved.
        bf16: Autocast to bfloat16 (weights stay float32).
        seed: Of initial weights, order, draws.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 64
    weight_decay: float = 0.05
    warmup_share: float = 0.05
    label_smoothing: float = 0.1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    bf16: bool = False
    seed: int = 0

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)


class EpochReport(NamedTuple):
    """What an epoch was like: means over its steps, and the time it took."""

    stage: str
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    learning_rate: float
    alpha: float
    clips_per_s: float


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


Augment = Callable[[Batch, torch.Generator], Batch]


class Trainer:
    """A model with its optimiser and its place in the run."""

    def __init__(self, model: ViViT, config: TrainConfig, *, augment: Augment | None = None) -> None:
        self.model, self.config, self.augment = model, config, augment
        self.average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema_decay)
        )
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), betas=(0.9, 0.98))
        self.epoch = 0

    @property
    def averaged(self) -> ViViT:
        """The model of averaged weights, which is the result."""
        return cast(ViViT, self.average.module)

    def run(self, clips: ClipSource) -> Iterator[EpochReport]:
        """Train to the end; yields after each epoch, so that the caller logs, saves, evaluates or stops.

        Raises:
            DivergedError: A loss that is not finite.
        """
        while self.epoch < self.config.epochs:
            yield self._run_epoch(clips)

    def _run_epoch(self, clips: ClipSource) -> EpochReport:
        stage, epoch_of_stage = self._position()
        steps = math.ceil(len(clips) / self.config.batch_size)
        # One generator a purpose: where it lives differs (draws on the CPU, augmentation on the device).
        draws = torch.Generator().manual_seed(hash((self.config.seed, self.epoch)) % 2**63)
        device = next(self.model.parameters()).device
        device_draws = torch.Generator(device).manual_seed(hash((self.config.seed, self.epoch, 1)) % 2**63)
        torch.manual_seed(hash((self.config.seed, self.epoch, 2)) % 2**63)

        self.model.train()
        totals, started_s, rate = torch.zeros(2, device=device), time.perf_counter(), 0.0
        for step, batch in enumerate(clips.batches(self.config.batch_size, draws)):
            done_share = (epoch_of_stage * steps + step) / (stage.epochs * steps)
            rate = stage.learning_rate * schedule(done_share, self.config.warmup_share)
            counts = stage.draw_counts(self.model.config, draws)
            totals += self._step(self.augment(batch, device_draws) if self.augment else batch, counts, rate)
        loss, correct = (totals / len(clips)).tolist()
        if not math.isfinite(loss):
            raise DivergedError(f"the loss of epoch {self.epoch + 1} is {loss}; lower the learning rate")
        self.epoch += 1
        return EpochReport(
            stage=stage.name,
            epoch=self.epoch,
            epochs=self.config.epochs,
            loss=loss,
            accuracy=correct,
            learning_rate=rate,
            alpha=float(self.model.encoder.bounded_alphas().detach().mean()),
            clips_per_s=len(clips) / (time.perf_counter() - started_s),
        )

    def _step(self, batch: Batch, counts: tuple[int, ...], rate: float) -> Tensor:
        """One optimiser step; returns the sums of loss and of right answers, [2], without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(batch.patches_BFNP.device.type, torch.bfloat16, enabled=self.config.bf16):
            logits_BC = self.model(batch.patches_BFNP, counts=counts).logits_BC.float()
        loss = F.cross_entropy(logits_BC, batch.labels_B, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.model.encoder.project_alphas()
        self.average.update_parameters(self.model)
        correct = (logits_BC.argmax(-1) == batch.labels_B).sum()
        return torch.stack([loss.detach() * len(batch.labels_B), correct.float()])

    def _position(self) -> tuple[Stage, int]:
        """The current stage and how many of its epochs are done."""
        epoch = self.epoch
        for stage in self.config.stages:
            if epoch < stage.epochs:
                return stage, epoch
            epoch -= stage.epochs
        raise AssertionError("the run has ended")

    def save(self, path: Path) -> None:
        """Write the state from which `load` continues; the file appears whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue where `save` was called."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def schedule(done_share: float, warmup_share: float) -> float:
    """Linear warm-up, then half a cosine down to zero; a factor in [0, 1]."""
    if done_share < warmup_share or warmup_share >= 1:
        return (done_share + 1e-3) / (warmup_share + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done_share - warmup_share) / (1 - warmup_share)))


def _parameter_groups(model: ViViT, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices only; biases, norms, embeddings and alpha are left alone."""
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 2]
    chosen = {id(parameter) for parameter in decayed}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


@torch.inference_mode()
def accuracy(model: ViViT, clips: ClipSource, capacity: float, *, batch_size: int = 64) -> float:
    """Share of clips whose best class is right, at an effective capacity."""
    model.eval()
    correct = [
        (model(batch.patches_BFNP, capacity).logits_BC.argmax(-1) == batch.labels_B).sum()
        for batch in clips.batches(batch_size, None)
    ]
    return float(torch.stack(correct).sum()) / len(clips)
