"""The least that a block costs on a device: operations, bytes, and the time that neither lets it go below.

Each part is a launch that reads its inputs once and writes its outputs once; what one part hands to the next goes
through memory. Weights are read once. Shapes: T tokens, D model features, n tokens that attend to each other.
"""

from typing import NamedTuple

from mone.config import ModelConfig
from mone.nested import Segments


class Part(NamedTuple):
    """A launch: its name, floating-point operations (2 per multiply-add) and bytes."""

    name: str
    flops: int
    num_bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The larger of the two times."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def block_parts(config: ModelConfig, segments: Segments, num_sequences: int, value_bytes: int = 2) -> list[Part]:
    """What a block does to a batch in the expert-major layout.

    Args:
        config: Sizes.
        segments: Tokens of a sequence by expert.
        num_sequences: Sequences that attend each within itself.
        value_bytes: Of a stored number.
    """
    dim, hidden, attended = config.dim, config.mlp_ratio * config.dim, segments[-1].stop
    tokens = num_sequences * attended
    widths = num_sequences * sum((s.stop - s.start) * s.width for s in segments)  # T times the mean width
    return [
        Part(name, flops, values * value_bytes)
        for name, flops, values in (
            ("norm", 0, 2 * widths),
            ("qkv", 2 * widths * 3 * dim, widths + 3 * tokens * dim + 3 * dim * dim),
            ("attention", 4 * tokens * attended * dim, 4 * tokens * dim),
            ("out", 2 * widths * dim, tokens * dim + 2 * widths + dim * dim),
            ("norm", 0, 2 * widths),
            ("up", 2 * widths * hidden, widths + tokens * hidden + dim * hidden),
            ("down", 2 * widths * hidden, tokens * hidden + 2 * widths + dim * hidden),
        )
    ]
