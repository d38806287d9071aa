"""Compiling is slow, so these models have one block each; the equality of their mathematics is tested elsewhere."""

import dataclasses
import io
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export, load, save

from mone.compiled import AtCapacity, compiled
from tests.mone.conftest import VARIANTS, small_model, some_inputs, variant

# Two of them have the same counts.
CAPACITIES = (0.15, 0.35, 0.3501, 0.65, 0.95)
SHALLOW = {"depth": 1, "height_px": 8}  # 8 tokens


@pytest.fixture(autouse=True)
def clean_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # dynamo warns where it traces what it should not
        yield
    torch._dynamo.reset()


def variants(*quick):
    """All variants; those that are not quick are for the slow suite."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [name if name in quick else pytest.param(name, marks=slow) for name in VARIANTS]
    )


def shallow(name, batch=2, **changes):
    config, num_kept = variant(name, **{**SHALLOW, **changes})
    config = dataclasses.replace(config, temporal_depth=min(1, config.temporal_depth))
    return small_model(config, alpha=0.5, dtype=torch.float32), some_inputs(config, num_kept and 11, batch)


@torch._dynamo.config.patch(recompile_limit=2)  # 8 without it: the same in a third of the time
def test_training_over_a_set_of_capacities_compiles_once_for_each_set_of_counts():
    model, inputs = shallow("factorised", dropout=0.1, drop_path=0.1)
    counter = CompileCounterWithBackend("eager")
    run = compiled(model.train(), backend=counter)
    distinct = {model.config.token_counts(capacity) for capacity in CAPACITIES}
    assert torch._dynamo.config.recompile_limit < len(distinct) < len(CAPACITIES)
    shapes = set()
    for _ in range(3):
        for capacity in CAPACITIES:
            logits, plan = run(**inputs, capacity=capacity)
            logits.sum().backward()
            shapes.add((logits.shape, plan.order_BN.shape, plan.expert_BN.shape))
        with torch.no_grad():
            model.embed.weight.mul_(0.9)  # as an optimiser does
    assert counter.frame_count == len(distinct)
    assert len(shapes) == 1


@variants("joint, clip budget", "joint tome, mean", "motion, kept, centred")
@torch.no_grad()
def test_no_graph_breaks_and_the_same_answers(name):
    model, inputs = shallow(name)
    run = compiled(model, backend="eager")
    actual, expected = run(**inputs, capacity=0.4), model(**inputs, capacity=0.4)
    torch.testing.assert_close(actual.logits_BC, expected.logits_BC, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual.plan.expert_BN, expected.plan.expert_BN)
    assert actual.plan.counts == expected.plan.counts


@variants("clip budget, mean")
def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(name):
    model, inputs = shallow(name, dropout=0.1, drop_path=0.2)
    model.encoder.engine = "reference"  # as compiled: what dropout draws depends on what it is drawn for
    model.train()
    steps = []
    for forward in (compiled(model, backend="aot_eager"), model):
        torch.manual_seed(0)
        model.zero_grad()
        logits = forward(**inputs, capacity=0.4).logits_BC
        logits.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        steps.append([logits.detach(), *[gradient.clone() for gradient in gradients]])
    torch.testing.assert_close(steps[0], steps[1], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_inductor_gives_the_same_answers(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = shallow(name)
        actual, expected = compiled(model)(**inputs, capacity=0.4), model(**inputs, capacity=0.4)
    torch.testing.assert_close(actual.logits_BC, expected.logits_BC, atol=1e-5, rtol=1e-5)
    assert torch.equal(actual.plan.expert_BN, expected.plan.expert_BN)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@variants("kept, mean")
@torch.no_grad()
def test_an_exported_model_takes_any_batch_size_from_its_file(name, strict):
    model, inputs = shallow(name, batch=3)
    at_capacity = AtCapacity(model, 0.4, num_kept=11 if "kept_BK" in inputs else None)
    batch = {0: Dim("batch")}
    dynamic = {"patches": batch, "kept_BK": batch if "kept_BK" in inputs else None}
    program = export(at_capacity, (), {"kept_BK": None, **inputs}, dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    for exported in (program.module(), load(file).module()):
        for size in (1, 3, 5):
            _, others = shallow(name, batch=size)
            expected = model(**others, capacity=0.4)
            logits_BC, expert_BN = exported(**{"kept_BK": None, **others})
            torch.testing.assert_close(logits_BC, expected.logits_BC, atol=1e-5, rtol=1e-5)
            assert torch.equal(expert_BN, expected.plan.expert_BN)
