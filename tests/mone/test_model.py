import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mone.capacity import token_counts
from mone.model import ViViT
from tests.mone.conftest import slow_routing, small_config, small_model, some_patches

POOLINGS = pytest.mark.parametrize("pooling", ["cls", "mean"])
EXACT = {"atol": 1e-10, "rtol": 1e-10}


# --- a second ViViT-FE, from the state dict and torch operations, tokens in their original order ---


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return normal * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def block(state: dict[str, Tensor], name: str, x: Tensor, heads: int, mask: Tensor | float, gain: Tensor | float):
    """One pre-norm block on one sequence [N, D]; mask is 0 on the features that a token's expert lacks."""
    q, k, v = linear(state, f"{name}.attention.qkv", mask * layer_norm(state, f"{name}.norm_attention", x)).chunk(3, -1)
    mixed = []
    for columns in torch.arange(x.shape[-1]).chunk(heads):
        scores = torch.exp(q[:, columns] @ k[:, columns].T / math.sqrt(len(columns)))
        mixed.append(scores / scores.sum(-1, keepdim=True) @ v[:, columns])
    z = x + mask * linear(state, f"{name}.attention.out", torch.cat(mixed, -1))
    hidden = linear(state, f"{name}.mlp.up", mask * layer_norm(state, f"{name}.norm_mlp", z))
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return z + gain * mask * linear(state, f"{name}.mlp.down", hidden)


def reference(model: ViViT, clip_FNP: Tensor, counts: tuple[int, ...] | None = None, alpha: bool = True) -> Tensor:
    """Logits [C] of one clip; without counts every token has all features and the weight of the last expert."""
    state, config = model.state_dict(), model.config
    frames = []
    for patches in clip_FNP:
        x = linear(state, "embed", patches.double() / 127.5 - 1) + state["encoder.position_ND"]
        mask, gains = 1.0, [1.0] * config.depth
        if counts is not None or alpha:
            scores = torch.exp(linear(state, "encoder.router", x))
            probabilities = scores / scores.sum(-1, keepdim=True)
            last = [config.num_experts - 1] * len(x)
            experts = last if counts is None else slow_routing(probabilities.tolist(), counts)
            weight = torch.stack([row[expert] for row, expert in zip(probabilities, experts, strict=True)])[:, None]
            widths = torch.tensor([config.dim >> (config.num_experts - 1 - expert) for expert in experts])
            mask = (torch.arange(config.dim) < widths[:, None]).double()
            if config.pooling == "cls":
                mask = torch.cat([torch.ones(1, config.dim, dtype=torch.float64), mask])
                weight = torch.cat([torch.zeros(1, 1, dtype=torch.float64), weight])
            gains = [factor * weight + 1 for factor in state["encoder.alpha_L"]]
        if config.pooling == "cls":
            x = torch.cat([state["encoder.class_token_KD"], x])
        for index, gain in enumerate(gains):
            x = block(state, f"encoder.blocks.{index}", x, config.num_heads, mask, gain)
        frames.append(layer_norm(state, "encoder.norm", x[0] if config.pooling == "cls" else x.mean(0)))
    x = torch.cat([state["temporal.class_token_KD"], torch.stack(frames) + state["temporal.position_FD"]])
    for index in range(config.temporal_depth):
        x = block(state, f"temporal.blocks.{index}", x, config.num_heads, 1.0, 1.0)
    return linear(state, "head", layer_norm(state, "temporal.norm", x)[0])


@POOLINGS
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@torch.no_grad()
def test_full_capacity_is_a_plain_vivit(pooling, alpha):
    model = small_model(small_config(pooling=pooling), alpha=alpha)
    patches = some_patches(model.config)
    expected = torch.stack([reference(model, clip, alpha=alpha > 0) for clip in patches])
    torch.testing.assert_close(model(patches).logits_BC, expected, **EXACT)
    torch.testing.assert_close(model(patches, 1.0).logits_BC, expected, **EXACT)


@POOLINGS
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("counts", [(5, 3, 2, 2), (12, 0, 0, 0), (0, 6, 0, 6), (0, 12, 0, 0)])
@torch.no_grad()
def test_routed_model_equals_masks_in_original_order(pooling, alpha, counts):
    model = small_model(small_config(pooling=pooling), alpha=alpha, seed=1)
    patches = some_patches(model.config)
    expected = torch.stack([reference(model, clip, counts) for clip in patches])
    torch.testing.assert_close(model(patches, counts=counts).logits_BC, expected, **EXACT)


@torch.no_grad()
def test_capacity_is_an_argument_of_the_call():
    model = small_model(small_config())
    patches = some_patches(model.config)
    for capacity in (0.4, 0.8, 0.4):
        logits, plan = model(patches, capacity)
        assert plan.counts == token_counts(capacity, 12, 4)
        expected = torch.stack([reference(model, clip, plan.counts) for clip in patches])
        torch.testing.assert_close(logits, expected, **EXACT)


@POOLINGS
@pytest.mark.parametrize("router", ["learned", "random"])
@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours(pooling, router):
    model = small_model(small_config(pooling=pooling, router=router), alpha=0.5)
    patches = some_patches(model.config, batch=5)
    together = model(patches, 0.4)
    for index in range(5):
        alone = model(patches[index : index + 1], 0.4)
        torch.testing.assert_close(alone.logits_BC[0], together.logits_BC[index], atol=1e-12, rtol=1e-12)
        assert torch.equal(alone.plan.expert_BN[0], together.plan.expert_BN[index])


@torch.no_grad()
def test_order_of_tokens_does_not_matter_beyond_their_positions():
    # The same tokens with the same position embeddings, in another order.
    model, permutation = small_model(small_config(), alpha=0.5), torch.randperm(12)
    patches = some_patches(model.config)
    before = model(patches, 0.4).logits_BC
    model.encoder.position_ND.copy_(model.encoder.position_ND[permutation])
    torch.testing.assert_close(model(patches[:, :, permutation], 0.4).logits_BC, before, **EXACT)


@pytest.mark.parametrize("router", ["learned", "random"])
def test_a_new_model_knows_nothing(router):
    model = ViViT(small_config(router=router)).eval()
    logits = model(some_patches(model.config), 0.4).logits_BC
    assert torch.equal(logits.softmax(-1), torch.full((2, 5), 0.2))
    assert not model.encoder.alpha_L.any()


@pytest.mark.parametrize("router", ["learned", "random"])
@pytest.mark.parametrize("capacity", [0.125, 0.4, 1.0])
def test_plan_has_a_row_for_each_frame_with_the_counts_of_the_capacity(router, capacity):
    config = small_config(router=router, num_frames=6)
    plan = ViViT(config).eval()(some_patches(config), capacity).plan
    assert plan.counts == token_counts(capacity, 12, 4)
    assert plan.weight_BN.shape == plan.order_BN.shape == plan.expert_BN.shape == (2, 3, 12)
    assert plan.order_BN.sort(-1).values.eq(torch.arange(12)).all()
    assert torch.nn.functional.one_hot(plan.expert_BN, 4).sum(-2).eq(torch.tensor(plan.counts)).all()
    assert plan.expert_BN.gather(-1, plan.order_BN).diff(dim=-1).min() >= 0
    assert ((plan.weight_BN > 0) & (plan.weight_BN < 1)).all()


def test_random_router_routes_frames_differently_and_anew_at_each_training_step():
    model = ViViT(small_config(router="random"))
    patches = some_patches(model.config)
    frames = model.eval()(patches, 0.4).plan.expert_BN.flatten(0, 1)
    assert len({tuple(frame.tolist()) for frame in frames}) == 4
    first, second = (model.train()(patches, 0.4).plan.expert_BN for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(2, 2, 12, 95), (2, 2, 11, 96), (2, 3, 12, 96), (2, 12, 96)])
def test_patches_of_another_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError) as caught:
        ViViT(small_config())(torch.zeros(shape, dtype=torch.uint8))
    assert str(list(shape)) in str(caught.value)
    assert "[B, 2, 12, 96]" in str(caught.value)


@pytest.mark.parametrize("counts", [(5, 3, 2, 1), (6, 6), (12, 0, 0, 0, 0)])
def test_counts_that_do_not_split_the_tokens_are_refused(counts):
    model = ViViT(small_config())
    with pytest.raises(ValueError) as caught:
        model(some_patches(model.config), counts=counts)
    assert str(caught.value) == f"counts {counts} do not split 12 tokens over 4 experts"


@pytest.mark.parametrize("capacity", [0.1, 1.5])
def test_capacity_out_of_range_is_refused_with_the_range(capacity):
    model = ViViT(small_config())
    with pytest.raises(ValueError, match=f"between 0.125 and 1 for 4 experts, got {capacity}"):
        model(some_patches(model.config), capacity)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_model_runs_in_another_dtype(dtype):
    model = ViViT(small_config()).to(dtype)
    assert model(some_patches(model.config), 0.4).logits_BC.isfinite().all()


def test_an_empty_batch_gives_no_logits():
    model = ViViT(small_config())
    assert model(some_patches(model.config, batch=0)).logits_BC.shape == (0, 5)


# --- gradients ---

TINY = {"dim": 8, "num_heads": 2, "num_experts": 3, "depth": 2, "temporal_depth": 1, "mlp_ratio": 1, "num_classes": 3}
TINY |= {"num_frames": 2, "height_px": 4, "width_px": 6, "tubelet_px": 2}


@POOLINGS
@pytest.mark.parametrize("counts", [(2, 2, 2), (6, 0, 0), (0, 3, 3)])
@pytest.mark.parametrize(
    "name",
    [
        "encoder.router.weight",
        "encoder.alpha_L",
        "encoder.position_ND",
        "encoder.blocks.0.attention.qkv.weight",
        "encoder.blocks.0.attention.out.weight",
        "encoder.blocks.0.mlp.up.weight",
        "encoder.blocks.0.mlp.down.weight",
        "encoder.blocks.0.mlp.down.bias",
    ],
)
def test_gradients_equal_finite_differences(pooling, counts, name):
    model = small_model(small_config(pooling=pooling, **TINY), alpha=0.6)
    patches, parameter = some_patches(model.config, batch=1), dict(model.named_parameters())[name]

    def logits(value: Tensor) -> Tensor:
        return functional_call(model, {name: value}, (patches,), {"counts": counts}).logits_BC

    (gradient,) = torch.autograd.grad(logits(parameter).sum(), parameter)
    assert gradient.any()
    assert torch.autograd.gradcheck(logits, parameter)


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
