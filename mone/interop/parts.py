"""From the parts that a reader takes out of a checkpoint to a model of ours.

Shapes: D model features, E experts, M = 1 + N positions of a class token and N others.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mone.checkpoint import CheckpointError
from mone.config import ModelConfig
from mone.interop.source import Source
from mone.model import ViViT

_ROUTER_SEED = 0


class Parts(NamedTuple):
    """What a reader returns.

    Attributes:
        config: Fields of a `ModelConfig`.
        tensors: All weights under our names, but for alpha and the router.
        labels: Name of each class.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    labels: tuple[str, ...]


def build(source: Source, parts: Parts) -> ViViT:
    """The model in evaluation mode, with alpha 0 and a fresh router, the same each time.

    Raises:
        CheckpointError: Sizes that do not fit each other, such as a width that cannot be halved often enough.
    """
    try:
        config = ModelConfig(**parts.config)
    except ValueError as error:
        raise CheckpointError(f"{source.folder}: {error}") from error
    router_ED = torch.empty(config.num_experts, config.dim)
    nn.init.xavier_uniform_(router_ED, generator=torch.Generator().manual_seed(_ROUTER_SEED))
    fresh = {
        "encoder.alpha_L": torch.zeros(config.depth),
        "encoder.router.weight": router_ED,
        "encoder.router.bias": torch.zeros(config.num_experts),
    }
    with torch.device("meta"):
        model = ViViT(config)
    # Copied, since a tensor may lie in a mapped file.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in (parts.tensors | fresh).items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def mlp_ratio(source: Source, name: str, hidden: int, dim: int) -> int:
    """Hidden width of the MLP over D, which has to be whole.

    Raises:
        CheckpointError: It is not; the key or tensor is named.
    """
    if hidden % dim:
        raise CheckpointError(f"{source.folder}: {name} {hidden} is not a multiple of the width {dim}")
    return hidden // dim


def class_and_positions(class_token_D: Tensor, position_MD: Tensor) -> dict[str, Tensor]:
    """Our class token has no position of its own: theirs, the first of M, is added to it."""
    return {
        "encoder.class_token_KD": (class_token_D + position_MD[0]).unsqueeze(0),
        "encoder.position_ND": position_MD[1:],
    }
