import dataclasses
import json

import pytest

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
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_config_survives_json():
    config = small_config(pooling="mean", router="random", span_s=1.25)
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
