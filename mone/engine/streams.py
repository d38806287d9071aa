"""A second stream, for kernels that fill what those on the first leave idle. CUDA graphs record both."""

import functools

import torch


@functools.cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fork(device: torch.device) -> torch.cuda.Stream | None:
    """The second stream, which begins where the current one is; off the GPU None, which `torch.cuda.stream` ignores."""
    if device.type != "cuda":
        return None
    second = _second(device)
    second.wait_stream(torch.cuda.current_stream(device))
    return second


def join(second: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for the second one."""
    if second is not None:
        torch.cuda.current_stream(second.device).wait_stream(second)
