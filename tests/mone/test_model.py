import pytest
import torch

from mone.capacity import token_counts
from mone.model import ViViT
from tests.mone.conftest import small_config, small_model, some_patches
from tests.mone.reference import reference

POOLINGS = pytest.mark.parametrize("pooling", ["cls", "mean"])
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@torch.no_grad()
def test_capacity_is_an_argument_of_the_call():
    model = small_model(small_config())
    patches = some_patches(model.config)
    for capacity in (0.4, 0.8, 0.4):
        logits, plan = model(patches, capacity)
        assert plan.counts == token_counts(capacity, 12, 4)
        expected = torch.stack([reference(model, clip, plan.counts) for clip in patches])
        torch.testing.assert_close(logits, expected, **EXACT)


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
