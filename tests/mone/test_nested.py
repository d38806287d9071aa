import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mone.nested import NestedIn, NestedOut, Segment, segments_of
from tests.mone.conftest import small_config, small_model, some_patches

CONFIG = small_config(pooling="mean")  # no class token: every spatial token is on the expert under test
EXPERTS = range(CONFIG.num_experts)


def all_on(expert):
    return tuple(CONFIG.num_tokens * (index == expert) for index in EXPERTS)


def nested_parameters(model):
    """Parameters of the nested projections, with the dimension along which experts are prefixes."""
    for block in model.encoder.blocks:
        for layer in (block.attention.qkv, block.mlp.up):
            yield layer.weight, 1
        for layer in (block.attention.out, block.mlp.down):
            yield layer.weight, 0
            yield layer.bias, 0


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 2))
def test_segments_cover_the_rows_once(counts, num_full):
    segments = segments_of(tuple(counts), (2, 4, 8), num_full)
    widths = [s.width for s in segments for _ in range(s.start, s.stop)]
    assert widths == [2] * counts[0] + [4] * counts[1] + [8] * (counts[2] + num_full)
    assert all(s.start < s.stop for s in segments)


def test_class_token_makes_a_full_segment_where_the_full_expert_has_none():
    assert segments_of((3, 0, 0), (2, 4, 8), 1) == (Segment(0, 3, 2), Segment(3, 4, 8))


def masks(segments, num_features):
    return torch.cat(
        [(torch.arange(num_features) < s.width).double().expand(s.stop - s.start, num_features) for s in segments]
    )


@pytest.mark.parametrize("counts", [(3, 2, 1), (0, 4, 2), (6, 0, 0), (0, 0, 6), (1, 0, 5)])
def test_projections_equal_full_matrices_with_zeros(counts):
    segments = segments_of(counts, (2, 4, 8))
    entry, exit_ = NestedIn(8, 5).double(), NestedOut(5, 8).double()
    x_BND, h_BNH = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    for token, mask in enumerate(masks(segments, 8)):
        inward = F.linear(x_BND[:, token], entry.weight * mask, entry.bias)
        torch.testing.assert_close(entry(x_BND, segments)[:, token], inward)
        outward = F.linear(h_BNH[:, token], exit_.weight * mask[:, None], exit_.bias * mask)
        torch.testing.assert_close(exit_(h_BNH, segments)[:, token], outward)


@pytest.mark.parametrize("expert", EXPERTS)
def test_residual_past_the_width_passes_all_blocks_unchanged(expert):
    model, width = small_model(CONFIG, alpha=0.6), CONFIG.widths[expert]
    x_SND = before_SND = torch.randn(2, CONFIG.num_tokens, CONFIG.dim, dtype=torch.float64)
    for block in model.encoder.blocks:
        x_SND = block(x_SND, segments_of(all_on(expert), CONFIG.widths), 1.3)
    assert torch.equal(x_SND[..., width:], before_SND[..., width:])
    assert (x_SND[..., :width] != before_SND[..., :width]).all()


def test_each_token_keeps_its_own_tail_beside_wider_ones():
    model, segments = small_model(CONFIG), segments_of((5, 3, 2, 2), CONFIG.widths)
    x_SND = before_SND = torch.randn(2, CONFIG.num_tokens, CONFIG.dim, dtype=torch.float64)
    for block in model.encoder.blocks:
        x_SND = block(x_SND, segments)
    assert torch.equal((x_SND == before_SND).double(), (1 - masks(segments, CONFIG.dim)).expand_as(x_SND))


@pytest.mark.parametrize("expert", EXPERTS[:-1])
def test_weights_outside_the_prefix_have_no_effect(expert):
    model, patches, width = small_model(CONFIG, alpha=0.6), some_patches(CONFIG), CONFIG.widths[expert]
    before = model(patches, counts=all_on(expert)).logits_BC
    wider = model(patches, counts=all_on(expert + 1)).logits_BC
    with torch.no_grad():
        for parameter, dim in nested_parameters(model):
            parameter.movedim(dim, 0)[width:] += 1.0
    assert torch.equal(model(patches, counts=all_on(expert)).logits_BC, before)
    assert (model(patches, counts=all_on(expert + 1)).logits_BC != wider).all()


@pytest.mark.parametrize("expert", EXPERTS)
def test_gradients_are_zero_exactly_outside_the_prefix(expert):
    model, width = small_model(CONFIG, alpha=0.6), CONFIG.widths[expert]
    model(some_patches(CONFIG), counts=all_on(expert)).logits_BC.square().sum().backward()
    for parameter, dim in nested_parameters(model):
        rows = parameter.grad.movedim(dim, 0).reshape(CONFIG.dim, -1)
        assert rows.any(1).tolist() == [feature < width for feature in range(CONFIG.dim)]
