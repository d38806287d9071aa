import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.capacity import (
    ENTROPY_WEIGHT,
    PREFERENCE_BASE,
    effective_capacity,
    expert_shares,
    fixed_capacity,
    relative_widths,
    token_counts,
)

# Section 1 of the design notes, smallest expert to full.
TABLE = {
    0.2: (0.605, 0.305, 0.083, 0.006),
    0.3: (0.420, 0.315, 0.191, 0.073),
    0.4: (0.314, 0.278, 0.235, 0.174),
    0.5: (0.233, 0.231, 0.246, 0.290),
    0.6: (0.166, 0.182, 0.237, 0.415),
    0.8: (0.062, 0.084, 0.167, 0.688),
}


@st.composite
def capacities(draw, min_experts=1, margin=0.0):
    """(e_c, E) in the allowed range; margin keeps off its ends, where shares reach zero."""
    num_experts = draw(st.integers(min_experts, 6))
    smallest = relative_widths(num_experts)[0]
    position = draw(st.floats(margin, 1 - margin))
    return min(1.0, smallest + position * (1 - smallest)), num_experts


def objective(shares):
    preference = sum(share * PREFERENCE_BASE**-index for index, share in enumerate(shares))
    return preference - ENTROPY_WEIGHT * sum(share * math.log(share) for share in shares if share > 0)


@pytest.mark.parametrize(("capacity", "shares"), TABLE.items())
def test_shares_are_those_of_the_paper(capacity, shares):
    assert expert_shares(capacity, 4) == pytest.approx(shares, abs=0.001)


@given(capacities())
def test_shares_sum_to_one_and_average_to_the_capacity(case):
    capacity, num_experts = case
    shares = expert_shares(capacity, num_experts)
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    average = sum(share * width for share, width in zip(shares, relative_widths(num_experts), strict=True))
    assert average == pytest.approx(capacity, abs=1e-9)


@given(capacities(min_experts=3, margin=0.02), st.integers(0, 2**31))
def test_no_feasible_step_improves_the_objective(case, seed):
    capacity, num_experts = case
    shares = torch.tensor(expert_shares(capacity, num_experts), dtype=torch.float64)
    constraints = torch.tensor([[1.0] * num_experts, relative_widths(num_experts)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(num_experts, dtype=torch.float64, generator=generator)
    step -= torch.linalg.pinv(constraints) @ (constraints @ step)
    tried = 0
    for length in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        for direction in (step, -step):
            other = shares + length * direction / direction.norm()
            if bool((other >= 0).all()):
                tried += 1
                assert objective(other.tolist()) < objective(shares.tolist())
    assert tried


def test_the_optimum_is_strict_enough_to_tell_another_temperature_apart():
    # The shares of beta = 9 have the same capacity and lose to ours: the oracle above can fail.
    widths, low, high = relative_widths(4), -100.0, 100.0
    for _ in range(80):
        multiplier = (low + high) / 2
        weights = [math.exp((PREFERENCE_BASE**-i + multiplier * width) / 9) for i, width in enumerate(widths)]
        other = [weight / sum(weights) for weight in weights]
        low, high = (multiplier, high) if effective_capacity(tuple(other)) < 0.4 else (low, multiplier)
    assert effective_capacity(tuple(other)) == pytest.approx(0.4)
    assert objective(expert_shares(0.4, 4)) - objective(other) > 1e-7


@pytest.mark.parametrize(
    ("capacity", "num_experts", "smallest"),
    [(0.12, 4, "0.125"), (1.001, 4, "0.125"), (0.4, 2, "0.5"), (0.9, 1, "1"), (0, 4, "0.125"), (math.nan, 4, "0.125")],
)
@pytest.mark.parametrize("function", [expert_shares, lambda capacity, experts: token_counts(capacity, 9, experts)])
def test_capacity_out_of_range_is_refused_with_the_range(function, capacity, num_experts, smallest):
    with pytest.raises(ValueError, match=f"between {smallest} and 1 for {num_experts} experts, got {capacity:g}"):
        function(capacity, num_experts)


@given(capacities(), st.integers(1, 400))
def test_counts_split_the_tokens_by_floor(case, num_tokens):
    capacity, num_experts = case
    counts, shares = token_counts(capacity, num_tokens, num_experts), expert_shares(capacity, num_experts)
    assert sum(counts) == num_tokens
    assert min(counts) >= 0
    for count, share in zip(counts[1:], shares[1:], strict=True):
        assert share * num_tokens - 1 < count <= share * num_tokens + 1e-6


@given(capacities(), st.integers(1, 400))
def test_realised_capacity_is_just_below_the_asked_one(case, num_tokens):
    capacity, num_experts = case
    realised = effective_capacity(token_counts(capacity, num_tokens, num_experts))
    assert capacity - num_experts / num_tokens < realised <= capacity + 1e-6


@pytest.mark.parametrize(
    ("capacity", "num_tokens", "counts"),
    [
        (0.125, 10, (10, 0, 0, 0)),
        (1.0, 10, (0, 0, 0, 10)),
        (1, 10, (0, 0, 0, 10)),
        (1.0, 1, (0, 0, 0, 1)),
        (0.4, 1, (1, 0, 0, 0)),  # every floor is 0
        (0.4, 196, (63, 54, 45, 34)),
        (0.2, 196, (120, 59, 16, 1)),
    ],
)
def test_counts_at_the_edges_and_by_hand(capacity, num_tokens, counts):
    assert token_counts(capacity, num_tokens, 4) == counts


@pytest.mark.parametrize("num_tokens", [4, 196])
def test_equal_shares_lose_no_token_to_rounding(num_tokens):
    # Two experts at e_c 3/4 hold half of the tokens each, exactly.
    assert token_counts(0.75, num_tokens, 2) == (num_tokens // 2, num_tokens // 2)


@pytest.mark.parametrize(("counts", "capacity"), [((8, 0, 0, 0), 0.125), ((0, 0, 0, 3), 1.0), ((2, 2), 0.75)])
def test_effective_capacity_by_hand(counts, capacity):
    assert effective_capacity(counts) == capacity


# --- baselines ---


@given(capacities(), st.integers(1, 400), st.sampled_from([("uniform", 0), ("proportionate", -1)]))
def test_fixed_rules_split_by_their_own_shares_whatever_is_asked(case, num_tokens, rule):
    (capacity, num_experts), (allocation, power) = case, rule
    widths = relative_widths(num_experts)
    counts = token_counts(capacity, num_tokens, num_experts, allocation)
    assert sum(counts) == num_tokens
    assert counts == token_counts(1.0, num_tokens, num_experts, allocation)
    total = sum(width**power for width in widths)
    for count, width in zip(counts[1:], widths[1:], strict=True):
        assert count == math.floor(num_tokens * width**power / total + 1e-6)
    assert effective_capacity(counts) <= fixed_capacity(num_experts, allocation) + 1e-6


def test_fixed_rules_have_the_capacities_of_the_paper():
    assert fixed_capacity(4, "uniform") == pytest.approx(0.46875, abs=1e-12)
    assert fixed_capacity(4, "proportionate") == pytest.approx(4 / 15, abs=1e-12)
    assert [fixed_capacity(4, name) for name in ("mone", "submodel", "token_drop", "tome")] == [None] * 4
    # Proportionate: every expert does the same work.
    assert token_counts(1.0, 15, 4, "proportionate") == (8, 4, 2, 1)
    assert token_counts(1.0, 8, 4, "uniform") == (2, 2, 2, 2)


@given(capacities(), st.integers(1, 400))
def test_a_submodel_is_the_widest_expert_that_fits(case, num_tokens):
    capacity, num_experts = case
    counts, widths = token_counts(capacity, num_tokens, num_experts, "submodel"), relative_widths(num_experts)
    chosen = counts.index(num_tokens)
    assert sum(counts) == num_tokens
    assert widths[chosen] <= capacity + 1e-6
    assert chosen == num_experts - 1 or widths[chosen + 1] > capacity


@given(capacities(), st.integers(1, 400), st.sampled_from(["token_drop", "tome"]))
def test_token_reducing_rules_keep_what_costs_as_much_at_full_width(case, num_tokens, allocation):
    capacity, num_experts = case
    *narrow, full = token_counts(capacity, num_tokens, num_experts, allocation)
    assert not any(narrow)
    assert 1 <= full <= num_tokens
    assert full == 1 or full <= capacity * num_tokens + 1e-6
    assert full + 1 > capacity * num_tokens
