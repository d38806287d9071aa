"""The order of training: every row once an epoch, and the same steps for every number of workers, however stopped."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mone.order import EpochOrder, part_of

SIZES = st.integers(0, 200)
BATCHES = st.integers(1, 70)
WORLDS = st.integers(1, 17)
SEEDS = st.integers(-(2**63), 2**64)


def global_steps(order: EpochOrder, epoch: int, batch: int, world: int, start: int = 0) -> list[list[int]]:
    """The steps of all workers, their parts put together by rank."""
    parts = [order.steps(epoch, batch, rank=rank, world=world, start_sample=start) for rank in range(world)]
    return [np.concatenate(step).tolist() for step in zip(*parts, strict=True)]


@given(SIZES, SEEDS, st.integers(0, 5), BATCHES, WORLDS)
def test_the_steps_are_those_of_one_worker_and_have_every_row_once(size, seed, epoch, batch, world):
    order = EpochOrder(size, seed)
    steps = global_steps(order, epoch, batch, world)
    assert steps == global_steps(order, epoch, batch, 1)
    assert all(len(step) == batch for step in steps[:-1])
    assert sorted(row for step in steps for row in step) == list(range(size))


@given(SIZES, SEEDS, BATCHES, WORLDS, WORLDS, st.data())
def test_another_number_of_workers_continues_the_same_sequence(size, seed, batch, before, after, data):
    order, done = EpochOrder(size, seed), data.draw(st.integers(0, -(-size // batch)))
    whole = global_steps(order, 3, batch, before)
    assert whole[:done] + global_steps(order, 3, batch, after, min(done * batch, size)) == whole


@given(SIZES, SEEDS, BATCHES, BATCHES, st.data())
def test_another_batch_size_continues_the_same_rows(size, seed, batch, other, data):
    order, start = EpochOrder(size, seed), data.draw(st.integers(0, size))
    for rows_of_step in (batch, other):
        steps = global_steps(order, 0, rows_of_step, 2, start)
        assert [row for step in steps for row in step] == order.permutation(0)[start:].tolist()


@given(st.integers(0, 500), WORLDS)
def test_parts_are_whole_pairs_and_as_equal_as_pairs_allow(num_rows, world):
    parts = [part_of(num_rows, rank, world) for rank in range(world)]
    sizes = [part.stop - part.start for part in parts]
    assert sum(sizes) == num_rows and all(part.start % 2 == 0 for part in parts if part.start < num_rows)
    assert max(sizes) - min(sizes) <= (2 if num_rows % 2 == 0 else 3)
    assert sum(size % 2 for size in sizes) == num_rows % 2
    if num_rows % (2 * world) == 0:
        assert len(set(sizes)) == 1


def test_epochs_and_seeds_differ_and_repeat():
    first, again = EpochOrder(100, 1), EpochOrder(100, 1)
    orders = [tuple(order.permutation(epoch)) for order in (first, EpochOrder(100, 2)) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(again.permutation(1)) == orders[1]


def test_the_order_of_a_seed_is_this_one_for_ever():
    """A run that is stopped continues under another version of NumPy."""
    assert EpochOrder(8, seed=7).permutation(3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]


def test_without_shuffling_rows_come_as_they_are():
    assert global_steps(EpochOrder(5, 0, shuffle=False), 9, 2, 3) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    "change", [{"global_batch": 0}, {"rank": 2}, {"rank": -1}, {"start_sample": 11}, {"start_sample": -1}]
)
def test_what_is_out_of_range_is_refused(change):
    arguments = {"global_batch": 4, "rank": 0, "world": 2, "start_sample": 0} | change
    with pytest.raises(ValueError, match="no such part"):
        EpochOrder(10, 0).steps(0, **arguments)
