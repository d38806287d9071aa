"""uint8 pixels to the floats that a model sees. They stay uint8 until they are on the device.

Shapes: B clips, F frames, N patches of a frame, K patches of a clip, P values of a patch.
"""

import torch
from torch import Tensor

from mone.blocks import last_kept
from mone.config import ModelConfig
from mone.engine.support import triton_runs

# Of "scaled", whose differences, odd halves up to 255 / 2, are exact in half precision too.
_MIDDLE = 127.5
# Of "centred".
_SPREAD = 64.0


def to_float(patches_BKP: Tensor, config: ModelConfig, dtype: torch.dtype, kept_BK: Tensor | None = None) -> Tensor:
    """uint8 patches as the model sees them (`ModelConfig.pixels`), of the same shape.

    Differences are rounded to dtype before they are divided. On a GPU all is one pass over memory, which as a step for
    each operation takes longer than the embedding of the patches.

    Args:
        patches_BKP: uint8.
        config: Says how.
        dtype: Of the answer.
        kept_BK: Places of the patches where static ones were dropped (`static.kept_patches`).
    """
    if config.pixels == "scaled":
        return _shift_and_scale(patches_BKP, _MIDDLE, _MIDDLE, dtype)
    # The mean of each frame, in which a dropped patch counts as what stands for it.
    mean_BFN = patches_BKP.mean(dim=-1, dtype=torch.promote_types(dtype, torch.float32))
    if kept_BK is not None:
        mean_BFN = mean_BFN.gather(1, last_kept(kept_BK, config.num_indices, config.num_tokens).flatten(1))
    mean_BF = mean_BFN.unflatten(1, (config.num_indices, config.num_tokens)).mean(dim=-1)
    mean_BK = mean_BF.repeat_interleave(config.num_tokens, dim=1)
    if kept_BK is not None:
        mean_BK = mean_BK.gather(1, kept_BK)
    return _shift_and_scale(patches_BKP, mean_BK, _SPREAD, dtype)


def _shift_and_scale(patches_BKP: Tensor, mean: float | Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    if triton_runs(patches_BKP.device) and dtype != torch.float64:
        from mone.engine.kernels.pixels import shift_and_scale

        return shift_and_scale(patches_BKP, mean, scale, dtype)
    if isinstance(mean, Tensor):
        return patches_BKP.sub(mean.unsqueeze(-1)).to(dtype).div_(scale)
    return patches_BKP.sub(torch.full((), mean, dtype=dtype, device=patches_BKP.device)).div_(scale)
