"""Dropout and stochastic depth."""

import math

import pytest
import torch

from mone.blocks import Branch, make_blocks
from mone.nested import Segment
from tests.mone.conftest import VARIANTS, small_config, small_model, some_inputs, variant


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_both_are_absent_in_evaluation(name):
    answers = []
    for rates in ({}, {"dropout": 0.5, "drop_path": 0.5}):
        config, num_kept = variant(name, **rates)
        answers.append(small_model(config, alpha=0.5)(**some_inputs(config, num_kept), capacity=0.4).logits_BC)
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "random" not in name and name != "token drop"])
@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"drop_path": 0.5}], ids=str)
@torch.no_grad()
def test_each_draws_anew_at_each_training_step(name, rates):
    config, num_kept = variant(name, **rates)
    model, inputs = small_model(config, alpha=0.5).train(), some_inputs(config, num_kept, batch=8)
    first, second = (model(**inputs, capacity=0.4).logits_BC for _ in range(2))
    assert not torch.equal(first, second)
    without = small_model(variant(name)[0], alpha=0.5).train()
    assert torch.equal(*(without(**inputs, capacity=0.4).logits_BC for _ in range(2)))


@pytest.mark.parametrize(("dropout", "drop_path"), [(0.3, 0.0), (0.0, 0.3), (0.2, 0.2)])
def test_a_branch_keeps_its_expectation(dropout, drop_path):
    branch, x_SND = Branch(dropout, drop_path).train(), torch.ones(20_000, 2, 2, dtype=torch.float64)
    y_SND = branch(x_SND)
    kept = (1 - dropout) * (1 - drop_path)
    deviations = math.sqrt((1 / kept - 1) / 20_000)  # of one feature's mean
    assert (y_SND.mean(0) - 1).abs().max() < 5 * deviations
    assert y_SND.unique().tolist() == pytest.approx([0, 1 / kept])
    assert y_SND.dtype == x_SND.dtype


def test_stochastic_depth_takes_whole_branches_of_a_sequence():
    y_SND = Branch(0.0, 0.4).train()(torch.ones(1000, 3, 4))
    assert set(y_SND.flatten(1).mean(1).tolist()) == {0.0, y_SND.max().item()}


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_stochastic_depth_grows_linearly_to_the_last_block(depth):
    config = small_config(drop_path=0.3, dropout=0.1)
    rates = [block.branch.drop_path for block in make_blocks(config, depth)]
    assert rates == pytest.approx([0.3 * (index + 1) / depth for index in range(depth)])
    assert {block.branch.dropout for block in make_blocks(config, depth)} == {0.1}


def test_a_block_without_its_branches_is_the_identity():
    config = small_config(drop_path=0.999999, depth=1, temporal_depth=1)
    block = small_model(config).encoder.blocks[0].train()
    x_SND = torch.randn(3, 4, 32, dtype=torch.float64)
    assert torch.equal(block(x_SND, (Segment(0, 4, 32),)), x_SND)
