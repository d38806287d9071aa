"""A second stream, for kernels that fill what those on the first leave idle. CUDA graphs record both."""

import functools

import torch


@functools.cache
def second_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The one of this process; None, which `torch.cuda.stream` ignores, off the GPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def fork(second: torch.cuda.Stream | None) -> None:
    """Let the second stream go on from where the current one is."""
    if second is not None:
        second.wait_stream(torch.cuda.current_stream(second.device))


def join(second: torch.cuda.Stream | None) -> None:
    """Let the current stream wait for the second one."""
    if second is not None:
        torch.cuda.current_stream(second.device).wait_stream(second)
