import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mone.capacity import token_counts
from mone.compute import clip_compute, clip_flops, peak_flops_per_s, training_flops
from mone.config import preset
from mone.model import ViViT
from tests.mone.conftest import JOINT, small_config, some_inputs, some_patches

CONFIGS = {
    "cls": small_config(),
    "mean": small_config(pooling="mean"),
    "random": small_config(router="random"),
    "wide": small_config(mlp_ratio=2, dim=64, num_heads=2, depth=3, temporal_depth=1),
    "two experts": small_config(num_experts=2, num_classes=7, num_frames=6),
    "one expert": small_config(num_experts=1, pooling="mean", num_frames=3, tubelet_frames=3),
}


def counted_flops(config, counts, num_kept=None):
    model, inputs = ViViT(config).eval(), some_inputs(config, num_kept, batch=1)
    model.encoder.engine = "reference"
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, counts=counts)
    return counter.get_total_flops()


# How a capacity is spent, and on what: budgets and numbers of kept patches (of 24; one frame has 12).
SPENT = [
    {"router": "learned"},
    {"router": "random"},
    {"router": "motion"},
    {"allocation": "uniform"},
]
BUDGETS = [({"budget": "frame"}, None), ({"budget": "clip"}, None), ({"budget": "frame"}, 15)]
COMBINATIONS = [(spent | budget, num_kept) for spent in SPENT for budget, num_kept in BUDGETS]
COMBINATIONS += [({"allocation": name}, None) for name in ("token_drop", "tome")]


@pytest.mark.parametrize("num_frames", [2, 4])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("encoder", [{}, JOINT, {"temporal_depth": 0}], ids=["factorised", "joint", "average"])
def test_formula_equals_what_torch_counts_for_every_combination(encoder, pooling, num_frames):
    shallow = {"depth": 1, "temporal_depth": 1, "pooling": pooling, "num_frames": num_frames} | encoder
    for changes, num_kept in COMBINATIONS:
        config = small_config(**shallow, **changes)
        if num_kept and num_frames == 2:
            num_kept = config.num_tokens
        compute, counts = clip_compute(config, 0.4, num_kept), config.token_counts(0.4, num_kept)
        nobody = (0,) * (config.num_experts - 1)
        everything = (*nobody, config.tokens_per_budget()), (*nobody, config.tokens_per_budget(num_kept))
        label = str((changes, num_kept))
        assert compute.flops == counted_flops(config, counts, num_kept), label
        assert compute.kept_flops == counted_flops(config, everything[1], num_kept), label
        if num_kept is not None:
            assert compute.dense_flops == counted_flops(config, everything[0]), label
        assert compute.flops < compute.kept_flops <= compute.dense_flops, label
        assert (compute.kept_flops < compute.dense_flops) == (num_kept is not None and num_frames > 2), label


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("capacity", [0.0, 0.4, 0.7, 1.0])
def test_formula_equals_what_torch_counts(config, capacity):
    capacity = max(capacity, config.widths[0] / config.dim)
    counts = token_counts(capacity, config.num_tokens, config.num_experts)
    assert clip_flops(config, counts) == counted_flops(config, counts)
    assert clip_compute(config, capacity).flops == counted_flops(config, counts)


@pytest.mark.parametrize("expert", range(4))
def test_formula_holds_for_nested_sub_models(expert):
    config = small_config(pooling="mean")
    counts = tuple(config.num_tokens * (index == expert) for index in range(4))
    assert clip_flops(config, counts) == counted_flops(config, counts)


@pytest.mark.parametrize(
    ("capacity", "gmacs", "tolerance"),
    [(1.0, 374.0, 0.01), (0.5, 198.6, 0.02), (0.4, 163.4, 0.01), (0.3, 128.6, 0.02), (0.2, 93.6, 0.02)],
)
def test_base_model_costs_what_the_papers_print(capacity, gmacs, tolerance):
    config = preset("base", num_classes=174, height_px=256, width_px=256)
    compute = clip_compute(config, capacity)
    assert compute.flops / 2e9 == pytest.approx(gmacs, rel=tolerance)
    assert compute.dense_flops / 2e9 == pytest.approx(374.0, rel=0.01)


def test_base_model_at_224_px_costs_what_vivit_prints():
    assert clip_compute(preset("base", num_classes=400), 1.0).flops / 2e9 == pytest.approx(283.3, rel=0.01)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_full_capacity_is_the_dense_model(config):
    full = clip_compute(config, 1.0)
    nobody = (0,) * (config.num_experts - 1)
    assert full.flops == full.dense_flops == counted_flops(config, (*nobody, config.num_tokens))
    assert full.tokens_per_expert == (*nobody, config.num_indices * config.num_tokens)


@pytest.mark.parametrize("capacity", [0.125, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_tokens_are_those_of_the_routing_plan(capacity):
    config = small_config(num_frames=6)
    compute = clip_compute(config, capacity)
    expert_FN = ViViT(config)(some_patches(config, batch=1), capacity).plan.expert_BN[0]
    assert compute.tokens_per_expert == tuple(torch.bincount(expert_FN.flatten(), minlength=4).tolist())
    assert sum(compute.tokens_per_expert) == config.num_indices * config.num_tokens


def test_less_capacity_costs_less_and_never_changes_the_dense_count():
    config = preset("tiny", num_classes=5)
    computes = [clip_compute(config, capacity / 40) for capacity in range(5, 41)]
    flops = [compute.flops for compute in computes]
    assert flops == sorted(set(flops))
    assert {compute.dense_flops for compute in computes} == {flops[-1]}


def test_capacity_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"between 0\.125 and 1"):
        clip_compute(small_config(), 0.1)


PLAIN = {"router": "random", "temporal_depth": 0, "num_frames": 2}


@pytest.mark.parametrize("changes", [{}, PLAIN, PLAIN | {"depth": 8}, {"pooling": "mean"}], ids=str)
def test_a_training_step_costs_three_forward_passes_but_for_the_gradient_of_the_pixels(changes):
    config = small_config(**changes)
    counts = config.token_counts(0.4)
    model, inputs = ViViT(config), some_inputs(config, None, batch=1)
    model.encoder.engine = "reference"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, counts=counts).logits_BC.sum().backward()
    pixels = 2 * config.num_indices * config.num_tokens * config.patch_values * config.dim
    assert training_flops(config, counts) == 3 * clip_flops(config, counts)
    assert counter.get_total_flops() == training_flops(config, counts) - pixels


def test_static_patches_cost_no_training():
    config = small_config()
    counts = config.token_counts(0.4, 15)
    assert training_flops(config, counts, 15) == 3 * clip_compute(config, 0.4, 15).flops


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "tflop_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989),
        ("NVIDIA H100 80GB HBM3", FP16, 989),
        ("NVIDIA H100 80GB HBM3", FP32, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", BF16, None),
        ("NVIDIA H100 PCIe", BF16, None),
        ("NVIDIA H100 NVL", BF16, None),
        ("NVIDIA H200", BF16, 989),
        ("NVIDIA GH200 480GB", BF16, None),
        ("NVIDIA A100-SXM4-80GB", BF16, 312),
        ("NVIDIA A100 80GB PCIe", BF16, 312),
        ("NVIDIA L4", BF16, 121),
        ("NVIDIA L40S", BF16, 362),
        ("NVIDIA L40", BF16, None),
        ("Tesla T4", FP16, 65),
        ("Tesla T4", BF16, None),
        ("Tesla V100-SXM2-16GB", FP16, 125),
        ("Tesla V100-PCIE-16GB", FP16, None),
        ("Tesla V100-SXM2-16GB", BF16, None),
        ("AMD Instinct MI300X", BF16, None),
        ("", BF16, None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, dtype, tflop_per_s):
    peak = peak_flops_per_s(name, dtype)
    assert peak == (None if tflop_per_s is None else tflop_per_s * 1e12)
