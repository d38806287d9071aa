"""The floor's operations are those that the model counts."""

import pytest

from mone.compute import clip_flops
from mone.engine.roofline import Part, block_parts
from mone.nested import segments_of
from tests.mone.conftest import small_config


@pytest.mark.parametrize("capacity", [0.2, 0.4, 1.0])
def test_operations_of_a_block_are_those_that_one_more_block_adds_to_a_clip(capacity):
    config = small_config()
    counts = config.token_counts(capacity)
    parts = block_parts(config, segments_of(counts, config.widths, 1), config.num_indices)
    deeper, shallower = (clip_flops(small_config(depth=depth), counts) for depth in (3, 2))
    assert sum(part.flops for part in parts) == deeper - shallower


def test_the_slower_of_operations_and_bytes_counts():
    assert Part("", 100, 10).seconds(10, 10) == 10
    assert Part("", 10, 100).seconds(10, 10) == 10
