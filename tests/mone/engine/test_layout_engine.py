"""The engine in plain PyTorch equals the reference: every way to encode, every split of the tokens, gradients."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.engine.choice import run_blocks
from mone.engine.tokens import Tokens
from mone.nested import segments_of
from tests.mone.conftest import VARIANTS, small_config, small_model, some_inputs, variant

EXACT = {"atol": 1e-9, "rtol": 1e-9}
NAMES = [name for name in VARIANTS if "tome" not in name]  # which merges tokens in blocks of its own


def step(model, inputs, engine, **asked):
    """Logits and all gradients."""
    model = copy.deepcopy(model)
    model.encoder.engine = engine
    torch.manual_seed(1)  # stochastic depth
    logits = model(**inputs, **asked).logits_BC
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal_steps(model, inputs, tolerance, **asked):
    fast, fast_grads = step(model, inputs, "layout", **asked)
    slow, slow_grads = step(model, inputs, "reference", **asked)
    torch.testing.assert_close(fast, slow, **tolerance)
    for name, slow_grad in slow_grads.items():
        if slow_grad is None:
            assert fast_grads[name] is None or not fast_grads[name].any(), name
        else:
            torch.testing.assert_close(fast_grads[name], slow_grad, msg=lambda text: f"{name}: {text}", **tolerance)  # noqa: B023


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reference_with_gradients(name):
    config, num_kept = variant(name)
    assert_equal_steps(small_model(config, alpha=0.5), some_inputs(config, num_kept), EXACT, capacity=0.4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_equals_the_reference_in_training(name, drop_path):
    config, num_kept = variant(name, drop_path=drop_path)
    model = small_model(config, alpha=0.5).train()
    assert_equal_steps(model, some_inputs(config, num_kept, batch=5), EXACT, capacity=0.4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_the_reference_in_inference(name):
    config, num_kept = variant(name, activation="gelu_tanh")
    model, inputs = small_model(config, alpha=0.5), some_inputs(config, num_kept)
    fast = model(**inputs, capacity=0.4).logits_BC
    model.encoder.engine = "reference"
    torch.testing.assert_close(fast, model(**inputs, capacity=0.4).logits_BC, **EXACT)


@given(data=st.data(), num_experts=st.integers(1, 4), pooling=st.sampled_from(["cls", "mean"]))
def test_every_split_of_tokens_over_any_number_of_experts(data, num_experts, pooling):
    config = small_config(num_experts=num_experts, pooling=pooling, depth=2, temporal_depth=0)
    cuts = sorted(data.draw(st.lists(st.integers(0, 12), min_size=num_experts - 1, max_size=num_experts - 1)))
    counts = tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, 12], strict=True))
    assert_equal_steps(small_model(config, alpha=0.5), some_inputs(config, None), EXACT, counts=counts)


@pytest.mark.parametrize(("dim", "num_heads", "num_experts"), [(24, 3, 4), (8, 1, 4), (6, 2, 2), (5, 1, 1)])
def test_odd_widths(dim, num_heads, num_experts):
    config = small_config(dim=dim, num_heads=num_heads, num_experts=num_experts, num_frames=6, height_px=20)
    capacity = max(0.7, 2 / 2**num_experts)
    assert_equal_steps(small_model(config, alpha=0.5), some_inputs(config, None, batch=3), EXACT, capacity=capacity)


def test_single_precision_far_from_zero():
    """A large common offset is where a variance from sums of squares would be lost."""
    config = small_config()
    model = small_model(config, alpha=0.5, dtype=torch.float32).encoder
    x_SND = torch.randn(4, 12, 32) + 100
    segments = segments_of((5, 3, 2, 2), config.widths)
    exact = run_blocks("reference", copy.deepcopy(model).double().blocks, Tokens(x_SND.double()), segments)
    slow, fast = (run_blocks(name, model.blocks, Tokens(x_SND), segments) for name in ("reference", "layout"))
    assert (fast - exact).abs().max() < 2 * (slow - exact).abs().max() + 1e-5


@pytest.mark.parametrize("name", ["factorised", "kept, mean"])
def test_a_batch_gives_the_same_bits_again(name):
    config, num_kept = variant(name)
    model, inputs = small_model(config, alpha=0.5, dtype=torch.float32), some_inputs(config, num_kept)
    first, second = (step(model, inputs, "layout", capacity=0.4) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], grad) for name, grad in second[1].items() if grad is not None)


@torch.no_grad()
def test_bfloat16_is_no_less_exact_than_the_reference():
    config = small_config(num_frames=16, depth=4)
    model, inputs = small_model(config, alpha=0.5, dtype=torch.float32), some_inputs(config, None, batch=8)
    exact = copy.deepcopy(model).double()
    counts = (5, 3, 2, 2)
    expected, errors = exact(**inputs, counts=counts), {}
    for engine in ("layout", "reference"):
        model.encoder.engine = engine
        with torch.autocast("cpu", torch.bfloat16):
            answer = model(**inputs, counts=counts)
        errors[engine] = (answer.logits_BC - expected.logits_BC).square().mean().sqrt()
    assert 0 < errors["layout"] < 1.2 * errors["reference"]


def test_dropout_draws_and_keeps_the_mean():
    config = small_config(dropout=0.3)
    model, inputs = small_model(config, alpha=0.5, dtype=torch.float32).train(), some_inputs(config, None, batch=4)
    first, second = (model(**inputs, capacity=0.4).logits_BC for _ in range(2))
    assert not torch.equal(first, second)
