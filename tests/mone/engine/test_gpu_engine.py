"""The engine on a CUDA GPU, at the sizes that it is made for."""

import copy
import os

import pytest
import torch

from mone.config import preset
from mone.engine.choice import run_blocks
from mone.engine.graphs import Replayed
from mone.engine.tokens import Gain, Tokens
from mone.model import ViViT
from mone.nested import segments_of
from tests.mone.conftest import small_config, small_model, some_inputs, variant

pytestmark = pytest.mark.gpu
CAPACITIES = pytest.mark.parametrize("capacity", [0.2, 0.4, 1.0])


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1":
        pytest.skip("no CUDA GPU")


@pytest.fixture
def base():
    config = preset("base", num_classes=10, depth=4, num_frames=2, temporal_depth=0)
    model = ViViT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.encoder.engine = "triton"
    return model.cuda().requires_grad_(False)


@CAPACITIES
@pytest.mark.parametrize("num_class_tokens", [0, 1])
@pytest.mark.parametrize("sequences", [8, 256])  # of many, narrow experts and attention have kernels of their own
def test_no_less_exact_than_dense_in_bfloat16(base, capacity, num_class_tokens, sequences):
    config, blocks = base.config, base.encoder.blocks
    x_SND = torch.randn(sequences, config.num_tokens, config.dim, device="cuda")
    class_1D = torch.randn(1, config.dim, device="cuda")
    gain = Gain(torch.rand(sequences, config.num_tokens, device="cuda"), torch.rand(config.depth, device="cuda"))

    def tokens(dtype):
        return Tokens(x_SND.to(dtype), None, class_1D.to(dtype), gain=gain)

    def error(engine, of):
        segments = segments_of(config.token_counts(of), config.widths, 1)
        exact = run_blocks("reference", copy.deepcopy(blocks).double(), tokens(torch.double), segments)
        exact = exact[:, -num_class_tokens:]
        halves = copy.deepcopy(blocks).bfloat16()
        half = run_blocks(engine, halves, tokens(torch.bfloat16), segments, None, num_class_tokens)
        return ((half - exact).norm() / exact.norm()).item()

    dense = error("reference", 1.0)
    for engine in ("auto", "triton", "layout"):
        assert 0 < error(engine, capacity) < 1.2 * dense


@CAPACITIES
def test_products_in_eight_bits_are_some_percent_off(base, capacity):
    patches = torch.randint(256, (4, 1, 196, base.config.patch_values), dtype=torch.uint8, device="cuda")

    def logits(engine, model):
        model.encoder.engine = engine
        with torch.inference_mode():
            return model(patches, capacity).logits_BC.double()

    exact = logits("reference", copy.deepcopy(base).double())
    error = (logits("fp8", base.bfloat16()) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.15


@CAPACITIES
@pytest.mark.parametrize("clips", [4, 256])
def test_a_batch_gives_the_same_bits_again(base, capacity, clips):
    patches = torch.randint(256, (clips, 1, 196, base.config.patch_values), dtype=torch.uint8, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        first, second = (base(patches, capacity).logits_BC for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["factorised", "kept", "joint", "motion, kept, centred"])
def test_a_replayed_model_answers_as_the_model_for_other_clips_and_weights(name):
    config, num_kept = variant(name, dim=128)
    model = small_model(config, alpha=0.5, dtype=torch.float32).cuda()
    model.encoder.engine = "triton"
    run = Replayed(model)
    for seed in range(6):
        if seed == 4:
            with torch.no_grad():
                model.head.weight.mul_(2)
                model.encoder.blocks[0].mlp.up.weight.mul_(1.5)
        inputs = {name: tensor.cuda() for name, tensor in some_inputs(config, num_kept, seed=seed).items()}
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            actual, expected = run(**inputs, capacity=0.4), model(**inputs, capacity=0.4)
        torch.testing.assert_close(actual.logits_BC, expected.logits_BC)
        assert torch.equal(actual.plan.expert_BN, expected.plan.expert_BN)


def test_a_training_step_has_the_gradients_of_the_reference():
    config = small_config(dim=128)
    inputs = {name: tensor.cuda() for name, tensor in some_inputs(config, None).items()}
    gradients = []
    for engine in ("layout", "reference"):
        model = small_model(config, alpha=0.5, dtype=torch.float32).cuda().train()
        model.encoder.engine = engine
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(**inputs, capacity=0.4).logits_BC
        logits.float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 3e-2 * gradients[1].norm()
