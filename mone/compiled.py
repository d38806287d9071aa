"""torch.compile and torch.export for a model whose token counts change from call to call.

Counts decide every shape, so a graph is static: one for each set of counts, and for each batch size, number of kept
patches, mode (training or not) and dtype. Left to itself torch.compile would make the counts symbolic at their second
value, and give up at the eighth.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mone.model import Prediction, ViViT

# Graphs that all compiled models of a process may have together: 32 levels of kept patches at 8 capacities.
GRAPH_LIMIT = 256


def compiled(model: ViViT, **options: Any) -> Callable[..., Prediction]:
    """The model's forward pass without graph breaks: the same arguments, weights and mode.

    A capacity becomes counts before the graph, so capacities of the same counts share one. More than GRAPH_LIMIT graphs
    raise torch's FailOnRecompileLimitHit.

    >>> run = compiled(model)
    >>> logits, plan = run(patches, capacity=0.4)

    Args:
        model: Read at each call, so `model.train()` and optimiser steps work as ever.
        **options: Of `torch.compile`, such as `mode="max-autotune"` or `backend`.
    """
    run = torch.compile(model, fullgraph=True, dynamic=False, **options)
    limits = {"recompile_limit": GRAPH_LIMIT, "accumulated_recompile_limit": GRAPH_LIMIT}

    def forward(
        patches: Tensor,
        capacity: float = 1.0,
        *,
        counts: tuple[int, ...] | None = None,
        kept_BK: Tensor | None = None,
    ) -> Prediction:
        if counts is None:
            counts = model.config.token_counts(capacity, None if kept_BK is None else kept_BK.shape[1])
        with torch._dynamo.config.patch(limits):
            return run(patches, counts=counts, kept_BK=kept_BK)

    return forward


class AtCapacity(nn.Module):
    """The model at one capacity, tensors in and tensors out: what torch.export can write to a file.

    >>> dynamic = {"patches": {0: Dim("batch")}, "kept_BK": None}
    >>> program = torch.export.export(AtCapacity(model, 0.4), (patches,), dynamic_shapes=dynamic)
    >>> torch.export.save(program, "model.pt2")
    """

    def __init__(self, model: ViViT, capacity: float, num_kept: int | None = None) -> None:
        super().__init__()
        self.model, self.counts = model, model.config.token_counts(capacity, num_kept)

    def forward(self, patches: Tensor, kept_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and the expert of each token, shaped as in `Prediction`."""
        logits_BC, plan = self.model(patches, counts=self.counts, kept_BK=kept_BK)
        return logits_BC, plan.expert_BN
