"""Weights in the dtype of matrix products, kept from call to call as long as they do not change."""

import weakref

import torch
from torch import Tensor

# Parameters cannot be weak keys by value, so by identity; an entry goes when its parameter does.
_casts: dict[int, tuple[int, Tensor]] = {}


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight itself where it has the dtype, else a copy, made anew where the weight was written to since."""
    if weight.dtype == dtype:
        return weight.detach()
    if weight.is_inference():
        return weight.detach().to(dtype)
    version, copy = _casts.get(id(weight), (-1, weight))
    if version != weight._version or copy.dtype != dtype or copy.device != weight.device:
        if id(weight) not in _casts:
            weakref.finalize(weight, _casts.pop, id(weight), None)
        copy = weight.detach().to(dtype)
        _casts[id(weight)] = (weight._version, copy)
    return copy
