import dataclasses
import json

import pytest

from mone.capacity import token_counts
from mone.config import PRESETS, ModelConfig, preset
from tests.mone.conftest import small_config


@pytest.mark.parametrize(("num_experts", "widths"), [(1, (768,)), (2, (384, 768)), (4, (96, 192, 384, 768))])
def test_widths_halve_from_the_model_dimension(num_experts, widths):
    assert ModelConfig(num_classes=2, num_experts=num_experts).widths == widths


@pytest.mark.parametrize(("side_px", "num_tokens"), [(224, 196), (256, 256)])
def test_base_token_arithmetic_is_that_of_vivit(side_px, num_tokens):
    config = preset("base", num_classes=174, height_px=side_px, width_px=side_px)
    assert (config.num_indices, config.num_tokens, config.patch_values) == (16, num_tokens, 2 * 16 * 16 * 3)


def test_grid_is_rows_by_columns():
    assert small_config(height_px=8, width_px=20).grid == (2, 5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_heads_of_64_features(name):
    config = preset(name, num_classes=3)
    assert config.dim == 64 * config.num_heads
    assert config.num_classes == 3


def test_preset_takes_changes_of_its_own_fields():
    assert preset("base", num_classes=3, depth=2).depth == 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_joint_preset_has_no_temporal_blocks(name):
    config = preset(name, num_classes=3, encoder="joint")
    assert (config.temporal_depth, config.depth) == (0, PRESETS[name]["depth"])
    assert config.joint
    with pytest.raises(ValueError, match="temporal_depth must be 0, not 4"):
        preset(name, num_classes=3, encoder="joint", temporal_depth=4)


@pytest.mark.parametrize(
    ("changes", "num_kept", "budgets", "tokens"),
    [
        ({"budget": "frame"}, None, 2, 12),
        ({"budget": "clip"}, None, 1, 24),
        ({"budget": "frame"}, 15, 1, 15),
        ({"budget": "clip"}, 15, 1, 15),
        ({"budget": "clip", "num_frames": 2}, None, 1, 12),
        ({"budget": "frame", "num_frames": 2}, None, 1, 12),
    ],
)
def test_budgets_split_all_tokens_of_a_clip(changes, num_kept, budgets, tokens):
    config = small_config(**changes)
    assert (config.num_budgets(num_kept), config.tokens_per_budget(num_kept)) == (budgets, tokens)
    assert config.token_counts(0.4, num_kept) == token_counts(0.4, tokens, 4)


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"huge.*tiny, small, base, large"):
        preset("huge", num_classes=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"depth": -1}, "depth must be a positive int, got -1"),
        ({"span_s": float("nan")}, "span_s must be a positive float"),
        ({"num_frames": 5}, "num_frames 5 .* tubelet_frames 2"),
        ({"height_px": 13}, "height_px 13 .* tubelet_px 4"),
        ({"width_px": 18}, "width_px 18 .* tubelet_px 4"),
        ({"num_heads": 5}, "dim 32 .* num_heads 5"),
        ({"dim": 36, "num_heads": 4}, "dim 36 cannot be halved 3 times for 4 experts"),
        ({"pooling": "max"}, "pooling must be one of cls, mean, got 'max'"),
        ({"router": "none"}, "router must be one of learned, motion, random, got 'none'"),
        ({"router": "motion", "tubelet_frames": 1}, "tubelet_frames must be at least 2"),
        ({"encoder": "mixed"}, "encoder must be one of factorised, joint, got 'mixed'"),
        ({"encoder": "joint"}, "a joint encoder has no temporal blocks: temporal_depth must be 0, not 2"),
        ({"temporal_depth": -1}, "temporal_depth must be a number of at least 0, got -1"),
        ({"temporal_depth": 1.5}, "temporal_depth must be a number of at least 0, got 1.5"),
        ({"budget": "video"}, "budget must be one of frame, clip, got 'video'"),
        ({"allocation": "fair"}, "allocation must be one of mone, uniform, .*, tome, got 'fair'"),
        ({"allocation": "token_drop", "budget": "clip"}, "'token_drop' takes tokens from every frame"),
        ({"allocation": "tome", "budget": "clip"}, "'tome' takes tokens from every frame: budget must be 'frame'"),
        ({"activation": "relu"}, "activation must be one of gelu, gelu_tanh, got 'relu'"),
        ({"norm_eps": 0}, "norm_eps must be a positive float, got 0"),
        ({"norm_eps": float("inf")}, "norm_eps must be a positive float, got inf"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        ({"dropout": "0.1"}, "dropout must be at least 0 and below 1, got '0.1'"),
        ({"drop_path": -0.1}, "drop_path must be at least 0 and below 1, got -0.1"),
        ({"drop_path": float("nan")}, "drop_path must be at least 0 and below 1, got nan"),
        ({"drop_path": True}, "drop_path must be at least 0 and below 1, got True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_config_survives_json():
    config = small_config(
        pooling="mean", router="random", span_s=1.25, allocation="tome", activation="gelu_tanh", drop_path=0.1
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_from_dict_names_every_unknown_key():
    with pytest.raises(ValueError, match="unknown keys 'colour', 'size'"):
        ModelConfig.from_dict({"num_classes": 2, "size": 1, "colour": 2})


def test_from_dict_needs_the_number_of_classes():
    with pytest.raises(ValueError, match="num_classes is missing"):
        ModelConfig.from_dict({"dim": 64})


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().dim = 64
