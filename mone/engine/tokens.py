"""Tokens on their way to the blocks, which whoever needs them placed and sorted may place and sort as they are read.

Shapes: S sequences, K tokens in their own order, N sorted tokens of a sequence that are routed, C class tokens,
D features, P positions, L blocks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mone.blocks import take


class Positions(NamedTuple):
    """Position embeddings of tokens, to be added.

    Attributes:
        table_PD: Tokens of all sequences, one after the other, take them in turn.
        place_SK: int64. Or each takes that of its place, modulo P.
    """

    table_PD: Tensor
    place_SK: Tensor | None = None

    def added_to(self, x_SKD: Tensor) -> Tensor:
        """Tokens with their positions [S, K, D]."""
        if self.place_SK is not None:
            return x_SKD + self.table_PD[self.place_SK % len(self.table_PD)]
        return (x_SKD.unflatten(1, (-1, len(self.table_PD))) + self.table_PD).flatten(1, 2)


class Gain(NamedTuple):
    """What multiplies the MLP of a token in a block: alpha r_j + 1 (MoNE equation 1).

    Attributes:
        weight_SK: float32. r_j of each token.
        alpha_L: Of each block.
    """

    weight_SK: Tensor
    alpha_L: Tensor


class Tokens(NamedTuple):
    """Tokens, the order that sorts them by expert, and what joins them.

    Attributes:
        x_SKD: Tokens in their own order.
        order_SN: int64. Those that are routed, smallest expert first; None: as they are.
        classes_CD: Class tokens, which end each sequence.
        positions: Of all but class tokens; None: x has them.
        gain: Of all but class tokens, whose gain is 1; None: all gains are.
    """

    x_SKD: Tensor
    order_SN: Tensor | None = None
    classes_CD: Tensor | None = None
    positions: Positions | None = None
    gain: Gain | None = None

    @property
    def dtype(self) -> torch.dtype:
        """With positions."""
        own = self.x_SKD.dtype
        return own if self.positions is None else torch.promote_types(own, self.positions.table_PD.dtype)

    def sorted(self) -> Tensor:
        """Expert-major tokens [S, N + C, D]."""
        x_SKD = self.x_SKD if self.positions is None else self.positions.added_to(self.x_SKD)
        x_SND = x_SKD if self.order_SN is None else take(x_SKD, self.order_SN)
        if self.classes_CD is None:
            return x_SND
        return torch.cat([x_SND, self.classes_CD.expand(x_SND.shape[0], -1, -1)], dim=1)

    def gains(self, num_blocks: int) -> Tensor:
        """The gain of each sorted token in each block, [L, S, N + C, 1]."""
        own_SK = self.x_SKD[..., 0] if self.order_SN is None else self.order_SN
        num_classes = 0 if self.classes_CD is None else len(self.classes_CD)
        if self.gain is None:
            shape = (num_blocks, own_SK.shape[0], own_SK.shape[1] + num_classes, 1)
            return self.x_SKD.new_ones(shape, dtype=self.dtype)
        weight_SK, alpha_L = self.gain
        weight_SN = weight_SK if self.order_SN is None else weight_SK.gather(1, self.order_SN)
        weight_SN1 = F.pad(weight_SN, (0, num_classes)).unsqueeze(-1)
        return (alpha_L.view(-1, 1, 1, 1) * weight_SN1 + 1).to(self.dtype)
