"""Whether this machine has what the kernels need."""

from importlib.util import find_spec

import torch

_TRITON = find_spec("triton") is not None


def triton_runs(device: torch.device, capability: tuple[int, int] = (8, 0)) -> bool:
    """Whether Triton is there and the device is a CUDA GPU of at least this capability; not while torch compiles."""
    if torch.compiler.is_compiling() or not _TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= capability
