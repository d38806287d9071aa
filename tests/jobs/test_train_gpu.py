"""Training on a GPU: what it says of the device, and that no step waits for it."""

import os

import pytest
import torch

import jobs.train
from jobs.metrics import read_metrics
from mone.clips import MemoryClips
from mone.model import ViViT
from mone.parallel import Parallel
from mone.stages import Stage, TrainConfig
from mone.training import Trainer
from tests.conftest import TINY

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available() and os.environ.get("REQUIRE_GPU") != "1":
        pytest.skip("no GPU")


def test_a_run_says_how_much_of_the_device_it_uses(tmp_path, capsys):
    options = ["--data", "motions", "--num-clips", "256", "--epochs", "1", "--output", str(tmp_path / "run")]
    assert jobs.train.main(options) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "epoch"]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["mfu"] < 1 and row["gpu_memory_gib"] > 0 and row["flops_per_s"] > 0
    assert "  mfu " in capsys.readouterr().err


@pytest.mark.parametrize("routing", ["dense", "nested", "mone"])
def test_a_step_never_waits_for_the_device(routing):
    stages = (Stage(name=routing, epochs=1, routing=routing),)
    torch.manual_seed(0)
    config = TrainConfig(stages=stages, batch_size=4, bf16=True)
    trainer = Trainer(ViViT(TINY), config, 12, Parallel(torch.device("cuda")), cuda_graphs=False)
    frames = torch.randint(0, 256, (12, TINY.num_frames, TINY.height_px, TINY.width_px, 3), dtype=torch.uint8)
    clips = MemoryClips(frames, torch.arange(12)).to("cuda")
    steps = trainer.run(clips)
    next(steps)  # the first allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.place.step == 2
