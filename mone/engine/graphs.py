"""Inference replayed from CUDA graphs: the host's work is done once for each shape of the input.

Shapes: B clips, F temporal indices, N tokens per index, P values per patch, K patches that were kept.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from mone.model import Prediction, ViViT

_WARM_UP_RUNS = 2
_Result = TypeVar("_Result")


class _Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes; of patches a copy only if its router looks at them."""

    graph: torch.cuda.CUDAGraph
    x_BKD: Tensor
    patches: Tensor | None
    kept_BK: Tensor | None
    prediction: Prediction


class Replayed:
    """A model's forward pass in inference, with the same arguments and answers.

    Graphs begin with tokens: patches are embedded from where they are into the graph's memory, and need not be copied.
    A graph is captured for each shape, set of counts and autocast dtype at its second use, so that shapes seen once
    cost nothing. Weights that change in place are noticed, and their graphs captured again.

    >>> run = Replayed(model)
    >>> logits, plan = run(patches, capacity=0.4)
    """

    def __init__(self, model: ViViT, max_graphs: int = 16) -> None:
        """Wrap a model on a CUDA device, in evaluation mode; each graph keeps memory of its own."""
        self.model, self.max_graphs = model, max_graphs
        self._graphs: dict[tuple, _Captured] = {}
        self._seen: set[tuple] = set()
        self._version = -1

    @torch.inference_mode()
    def __call__(
        self,
        patches: Tensor,
        capacity: float = 1.0,
        *,
        counts: tuple[int, ...] | None = None,
        kept_BK: Tensor | None = None,
    ) -> Prediction:
        """As `ViViT.forward`."""
        if counts is None:
            counts = self.model.config.token_counts(capacity, None if kept_BK is None else kept_BK.shape[1])
        version = sum(parameter._version for parameter in self.model.parameters())
        if version != self._version:
            self._graphs.clear()
            self._version = version
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (patches.shape, counts, None if kept_BK is None else kept_BK.shape, autocast)
        if key not in self._graphs:
            if key not in self._seen or len(self._graphs) >= self.max_graphs:
                self._seen.add(key)
                return self.model(patches, counts=counts, kept_BK=kept_BK)
            self._graphs[key] = self._capture(patches, counts, kept_BK)
        captured = self._graphs[key]
        self.model.embedded(patches, kept_BK, captured.x_BKD)
        if captured.patches is not None:
            captured.patches.copy_(patches)
        if captured.kept_BK is not None and kept_BK is not None:
            captured.kept_BK.copy_(kept_BK)
        captured.graph.replay()
        logits_BC, plan = captured.prediction
        order, expert, weight = (tensor.clone() for tensor in plan[:3])
        return Prediction(logits_BC.clone(), plan._replace(order_BN=order, expert_BN=expert, weight_BN=weight))

    def _capture(self, patches: Tensor, counts: tuple[int, ...], kept_BK: Tensor | None) -> _Captured:
        x_BKD = self.model.embedded(patches, kept_BK)
        kept_BK = None if kept_BK is None else kept_BK.clone()
        own = patches.clone() if self.model.encoder.router.sees_patches else None
        seen = patches if own is None else own
        graph, prediction = captured(lambda: self.model.classified(x_BKD, seen, counts, kept_BK))
        return _Captured(graph, x_BKD, own, kept_BK, prediction)


def captured(run: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A graph of what a function launches, and its result, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
