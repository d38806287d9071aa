"""What MoNE has to beat, by name: each is a change of the model's config, and runs through the same code.

A table of accuracy against compute is honest only with these rows. They use the weights of any checkpoint of ours as
they are, and train by the same recipes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mone.capacity import fixed_capacity
from mone.config import ModelConfig
from mone.model import ViViT


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to spend a capacity.

    Attributes:
        summary: What it is, in a line.
        changes: Fields of the config that it sets.
        routing: How its training chooses experts (`mone.training.Stage`); None: as the recipe does.
    """

    summary: str
    changes: dict[str, Any] = field(default_factory=dict)
    routing: Literal["dense", "nested"] | None = None


METHODS: dict[str, Method] = {
    "mone": Method(summary="the model as it is configured"),
    "dense": Method(
        summary="every token at full width; one capacity, 1", changes={"allocation": "mone"}, routing="dense"
    ),
    "random_router": Method(summary="MoNE whose router knows nothing of the content", changes={"router": "random"}),
    "uniform": Method(
        summary="the same number of tokens for each expert (MoNE table 2)", changes={"allocation": "uniform"}
    ),
    "proportionate": Method(
        summary="tokens inversely to width, the same work for each expert (MoNE table 2)",
        changes={"allocation": "proportionate"},
    ),
    "submodel": Method(
        summary="all tokens on the widest expert that fits, no routing (MatViT)",
        changes={"allocation": "submodel"},
        routing="nested",
    ),
    "token_drop": Method(
        summary="random tokens are left out, the others at full width",
        changes={"allocation": "token_drop", "router": "random"},
    ),
    "tome": Method(summary="similar tokens are merged in every block (ToMe)", changes={"allocation": "tome"}),
}


def with_method(config: ModelConfig, name: str) -> ModelConfig:
    """The config of a method.

    Raises:
        ValueError: An unknown name, or a method that the config cannot have.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return dataclasses.replace(config, **METHODS[name].changes)


def capacities_of(name: str, config: ModelConfig, asked: Sequence[float]) -> tuple[float, ...]:
    """The capacities at which a method can be run: those asked for, or the only one that it has."""
    fixed = 1.0 if name == "dense" else fixed_capacity(config.num_experts, with_method(config, name).allocation)
    return tuple(asked) if fixed is None else (fixed,)


def within_reach(config: ModelConfig, wanted: Sequence[float]) -> list[float]:
    """Those of the wanted capacities that the smallest expert allows."""
    return [capacity for capacity in wanted if capacity >= config.widths[0] / config.dim]


def sharing_weights(base: ViViT, config: ModelConfig) -> ViViT:
    """A model of another config on the same tensors, in evaluation mode; a router that it lacks is left out."""
    with torch.device("meta"):
        model = ViViT(config)
    names = model.state_dict().keys()
    model.load_state_dict({name: tensor for name, tensor in base.state_dict().items() if name in names}, assign=True)
    return model.eval()
