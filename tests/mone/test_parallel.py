"""Two processes against one: the same pixels, losses, weights and scores, and states that fit either.

Sums are made in another order, so losses agree to 1e-5. So do weights under SGD, which is linear in the gradients;
AdamW divides by their size, which for some (the biases of keys, which no softmax can see) is nothing but rounding.
"""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from mone.parallel import Parallel
from mone.stages import Stage
from tests.mone.training_data import AUGMENTED, CONFIG, assert_same_state, corner_clips, new_trainer

CPU = torch.device("cpu")
STAGES = (
    Stage(name="first", epochs=1, routing="nested", learning_rate=0.02),
    Stage(name="second", epochs=1, routing="mone", learning_rate=0.02),
)
SGD = {"optimizer": "sgd", "stages": STAGES}
ADAMW = {"stages": tuple(replace(stage, learning_rate=1e-3) for stage in STAGES)}
DENSE = (Stage(name="dense", epochs=1, routing="dense", learning_rate=0.02),)
JOINT = replace(CONFIG, encoder="joint", temporal_depth=0, pooling="mean")
# Clips, and the settings of a trainer. Of 17 clips the last step has one, and one worker nothing.
CASES = {
    "sgd": (22, SGD),
    "one left over": (17, SGD),
    "augmented": (22, SGD | {"augment": AUGMENTED}),
    "accumulated": (17, SGD | {"augment": AUGMENTED, "micro_batch": 1}),
    "not accumulated": (17, SGD | {"augment": AUGMENTED}),
    "adamw": (17, ADAMW | {"layer_decay": 0.8}),
    "joint": (17, SGD | {"config": JOINT}),
    "tome": (17, SGD | {"config": replace(CONFIG, allocation="tome")}),
    "submodel": (17, SGD | {"config": replace(CONFIG, allocation="submodel", temporal_depth=0)}),
    "dense": (17, SGD | {"stages": DENSE}),
}
STOP = 2  # within the first epoch


def run_case(name, parallel, state=None):
    """A run to its end: what it reported, saw and became, and its state after STOP steps."""
    num_clips, settings = CASES[name]
    clips = corner_clips(num_clips, seed=0, config=settings.get("config", CONFIG))
    trainer = new_trainer(num_clips, parallel=parallel, **settings)
    found = {"metrics": [], "samples": [], "pixels": [], "stopped": None}
    prepared = trainer._prepared

    def record(batch):
        found["pixels"].append(prepared(batch))
        return found["pixels"][-1]

    trainer._prepared = record
    if state:
        trainer.load(state)
    while not trainer.done:
        for batch in trainer.run(clips):
            found["samples"].append(batch.samples_B.tolist())
            found["metrics"].append(trainer.metrics()._replace(clips_per_s=0.0, data_wait_share=0.0, flops_per_s=0.0))
            if trainer.place.step == STOP:
                found["stopped"] = trainer.state()
        found["score"] = trainer.evaluate(corner_clips(7, seed=1, config=trainer.model.config), 0.5, batch_size=2)
    return found | {"state": trainer.state()}


def work(rank, folder):
    """One of two processes: every case under both strategies, and some continued from where one process stopped."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=timedelta(seconds=30), rank=rank, world_size=2)
    found = {}
    for strategy in ("ddp", "fsdp"):
        parallel = Parallel(CPU, rank, 2, strategy)
        for name in CASES:
            found[strategy, name] = run_case(name, parallel)
        for name in ("augmented", "adamw"):
            stopped = torch.load(folder / f"{name}.pt", weights_only=True)
            found[strategy, f"{name} continued"] = run_case(name, parallel, stopped)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    return {name: run_case(name, Parallel(CPU)) for name in CASES}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """What each of two processes found."""
    folder = Path(tmp_path_factory.mktemp("parallel"))
    for name in CASES:
        torch.save(alone[name]["stopped"], folder / f"{name}.pt")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same_run(found, expected, name):
    """Curves, scores and weights; of a continued run, from its first step on."""
    assert found["metrics"][-1].step == expected["metrics"][-1].step
    for one, other in zip(found["metrics"], expected["metrics"][-len(found["metrics"]) :], strict=True):
        assert one[:3] == other[:3] and one.clips == other.clips
        assert (one.learning_rate, one.flops, one.tokens_per_expert) == (
            other.learning_rate,
            other.flops,
            other.tokens_per_expert,
        )
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.accuracy == pytest.approx(other.accuracy)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        assert one.alpha == pytest.approx(other.alpha, abs=1e-5)
    assert found["score"] == pytest.approx(expected["score"], abs=1e-5)
    for part in ("model", "average"):
        one, other = (
            {key: value for key, value in run["state"][part].items() if name != "adamw" or "qkv.bias" not in key}
            for run in (found, expected)
        )
        assert_same_state(one, other, rtol=0, atol=1e-5)
    for part in ("place", "trained_flops"):
        assert found["state"][part] == expected["state"][part]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(strategy, name, alone, together):
    assert_same_run(together[0][strategy, name], alone[name], name)
    first, second = (rank[strategy, name] for rank in together)
    assert (first["metrics"], first["score"]) == (second["metrics"], second["score"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_see_the_pixels_of_one_and_each_sample_once_an_epoch(strategy, name, alone, together):
    parts = [rank[strategy, name] for rank in together]
    for step, (frames, targets) in enumerate(alone[name]["pixels"]):
        assert torch.equal(torch.cat([part["pixels"][step][0] for part in parts]), frames)
        assert torch.equal(torch.cat([part["pixels"][step][1] for part in parts]), targets)
    both = [first + second for first, second in zip(*(part["samples"] for part in parts), strict=True)]
    assert both == alone[name]["samples"]
    num_clips, steps = CASES[name][0], 3  # an epoch
    for epoch in range(len(both) // steps):
        seen = [sample for step in both[epoch * steps : (epoch + 1) * steps] for sample in step]
        assert sorted(seen) == list(range(num_clips))
    if num_clips == 17:
        assert parts[1]["samples"][2] == []


@pytest.mark.parametrize("name", ["augmented", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_state_of_two_continues_on_one_and_of_one_on_two(strategy, name, alone, together):
    assert_same_run(run_case(name, Parallel(CPU), together[0][strategy, name]["stopped"]), alone[name], name)
    assert_same_run(together[0][strategy, f"{name} continued"], alone[name], name)


def test_accumulation_in_two_processes_is_a_whole_batch_of_one(alone, together):
    for strategy in ("ddp", "fsdp"):
        assert_same_run(together[0][strategy, "accumulated"], alone["not accumulated"], "accumulated")
