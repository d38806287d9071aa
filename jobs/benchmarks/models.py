"""The arithmetics that benchmarks run models in."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from mone.engine.choice import Engine


class Arithmetic(NamedTuple):
    """How numbers are stored and multiplied.

    Attributes:
        weights: Type of the weights, and of everything between them where autocast is off.
        autocast: Type of the matrix products under autocast; None: off.
        engine: Code that runs the blocks.
    """

    weights: torch.dtype
    autocast: torch.dtype | None = None
    engine: Engine = "auto"

    def context(self, device: torch.device) -> AbstractContextManager:
        """In which a forward pass runs."""
        return torch.autocast(device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)


ARITHMETICS = {
    "float64": Arithmetic(torch.float64),
    "float32": Arithmetic(torch.float32),
    "bf16": Arithmetic(torch.bfloat16),
    "bf16_autocast": Arithmetic(torch.float32, torch.bfloat16),
    "fp16_autocast": Arithmetic(torch.float32, torch.float16),
    "fp8": Arithmetic(torch.float32, torch.bfloat16, "fp8"),
}
