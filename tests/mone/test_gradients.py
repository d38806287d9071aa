import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mone.config import ModelConfig
from tests.mone.conftest import JOINT, small_config, small_model, some_inputs, some_patches

POOLINGS = pytest.mark.parametrize("pooling", ["cls", "mean"])
# 2 frames of 2 x 3 tokens, 3 experts of 2, 4 and 8 features.
TINY = {"dim": 8, "num_heads": 2, "num_experts": 3, "depth": 2, "temporal_depth": 1, "mlp_ratio": 1, "num_classes": 3}
TINY |= {"num_frames": 4, "height_px": 4, "width_px": 6, "tubelet_px": 2}
# Kept patches, and counts with which every expert has tokens.
ENCODERS = {
    "factorised": ({}, None, (2, 2, 2)),
    "clip budget": ({"budget": "clip"}, None, (4, 3, 5)),
    "joint": (JOINT, None, (2, 2, 2)),
    "joint, clip budget": ({**JOINT, "budget": "clip"}, None, (3, 4, 5)),
    "kept": ({}, 9, (3, 3, 3)),
    "joint, kept": (JOINT, 9, (3, 3, 3)),
}


def nested_slices(config: ModelConfig) -> dict[str, tuple[str, Tensor]]:
    """For each nested parameter and expert, a mask of what this expert uses and the next smaller one does not."""
    slices, dim = {}, config.dim
    for expert, width in enumerate(config.widths):
        own_D = (torch.arange(dim) < width) & (torch.arange(dim) >= (config.widths[expert - 1] if expert else 0))
        for index in range(config.depth):
            block = f"encoder.blocks.{index}"
            for name, mask in {
                f"{block}.attention.qkv.weight": own_D.expand(3 * dim, -1),
                f"{block}.mlp.up.weight": own_D.expand(config.mlp_ratio * dim, -1),
                f"{block}.attention.out.weight": own_D[:, None].expand(-1, dim),
                f"{block}.attention.out.bias": own_D,
                f"{block}.mlp.down.weight": own_D[:, None].expand(-1, config.mlp_ratio * dim),
                f"{block}.mlp.down.bias": own_D,
            }.items():
                slices[f"{name}, expert {expert}"] = (name, mask)
            if not expert:  # biases on the way in are whole
                slices[f"{block}.attention.qkv.bias"] = (f"{block}.attention.qkv.bias", torch.ones(3 * dim).bool())
                slices[f"{block}.mlp.up.bias"] = (f"{block}.mlp.up.bias", torch.ones(config.mlp_ratio * dim).bool())
    return slices


@POOLINGS
@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_of_every_slice_equal_finite_differences(name, pooling):
    changes, num_kept, counts = ENCODERS[name]
    config = small_config(**{**TINY, **changes}, pooling=pooling)
    model, inputs = small_model(config, alpha=0.6), some_inputs(config, num_kept, batch=2)
    parameters = dict(model.named_parameters())
    factors = torch.randn(2, 3, dtype=torch.float64)

    def loss(changed: dict[str, Tensor]) -> Tensor:
        return (functional_call(model, changed, (), {**inputs, "counts": counts}).logits_BC * factors).sum()

    gradients = dict(zip(parameters, torch.autograd.grad(loss(parameters), list(parameters.values())), strict=True))
    slices = nested_slices(config)
    nested = {key for key, _ in slices.values()}
    slices |= {key: (key, torch.ones_like(p, dtype=torch.bool)) for key, p in parameters.items() if key not in nested}
    with torch.no_grad():
        for label, (key, mask) in slices.items():
            step = torch.randn_like(parameters[key]) * mask
            difference = loss({key: parameters[key] + 1e-5 * step}) - loss({key: parameters[key] - 1e-5 * step})
            slope = float((gradients[key] * step).sum())
            assert float(difference) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-8), label
            assert gradients[key][mask].any() or not mask.numel(), label


@POOLINGS
@pytest.mark.parametrize("name", ENCODERS)
def test_router_and_alpha_have_exact_gradients(name, pooling):
    changes, num_kept, counts = ENCODERS[name]
    config = small_config(**{**TINY, **changes}, pooling=pooling)
    model, inputs = small_model(config, alpha=0.6), some_inputs(config, num_kept, batch=1)
    for key in ("encoder.router.weight", "encoder.router.bias", "encoder.alpha_L"):
        parameter = dict(model.named_parameters())[key]

        def logits(value: Tensor, key=key) -> Tensor:
            return functional_call(model, {key: value}, (), {**inputs, "counts": counts}).logits_BC

        (gradient,) = torch.autograd.grad(logits(parameter).sum(), parameter)
        assert gradient.any()
        assert torch.autograd.gradcheck(logits, parameter)


@pytest.mark.parametrize(("pooling", "counts"), [("cls", (6, 0, 0)), ("mean", (0, 3, 3))])
@pytest.mark.parametrize("layer", ["attention.qkv", "attention.out", "mlp.up", "mlp.down"])
def test_every_weight_has_an_exact_gradient_where_experts_are_empty(pooling, counts, layer):
    model = small_model(small_config(**TINY, pooling=pooling), alpha=0.6)
    patches, key = some_patches(model.config, batch=1), f"encoder.blocks.0.{layer}.weight"

    def logits(value: Tensor) -> Tensor:
        return functional_call(model, {key: value}, (patches,), {"counts": counts}).logits_BC

    assert torch.autograd.gradcheck(logits, dict(model.named_parameters())[key])


def test_alpha_learns_from_zero_and_the_router_only_after_it():
    # With a class token the last block's alpha has no gradient: nothing reads the tokens that it scales.
    model = small_model(small_config(pooling="mean"))
    patches = some_patches(model.config)
    for alpha in (0.0, 0.3):
        model.zero_grad()
        with torch.no_grad():
            model.encoder.alpha_L.fill_(alpha)
        model(patches, 0.4).logits_BC.square().sum().backward()
        assert model.encoder.alpha_L.grad.all()
        assert bool(model.encoder.router.weight.grad.any()) == (alpha > 0)


@pytest.mark.parametrize(("stored", "used"), [(-0.5, 0.0), (0.0, 0.0), (0.25, 0.25), (1.0, 1 - 1e-6), (7.0, 1 - 1e-6)])
def test_alpha_stays_below_one_and_keeps_its_gradient_at_the_edges(stored, used):
    model = small_model(small_config(), dtype=torch.float32)
    with torch.no_grad():
        model.encoder.alpha_L.fill_(stored)
    alphas = model.encoder.bounded_alphas()
    assert alphas.tolist() == pytest.approx([used, used], abs=5e-7)
    assert 0 <= alphas.min() <= alphas.max() < 1
    alphas.sum().backward()
    assert model.encoder.alpha_L.grad.tolist() == [1, 1]
