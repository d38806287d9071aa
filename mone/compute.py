"""How much arithmetic a clip costs, from formulas.

Everything is in floating-point operations, 2 per multiply-add. (Both papers print "GFLOPs" and mean multiply-adds.)
Counted: every matrix product. Not counted: LayerNorm, softmax, GELU, adds and the sort, together about 1 % at ViViT-B.
`torch.utils.flop_counter` counts the same operations, and a test holds the two equal.
"""

from dataclasses import dataclass

from mone.capacity import token_counts
from mone.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What one clip costs.

    Attributes:
        flops: Floating-point operations with routing.
        dense_flops: The same network with every token on the full expert.
        tokens_per_expert: Routed tokens of the whole clip, smallest expert first.
    """

    flops: int
    dense_flops: int
    tokens_per_expert: tuple[int, ...]


def clip_compute(config: ModelConfig, capacity: float) -> Compute:
    """The record of a clip run at an effective capacity; counts are static, so it holds for every clip.

    Raises:
        ValueError: A capacity out of range.
    """
    counts = token_counts(capacity, config.num_tokens, config.num_experts)
    everything = token_counts(1.0, config.num_tokens, config.num_experts)
    return Compute(
        flops=clip_flops(config, counts),
        dense_flops=clip_flops(config, everything),
        tokens_per_expert=tuple(config.num_indices * count for count in counts),
    )


def clip_flops(config: ModelConfig, counts: tuple[int, ...]) -> int:
    """Floating-point operations of one clip whose frames split their tokens by these counts."""
    return 2 * (
        config.num_indices * (_stem_macs(config) + config.depth * _nested_block_macs(config, counts))
        + config.temporal_depth * _block_macs(config, config.num_indices + 1, (config.num_indices + 1) * config.dim)
        + config.dim * config.num_classes
    )


def _stem_macs(config: ModelConfig) -> int:
    """Tubelet embedding and router of one frame."""
    router_outputs = 0 if config.router == "random" else config.num_experts
    return config.num_tokens * config.dim * (config.patch_values + router_outputs)


def _nested_block_macs(config: ModelConfig, counts: tuple[int, ...]) -> int:
    num_class_tokens = int(config.pooling == "cls")
    width_sum = sum(count * width for count, width in zip(counts, config.widths, strict=True))
    return _block_macs(config, config.num_tokens + num_class_tokens, width_sum + num_class_tokens * config.dim)


def _block_macs(config: ModelConfig, num_tokens: int, width_sum: int) -> int:
    """One block on one sequence, where width_sum is the sum of d over its tokens.

    Per token: Q, K, V 3 d D; attention out d D; MLP in and out 2 * ratio d D. Scores and values: 2 n D per token,
    whatever the width (MoNE appendix A.1).
    """
    return (4 + 2 * config.mlp_ratio) * width_sum * config.dim + 2 * num_tokens**2 * config.dim
