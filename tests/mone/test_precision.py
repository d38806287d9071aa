"""Errors against float64, on models of 4 nested blocks of 64 features.

An error is the root mean square of the difference of the logits over that of the float64 logits. A token that goes to
another expert is no rounding error but a decision that fell the other way, where two preferences nearly tie: the bounds
on logits hold for equal plans, and the share of tokens that change experts has a bound of its own.

| precision | bound on logits | seen | bound on the share | seen |
|---|---|---|---|---|
| float32 | 3e-6 | 9e-7 | 0 | 0 |
| bfloat16 autocast, float32 weights | 3e-2 | 1.5e-2 | 0.02 | 0.005 |
| bfloat16 weights | 3e-2 | 1.3e-2 | 0.06 | 0.033 |

bfloat16 rounds to 2^-9 = 2e-3, twice a block and in the weights.
"""

import pytest
import torch

import mone.engine.choice
from mone.routing import RoutingPlan
from tests.mone.conftest import small_model, some_inputs, variant

BOUNDS = {"float32": (3e-6, 0.0), "autocast": (3e-2, 0.02), "bfloat16": (3e-2, 0.06)}
PRECISIONS = pytest.mark.parametrize("precision", BOUNDS)
NAMES = pytest.mark.parametrize(
    "name", ["factorised, mean", "clip budget", "joint", "joint, mean", "kept", "kept, mean", "motion", "tome"]
)


def run(name, precision, seed):
    """The prediction of a model of the same weights, whatever the precision."""
    config, num_kept = variant(name, dim=64, depth=4)
    model = small_model(config, alpha=0.5, seed=seed, dtype=torch.float32)
    model = model.to({"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        return model(**some_inputs(config, num_kept, batch=8, seed=seed), capacity=0.4)


def relative_error(actual, expected):
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def same_decisions(plan):
    """Routing that takes the decisions of a plan, and weights from its own probabilities."""
    order, expert = plan.order_BN.reshape(-1, plan.order_BN.shape[-1]), plan.expert_BN.flatten(0, -2)

    def route(probabilities_BNE, counts, **_):
        return RoutingPlan(order, expert, probabilities_BNE.gather(-1, expert.unsqueeze(-1)).squeeze(-1), counts)

    return route


@NAMES
@PRECISIONS
def test_logits_are_within_the_bound_where_tokens_go_the_same_way(name, precision, monkeypatch):
    for seed in range(3):
        with monkeypatch.context() as patched:
            exact = run(name, "float64", seed)
            patched.setattr(mone.engine.choice, "expert_preferred_routing", same_decisions(exact.plan))
            rounded = run(name, precision, seed)
        assert torch.equal(rounded.plan.expert_BN, exact.plan.expert_BN)
        assert rounded.logits_BC.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
        assert relative_error(rounded.logits_BC, exact.logits_BC) < BOUNDS[precision][0]


@NAMES
@PRECISIONS
def test_few_tokens_change_experts(name, precision):
    changed = [
        run(name, precision, seed).plan.expert_BN.ne(run(name, "float64", seed).plan.expert_BN) for seed in range(3)
    ]
    assert float(torch.stack(changed).double().mean()) <= BOUNDS[precision][1]


@PRECISIONS
def test_a_random_router_decides_alike_in_any_precision(precision):
    assert torch.equal(run("random", precision, 0).plan.expert_BN, run("random", "float64", 0).plan.expert_BN)


@NAMES
def test_gradients_of_float32_are_within_the_bound(name):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        config, num_kept = variant(name)
        model = small_model(config, alpha=0.5, dtype=torch.float32).to(dtype)
        model(**some_inputs(config, num_kept), capacity=0.4).logits_BC.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    scale = max(float(gradient.abs().max()) for gradient in gradients[1] if gradient.numel())
    for single, double in zip(*gradients, strict=True):
        torch.testing.assert_close(single.double(), double, atol=1e-5 * scale, rtol=0)
