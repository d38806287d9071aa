"""What a device can do."""

import pytest
import torch

from mone.engine.support import check_engine


def test_nothing_stands_for_eight_bits_on_a_processor():
    with pytest.raises(ValueError, match=r"--engine fp8 needs .* not cpu; use --engine auto"):
        check_engine("fp8", torch.device("cpu"))
    check_engine("triton", torch.device("cpu"))
