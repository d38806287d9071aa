"""Tokens on their way to the blocks, which whoever needs them sorted may sort as they are read.

Shapes: S sequences, K tokens in their own order, N tokens of a sequence that are routed, C class tokens, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mone.blocks import take


class Tokens(NamedTuple):
    """Tokens, the order that sorts them by expert, and what joins them.

    Attributes:
        x_SKD: Tokens in their own order.
        order_SN: int64. Those that are routed, smallest expert first; None: as they are.
        classes_CD: Class tokens, which end each sequence.
    """

    x_SKD: Tensor
    order_SN: Tensor | None = None
    classes_CD: Tensor | None = None

    def sorted(self) -> Tensor:
        """Expert-major tokens [S, N + C, D]."""
        x_SND = self.x_SKD if self.order_SN is None else take(self.x_SKD, self.order_SN)
        if self.classes_CD is None:
            return x_SND
        return torch.cat([x_SND, self.classes_CD.expand(x_SND.shape[0], -1, -1)], dim=1)
