"""uint8 pixels to the floats that a model sees, and to tokens. They stay uint8 until they are on the device.

Shapes: B clips, F frames, N patches of a frame, K patches of a clip, P values of a patch, D model features.
"""

import torch
from torch import Tensor, nn

from mone.blocks import last_kept
from mone.config import ModelConfig
from mone.engine.casts import cast
from mone.engine.support import compute_dtype, triton_runs

# Of "scaled", whose differences, odd halves up to 255 / 2, are exact in half precision too.
_MIDDLE = 127.5
# Of "centred".
_SPREAD = 64.0


def embed(
    linear: nn.Linear,
    patches_BKP: Tensor,
    config: ModelConfig,
    kept_BK: Tensor | None = None,
    out_BKD: Tensor | None = None,
    *,
    kernels: bool,
) -> Tensor:
    """uint8 patches to tokens [B, K, D], in out_BKD where that is given.

    Args:
        linear: The embedding.
        patches_BKP: As in `to_float`.
        config: As there.
        kept_BK: As there.
        out_BKD: In the dtype of products.
        kernels: Whether a Triton kernel may do all in one launch, from `engine.choice.uses_kernels`.
    """
    dtype = compute_dtype(linear.weight)
    if kernels:
        from mone.engine.kernels.embed import embed_patches, fits  # here: there may be no Triton

        if fits(patches_BKP, linear.out_features):
            if out_BKD is None:
                out_BKD = patches_BKP.new_empty((*patches_BKP.shape[:2], linear.out_features), dtype=dtype)
            mean, scale = _mean_and_scale(patches_BKP, config, dtype, kept_BK)
            embed_patches(patches_BKP, mean, scale, cast(linear.weight, dtype), linear.bias, out_BKD)
            return out_BKD
    x_BKD = linear(to_float(patches_BKP, config, dtype, kept_BK))
    return x_BKD if out_BKD is None else out_BKD.copy_(x_BKD)


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
    mean, scale = _mean_and_scale(patches_BKP, config, dtype, kept_BK)
    if triton_runs(patches_BKP.device) and dtype != torch.float64:
        from mone.engine.kernels.pixels import shift_and_scale

        return shift_and_scale(patches_BKP, mean, scale, dtype)
    if isinstance(mean, Tensor):
        return patches_BKP.sub(mean.unsqueeze(-1)).to(dtype).div_(scale)
    return patches_BKP.sub(torch.full((), mean, dtype=dtype, device=patches_BKP.device)).div_(scale)


def _mean_and_scale(
    patches_BKP: Tensor, config: ModelConfig, dtype: torch.dtype, kept_BK: Tensor | None = None
) -> tuple[float | Tensor, float]:
    """What is subtracted of pixels, one for all or for each patch [B, K], and what their differences are divided by."""
    if config.pixels == "scaled":
        return _MIDDLE, _MIDDLE
    # The mean of each frame, in which a dropped patch counts as what stands for it.
    mean_BFN = patches_BKP.mean(dim=-1, dtype=torch.promote_types(dtype, torch.float32))
    if kept_BK is not None:
        mean_BFN = mean_BFN.gather(1, last_kept(kept_BK, config.num_indices, config.num_tokens).flatten(1))
    mean_BF = mean_BFN.unflatten(1, (config.num_indices, config.num_tokens)).mean(dim=-1)
    mean_BK = mean_BF.repeat_interleave(config.num_tokens, dim=1)
    return (mean_BK if kept_BK is None else mean_BK.gather(1, kept_BK)), _SPREAD
