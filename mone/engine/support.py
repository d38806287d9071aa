"""Whether this machine has what the kernels need."""

from importlib.util import find_spec

import torch

_TRITON = find_spec("triton") is not None


def triton_runs(device: torch.device) -> bool:
    """Whether Triton is there and the device is a CUDA GPU of Ampere or newer; not while torch compiles."""
    if torch.compiler.is_compiling() or not _TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
