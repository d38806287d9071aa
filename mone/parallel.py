"""One process of a training run, or one of many: what differs between alone, DDP and FSDP2."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mone.model import ViViT

Strategy = Literal["ddp", "fsdp"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parallel:
    """A worker's place among the workers.

    Attributes:
        device: That it computes on.
        rank, world: It is worker `rank` of `world`.
        strategy: "ddp": every worker holds the model. "fsdp": FSDP2, each holds its share of every weight, for models
            that do not fit otherwise.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    strategy: Strategy = "ddp"

    def wrap(self, model: ViViT, *, bf16: bool) -> nn.Module:
        """The module to call in training; the model's own parameters are what the optimiser sees."""
        model.to(self.device)
        if self.strategy == "fsdp":
            for parameter in model.parameters():
                # FSDP2 cannot add up gradients of no elements: class tokens where the mean is pooled.
                parameter.requires_grad_(parameter.numel() > 0)
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, cast_forward_inputs=False)
            # ToMe takes blocks apart, and only a block that is called gathers its weights: the root does so for them.
            whole = [] if model.config.allocation == "tome" else model.encoder.blocks
            for block in [*whole, *getattr(model.temporal, "blocks", [])]:
                fully_shard(block, mp_policy=policy)
            # Evaluation has no backward pass, after which the root's weights would be shares again.
            fully_shard(model, reshard_after_forward=True)
            return model
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        # ToMe leaves the router and alpha without a gradient.
        return DistributedDataParallel(model, devices, find_unused_parameters=model.config.allocation == "tome")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all workers; each gets them all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, more: bool) -> Iterator[None]:
        """Gradients of this backward pass stay here where more are to come."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not more)
            yield
        elif isinstance(module, DistributedDataParallel) and more:
            with module.no_sync():
                yield
        else:
            yield
