"""The fastest that torch.compile makes of a model: what it has to be compared with."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mone.model import Prediction, ViViT

CompileMode = Literal["default", "max-autotune-no-cudagraphs", "max-autotune"]
ALL_MODES: tuple[CompileMode, ...] = get_args(CompileMode)
_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
_CALLS = 5


def fastest_compiled(
    model: ViViT, arguments: dict[str, Any], modes: Sequence[CompileMode] = ALL_MODES
) -> Callable[..., Prediction]:
    """Compile a model in each mode with each kernel for attention, and keep the fastest; minutes on a GPU.

    On a CPU there is one of each.

    Args:
        model: In evaluation mode.
        arguments: Of the call that is timed; the result is for its shapes.
        modes: Of torch.compile.

    Raises:
        RuntimeError: None of them runs; the last one's error is its cause.
    """
    if arguments["patches"].device.type != "cuda":
        return torch.compile(model, dynamic=False)
    found: dict[float, Callable[..., Prediction]] = {}
    failure: Exception | None = None
    for mode, backend in tqdm([(mode, backend) for mode in modes for backend in _BACKENDS], "compile"):
        # Which kernel runs is decided as the graph is made, so each needs a function of its own.
        run = torch.compile(lambda **inputs: model(**inputs), mode=mode, dynamic=False)
        try:
            with sdpa_kernel(backend):
                found[_seconds(run, arguments)] = _with_backend(run, backend)
        except Exception as error:
            failure = error
    if not found:
        raise RuntimeError("torch.compile fails in every mode") from failure
    return found[min(found)]


def _with_backend(run: Callable[..., Prediction], backend: SDPBackend) -> Callable[..., Prediction]:
    def forward(**inputs: Any) -> Prediction:
        with sdpa_kernel(backend):
            return run(**inputs)

    return forward


def _seconds(run: Callable[..., Prediction], arguments: dict[str, Any]) -> float:
    for _ in range(3):
        run(**arguments)
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(_CALLS):
        run(**arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - started_s
