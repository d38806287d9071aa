"""Training a baseline: its config and stages, its scores at its own capacities, and the card that tells of them."""

import json
import re
import shlex

import pytest
import torch

import jobs.train
import jobs.training_data
import pipelines.train_loop
from jobs.recipes import RECIPES, Recipe
from mone.baselines import METHODS, with_method
from mone.checkpoint import read_checkpoint
from mone.clips import MemoryClips
from mone.stages import Stage, TrainConfig
from mone.training import Trainer
from pipelines.synthetic import MOTIONS
from pipelines.synthetic_stream import motions
from pipelines.view import View
from tests.conftest import TINY

OWN = {"dense": ["1"], "uniform": ["0.469"], "proportionate": ["0.267"]}
# Of stages that a recipe wants nested, then mone; where tokens are reduced there are no nested widths.
ROUTINGS = {
    "dense": ["dense", "dense"],
    "submodel": ["nested", "nested"],
    "token_drop": ["dense", "mone"],
    "tome": ["dense", "mone"],
}


def tiny() -> Recipe:
    stages = (
        Stage(name="first", epochs=1, routing="nested", learning_rate=1e-3),
        Stage(name="second", epochs=1, routing="mone", learning_rate=1e-3),
    )
    return Recipe(model=TINY, train=TrainConfig(stages=stages, batch_size=12), num_clips=12)


@pytest.fixture(scope="module")
def rendered() -> dict[str, MemoryClips]:
    view = View(num_frames=TINY.num_frames, height_px=TINY.height_px, width_px=TINY.width_px)
    return {split: motions(split, 12, view, num_workers=1) for split in ("train", "val", "test")}


@pytest.fixture(autouse=True)
def _tiny_recipe_on_one_cpu(monkeypatch, rendered):
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(jobs.training_data, "motions", lambda split, count, view: rendered[split])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_trained(tmp_path, monkeypatch, method):
    trainers = []
    monkeypatch.setattr(
        pipelines.train_loop,
        "Trainer",
        lambda *args, **options: trainers.append(Trainer(*args, **options)) or trainers[-1],
    )
    arguments = ["--recipe", "tiny", "--method", method, "--data", "motions", "--output", str(tmp_path)]
    assert jobs.train.main(arguments) == 0
    (trainer,) = trainers
    checkpoint = read_checkpoint(tmp_path / "model")
    assert checkpoint.labels == MOTIONS
    assert checkpoint.config == with_method(TINY, method) == trainer.model.config
    for name, value in METHODS[method].changes.items():
        assert getattr(checkpoint.config, name) == value
    assert [stage.routing for stage in trainer.config.stages] == ROUTINGS.get(method, ["nested", "mone"])

    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert list(last["val_top1"]) == OWN.get(method, ["0.2", "0.4", "1"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"`python -m jobs.train --data motions --recipe tiny --method {method}`, seed 0" in card
    for capacity, score in last["val_top1"].items():
        assert f"| val | {float(capacity):.3g} | {score:.1%} | 12 |" in card
        assert f"| test | {float(capacity):.3g} |" in card
    assert "1 epochs of first" in card


def test_another_method_is_another_run(tmp_path, capsys):
    arguments = ["--recipe", "tiny", "--data", "motions", "--output", str(tmp_path)]
    assert jobs.train.main([*arguments, "--method", "uniform"]) == 0
    capsys.readouterr()
    assert jobs.train.main([*arguments, "--method", "proportionate"]) == 2
    assert "another run" in capsys.readouterr().err


def test_the_command_of_the_card_has_every_option_that_decides_the_model(tmp_path):
    assert (
        jobs.train.main(
            ["--recipe", "tiny", "--data", "motions", "--stages", "first", "--output", str(tmp_path / "a start")]
        )
        == 0
    )
    options = ["--data", "motions", "--recipe", "tiny", "--method", "random_router", "--num-clips", "12"]
    options += ["--epochs", "1", "2", "--stages", "first", "second", "--capacities", "0.4", "0.6", "--seed", "3"]
    options += ["--init", str(tmp_path / "a start" / "model")]
    assert jobs.train.main([*options, "--output", str(tmp_path / "run"), "--device", "cpu"]) == 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    (command,) = re.findall(r"`python -m jobs\.train (.*)`", card)
    assert jobs.train.main([*shlex.split(command), "--output", str(tmp_path / "again")]) == 0
    for name in ("config.json", "model/model.safetensors", "model/README.md"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_without_held_out_clips_nothing_is_measured(tmp_path, rendered, monkeypatch):
    nothing = MemoryClips(rendered["val"].frames_STHWC[:0], rendered["val"].labels_S[:0])
    monkeypatch.setattr(
        jobs.training_data, "motions", lambda split, *_: rendered["train"] if split == "train" else nothing
    )
    arguments = ["--recipe", "tiny", "--data", "motions", "--output", str(tmp_path), "--epochs", "1"]
    assert jobs.train.main(arguments) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| val |" not in card and "| test |" not in card and not (tmp_path / "curve.json").exists()
