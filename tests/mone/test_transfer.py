"""Weights for another clip size, and as a start for another model."""

import pytest
import torch

from mone.checkpoint import read_checkpoint, save_checkpoint
from mone.model import ViViT
from mone.transfer import initialise_from, interpolate_positions, resize
from tests.mone.conftest import small_config, small_model, some_patches

JOINT = {"encoder": "joint", "temporal_depth": 0}
SIZES = {"num_frames": 8, "height_px": 24, "width_px": 12}
LABELS = list("abcde")


def model_of(**changes):
    return small_model(small_config(**changes), dtype=torch.float32)


@pytest.mark.parametrize("changes", [{}, JOINT, {"pooling": "mean", "temporal_depth": 0}])
def test_own_size_is_the_same_bit_for_bit(changes):
    model = model_of(**changes)
    config = model.config
    for same in (resize(model), resize(model, num_frames=4, height_px=12, width_px=16)):
        assert same.config == config
        assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())
        patches = some_patches(config)
        assert torch.equal(same(patches, 0.4).logits_BC, model(patches, 0.4).logits_BC)


@pytest.mark.parametrize("changes", [{}, JOINT, {"temporal_depth": 0}, {"budget": "clip"}])
def test_resized_model_runs_and_only_positions_differ(changes):
    model = model_of(**changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resized = resize(model, **SIZES)
    assert (resized.config.num_indices, resized.config.grid) == (4, (6, 3))
    assert resized(some_patches(resized.config), 0.4).logits_BC.isfinite().all()
    assert not resized.training
    for name, tensor in resized.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("position" in name), name
    with torch.no_grad():
        resized.head.weight.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_on_disk_is_resized_too(tmp_path):
    model = model_of()
    checkpoint = read_checkpoint(save_checkpoint(model, LABELS, tmp_path))
    ours, theirs = resize(checkpoint, **SIZES).state_dict(), resize(model, **SIZES).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("new", [(4, 24, 32), (16, 12, 16), (2, 36, 16), (5, 9, 40)])
def test_a_linear_ramp_stays_linear(new):
    old, slopes_3D = (4, 12, 16), torch.tensor([[0.5, -1.0], [0.25, 2.0], [-0.125, 1.0]])

    def ramp(grid):
        """Values at token centres, which are at equal shares of the frame's size whatever the grid."""
        axes = [(torch.arange(size) + 0.5) * (full / size) - 0.5 for size, full in zip(grid, old, strict=True)]
        places_FhwC = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return places_FhwC @ slopes_3D

    inner = tuple(slice(3 * n // o + 1, -(3 * n // o + 1)) for o, n in zip(old[1:], new[1:], strict=True))
    inner_frames = slice(new[0] // 8 + 1, -(new[0] // 8 + 1)) if new[0] > old[0] else slice(None)
    got = interpolate_positions(ramp(old).flatten(0, 2), old, new).unflatten(0, new)[inner_frames][:, *inner]
    wanted = ramp(new)[inner_frames][:, *inner]
    assert got.numel()
    assert torch.allclose(got, wanted, atol=0.05 if new[1] < old[1] else 1e-4)


def test_axes_keep_their_order():
    position_FhwD = torch.zeros(2, 4, 4, 1)
    position_FhwD[1, 0, 3] = 1.0
    larger = interpolate_positions(position_FhwD.flatten(0, 2), (2, 4, 4), (2, 8, 12)).unflatten(0, (2, 8, 12))[..., 0]
    assert divmod(int(larger[1].argmax()), 12)[0] <= 1
    assert divmod(int(larger[1].argmax()), 12)[1] >= 9
    assert not larger[0].any()
    longer = interpolate_positions(position_FhwD.flatten(0, 2), (2, 4, 4), (4, 4, 4)).unflatten(0, (4, 4, 4))
    assert longer[:, 0, 3, 0].tolist() == [0.0, 0.25, 0.75, 1.0]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"num_frames": 5}, "num_frames 5 is not a multiple of tubelet_frames 2"),
        ({"height_px": 10}, "height_px 10 is not a multiple of tubelet_px 4"),
        ({"width_px": 0}, "width_px must be a positive int, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        resize(model_of(), **sizes)


def test_a_start_of_equal_sizes_is_a_copy():
    model, source = ViViT(small_config()), model_of()
    assert initialise_from(model, source) == []
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, JOINT])
def test_a_start_of_another_size_is_the_resized_source(changes):
    source = model_of(**changes)
    model = ViViT(small_config(**changes | SIZES))
    assert initialise_from(model, source) == []
    wanted = resize(source, **SIZES).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_parts_that_do_not_fit_stay_new():
    model, source = ViViT(small_config(num_classes=3, router="motion")), model_of(temporal_depth=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines = initialise_from(model, source)
    assert lines == [
        "head: 3 classes, the source has 5",
        "temporal: 2 blocks, the source has 0",
        "encoder.router.prior_E: the source has none",
    ]
    for name, tensor in model.state_dict().items():
        new = name.startswith(("head", "temporal")) or name == "encoder.router.prior_E"
        assert torch.equal(tensor, (before if new else source.state_dict())[name]), name
    assert initialise_from(ViViT(small_config(router="random", **JOINT)), model_of(**JOINT)) == []
    assert initialise_from(ViViT(small_config(temporal_depth=0)), model_of()) == []


def test_a_head_of_other_labels_stays_new(tmp_path):
    checkpoint = read_checkpoint(save_checkpoint(model_of(), LABELS, tmp_path))
    model = ViViT(small_config())
    (line,) = initialise_from(model, checkpoint, labels=[*"abc", "e", "d"])
    assert line == "head: class 3 is 'e', that of the source 'd'"
    assert not model.head.weight.any()
    assert initialise_from(model, checkpoint, labels=LABELS) == []
    assert model.head.weight.all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 64}, "dim is 64, that of the source 32"),
        ({"depth": 3}, "depth is 3, that of the source 2"),
        ({"num_heads": 2}, "num_heads is 2, that of the source 4"),
        ({"mlp_ratio": 2}, "mlp_ratio is 2, that of the source 4"),
        ({"num_experts": 3}, "num_experts is 3, that of the source 4"),
        ({"tubelet_frames": 1}, "tubelet_frames is 1, that of the source 2"),
        ({"tubelet_px": 2}, "tubelet_px is 2, that of the source 4"),
        ({"activation": "gelu_tanh"}, "activation is 'gelu_tanh', that of the source 'gelu'"),
        ({"pooling": "mean"}, "pooling is 'mean', that of the source 'cls'"),
        ({"pixels": "centred"}, "pixels is 'centred', that of the source 'scaled'"),
        (JOINT, "encoder is 'joint', that of the source 'factorised'"),
    ],
)
def test_weights_that_would_be_wrong_are_refused(changes, named):
    model = ViViT(small_config(**changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        initialise_from(model, model_of())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
