"""Steps that are repeated from recordings; without a GPU, a recording is the function itself."""

import functools
from dataclasses import replace

import pytest
import torch

from mone.engine.step_graphs import ReplayedGradients
from mone.stages import Stage
from tests.mone.training_data import AUGMENTED, CONFIG, assert_same_state, corner_clips, new_trainer


class Recorder:
    """Notes what is recorded and repeated."""

    def __init__(self):
        self.recorded, self.repeated = 0, 0

    def __call__(self, run):
        self.recorded += 1

        def again():
            self.repeated += 1
            return run()

        return again


def replayed(trainer, **settings):
    """The trainer, made to repeat its steps."""
    recorder = Recorder()
    trainer._backward = ReplayedGradients(trainer._backward, list(trainer.model.parameters()), recorder, **settings)
    return recorder


STAGES = (
    Stage(name="nested", epochs=2, routing="nested"),
    Stage(name="mone", epochs=4, routing="mone", capacities=(0.3, 0.6), learning_rate=3e-3),
)
CASES = {
    "plain": {},
    "dropout, random router": {"config": replace(CONFIG, router="random", dropout=0.1, drop_path=0.3)},
    "tome, whose router learns nothing": {"config": replace(CONFIG, allocation="tome")},
    "micro-batches": {"micro_batch": 3, "augment": AUGMENTED},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_same_with_recordings(name):
    config = CASES[name].get("config", CONFIG)
    clips = corner_clips(20, seed=0, config=config)  # the last step of an epoch is smaller
    plain, fast = (new_trainer(20, stages=STAGES, **CASES[name]) for _ in range(2))
    recorder = replayed(fast)
    while not plain.done:
        list(plain.run(clips))
        list(fast.run(clips))
        assert fast.metrics().loss == plain.metrics().loss
    assert_same_state(fast.state(), plain.state())
    assert 3 <= recorder.recorded < recorder.repeated


def test_a_resumed_run_is_the_same_with_recordings():
    clips, through = corner_clips(20, seed=0), new_trainer(20, stages=STAGES)
    replayed(through)
    states = []
    while not through.done:
        states += [through.state() for _ in through.run(clips)]
    for stop in (2, 9):
        resumed = new_trainer(20, seed=1, stages=STAGES)
        replayed(resumed)
        resumed.load(states[stop])
        while not resumed.done:
            list(resumed.run(clips))
        assert_same_state(resumed.state(), states[-1] | {"lowest_loss": resumed.state()["lowest_loss"]})


def recorded_sums(max_graphs=8):
    """A function whose gradients are its inputs' sums; of the second weight only where the first count is 1."""
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]

    def compute(counts, x):
        (weights[0] * x.sum() + (weights[1] * x.sum() if counts[0] else 0)).backward()
        return x.sum()

    recorder = Recorder()
    return ReplayedGradients(compute, weights, recorder, max_graphs), weights, recorder


def test_records_at_the_second_use_and_no_more_than_allowed():
    run, _, recorder = recorded_sums(max_graphs=2)
    for size in (1, 2, 3):
        for uses, expected in enumerate([0, 1, 2, 3]):
            run((1,), torch.ones(size))
            assert recorder.repeated == (min(size - 1, 2) * 3 + expected if size <= 2 else 6), (size, uses)
    assert recorder.recorded == 2


def test_adds_to_gradients_whoever_made_them_and_leaves_others_without():
    run, (first, second), _ = recorded_sums()
    for _ in range(3):
        run((0,), torch.ones(2))
    assert first.grad == 6 and second.grad is None
    first.grad = torch.tensor(10.0)
    run((0,), torch.ones(2))
    assert first.grad == 12 and second.grad is None
    run((1,), torch.ones(2))  # as it is
    run((1,), torch.ones(2))  # recorded
    assert first.grad == 16 and second.grad == 4
    first.grad = second.grad = None
    run((0,), torch.full((2,), 3.0))
    assert first.grad == 6 and second.grad is None


def test_recording_draws_nothing():
    weight = torch.nn.Parameter(torch.zeros(()))

    def compute(counts, x):
        drawn = torch.rand(())
        (weight * drawn).backward()
        return drawn

    torch.manual_seed(0)
    expected = [torch.rand(()).item() for _ in range(4)]
    run = ReplayedGradients(compute, [weight], lambda work: functools.partial(work))
    torch.manual_seed(0)
    assert [run((1,), torch.ones(1)).item() for _ in range(4)] == expected
