import pytest
import torch

from tests.mone.conftest import JOINT, VARIANTS, small_model, some_inputs, variant
from tests.mone.reference import reference

EXACT = {"atol": 1e-10, "rtol": 1e-10}
POOLINGS = pytest.mark.parametrize("pooling", ["cls", "mean"])
ALPHAS = pytest.mark.parametrize("alpha", [0.0, 0.7])
# Of 2 frames of 12 tokens; 15 are kept. Counts of one budget: some experts get nobody.
BUDGETS = {
    "frame": ({"budget": "frame"}, [(5, 3, 2, 2), (12, 0, 0, 0), (0, 6, 0, 6), (0, 12, 0, 0)]),
    "clip": ({"budget": "clip"}, [(8, 7, 5, 4), (24, 0, 0, 0), (0, 13, 0, 11), (1, 0, 23, 0)]),
    "kept": ({"kept": 15}, [(5, 4, 3, 3), (15, 0, 0, 0), (0, 8, 0, 7)]),
    "kept, clip": ({"kept": 13, "budget": "clip"}, [(5, 3, 3, 2), (0, 0, 13, 0)]),
    "token drop": ({"allocation": "token_drop"}, [(0, 0, 0, 5), (0, 0, 0, 1)]),
}


def expected_logits(model, inputs, counts=None):
    kept = inputs["kept_BK"].tolist() if "kept_BK" in inputs else [None] * len(inputs["patches"])
    clips = zip(inputs["patches"], kept, strict=True)
    return torch.stack([reference(model, clip, counts, places) for clip, places in clips])


@POOLINGS
@ALPHAS
@pytest.mark.parametrize("encoder", [{}, JOINT, {"temporal_depth": 0}], ids=["factorised", "joint", "average"])
@pytest.mark.parametrize(("budget", "counts"), [(b, c) for b, (_, split) in BUDGETS.items() for c in split])
@torch.no_grad()
def test_routed_model_equals_masks_in_original_order(encoder, budget, counts, pooling, alpha):
    config, num_kept = variant("factorised", pooling=pooling, **encoder, **BUDGETS[budget][0])
    model, inputs = small_model(config, alpha=alpha, seed=1), some_inputs(config, num_kept)
    logits = model(**inputs, counts=counts).logits_BC
    torch.testing.assert_close(logits, expected_logits(model, inputs, counts), **EXACT)


@POOLINGS
@ALPHAS
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("encoder", [{}, JOINT], ids=["factorised: model 2", "joint: model 1"])
@torch.no_grad()
def test_full_capacity_is_a_plain_vivit(encoder, activation, pooling, alpha):
    config, _ = variant("factorised", pooling=pooling, activation=activation, **encoder)
    model, inputs = small_model(config, alpha=alpha), some_inputs(config, None)
    expected = expected_logits(model, inputs)
    torch.testing.assert_close(model(**inputs).logits_BC, expected, **EXACT)
    torch.testing.assert_close(model(**inputs, capacity=1.0).logits_BC, expected, **EXACT)


@pytest.mark.parametrize("name", ["factorised", "clip budget, mean", "joint", "kept, mean"])
@torch.no_grad()
def test_activation_and_epsilon_are_those_of_the_config(name):
    answers = []
    for changes in ({}, {"activation": "gelu_tanh"}, {"norm_eps": 1e-2}):
        config, num_kept = variant(name, **changes)
        model, inputs = small_model(config, alpha=0.5), some_inputs(config, num_kept)
        logits, plan = model(**inputs, capacity=0.4)
        torch.testing.assert_close(logits, expected_logits(model, inputs, plan.counts), **EXACT)
        answers.append(logits)
    assert all((answers[0] != other).all() for other in answers[1:])


@pytest.mark.parametrize(
    "name", ["factorised", "factorised, mean", "joint", "joint, mean", "clip budget", "motion", "uniform", "submodel"]
)
@torch.no_grad()
def test_all_patches_kept_is_a_clip_budget(name):
    config, _ = variant(name)
    inputs = some_inputs(config, None)
    everything_BK = torch.arange(24).expand(2, -1)
    clip = small_model(variant(name, budget="clip")[0], alpha=0.5)(**inputs, capacity=0.4)
    kept = small_model(config, alpha=0.5)(inputs["patches"].flatten(1, 2), 0.4, kept_BK=everything_BK)
    torch.testing.assert_close(kept.logits_BC, clip.logits_BC, **EXACT)
    assert torch.equal(kept.plan.expert_BN, clip.plan.expert_BN)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_plan_has_a_row_for_each_budget(name):
    config, num_kept = variant(name)
    plan = small_model(config)(**some_inputs(config, num_kept), capacity=0.4).plan
    budgets = (2, 2) if config.budget_per_frame(num_kept) else (2,)
    tokens = config.tokens_per_budget(num_kept)
    assert plan.counts == config.token_counts(0.4, num_kept)
    assert plan.expert_BN.shape == plan.weight_BN.shape == (*budgets, tokens)
    if config.allocation == "tome":  # all tokens are somewhere in the full expert
        assert plan.expert_BN.eq(3).all()
        return
    assert plan.order_BN.shape == (*budgets, sum(plan.counts))
    for order, expert in zip(plan.order_BN.flatten(0, -2), plan.expert_BN.flatten(0, -2), strict=True):
        assert expert[order].tolist() == [e for e, count in enumerate(plan.counts) for _ in range(count)]
        left_out = sorted(set(range(tokens)) - set(order.tolist()))
        assert len(left_out) == tokens - sum(plan.counts)
        assert expert[left_out].eq(-1).all()
