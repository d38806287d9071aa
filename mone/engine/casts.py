"""Weights in the dtype of matrix products, kept from call to call as long as they do not change.

Shapes: O output and I input features.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

EIGHT_BITS = torch.float8_e4m3fn
_LARGEST = torch.finfo(EIGHT_BITS).max


class Factor(NamedTuple):
    """A weight as a factor of products: values times the scale of their output feature.

    Attributes:
        values: [O, I].
        scale_O: float32; None is 1. Only 8 bits have one: the largest value of a row is the largest there is.
    """

    values: Tensor
    scale_O: Tensor | None


# Parameters cannot be weak keys by value, so by identity; the entries of one go when it does.
_kept: dict[int, dict[torch.dtype, tuple[int, Factor]]] = {}


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight itself where it has the dtype, else a copy, made anew where the weight was written to since."""
    return factor(weight, dtype).values


def factor(weight: Tensor, dtype: torch.dtype) -> Factor:
    """A weight or bias for products in this dtype."""
    if weight.dtype == dtype:
        return Factor(weight.detach(), None)
    if weight.is_inference():
        return _made(weight, dtype)
    if id(weight) not in _kept:
        _kept[id(weight)] = {}
        weakref.finalize(weight, _kept.pop, id(weight), None)
    version, found = _kept[id(weight)].get(dtype, (-1, None))
    if found is None or version != weight._version or found.values.device != weight.device:
        found = _made(weight, dtype)
        _kept[id(weight)][dtype] = (weight._version, found)
    return found


def _made(weight: Tensor, dtype: torch.dtype) -> Factor:
    weight = weight.detach()
    if dtype != EIGHT_BITS:
        return Factor(weight.to(dtype), None)
    scale_O = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
    return Factor((weight.float() / scale_O.unsqueeze(1)).clamp(-_LARGEST, _LARGEST).to(dtype), scale_O)
