"""Configs and capacities at their edges: one expert, one token, one frame, nobody at an expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.capacity import effective_capacity, relative_widths
from mone.config import ModelConfig
from mone.model import ViViT
from tests.mone.conftest import VARIANTS, small_model, some_inputs, variant

CHOICES = {
    "pooling": ["cls", "mean"],
    "router": ["learned", "motion", "random"],
    "budget": ["frame", "clip"],
    "allocation": ["mone", "uniform", "proportionate", "submodel", "token_drop", "tome"],
    "pixels": ["scaled", "centred"],
    "dropout": [0.0, 0.2],
    "drop_path": [0.0, 0.2],
}


@st.composite
def edge_cases(draw):
    """A config, a capacity and how many patches are kept."""
    choices = {name: draw(st.sampled_from(values)) for name, values in CHOICES.items()}
    if choices["allocation"] in ("token_drop", "tome"):
        choices["budget"] = "frame"
    joint, num_experts = draw(st.booleans()), draw(st.integers(1, 5))
    config = ModelConfig(
        num_classes=2,
        num_experts=num_experts,
        dim=16 * draw(st.integers(1, 2)),
        num_heads=2,
        mlp_ratio=1,
        depth=draw(st.integers(1, 2)),
        encoder="joint" if joint else "factorised",
        temporal_depth=0 if joint else draw(st.integers(0, 1)),
        num_frames=2 * draw(st.integers(1, 3)),
        height_px=2 * draw(st.integers(1, 3)),
        width_px=2 * draw(st.integers(1, 3)),
        tubelet_px=2,
        **choices,
    )
    smallest = relative_widths(num_experts)[0]
    edges = [smallest, min(1.0, smallest + 1e-9), (smallest + 1) / 2, max(smallest, 1 - 1e-9), 1.0]
    capacity = draw(st.sampled_from(edges) | st.floats(smallest, 1.0))
    kept = st.integers(config.num_tokens, config.num_indices * config.num_tokens)
    num_kept = None if config.reduces_tokens else draw(st.none() | kept)
    return config, capacity, num_kept


@given(edge_cases())
def test_any_config_runs_at_any_capacity_with_finite_gradients(case):
    config, capacity, num_kept = case
    counts, tokens = config.token_counts(capacity, num_kept), config.tokens_per_budget(num_kept)
    assert tokens * config.num_budgets(num_kept) == (num_kept or config.num_indices * config.num_tokens)
    assert min(counts) >= 0
    assert sum(counts) == tokens or (config.reduces_tokens and 0 < sum(counts) < tokens)
    if config.allocation in ("mone", "submodel"):
        assert effective_capacity(counts) <= capacity + 1e-6
    model = ViViT(config).train()
    with torch.no_grad():
        model.head.weight.normal_()
        model.encoder.alpha_L.fill_(0.5)
    logits, plan = model(**some_inputs(config, num_kept), capacity=capacity)
    assert logits.shape == (2, 2) and logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.embed.weight.grad is not None
    assert plan.counts == counts
    if config.allocation == "tome":
        return
    experts, orders = plan.expert_BN.flatten(0, -2), plan.order_BN.flatten(0, -2)
    for expert, order in zip(experts.tolist(), orders.tolist(), strict=True):
        assert tuple(expert.count(index) for index in range(config.num_experts)) == counts
        assert expert.count(-1) == tokens - sum(counts)
        assert [expert[token] for token in order] == [e for e, count in enumerate(counts) for _ in range(count)]
        assert len(set(order)) == sum(counts)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_empty_batch_gives_no_logits(name):
    config, num_kept = variant(name)
    inputs = {key: value[:0] for key, value in some_inputs(config, num_kept).items()}
    assert small_model(config)(**inputs, capacity=0.4).logits_BC.shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "counts", "tokens"),
    [
        ("clip budget", (5, 3, 2, 2), 24),
        ("kept", (5, 3, 2, 2), 15),
        ("uniform", (3, 3, 3, 2), 12),
        ("token drop", (0, 0, 0, 13), 12),
        ("token drop", (0, 0, 0, 0), 12),
        ("token drop", (0, 0, -1, 5), 12),
        ("tome", (0, 0, 0, 13), 12),
    ],
)
def test_counts_that_do_not_fit_are_refused(name, counts, tokens):
    config, num_kept = variant(name)
    with pytest.raises(ValueError) as caught:
        ViViT(config)(**some_inputs(config, num_kept), counts=counts)
    assert str(caught.value) == f"counts {counts} do not split {tokens} tokens over 4 experts"


@pytest.mark.parametrize("allocation", ["token_drop", "tome"])
def test_patches_cannot_be_dropped_twice(allocation):
    inputs = some_inputs(variant("kept")[0], 15)
    with pytest.raises(ValueError, match=f"static patches cannot be dropped with allocation '{allocation}'"):
        ViViT(variant("factorised", allocation=allocation)[0])(**inputs)


def test_places_have_the_shape_of_their_patches():
    inputs = some_inputs(variant("kept")[0], 15)
    with pytest.raises(ValueError, match=r"patches are \[2, 14, 96\], their places \[2, 15\]"):
        ViViT(variant("kept")[0])(inputs["patches"][:, :14], kept_BK=inputs["kept_BK"])


@pytest.mark.parametrize("num_kept", [11, 25])
def test_a_clip_without_its_first_frame_is_refused(num_kept):
    kept_BK, patches = torch.arange(num_kept).expand(2, -1), torch.zeros(2, num_kept, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{num_kept} patches are kept, not from 12 \(a whole first frame\) to 24"):
        ViViT(variant("kept")[0])(patches, kept_BK=kept_BK)
