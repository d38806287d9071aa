"""The kernels of the layout with gradients, alone and in whole models, on the GPU or in the interpreter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mone.engine import attention, mlp, norm
from mone.engine.kernels.gelu_grad import gelu_grad
from mone.engine.kernels.heads import copy_heads
from mone.engine.layout import Tail
from mone.engine.norm import Branch, add_and_norm
from tests.mone.conftest import small_config, small_model, some_inputs, variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Take them on a CPU too, but for the float64 of an oracle."""
    for module in (attention, mlp, norm):
        monkeypatch.setattr(module, "triton_runs", lambda device: True)


def leaf(*shape, offset=0.0):
    return (torch.randn(*shape) + offset).to(DEVICE).requires_grad_()


def assert_near(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("offset", "dim"), [(0.0, 96), (10.0, 96), (0.0, 768)])
def test_a_branch_and_the_norm_after_it_with_gradients(offset, dim, add, scaled):
    widths, counts, sequences = (dim // 8, dim // 2, dim), (7, 5, 1), 3
    whole = [leaf(sequences, count, dim, offset=offset) for count in counts]
    outputs = [leaf(sequences, count, width) for count, width in zip(counts, widths, strict=True)]
    factor_R, bias_D, layer = leaf(sequences * sum(counts)), leaf(dim), nn.LayerNorm(dim, 1e-6).to(DEVICE)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    along = [torch.randn_like(output) for output in (*outputs, *outputs)]

    def gradients(results, wanted):
        total = sum((a * result).sum() for a, result in zip(along, results, strict=True))
        return torch.autograd.grad(total, wanted, allow_unused=True)

    exact, expected = copy.deepcopy(layer).double(), [[], []]
    factors = factor_R.double().split([sequences * count for count in counts])
    for x, output, factor in zip(whole, outputs, factors, strict=True):
        width, z = output.shape[-1], x.double()
        if add:
            scale = factor.view(sequences, -1, 1) if scaled else 1.0
            z = z + F.pad(scale * (output + bias_D[:width] if scaled else output), (0, dim - width))
        expected[0].append(z[..., :width])
        expected[1].append(exact(z)[..., :width])
    wanted = [*whole, *(outputs if add else []), *([factor_R, bias_D] if add and scaled else [])]
    expected_grads = gradients([*expected[0], *expected[1]], [*wanted, *exact.parameters()])

    heads, tails = [], []
    for x, width in zip(whole, widths, strict=True):
        heads.append(x[..., :width].contiguous())
        tail = x[..., width:]
        mean = tail.mean(-1, keepdim=True)
        tails.append(Tail(mean, (tail - mean).square().sum(-1, keepdim=True), dim - width) if width < dim else None)
    branch = Branch(outputs, *((bias_D, factor_R) if scaled else (None, None))) if add else None
    sums, normals = add_and_norm(heads, branch, tails, layer, torch.float32)
    grads = gradients([*sums, *normals], [*wanted, *layer.parameters()])
    for actual, other in zip([*sums, *normals, *grads], [*expected[0], *expected[1], *expected_grads], strict=True):
        assert_near(actual, other.double())


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_heads_of_any_strides_become_rows(order, moved):
    groups, num_heads, slots, features = 3, 4, 5, 8
    sizes = (groups, num_heads, slots, features)
    stored = torch.randn([sizes[index] for index in order], device=DEVICE)
    heads = stored.permute([order.index(index) for index in range(4)])
    slot_R = torch.randperm(groups * slots, device=DEVICE) if moved else None
    out = torch.zeros(groups * slots, 3, 32, device=DEVICE)
    copy_heads(heads, slot_R, out[:, 1])
    expected = heads.transpose(1, 2).reshape(groups * slots, 32)
    assert torch.equal(out[:, 1], expected if slot_R is None else expected[slot_R])
    assert not out[:, ::2].any()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (37, 520), (130, 64)])
def test_gelu_and_its_gradient(rows, columns, approximate):
    before, grad = torch.randn(rows, columns, device=DEVICE) * 3, torch.randn(rows, columns, device=DEVICE)
    exact = before.double().requires_grad_()
    expected = F.gelu(exact, approximate=approximate)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    hidden, sums = gelu_grad(before, grad, approximate)
    for actual, other in zip((hidden, grad, sums), (expected, expected_grad, expected_grad.sum(0)), strict=True):
        assert_near(actual, other, 1e-5)


NAMES = ["factorised", "factorised, mean", "joint", "clip budget", "kept", "submodel", "token drop"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_models_have_the_gradients_of_the_reference(name, drop_path):
    config, num_kept = variant(name, drop_path=drop_path)
    assert_same_step(config, num_kept, batch=5, capacity=0.4)


@pytest.mark.parametrize("counts", [(12, 0, 0, 0), (0, 0, 0, 12), (0, 11, 0, 1), (3, 3, 3, 3)])
def test_models_with_any_split(counts):
    assert_same_step(small_config(activation="gelu_tanh"), None, batch=2, counts=counts)


def assert_same_step(config, num_kept, batch, **asked):
    exact = small_model(config, alpha=0.5).train()
    model = small_model(config, alpha=0.5, dtype=torch.float32).train().to(DEVICE)
    exact.encoder.engine, model.encoder.engine = "reference", "layout"
    found = []
    for module in (exact.to(DEVICE), model):
        torch.manual_seed(1)  # stochastic depth
        inputs = {name: tensor.to(DEVICE) for name, tensor in some_inputs(config, num_kept, batch=batch).items()}
        logits = module(**inputs, **asked).logits_BC
        (logits * torch.linspace(-1, 1, logits.numel(), device=DEVICE).view_as(logits)).sum().backward()
        found.append(
            {"logits": logits, **{name: p.grad for name, p in module.named_parameters() if p.grad is not None}}
        )
    assert found[0].keys() == found[1].keys()
    largest = max(tensor.norm() for tensor in found[0].values())
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-5 * largest, name
