"""Self-attention over tokens that lie in expert-major order; it does not care about the order.

Shapes: S sequences, N tokens, R tokens that are read, D model features, h heads of k features, G groups that attend
within themselves (sequences, or the frames of all sequences), M slots of a group.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mone.blocks import Neighbours


def attend(qkv_SNX: Tensor, num_heads: int, neighbours: Neighbours | None, dropout: float) -> Tensor:
    """Mix values: queries, keys and values [S, N, 3 D] to [S, N, D]."""
    qkv_GMX = neighbours.split(qkv_SNX) if neighbours else qkv_SNX
    q, k, v = rearrange(qkv_GMX, "g m (three h k) -> three g h m k", three=3, h=num_heads).unbind(0)
    mixed_GMD = rearrange(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), "g h m k -> g m (h k)")
    return neighbours.join(mixed_GMD) if neighbours else mixed_GMD


def attend_last(q_SRD: Tensor, kv_SNX: Tensor, num_heads: int, neighbours: Neighbours | None, dropout: float) -> Tensor:
    """Mix values for the class tokens alone, the last of each group: keys and values [S, N, 2 D] to [S, R, D]."""
    kv_GMX = neighbours.split(kv_SNX) if neighbours else kv_SNX
    k, v = rearrange(kv_GMX, "g m (two h k) -> two g h m k", two=2, h=num_heads).unbind(0)
    q = q_SRD.reshape(len(kv_GMX), num_heads, 1, k.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).reshape(q_SRD.shape)
