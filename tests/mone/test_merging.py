import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone.merging import merge, merging_schedule
from tests.mone.conftest import JOINT, small_config, small_model, some_patches


def slow_merge(x, size, metric, merged, num_class_tokens):
    """ToMe's bipartite soft matching of one sequence: lists of (token, size) in their order."""
    num_tokens = len(x) - num_class_tokens
    nearest = {}
    for even in range(0, num_tokens, 2):
        cosines = {
            odd: float(metric[even] @ metric[odd] / metric[even].norm() / metric[odd].norm())
            for odd in range(1, num_tokens, 2)
        }
        nearest[even] = max((cosine, odd) for odd, cosine in cosines.items()) if cosines else (0.0, -1)
    joining = sorted(nearest, key=lambda even: -nearest[even][0])[:merged]
    groups = {odd: [odd] for odd in range(1, num_tokens, 2)}
    for even in joining:
        groups[nearest[even][1]].append(even)
    rows = [[even] for even in nearest if even not in joining]
    rows += [*groups.values(), *([row] for row in range(num_tokens, len(x)))]
    sizes = torch.stack([size[row].sum(0) for row in rows])
    return torch.stack([(x[row] * size[row]).sum(0) for row in rows]) / sizes, sizes


@given(st.integers(2, 11), st.integers(0, 2), st.data())
def test_merging_is_that_of_loops(num_tokens, num_class_tokens, data):
    merged = data.draw(st.integers(1, num_tokens // 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = (2, num_tokens + num_class_tokens)
    x_SND = torch.randn(*shape, 6, dtype=torch.float64, generator=generator)
    metric_SNK = torch.randn(*shape, 3, dtype=torch.float64, generator=generator)
    size_SN1 = torch.randint(1, 5, (*shape, 1), generator=generator).double()
    tokens, sizes = merge(x_SND, size_SN1, metric_SNK, merged, num_class_tokens)
    for index in range(2):
        expected = slow_merge(x_SND[index], size_SN1[index], metric_SNK[index], merged, num_class_tokens)
        torch.testing.assert_close((tokens[index], sizes[index]), expected, atol=1e-12, rtol=1e-12)
    assert tokens.shape == (2, num_tokens + num_class_tokens - merged, 6)
    assert torch.equal(sizes.sum(1), size_SN1.sum(1))
    torch.testing.assert_close((tokens * sizes).sum(1), (x_SND * size_SN1).sum(1))
    for token in range(1, num_class_tokens + 1):
        torch.testing.assert_close(tokens[:, -token], x_SND[:, -token])


def test_a_class_token_never_merges_however_alike_it_is():
    x_SND = torch.randn(1, 5, 4)
    metric_SNK = torch.ones(1, 5, 4)
    tokens, sizes = merge(x_SND, torch.ones(1, 5, 1), metric_SNK, 2, 1)
    assert torch.equal(tokens[:, -1], x_SND[:, -1])
    assert sizes.flatten().tolist() == [3, 1, 1]


def seen_by_blocks(schedule, num_tokens):
    """Average tokens of a block in thirds: one third of its work sees the tokens before merging, two thirds after."""
    thirds = 0
    for merged in schedule:
        thirds += num_tokens + 2 * (num_tokens - merged)
        num_tokens -= merged
    return thirds / 3 / len(schedule)


@given(st.integers(1, 60), st.integers(1, 6), st.data())
def test_schedule_is_the_smallest_that_meets_the_target(num_tokens, depth, data):
    target = data.draw(st.integers(1, num_tokens))
    schedule = merging_schedule(target, num_tokens, depth)
    left, possible = num_tokens, []
    for merged in schedule:
        assert merged in (schedule[0], left // 2)
        left -= merged
    assert left >= 1
    for merged in range(num_tokens // 2 + 1):
        steps, left = [], num_tokens
        for _ in range(depth):
            steps.append(min(merged, left // 2))
            left -= steps[-1]
        possible.append(tuple(steps))
    meeting = [steps for steps in possible if seen_by_blocks(steps, num_tokens) <= target + 1e-9]
    assert schedule == (meeting[0] if meeting else possible[-1])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("encoder", [{}, JOINT], ids=["factorised", "joint"])
@torch.no_grad()
def test_capacity_1_is_the_dense_model(encoder, pooling):
    # ToMe knows no alpha, so neither does this dense model.
    merging = small_model(small_config(**encoder, pooling=pooling, allocation="tome"))
    dense = small_model(small_config(**encoder, pooling=pooling))
    patches = some_patches(dense.config)
    torch.testing.assert_close(merging(patches).logits_BC, dense(patches).logits_BC, atol=1e-12, rtol=1e-12)
    assert (merging(patches, 0.7).logits_BC != dense(patches).logits_BC).all()


@torch.no_grad()
def test_a_token_weighs_as_many_patches_as_it_stands_for():
    encoder = small_model(small_config(allocation="tome")).encoder
    x_SND, sizes = torch.randn(2, 5, 32, dtype=torch.float64), torch.tensor([1, 3, 2, 1, 4])
    merged, kept_sizes = encoder._merging_block(encoder.blocks[0], x_SND, sizes.double()[:, None].expand(2, -1, 1), 0)
    repeated_SND = x_SND.repeat_interleave(sizes, dim=1)
    alone, _ = encoder._merging_block(encoder.blocks[0], repeated_SND, torch.ones(2, 11, 1, dtype=torch.float64), 0)
    torch.testing.assert_close(merged.repeat_interleave(sizes, dim=1), alone, atol=1e-12, rtol=1e-12)
    assert kept_sizes[0, :, 0].tolist() == sizes.tolist()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(pooling):
    # All patches of a frame and all positions are equal: whatever merges, averages and weights stay the same.
    model = small_model(small_config(allocation="tome", pooling=pooling))
    model.encoder.position_ND.copy_(model.encoder.position_ND[:1].clone())
    patches = some_patches(model.config)[:, :, :1].expand(-1, -1, 12, -1)
    torch.testing.assert_close(model(patches, 0.3).logits_BC, model(patches).logits_BC, atol=1e-10, rtol=1e-10)


def test_attention_weights_are_dropped_out_in_training():
    config = small_config(allocation="tome", dropout=0.5)
    encoder = small_model(config).encoder.train()
    block, x_SND = encoder.blocks[0], torch.randn(1, 6, 32, dtype=torch.float64)
    block.branch.dropout = 0.0  # only the attention's is left
    size_SN1 = torch.ones(1, 6, 1, dtype=torch.float64)
    first, second = (encoder._merging_block(block, x_SND, size_SN1, 0)[0] for _ in range(2))
    assert not torch.equal(first, second)
