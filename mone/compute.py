"""How much arithmetic a clip costs, from formulas.

Everything is in floating-point operations, 2 per multiply-add. (Both papers print "GFLOPs" and mean multiply-adds.)
Counted: every matrix product. Not counted: LayerNorm, softmax, GELU, adds and the sort, together about 1 % at ViViT-B.
`torch.utils.flop_counter` counts the same operations in the reference, and a test holds the two equal. The engine does
fewer: in the last block it leaves out what is not read (`mone.engine.blocks`), at any capacity alike.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mone.config import ModelConfig
from mone.merging import merging_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What one clip costs.

    Attributes:
        flops: Floating-point operations, as it was run.
        kept_flops: At full width, on the patches that were kept. dense_flops - kept_flops is what dropping static
            patches saves, kept_flops - flops what routing saves on top.
        dense_flops: At full width, on all patches.
        tokens_per_expert: Routed tokens of the whole clip, smallest expert first.
    """

    flops: int
    kept_flops: int
    dense_flops: int
    tokens_per_expert: tuple[int, ...]

    def times(self, views: int) -> "Compute":
        """The record of several views of a clip together."""
        return Compute(
            flops=views * self.flops,
            kept_flops=views * self.kept_flops,
            dense_flops=views * self.dense_flops,
            tokens_per_expert=tuple(views * tokens for tokens in self.tokens_per_expert),
        )


def clip_compute(config: ModelConfig, capacity: float, num_kept: int | None = None) -> Compute:
    """The record of a clip run at an effective capacity; counts are static, so it holds for every clip of its size.

    Args:
        config: Sizes.
        capacity: Effective capacity.
        num_kept: Patches that were not dropped as static; None: none were dropped.

    Raises:
        ValueError: A capacity out of range.
    """
    counts = config.token_counts(capacity, num_kept)
    return Compute(
        flops=clip_flops(config, counts, num_kept),
        kept_flops=clip_flops(config, config.token_counts(1.0, num_kept), num_kept, dense=True),
        dense_flops=clip_flops(config, config.token_counts(1.0), dense=True),
        tokens_per_expert=tuple(config.num_budgets(num_kept) * count for count in counts),
    )


def clip_flops(
    config: ModelConfig, counts: tuple[int, ...], num_kept: int | None = None, *, dense: bool = False
) -> int:
    """Floating-point operations of one clip whose budgets split their tokens by these counts.

    Args:
        config: Sizes.
        counts: Tokens of each expert under one budget; with ToMe, the last is the average that a block sees.
        num_kept: Patches that were not dropped as static.
        dense: All tokens at full width instead.
    """
    num_patches = num_kept or config.num_indices * config.num_tokens
    if dense:
        counts = (0,) * (config.num_experts - 1) + (num_patches // config.num_budgets(num_kept),)
    if config.allocation == "tome" and not dense:
        encoder = _merging_macs(config, counts[-1])
    else:
        encoder = config.depth * _nested_block_macs(config, counts, num_kept)
    num_frame_vectors = config.num_indices + 1
    return 2 * (
        num_patches * config.dim * (config.patch_values + _router_outputs(config))
        + encoder
        + config.temporal_depth * _block_macs(config, num_frame_vectors * config.dim, num_frame_vectors**2)
        + config.dim * config.num_classes
    )


def training_flops(config: ModelConfig, counts: tuple[int, ...], num_kept: int | None = None) -> int:
    """Floating-point operations of one clip in a training step: three times those of its forward pass.

    The assumption: behind every product of the forward pass stand two of its size, the gradients of its two factors.
    A little too much, as pixels and ToMe's matching need none. The optimiser is not counted, nor is recomputing
    activations: what is divided by the time is the use of the device (MFU), not how busy it is.

    Args:
        config: Sizes.
        counts: Tokens of each expert under one budget, as in `clip_flops`.
        num_kept: Patches that were not dropped as static.
    """
    return 3 * clip_flops(config, counts, num_kept)


class _Peak(NamedTuple):
    """A data sheet's rate.

    Attributes:
        product: Word of the device's name.
        without: Words of the names of slower versions.
        dtypes: Types of the factors; sums are float32.
        flops_per_s: Of dense matrix products (data sheets like to print twice that, for sparse ones).
    """

    product: str
    without: frozenset[str]
    dtypes: frozenset[torch.dtype]
    flops_per_s: float


_HALVES = frozenset({torch.bfloat16, torch.float16})
_HALF = frozenset({torch.float16})
_SLOWER = frozenset({"pcie", "nvl", "mig"})
# NVIDIA's data sheets of each, tensor cores, dense.
_PEAKS = (
    _Peak("h100", _SLOWER, _HALVES, 989e12),
    _Peak("h200", _SLOWER, _HALVES, 989e12),
    _Peak("a100", frozenset({"mig"}), _HALVES, 312e12),
    _Peak("l4", frozenset(), _HALVES, 121e12),
    _Peak("l40s", frozenset(), _HALVES, 362e12),
    _Peak("t4", frozenset(), _HALF, 65e12),
    _Peak("v100", frozenset({"pcie"}), _HALF, 125e12),
)


def peak_flops_per_s(device_name: str, dtype: torch.dtype) -> float | None:
    """What a device can do at most, for how much of it is used (MFU); None where we do not know.

    Args:
        device_name: As `torch.cuda.get_device_name` tells it: "NVIDIA H100 80GB HBM3".
        dtype: Of the matrix products: bfloat16, float16.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for peak in _PEAKS:
        if peak.product in words and not peak.without & words and dtype in peak.dtypes:
            return peak.flops_per_s
    return None


def _router_outputs(config: ModelConfig) -> int:
    return 0 if config.router == "random" or config.allocation == "tome" else config.num_experts


def _nested_block_macs(config: ModelConfig, counts: tuple[int, ...], num_kept: int | None) -> int:
    num_budgets, num_sequences = config.num_budgets(num_kept), 1 if config.joint else config.num_indices
    width_sum = num_budgets * sum(count * width for count, width in zip(counts, config.widths, strict=True))
    width_sum += num_sequences * config.num_class_tokens * config.dim
    if config.joint:
        attended = num_budgets * sum(counts)
    else:  # a frame attends over all of its places, whoever stands for them
        attended = sum(counts) if config.budget_per_frame(num_kept) else config.num_tokens
    return _block_macs(config, width_sum, num_sequences * (attended + config.num_class_tokens) ** 2)


def _merging_macs(config: ModelConfig, mean_tokens: int) -> int:
    num_sequences = 1 if config.joint else config.num_indices
    frames = config.num_indices // num_sequences
    tokens, macs = frames * config.num_tokens + config.num_class_tokens, 0
    for merged in merging_schedule(frames * mean_tokens, frames * config.num_tokens, config.depth):
        even = -(-(tokens - config.num_class_tokens) // 2)
        matching = even * (tokens - config.num_class_tokens - even) * config.dim // config.num_heads if merged else 0
        attention = 4 * tokens * config.dim**2 + 2 * tokens**2 * config.dim
        tokens -= merged
        macs += attention + matching + 2 * config.mlp_ratio * tokens * config.dim**2
    return num_sequences * macs


def _block_macs(config: ModelConfig, width_sum: int, attended_pairs: int) -> int:
    """One block, where width_sum is the sum of d over its tokens and attended_pairs that of queries times keys.

    Per token: Q, K, V 3 d D; attention out d D; MLP in and out 2 * ratio d D. Scores and values: 2 D per pair,
    whatever the width (MoNE appendix A.1).
    """
    return (4 + 2 * config.mlp_ratio) * width_sum * config.dim + 2 * attended_pairs * config.dim
