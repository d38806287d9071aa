"""Who decays and at what rate, by name; the optimisers against their formulas; the schedule."""

import pytest
import torch

from mone.model import ViViT
from mone.optim import make_optimizer, parameter_groups, schedule
from mone.stages import Stage, TrainConfig
from tests.mone.conftest import VARIANTS, small_config, variant

STAGES = (Stage(name="s", epochs=1, routing="dense"),)


def options_by_name(model, weight_decay, layer_decay):
    """Decay and rate of each parameter; each is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay, layer_decay)
    found = [(names[id(p)], group["weight_decay"], group["lr_scale"]) for group in groups for p in group["params"]]
    assert sorted(name for name, *_ in found) == sorted(names.values())
    return {name: (decay, scale) for name, decay, scale in found}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_in_one_group_and_only_matrices_of_linear_layers_decay(name):
    model = ViViT(variant(name)[0])
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    options = options_by_name(model, 0.3, 1.0)
    decaying = {name for name, (decay, _) in options.items() if decay == 0.3}
    assert {name for name in decaying if "norm" in name or not name.endswith("weight")} == set()
    assert linear - decaying == set()
    assert {decay for decay, _ in options.values()} == {0.3, 0.0}
    assert {scale for _, scale in options.values()} == {1.0}


def test_layer_decay_falls_from_the_head_to_the_embeddings():
    """Depth 2 and 2: embeddings 0, blocks 1 2, temporal blocks 3 4, head 5."""
    options = options_by_name(ViViT(small_config()), 0.05, 0.5)
    layers = {
        "embed.": 0,
        "encoder.position_ND": 0,
        "encoder.class_token_KD": 0,
        "encoder.router": 0,
        "encoder.alpha_L": 0,
        "encoder.blocks.0.": 1,
        "encoder.blocks.1.": 2,
        "encoder.norm": 2,
        "temporal.position_FD": 0,
        "temporal.class_token_KD": 0,
        "temporal.blocks.0.": 3,
        "temporal.blocks.1.": 4,
        "temporal.norm": 5,
        "head.": 5,
    }
    for name, (_, scale) in options.items():
        (layer,) = (layer for prefix, layer in layers.items() if name.startswith(prefix))
        assert scale == pytest.approx(0.5 ** (5 - layer)), name


def test_layer_decay_without_a_temporal_encoder():
    options = options_by_name(ViViT(small_config(temporal_depth=0)), 0.05, 0.5)
    scale = {name: scale for name, (_, scale) in options.items()}
    assert (scale["head.weight"], scale["encoder.blocks.1.attention.qkv.weight"]) == (1, 0.5)
    assert scale["embed.weight"] == 0.125


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_is_that_of_the_formula(optimizer):
    """Two steps by hand, in float64: AdamW (Loshchilov and Hutter, 2019), SGD with momentum and L2 as torch has it."""
    torch.manual_seed(0)
    model = ViViT(small_config()).double()
    train = TrainConfig(stages=STAGES, optimizer=optimizer, betas=(0.8, 0.95), momentum=0.7, weight_decay=0.1)
    steps, weight, expected = make_optimizer(model, train), model.embed.weight, model.embed.weight.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for group in steps.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    for step in (1, 2):
        gradient = torch.randn_like(expected)
        weight.grad = gradient.clone()
        steps.step()
        if optimizer == "adamw":
            first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
            direction = first / (1 - 0.8**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
            expected = expected * (1 - 0.01 * 0.1) - 0.01 * direction
        else:
            first = 0.7 * first + gradient + 0.1 * expected
            expected = expected - 0.01 * first
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("warmup_share", [0.0, 0.05, 0.5])
def test_schedule_rises_to_one_and_falls_to_zero(warmup_share):
    shares = [step / 200 for step in range(201)]
    rates = [schedule(share, warmup_share) for share in shares]
    peak = round(200 * warmup_share)
    assert rates[peak] == max(rates) == 1
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[: peak + 1] == sorted(set(rates[: peak + 1]))
    assert rates[peak:] == sorted(set(rates[peak:]), reverse=True)
    assert 0 < rates[0] < 0.03 or not warmup_share
    assert schedule((1 + warmup_share) / 2, warmup_share) == pytest.approx(0.5)
