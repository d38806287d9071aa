"""The last block, of which class tokens are all that is read: neither keys nor values of the other tokens are made.

Shapes: R rows, S sequences, C class tokens of a sequence, G = S C groups, D model features, h heads of k features.
"""

import torch
from torch import Tensor

from mone.blocks import Block
from mone.engine.blocks import finish
from mone.engine.casts import cast
from mone.engine.kernels.attention_last import mix_rows
from mone.engine.rows import Places, Run


def class_tokens(
    block: Block,
    head_RD: Tensor,
    normal_RX: Tensor,
    runs: tuple[Run, ...],
    places: Places,
    rows_SC: Tensor,
) -> Tensor:
    """`Block.forward` of class tokens [S, C, D], each of which fills the last slot of a group.

    Args:
        block: The last one.
        head_RD: Residual stream.
        normal_RX: After LayerNorm; each row has the width of its expert.
        runs: Rows of each expert.
        places: Groups, in the order of class tokens.
        rows_SC: int64. Rows of the class tokens, of full width.
    """
    qkv, num_heads, dtype = block.attention.qkv, block.attention.num_heads, head_RD.dtype
    weight_phkD, bias_phk = (cast(part, dtype).unflatten(0, (3, num_heads, -1)) for part in (qkv.weight, qkv.bias))
    own_GD = normal_RX[rows_SC.flatten(), : head_RD.shape[1]].to(dtype)
    query_hGk = torch.baddbmm(bias_phk[0].unsqueeze(1), own_GD.expand(num_heads, -1, -1), weight_phkD[0].mT)
    query_hGD = query_hGk @ weight_phkD[1]
    mixed_hGD = mix_rows(query_hGD, normal_RX, places.read_GM, runs, query_hGk.shape[-1] ** -0.5)
    mixed_hGk = torch.baddbmm(bias_phk[2].unsqueeze(1), mixed_hGD, weight_phkD[2].mT)
    mixed_SCD = mixed_hGk.transpose(0, 1).reshape(*rows_SC.shape, -1)
    return finish(block, head_RD[rows_SC], mixed_SCD)
