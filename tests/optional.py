"""What tests need that not every machine has. Importing this may import torch."""

import pytest

from pipelines import torchcodec_decoder


def _missing_torchcodec() -> str:
    """Why torchcodec cannot be had; "" where it can."""
    if not torchcodec_decoder.is_found():
        return "not installed"
    loaded = torchcodec_decoder._loaded()
    return loaded if isinstance(loaded, str) else ""


# It brings no FFmpeg of its own.
needs_torchcodec = pytest.mark.skipif(
    bool(_missing_torchcodec()),
    reason=f"torchcodec is {_missing_torchcodec()} (pip install '.[torchcodec]', and FFmpeg's libraries)",
)
