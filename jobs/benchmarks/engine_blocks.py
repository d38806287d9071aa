"""A model's blocks in the engine's kernels, with one tiling or another: what benchmarks of kernels have in common.

Shapes: S sequences, N tokens, D model features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jobs.cli import UserError, checking_input
from jobs.inputs import choose_device, load_model
from mone.capacity import check_capacity
from mone.config import preset
from mone.engine.fused import run_on_rows
from mone.engine.graphs import captured
from mone.engine.rows import Run, runs_of
from mone.engine.tilings import Tilings
from mone.engine.tokens import Tokens
from mone.model import ViViT
from mone.nested import Segments, segments_of


class EngineBlocks(NamedTuple):
    """The blocks of a model, and random tokens for them.

    Attributes:
        model: In bfloat16.
        segments: Experts of a sequence's tokens.
        x_SND: The tokens.
    """

    model: ViViT
    segments: Segments
    x_SND: Tensor

    @property
    def runs(self) -> tuple[Run, ...]:
        """Rows of each expert."""
        return runs_of(self.segments, len(self.x_SND))

    @torch.inference_mode()
    def __call__(self, tilings: Tilings) -> Tensor:
        """Run them all."""
        blocks, classes = self.model.encoder.blocks, self.model.config.num_class_tokens
        return run_on_rows(blocks, Tokens(self.x_SND), self.segments, None, classes, tilings)


def model_on_gpu(folder: str, preset_name: str, capacities: tuple[float, ...], batch_size: int) -> ViViT:
    """A model with what a benchmark of its kernels was asked for.

    Args:
        folder: Of the model; "": the preset.
        preset_name: Of a model with random weights.
        capacities: Effective capacities, to be checked.
        batch_size: Clips of a batch, to be checked.

    Raises:
        UserError: There is no GPU, or the options do not fit.
    """
    device = choose_device("")
    if device.type != "cuda":
        raise UserError("the engine's kernels are for a GPU, and there is none")
    if batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    with checking_input():
        config = load_model(folder).config if folder else preset(preset_name, num_classes=400)
        for capacity in capacities:
            check_capacity(capacity, config.num_experts)
        if config.joint:
            raise ValueError("a joint encoder has no tilings of its own yet: its defaults serve")
    with device:
        return ViViT(config).eval().requires_grad_(False).bfloat16()


def engine_blocks(model: ViViT, capacity: float, batch_size: int) -> EngineBlocks:
    """The blocks of a model under one budget."""
    config, device = model.config, model.embed.weight.device
    counts, classes = config.token_counts(capacity), config.num_class_tokens
    sequences, tokens = batch_size * config.num_indices, sum(counts) + classes
    return EngineBlocks(
        model=model,
        segments=segments_of(counts, config.widths, classes),
        x_SND=torch.randn(sequences, tokens, config.dim, dtype=torch.bfloat16, device=device),
    )


def replaying(run: Callable[[], object]) -> Callable[[int], float]:
    """A call from a CUDA graph, where the host does not count: mean seconds of so many in a row."""
    graph, _ = captured(run)
    graph.replay()

    def seconds(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return seconds
