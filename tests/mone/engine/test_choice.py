"""Which code runs the blocks."""

import pytest
import torch

from mone.engine import choice
from mone.model import ViViT
from tests.mone.conftest import small_config, small_model, some_patches


@pytest.fixture
def called(monkeypatch):
    """Whether blocks were called, as the reference does."""
    calls = []
    monkeypatch.setattr(choice, "run_on_layout", lambda blocks, x_SND, *_: calls.append("layout") or x_SND[:, -1:])
    return calls


def test_the_layout_is_the_default_and_the_reference_can_be_asked_for(called):
    model = small_model(small_config())
    patches = some_patches(model.config)
    model(patches, 0.4)
    assert called == ["layout", "layout"]  # the nested encoder and the temporal one
    model.encoder.engine = "reference"
    model(patches, 0.4)
    assert called == ["layout", "layout"]


def test_blocks_that_must_be_called_are_called(called, monkeypatch):
    model = small_model(small_config())
    monkeypatch.setattr(choice, "FSDPModule", torch.nn.Module)
    model(some_patches(model.config), 0.4)
    assert called == []


def test_kernels_without_gradients_are_not_trained_through(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("mone.engine.fused.run_on_rows", lambda *_: pytest.fail("there are no gradients"))
    gradients = []
    for engine in ("triton", "layout"):
        model = small_model(small_config()).train()
        model.encoder.engine = engine
        model(some_patches(model.config), 0.4).logits_BC.square().sum().backward()
        gradients.append([p.grad for p in model.encoder.blocks.parameters()])
    assert all(gradient is not None and gradient.any() for gradient in gradients[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_choice_is_not_part_of_the_weights():
    model = ViViT(small_config())
    model.encoder.engine = "reference"
    assert not [name for name in model.state_dict() if "engine" in name]
    assert ViViT(small_config()).encoder.engine == "auto"
