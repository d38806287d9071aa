"""The Triton kernels together equal the reference, on the GPU or in the interpreter."""

import copy

import pytest
import torch

from tests.mone.conftest import small_model, some_inputs, variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot multiply bfloat16.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
NAMES = ["factorised", "factorised, mean", "joint", "clip budget", "kept", "kept, mean", "token drop", "submodel"]


def errors(config, num_kept, **asked):
    """Relative errors of the logits against float64, through the kernels and through the reference."""
    model = small_model(config, alpha=0.5, dtype=torch.float32).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in some_inputs(config, num_kept).items()}
    model.encoder.engine = "reference"
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs, **asked).logits_BC
        found = {}
        for engine in ("triton", "reference"):
            model.encoder.engine = engine
            with torch.autocast(DEVICE, HALF):
                logits = model(**inputs, **asked).logits_BC
            found[engine] = ((logits - exact).norm() / exact.norm()).item()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_is_no_less_exact_than_the_reference(name):
    config, num_kept = variant(name, dim=128, num_heads=4, depth=2)
    found = errors(config, num_kept, capacity=0.4)
    assert 0 < found["triton"] < 1.5 * found["reference"] + 2e-3, found
