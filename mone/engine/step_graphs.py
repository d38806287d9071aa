"""Gradients replayed from CUDA graphs: the host's work is done once for each kind of step.

A step of a small model, or of one whose experts are narrow, is over sooner on a GPU than its thousands of launches are
made. Steps of training are of few kinds: the sizes of the batch, and the tokens of each expert.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Counts = tuple[int, ...]
Compute = Callable[..., Tensor]
Run = Callable[[], Tensor]

# Graphs share their memory, but each keeps its launches: 13 kinds in usual training, twice with the last batch.
_MAX_GRAPHS = 32


class ReplayedGradients:
    """A function that adds to the gradients of parameters, repeated from a recording once its inputs look familiar.

    Recorded are (counts, shapes of the inputs) at their second use. Random draws of a repetition continue from the
    state of the generator, so that seeds act as they do without. What the function returns is overwritten by the next
    repetition.

    Gradients of recordings are added up in tensors that stay where they are; parameters that a recording does not
    reach keep a gradient of None.
    """

    def __init__(
        self,
        compute: Compute,
        parameters: Sequence[nn.Parameter],
        record: Callable[[Run], Run],
        max_graphs: int = _MAX_GRAPHS,
    ) -> None:
        """Wrap a function.

        Args:
            compute: Called with counts and tensors on one device; adds to gradients, as `backward` does, returns a
                tensor, and keeps nothing else. It must not wait for the device.
            parameters: All that it may add gradients to.
            record: Takes a function and returns one that does the same work again on the same memory; `GraphRecorder`.
            max_graphs: Recordings to keep; what comes after them is computed as it is.
        """
        self._compute, self._parameters, self._record = compute, list(parameters), record
        self._max_graphs = max_graphs
        self._seen: Counter[tuple] = Counter()
        self._recorded: dict[tuple, tuple[Run, list[nn.Parameter]]] = {}
        self._inputs: dict[tuple, list[Tensor]] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}

    def __call__(self, counts: Counts, *inputs: Tensor) -> Tensor:
        """As the function."""
        sizes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        key = (counts, sizes)
        self._seen[key] += 1
        if key not in self._recorded:
            if self._seen[key] < 2 or len(self._recorded) >= self._max_graphs:
                return self._compute(counts, *inputs)
            fixed = self._inputs.setdefault(sizes, [tensor.clone() for tensor in inputs])
            self._recorded[key] = self._recording(counts, fixed)
        run, reached = self._recorded[key]
        for tensor, fixed in zip(inputs, self._inputs[sizes], strict=True):
            fixed.copy_(tensor)
        self._collect(reached)
        return run()

    def _recording(self, counts: Counts, inputs: list[Tensor]) -> tuple[Run, list[nn.Parameter]]:
        """Rehearse, which makes all that is made once and shows which parameters are reached; then record."""

        def run() -> Tensor:
            return self._compute(counts, *inputs)

        with self._gradients_kept():
            self._clear()
            with _draws_kept(inputs[0].device):
                run()
            reached = [parameter for parameter in self._parameters if parameter.grad is not None]
            self._clear()  # before the sums are made: there may be no room for both
            for parameter in reached:
                if parameter not in self._sums:
                    self._sums[parameter] = torch.zeros_like(parameter)
                parameter.grad = self._sums[parameter]
            return self._record(run), reached

    def _collect(self, reached: list[nn.Parameter]) -> None:
        """Put gradients so far, or zeros, where recordings add theirs."""
        fresh = []
        for parameter in reached:
            total = self._sums[parameter]
            if parameter.grad is None:
                fresh.append(total)
            elif parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total
        if fresh:
            torch._foreach_zero_(fresh)  # pyright: ignore[reportPrivateImportUsage]

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        kept = [parameter.grad for parameter in self._parameters]
        try:
            yield
        finally:
            for parameter, gradient in zip(self._parameters, kept, strict=True):
                parameter.grad = gradient


class GraphRecorder:
    """Records work as CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        """Record on a CUDA device."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """The work of a function, as a graph."""
        graph = torch.cuda.CUDAGraph()
        # Autograd must not still hold what was made on another stream, nor may other threads, which load clips and
        # watch over collectives, disturb the recording.
        gc.collect()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def _draws_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda")
