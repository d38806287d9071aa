"""The Triton kernels together equal the reference, on the GPU or in the interpreter."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone.engine import fused
from mone.engine.blocks import run_on_layout
from mone.engine.casts import cast
from mone.engine.fused import fits_kernels, run_on_rows
from mone.engine.tilings import Tiling, Tilings, default_tilings
from mone.engine.tokens import Gain, Tokens
from mone.nested import segments_of
from tests.mone.conftest import small_config, small_model, some_inputs, variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cannot multiply bfloat16.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
NAMES = ["factorised", "factorised, mean", "joint", "clip budget", "kept", "kept, mean", "token drop", "submodel"]


def errors(config, num_kept, engine="triton", **asked):
    """Relative errors of the logits against float64, through the kernels and through the reference.

    Weights and stream are in half precision; so are the kernels' under autocast.
    """
    model = small_model(config, alpha=0.5, dtype=torch.float32).to(DEVICE)
    inputs = {name: tensor.to(DEVICE) for name, tensor in some_inputs(config, num_kept).items()}
    model.encoder.engine = "reference"
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs, **asked).logits_BC
        found = {}
        halves = copy.deepcopy(model).to(HALF)
        for name, of, by in (
            ("half", halves, engine),
            ("autocast", model, engine),
            ("reference", halves, "reference"),
        ):
            of.encoder.engine = by
            with torch.autocast(DEVICE, HALF, enabled=of is model):
                logits = of(**inputs, **asked).logits_BC
            found[name] = ((logits - exact).norm() / exact.norm()).item()
    return found


@pytest.fixture(params=["few rows", "many rows"])
def _rows(request, monkeypatch):
    """Of few rows the last block is run whole."""
    if request.param == "many rows":
        monkeypatch.setattr(fused, "FEWEST_ROWS", 0)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("name", NAMES)
def test_is_no_less_exact_than_the_reference(name):
    config, num_kept = variant(name, dim=128, num_heads=4, depth=2)
    found = errors(config, num_kept, capacity=0.4)
    assert 0 < max(found["half"], found["autocast"]) < 1.5 * found["reference"] + 5e-4, found


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("name", ["factorised", "kept"])
def test_products_in_eight_bits_are_some_percent_off(name):
    config, num_kept = variant(name, dim=128, num_heads=4, depth=2)
    assert 1e-3 < errors(config, num_kept, engine="fp8", capacity=0.4)["half"] < 0.05


@settings(max_examples=12)
@given(
    data=st.data(),
    num_experts=st.integers(1, 4),
    pooling=st.sampled_from(["cls", "mean"]),
    few_rows=st.sampled_from([0, 512]),
)
def test_every_split_of_tokens_over_any_number_of_experts(data, num_experts, pooling, few_rows):
    config = small_config(num_experts=num_experts, pooling=pooling, dim=64, num_heads=4, depth=2, temporal_depth=0)
    cuts = sorted(data.draw(st.lists(st.integers(0, 12), min_size=num_experts - 1, max_size=num_experts - 1)))
    counts = tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, 12], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "FEWEST_ROWS", few_rows)
        found = errors(config, None, counts=counts)
    assert max(found["half"], found["autocast"]) < 1.5 * found["reference"] + 1e-3, found


def test_every_tiling_says_the_same():
    blocks, tokens, segments = sorted_tokens((5, 3, 2, 2))
    expected = run_on_layout(blocks, tokens.sorted(), segments, tokens.gains(len(blocks)))
    small = Tiling(32, 32, 32, 4, 1)
    narrow = ((16, small), (64, Tiling(64, 64, 64, 4, 1)))
    cards = [default_tilings(capability, 0.4, rows) for capability in ((9, 0), (8, 0), (8, 9)) for rows in (40, 40_000)]
    for tilings in (*cards, Tilings(*[small] * 4), Tilings(*[small] * 4, narrow=narrow)):
        first, second = (run_on_rows(blocks, tokens, segments, tilings=tilings) for _ in range(2))
        torch.testing.assert_close(first, expected, atol=2e-2, rtol=2e-2)
        assert torch.equal(first, second)
    assert not fits_kernels(blocks, tokens.x_SKD)  # float32


def sorted_tokens(counts):
    """Blocks, three sequences of tokens for them, float32, and their segments."""
    config = small_config(dim=128, num_heads=4)
    blocks = small_model(config, alpha=0.5, dtype=torch.float32).to(DEVICE).encoder.blocks.requires_grad_(False)
    x_SND, weight_SN, alpha_L = (torch.randn(3, 13, 128), torch.rand(3, 13), torch.rand(2))
    tokens = Tokens(x_SND.to(DEVICE), gain=Gain(weight_SN.to(DEVICE), alpha_L.to(DEVICE)))
    return blocks, tokens, segments_of(counts, config.widths, 1)


@pytest.mark.parametrize("keep", ["grad", "training"])
def test_gradients_and_training_are_left_to_the_layout(keep):
    blocks, tokens, _ = sorted_tokens((5, 3, 2, 2))
    blocks.train(keep == "training")
    with torch.set_grad_enabled(keep == "grad"), torch.autocast(DEVICE, HALF):
        assert not fits_kernels(blocks, tokens.x_SKD)


def test_casts_follow_the_weights():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    first = cast(weight, torch.bfloat16)
    assert cast(weight, torch.bfloat16) is first and cast(weight, torch.float32).dtype == torch.float32
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(cast(weight, torch.bfloat16), torch.full((3, 3), 2.0, dtype=torch.bfloat16))
    assert torch.equal(cast(weight, torch.float16), torch.full((3, 3), 2.0, dtype=torch.float16))
