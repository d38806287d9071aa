"""Which code runs the blocks of a nested encoder on tokens that are sorted by expert.

Shapes: S sequences, N tokens, D model features, R class tokens, L blocks.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mone.blocks import Neighbours
from mone.engine.blocks import run_on_layout
from mone.engine.support import triton_runs
from mone.engine.tokens import Positions, Tokens
from mone.nested import Segments
from mone.routing import LearnedRouter, RandomRouter, RoutingPlan, expert_preferred_routing

ExactEngine = Literal["auto", "triton", "layout", "reference"]
Engine = Literal[ExactEngine, "fp8"]

# Queries, keys and values that a processor computes at a time: glibc hands tensors of 32 MiB and more back to the
# system as they are freed, and to get them again can cost as much as the product itself.
_PROCESSOR_BYTES = 30 * 2**20


def uses_kernels(engine: Engine, blocks: nn.ModuleList, like: Tensor) -> bool:
    """Whether Triton kernels take tokens of the device and dtype of this tensor, which is not empty."""
    asked = engine in ("triton", "fp8")
    if not asked and not (engine == "auto" and _is_hopper(like.device) and not _must_be_called(blocks)):
        return False
    from mone.engine.fused import fits_kernels  # here: there may be no Triton

    return fits_kernels(blocks, like)


def score(kernels: bool, x_BKD: Tensor, positions: Positions, router: LearnedRouter | RandomRouter) -> Tensor | None:
    """What a router's linear part makes of tokens with their positions [B, K, E], where a kernel does that.

    Args:
        kernels: From `uses_kernels`.
        x_BKD: Tokens, without positions.
        positions: Theirs.
        router: Any.
    """
    if not (kernels and isinstance(router, LearnedRouter)):
        return None
    from mone.engine.kernels.route import score as score_tokens

    return score_tokens(x_BKD, positions, router.weight, router.bias)


def route(kernels: bool, probabilities_SNE: Tensor, counts: tuple[int, ...], *, cumulative: bool) -> RoutingPlan:
    """`expert_preferred_routing`, in one launch where kernels run and a sequence's tokens are few."""
    if kernels:
        from mone.engine.kernels.route import MOST_TOKENS, prefer

        if probabilities_SNE.shape[1] <= MOST_TOKENS:
            return RoutingPlan(*prefer(probabilities_SNE, counts, cumulative=cumulative), counts)
    return expert_preferred_routing(probabilities_SNE, counts, cumulative=cumulative)


def run_blocks(
    engine: Engine,
    blocks: nn.ModuleList,
    tokens: Tokens,
    segments: Segments,
    neighbours: Neighbours | None = None,
    num_class_tokens: int = 0,
) -> Tensor:
    """Run all blocks and return what is read of them: the class tokens [S, R, D], or without any all tokens [S, N, D].

    Args:
        engine: "reference": block by block, as `mone.blocks` has it. "layout": as wide as each expert, in plain
            PyTorch. "triton": Triton kernels for inference in half precision, the layout for all else. "fp8": the same
            with products of 8 bits, which are less exact. "auto": what is measured to be the fastest without that: as
            "triton" on GPUs from Hopper on, the layout elsewhere; the reference where blocks must be called.
        blocks: Of `mone.blocks.Block`.
        tokens: Placed and sorted by whoever runs them.
        segments: Which rows go through which expert.
        neighbours: As in `Block`.
        num_class_tokens: R, at the end of a sequence.
    """
    if uses_kernels(engine, blocks, tokens.x_SKD):
        from mone.engine.fused import run_on_rows

        return run_on_rows(*(blocks, tokens, segments, neighbours, num_class_tokens), eight_bits=engine == "fp8")
    x_SND, gain_LSN1 = tokens.sorted(), tokens.gains(len(blocks))
    one_by_one = engine == "reference" or (engine == "auto" and _must_be_called(blocks))
    if one_by_one or not x_SND.numel():  # of nothing there is no layout
        for block, gain_SN1 in zip(blocks, gain_LSN1, strict=True):
            x_SND = block(x_SND, segments, gain_SN1, neighbours)
        return x_SND[:, -num_class_tokens:] if num_class_tokens else x_SND
    if x_SND.device.type == "cpu" and not torch.is_grad_enabled() and neighbours is None and x_SND.numel():
        few = max(1, _PROCESSOR_BYTES // (3 * x_SND[0].numel() * x_SND.element_size()))
        parts = zip(x_SND.split(few), gain_LSN1.split(few, dim=1), strict=True)
        return torch.cat([run_on_layout(blocks, x, segments, gain, None, num_class_tokens) for x, gain in parts])
    return run_on_layout(blocks, x_SND, segments, gain_LSN1, neighbours, num_class_tokens)


def _is_hopper(device: torch.device) -> bool:
    """Or newer: the kernels were made for it, and were measured nowhere else."""
    return device.type == "cuda" and triton_runs(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def _must_be_called(blocks: nn.ModuleList) -> bool:
    """FSDP gathers the weights of a block that is called; torch.compile and torch.export fuse for themselves."""
    return torch.compiler.is_compiling() or any(isinstance(block, FSDPModule) for block in blocks)
