import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.routing import (
    LearnedRouter,
    MotionRouter,
    RandomRouter,
    expert_preferred_routing,
)
from tests.mone.conftest import slow_routing


@st.composite
def routings(draw, levels=None):
    """Probabilities [B, N, E] and counts, zeros among them; few levels make ties."""
    batch, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    counts = tuple(draw(st.lists(st.integers(0, 6), min_size=num_experts, max_size=num_experts)))
    if not sum(counts):
        counts = (*counts[:-1], 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, sum(counts), num_experts)
    if levels:
        return torch.randint(levels, shape, generator=generator) / levels, counts
    return torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1), counts


@given(routings())
def test_plan_is_a_partition_with_exact_counts(case):
    probabilities, counts = case
    plan = expert_preferred_routing(probabilities, counts)
    batch, num_tokens, num_experts = probabilities.shape
    assert plan.counts == counts
    for row in range(batch):
        assert sorted(plan.order_BN[row].tolist()) == list(range(num_tokens))
        assert tuple(torch.bincount(plan.expert_BN[row], minlength=num_experts).tolist()) == counts
        # The order lists each expert's tokens in one segment, smallest expert first.
        assert plan.expert_BN[row][plan.order_BN[row]].tolist() == [e for e, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize("levels", [1, 2, 4, None])
@given(data=st.data())
def test_plan_equals_algorithm_1_in_loops(levels, data):
    probabilities, counts = data.draw(routings(levels))
    plan = expert_preferred_routing(probabilities, counts)
    assert plan.expert_BN.tolist() == [slow_routing(row, counts) for row in probabilities.tolist()]


@given(routings(levels=3))
def test_weight_is_the_probability_of_the_expert_that_the_token_got(case):
    probabilities, counts = case
    plan = expert_preferred_routing(probabilities, counts)
    expected = [[p[e] for p, e in zip(*row, strict=True)] for row in zip(probabilities, plan.expert_BN, strict=True)]
    assert plan.weight_BN.tolist() == torch.tensor(expected).tolist()


def test_of_equal_tokens_the_earlier_wins_and_the_rest_goes_to_the_smallest():
    plan = expert_preferred_routing(torch.full((1, 6, 3), 1 / 3), (3, 1, 2))
    assert plan.expert_BN.tolist() == [[2, 2, 1, 0, 0, 0]]
    assert plan.order_BN.tolist() == [[3, 4, 5, 2, 0, 1]]


def test_the_largest_expert_chooses_first():
    # Token 1 is the favourite of both; expert 1 has to take its second choice.
    probabilities = torch.tensor([[[0.8, 0.15, 0.05], [0.0, 0.5, 0.5], [0.7, 0.2, 0.1]]])
    assert expert_preferred_routing(probabilities, (1, 1, 1)).expert_BN.tolist() == [[0, 2, 1]]


@pytest.mark.parametrize("counts", [(7, 0, 0), (0, 7, 0), (0, 0, 7), (0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_a_count_of_zero_selects_nothing(counts):
    plan = expert_preferred_routing(torch.rand(2, 7, 3), counts)
    assert torch.equal(torch.nn.functional.one_hot(plan.expert_BN, 3).sum(1), torch.tensor([counts, counts]))


@given(routings(), st.integers(0, 2**31))
def test_permuted_tokens_keep_their_experts(case, seed):
    probabilities, counts = case
    permutation = torch.randperm(probabilities.shape[1], generator=torch.Generator().manual_seed(seed))
    plan = expert_preferred_routing(probabilities, counts)
    permuted = expert_preferred_routing(probabilities[:, permutation], counts)
    assert torch.equal(permuted.expert_BN, plan.expert_BN[:, permutation])
    assert torch.equal(permuted.weight_BN, plan.weight_BN[:, permutation])


@given(routings())
def test_gradient_reaches_exactly_the_chosen_probabilities(case):
    probabilities, counts = case
    probabilities.requires_grad_()
    plan = expert_preferred_routing(probabilities, counts)
    factors = torch.arange(1.0, plan.weight_BN.numel() + 1, dtype=torch.float64).reshape_as(plan.weight_BN)
    (plan.weight_BN * factors).sum().backward()
    expected = torch.zeros_like(probabilities)
    expected.scatter_(-1, plan.expert_BN.unsqueeze(-1), factors.unsqueeze(-1))
    assert torch.equal(probabilities.grad, expected)


def test_learned_router_is_a_softmax_of_one_linear_layer():
    router, tokens = LearnedRouter(8, 3), torch.randn(2, 5, 8)
    scores = torch.exp(torch.einsum("bnd,ed->bne", tokens, router.weight) + router.bias)
    torch.testing.assert_close(router(tokens, tokens), scores / scores.sum(-1, keepdim=True))


def test_learned_router_does_not_round_under_autocast():
    router, tokens = LearnedRouter(8, 3), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(tokens, tokens)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, router(tokens, tokens))


@pytest.mark.parametrize("training", [False, True])
def test_random_router_gives_probabilities_that_differ_between_tokens_and_experts(training):
    patches = torch.randint(0, 256, (2, 50, 96), dtype=torch.uint8)
    probabilities = RandomRouter(4).train(training)(torch.randn(2, 50, 8), patches)
    assert probabilities.shape == (2, 50, 4)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 50))
    assert all(len(set(column.tolist())) > 90 for column in probabilities.reshape(100, 4).unbind(-1))
    winners = torch.bincount(probabilities.argmax(-1).flatten(), minlength=4)
    assert winners.min() > 5  # each expert is the favourite of some


def test_random_router_in_evaluation_reads_pixels_and_position_only():
    patches = torch.randint(0, 256, (1, 6, 96), dtype=torch.uint8).expand(2, -1, -1)
    router = RandomRouter(3).eval()
    first, second = router(torch.randn(2, 6, 8), patches)
    assert torch.equal(first, second)
    flat = router(torch.randn(1, 6, 8), torch.zeros_like(patches[:1]))[0]
    assert len(set(flat[:, 0].tolist())) == 6


def test_random_router_in_training_draws_anew():
    patches, router = torch.zeros(1, 6, 96, dtype=torch.uint8), RandomRouter(3).train()
    assert not torch.equal(router(torch.zeros(1, 6, 8), patches), router(torch.zeros(1, 6, 8), patches))


# --- the router with a prior from frame differences ---


def moving_patches(moving: list[int]) -> torch.Tensor:
    """uint8 [1, 9, 2 * 12] of two frames: only these tokens change between them."""
    first = torch.randint(0, 200, (1, 9, 12), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[:, moving] += 50
    return torch.cat([first, second], dim=-1).to(torch.uint8)


def test_the_motion_prior_gives_what_changes_the_largest_expert():
    router = MotionRouter(8, 3, tubelet_frames=2)
    torch.nn.init.zeros_(router.weight)
    plan = expert_preferred_routing(router(torch.randn(1, 9, 8), moving_patches([1, 4, 7])), (3, 3, 3))
    assert plan.expert_BN[0, [1, 4, 7]].tolist() == [2, 2, 2]


def test_a_still_frame_has_no_motion_prior():
    router, plain = MotionRouter(8, 3, tubelet_frames=2), LearnedRouter(8, 3)
    plain.load_state_dict({name: value for name, value in router.state_dict().items() if name != "prior_E"})
    tokens_BND = torch.randn(1, 9, 8)
    torch.testing.assert_close(router(tokens_BND, moving_patches([])), plain(tokens_BND, moving_patches([])))


def test_the_motion_prior_learns():
    router = MotionRouter(8, 3, tubelet_frames=2)
    router(torch.randn(1, 9, 8), moving_patches([2]))[..., 2].square().sum().backward()
    assert router.prior_E.grad is not None and router.prior_E.grad.abs().sum() > 0


def test_cumulative_ranking_keeps_what_the_full_expert_wants_most_from_the_smallest():
    # Tokens 0 and 1 want the full expert most, then each the next; there is no room on the full expert.
    probabilities = torch.tensor([[[0.05, 0.15, 0.8], [0.1, 0.3, 0.6], [0.3, 0.5, 0.2], [0.8, 0.15, 0.05]]])
    assert expert_preferred_routing(probabilities, (2, 2, 0)).expert_BN.tolist() == [[0, 1, 1, 0]]
    assert expert_preferred_routing(probabilities, (2, 2, 0), cumulative=True).expert_BN.tolist() == [[1, 1, 0, 0]]


@given(routings())
def test_cumulative_ranking_is_algorithm_1_on_sums(case):
    probabilities, counts = case
    plan = expert_preferred_routing(probabilities, counts, cumulative=True)
    for expert in range(1, len(counts)):
        wanted_BN = probabilities[..., expert:].sum(-1)
        for wanted_N, expert_N in zip(wanted_BN, plan.expert_BN, strict=True):
            smaller, mine = wanted_N[expert_N < expert], wanted_N[expert_N == expert]
            assert not len(smaller) or not len(mine) or mine.min() >= smaller.max()
    assert torch.equal(plan.weight_BN, probabilities.gather(-1, plan.expert_BN.unsqueeze(-1)).squeeze(-1))
