"""What this machine has, and in which dtype it multiplies."""

from importlib.util import find_spec

import torch
from torch import Tensor

_TRITON = find_spec("triton") is not None
# The first and the last Triton.
_GLUON = ((3, 6), (3, 8))


def triton_runs(device: torch.device) -> bool:
    """Whether Triton is there and the device is a CUDA GPU of Ampere or newer; not while torch compiles."""
    if torch.compiler.is_compiling() or not _TRITON or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def eight_bits_run(device: torch.device) -> bool:
    """Whether the kernels run with products of 8-bit floats: from compute capability 8.9 (L4, H100) on."""
    return triton_runs(device) and torch.cuda.get_device_capability(device) >= (8, 9)


def gluon_runs(device: torch.device) -> bool:
    """Whether kernels in Gluon, which are for Hopper, run on a device, with the Triton that is there."""
    if not triton_runs(device) or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    import triton

    return knows_gluon_of(triton.__version__)


def knows_gluon_of(version: str) -> bool:
    """Whether the kernels were tried with the Gluon of this Triton, as it may change with each release."""
    return _GLUON[0] <= tuple(int(part) for part in version.split(".")[:2]) <= _GLUON[1]


def check_engine(engine: str, device: torch.device) -> None:
    """Refuse what a device cannot do and nothing else may stand for.

    Raises:
        ValueError: "fp8" where 8 bits do not run.
    """
    if engine == "fp8" and not eight_bits_run(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ValueError(
            f"--engine fp8 needs Triton and a GPU of compute capability 8.9 (L4, H100), not {name}; use --engine auto"
        )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Of matrix products with this tensor."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
