"""Training steps from CUDA graphs against the same steps launched one by one."""

import os
from dataclasses import replace

import pytest
import torch

from mone.model import ViViT
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import Trainer
from tests.mone.conftest import VARIANTS, variant
from tests.mone.training_data import AUGMENTED, CONFIG, corner_clips

pytestmark = pytest.mark.gpu
TWO_COUNTS = (Stage(name="mone", epochs=6, routing="mone", capacities=(0.3, 0.6), learning_rate=3e-3),)
TRAINED = [name for name in VARIANTS if "kept" not in name]  # training drops no static patches


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1":
        pytest.skip("no CUDA GPU")


def gpu_trainer(config, num_samples, *, cuda_graphs, engine="auto", seed=0, **settings):
    torch.manual_seed(seed)
    model = ViViT(config)
    model.encoder.engine = engine
    train = TrainConfig(**({"stages": TWO_COUNTS, "batch_size": 8, "bf16": True, "optimizer": "sgd"} | settings))
    return Trainer(model, train, num_samples, Parallel(torch.device("cuda")), cuda_graphs=cuda_graphs)


def losses(trainer, clips):
    found = []
    while not trainer.done:
        found += [trainer.metrics().loss for _ in trainer.run(clips)]
    return torch.tensor(found)


def assert_same_runs(config, num_samples=20, **settings):
    clips = corner_clips(num_samples, seed=0, config=config).to("cuda")
    slow, fast = (gpu_trainer(config, num_samples, cuda_graphs=graphs, **settings) for graphs in (False, True))
    expected, actual = losses(slow, clips), losses(fast, clips)
    assert len(fast._backward._recorded) >= 2
    assert len(set(expected.tolist())) > len(expected) / 2
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
    for weight, other in zip(fast.model.parameters(), slow.model.parameters(), strict=True):
        assert (weight - other).norm() <= 1e-2 * other.norm() + 1e-4


@pytest.mark.parametrize("name", TRAINED)
def test_every_encoder_trains_the_same_from_graphs(name):
    config, _ = variant(name, num_classes=4, dim=64)
    assert_same_runs(config)


@pytest.mark.parametrize("engine", ["reference", "layout", "triton"])
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_every_engine_trains_the_same_from_graphs(engine, micro_batch):
    config = replace(CONFIG, dim=128, drop_path=0.3)
    assert_same_runs(config, engine=engine, micro_batch=micro_batch, augment=AUGMENTED)


@pytest.mark.parametrize("changes", [{"drop_path": 0.5}, {"dropout": 0.3}, {"router": "random"}], ids=str)
def test_draws_change_from_step_to_step_and_come_back_with_the_seed(changes):
    config = replace(CONFIG, dim=64, depth=2, **changes)
    stages = (Stage(name="one", epochs=8, routing="mone", capacities=(0.4,), learning_rate=0.0),)
    clips = corner_clips(8, seed=0, config=config).to("cuda")

    def run(cuda_graphs):
        trainer = gpu_trainer(config, 8, cuda_graphs=cuda_graphs, stages=stages, augment=AUGMENTED, warmup_share=0.0)
        with torch.no_grad():
            trainer.model.head.weight.normal_(generator=torch.Generator("cuda").manual_seed(0))
        return losses(trainer, clips)

    fast, again, slow = run(True), run(True), run(False)
    assert torch.equal(fast, again) and len(set(fast.tolist())) == len(fast)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def test_a_resumed_run_continues_as_if_it_had_not_stopped():
    config = replace(CONFIG, dim=64, drop_path=0.3)
    clips = corner_clips(20, seed=0, config=config).to("cuda")
    through = gpu_trainer(config, 20, cuda_graphs=True, optimizer="adamw")
    states, expected = [], []
    while not through.done:
        for _ in through.run(clips):
            expected.append(through.metrics().loss)
            states.append(through.state())
    resumed = gpu_trainer(config, 20, cuda_graphs=True, optimizer="adamw", seed=1)
    resumed.load(states[6])
    torch.testing.assert_close(losses(resumed, clips), torch.tensor(expected[7:]), rtol=2e-3, atol=2e-3)


def test_a_replayed_step_never_waits_for_the_device():
    stages = (Stage(name="one", epochs=6, routing="mone", capacities=(0.4,)),)
    trainer = gpu_trainer(CONFIG, 8, cuda_graphs=True, stages=stages)
    clips = corner_clips(8, seed=0).to("cuda")
    for _ in range(3):
        list(trainer.run(clips))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(trainer.run(clips))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_share_their_memory():
    """Of many counts, the activations of one are kept."""
    config = replace(CONFIG, dim=256, depth=6, num_frames=8, temporal_depth=0)
    clips = corner_clips(64, seed=0, config=config).to("cuda")
    reserved = []
    for capacities in ((0.6,), (0.6, 0.5, 0.4, 0.3)):
        stages = (Stage(name="mone", epochs=40, routing="mone", capacities=capacities),)
        trainer = gpu_trainer(config, 64, cuda_graphs=True, stages=stages, batch_size=64)
        losses(trainer, clips)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
        assert len(trainer._backward._recorded) == len(capacities)
        del trainer
    assert reserved[1] < 1.7 * reserved[0]
